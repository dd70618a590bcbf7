"""Progress: how long jobs say where they are. Knows no terminal; cli/main.py draws."""

from __future__ import annotations

from typing import Protocol

__all__ = ["Progress", "silent"]


class Progress(Protocol):
    """Called by a job as it goes: `stage` in words, `done` of `total` steps of it."""

    def __call__(self, stage: str, done: int, total: int) -> None: ...


def silent(stage: str, done: int, total: int) -> None:
    """Says nothing."""
