"""Every variant that the library knows runs in turn; those that this machine cannot run are named as not run."""

from __future__ import annotations

import pytest

import headrace_kernels as hk


@pytest.fixture(params=hk.known_isas())
def isa(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if name not in hk.available_isas():
        pytest.skip(f"NOT RUN: this machine has no {name}")
    return name
