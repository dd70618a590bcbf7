"""House rules: who may import whom, names, docstrings, a light --help, and a README whose commands exist."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from headrace.cli.command import parser
from headrace.cli.main import VERBS, find_verb
from tests.exports import Exports

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "headrace"
FILES = sorted(SOURCE.rglob("*.py"))

# Each package or module, and what it may import of headrace beside itself. Everybody may import errors, files, panics,
# patterns and progress, which import nothing of headrace but each other.
GROUND = {"errors", "files", "panics", "patterns", "progress"}
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "progress": set(),
    "files": set(),
    "panics": set(),
    "patterns": set(),
    "cluster": set(),
    "baichuan": set(),
    "config": set(),
    "plan": {"config"},
    "model": {"config"},
    "architectures": {"config", "model"},
    "checkpoint": {"architectures", "baichuan", "config", "model"},
    "bundle": {"config", "model", "plan"},
    "quantize": {"bundle", "checkpoint", "config", "model", "plan"},
    "graph": {"bundle", "config", "model", "plan"},
    "native": {"bundle", "config", "model", "runtime"},
    "text": {"baichuan"},
    "runtime": {"text"},
    "targets": {"bundle", "config", "graph", "model", "plan", "runtime", "text"},
    "forecast": {"bundle", "config", "model", "plan", "quantize"},
    "exporter": {
        "architectures", "bundle", "checkpoint", "cluster", "config", "forecast", "graph", "model", "plan", "quantize",
        "runners", "runtime", "targets", "text",
    },
    "genie_answers": {"runtime", "targets"},
    "runners": {"bundle", "genie_answers", "graph", "native", "runtime", "targets"},
    "language_model": {"bundle", "runners", "runtime", "text"},
    "measure": {
        "architectures", "bundle", "checkpoint", "cluster", "config", "forecast", "graph", "language_model", "model",
        "native", "plan", "quantize", "runners", "runtime", "targets", "text",
    },
    "batch": {"cluster", "language_model", "runtime", "text"},
    "server": {"cluster", "language_model", "model", "runtime", "text"},
    "cli": {
        "batch", "bundle", "checkpoint", "exporter", "forecast", "language_model", "measure", "native", "runtime",
        "server", "targets", "text",
    },
    "testing": {"runtime"},
    "__main__": {"cli"},
}  # fmt: skip
NEVER = {  # what a part of the package must not pull in, even indirectly
    "headrace.cli.running": ("dataclasses", "inspect", "numpy"),  # before the vocabulary's process is begun, and in it
    "headrace.text.tokenizer_json": ("dataclasses", "inspect", "numpy"),
    "headrace.runtime.engine": ("onnx", "onnx_ir", "torch", "onnxruntime"),
    "headrace.testing": ("onnx", "onnx_ir", "torch", "onnxruntime"),
    "headrace.language_model": ("onnx", "onnx_ir", "torch"),
    "headrace.native.program": ("onnx", "onnx_ir", "torch", "onnxruntime"),
    "headrace.targets.host.runner": ("onnx", "onnx_ir", "torch"),
    "headrace.exporter.job": ("torch", "onnxruntime", "onnxruntime_qnn", "onnx_ir", "sympy"),
}
ONNX_HOMES = {"targets/qualcomm/worker.py"}  # beside graph/: the compiler's child process, which reads a graph's ports
SLOW = {  # what an answer on the native engine, without a chat template, must not load
    "jinja2", "onnx", "onnxruntime", "google.protobuf", "huggingface_hub", "prompt_toolkit", "psutil", "pydantic",
    "rich", "sympy", "threadpoolctl", "numpy.random", "numpy.testing", "headrace.exporter", "headrace.quantize",
    "headrace.checkpoint", "headrace.server", "headrace.graph", "headrace.measure", "difflib", "subprocess",
}  # fmt: skip
JUNK = {"utils", "util", "common", "helpers", "helper", "misc", "_shared"}


def _module(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return parts[0] if parts[0] != "__init__" else ""


def _imports(tree: ast.AST) -> set[str]:
    """First components below headrace that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "headrace":
            rest = node.module.split(".")[1:]
            found |= {rest[0]} if rest else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("headrace.")}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(SOURCE).as_posix())
