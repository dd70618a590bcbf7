"""The program as a test calls it, and what it left."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from tests.exports import SMALL, Exports

HEADRACE = [sys.executable, "-m", "headrace"]
LIMIT = 120  # seconds a child process may take on a busy machine


class Result:
    """What a run of the program left."""

    def __init__(self, status: int, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err

    @property
    def json(self) -> dict[str, Any]:
        """The last line of stdout."""
        return dict(json.loads(self.out.splitlines()[-1]))


Run = Callable[..., Result]


def child(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*HEADRACE, *map(str, arguments)], capture_output=True, text=True, timeout=LIMIT, **options
    )  # fmt: skip


def export_arguments(exports: Exports, *more: object) -> list[object]:
    small = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    return [*small, "--calibration", exports.text, *more]


def one_line(result: Result, *parts: str) -> None:
    """The whole of stderr is one line that begins with "error: " and says `parts`; status 2, stdout empty."""
    assert result.err.startswith("error: "), result.err
    assert result.err.count("\n") == 1, result.err
    for part in parts:
        assert part in result.err
    assert result.out == ""
    assert result.status == 2
