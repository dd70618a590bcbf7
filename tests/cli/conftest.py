"""Fixture of the command line's tests."""

from __future__ import annotations

import pytest

from headrace.cli import main as cli
from tests.cli.calling import Result, Run


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """The program in this process."""

    def call(*arguments: object) -> Result:
        capfd.readouterr()
        status = cli._run([str(a) for a in arguments])
        return Result(status, *capfd.readouterr())

    return call