def test_file_follows_the_rules(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), "a module says what it does and what it does not know"
    assert path.stem not in JUNK and not JUNK & set(path.relative_to(SOURCE).parts)
    module = _module(path)
    if module:
        assert module in MAY_IMPORT, f"{module} has no row in MAY_IMPORT"
        foreign = _imports(tree) - {module, "__version__"} - GROUND
        assert foreign <= MAY_IMPORT[module], f"{module} may not import {sorted(foreign - MAY_IMPORT[module])}"
    for node in tree.body:
        public = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
        if public:
            assert ast.get_docstring(node), f"{node.name} is public and has no docstring"
    if path.relative_to(SOURCE).as_posix() not in ONNX_HOMES and module != "graph":
        roots = {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        roots |= {n.module.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module}
        assert not {"onnx", "onnx_ir"} & roots, "graph/ is the only home of onnx"


def test_imports_go_downwards_only() -> None:
    TopologicalSorter(MAY_IMPORT).prepare()  # raises CycleError where two packages could import each other


@pytest.mark.parametrize("module", NEVER)
def test_module_stays_light(module: str) -> None:
    loaded = _loaded_by(f"import {module}")
    assert not loaded & set(NEVER[module])


def test_reading_a_vocabulary_loads_neither_the_exporters_packages_nor_other_libraries() -> None:
    names = [path.stem for path in (SOURCE / "text").glob("*.py") if path.stem not in ("__init__", "sandbox")]
    loaded = _loaded_by("; ".join(f"import headrace.text.{name}" for name in names))
    heavy = {"onnx", "onnx_ir", "torch", "sentencepiece", "tokenizers", "jinja2", "google.protobuf", "hashlib"}
    assert sorted(loaded & heavy) == []


def test_help_loads_no_heavy_module() -> None:
    code = "from headrace.cli.main import _run; assert _run(['--help']) == 0; assert _run(['export', '--help']) == 0"
    assert not _loaded_by(code) & {"numpy", "onnxruntime", "onnx", "onnx_ir", "tokenizers", "rich"}


@pytest.mark.kernels
def test_a_first_answer_waits_for_nothing_it_does_not_use(exports: Exports) -> None:
    words = ["chat", str(exports.bundle()), "-n", "2", "-p", "hello", "--raw", "--greedy", "--runner", "native"]
    loaded = _loaded_by(f"from headrace.cli.main import _run; assert _run({words}) == 0")
    assert "headrace_kernels" in loaded
    assert sorted(loaded & SLOW) == []


def _loaded_by(code: str) -> set[str]:
    report = f"{code}\nimport sys; print('\\nLOADED', *sys.modules)"
    # A process whose coverage is measured loads what that needs.
    plain = {name: value for name, value in os.environ.items() if not name.startswith("COV")}
    done = subprocess.run([sys.executable, "-c", report], capture_output=True, text=True, check=True, env=plain)
    line = next(line for line in done.stdout.splitlines() if line.startswith("LOADED"))
    return set(line.split())


def _readme_blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)


def _readme_commands() -> list[str]:
    lines = [line.strip().removeprefix("$ ") for block in _readme_blocks("(?:sh|console)") for line in _joined(block)]
    return [line for line in lines if line.startswith(("headrace ", "make "))]


def _joined(block: tuple[str, ...] | str) -> list[str]:
    return (block if isinstance(block, str) else block[-1]).replace("\\\n", " ").splitlines()


def test_readme_shows_commands() -> None:
    assert any(c.startswith("make chat") for c in _readme_commands())
    assert any(c.startswith("make test") for c in _readme_commands())
    assert sum(c.startswith("headrace ") for c in _readme_commands()) >= 5


@pytest.mark.parametrize("command", _readme_commands())
def test_readme_command_exists(command: str) -> None:
    words = shlex.split(command, comments=True)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return
    assert words[1] in VERBS, f"{words[1]} is no verb"
    known = set(re.findall(r"-[-\w]+", parser(find_verb(words[1]), words[1]).format_help()))
    for word in words[2:]:
        if word.startswith("-") and not word.lstrip("-").replace(".", "").isdigit():
            assert word in known, f"{word} is no option of {words[1]}"


def test_nothing_private_in_the_repository() -> None:
    """The repository speaks of the project alone: no machine's paths."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in listed:
        path = ROOT / name
        if path.is_file() and path != Path(__file__):
            text = path.read_text(encoding="utf-8", errors="replace")
            assert not re.search(r"/(root|home/\w+|tmp/w|work)/", text), name
