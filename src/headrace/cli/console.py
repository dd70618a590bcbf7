"""What the command line shows: progress bars, tables, answers, one-line errors, JSON. Knows no verb."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from headrace.progress import Progress

if TYPE_CHECKING:
    from headrace.runtime.answer import Token

__all__ = ["human_bytes", "note", "print_answer", "print_json", "progress_bars", "show", "table"]


@contextmanager
def progress_bars() -> Iterator[Progress]:
    """Bars on stderr when it is a terminal; otherwise one line at the end of each stage."""
    if not sys.stderr.isatty():
        yield _plain
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    with Bars(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, TaskID] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield show


def _plain(stage: str, done: int, total: int) -> None:
    if done == total:
        note(f"{stage}: done")


def note(text: str) -> None:
    """A line on stderr."""
    print(text, file=sys.stderr, flush=True)  # noqa: T201


def show(text: object) -> None:
    """A line on stdout."""
    print(text, flush=True)  # noqa: T201


def print_answer(tokens: Iterable[Token]) -> Token | None:
    """Stream an answer to stdout as it is, for a pipe or a single question: the last token. Ctrl-C is the caller's."""
    last = None
    for last in tokens:
        sys.stdout.write(last.text)
        sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()
    return last


def print_json(report: Mapping[str, Any]) -> None:
    """The report as one line of JSON on stdout, escaped where stdout is not UTF-8, so that nothing is replaced."""
    unicode = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    print(json.dumps(report, ensure_ascii=not unicode), flush=True)  # noqa: T201


def table(rows: Sequence[Sequence[str]], header: Sequence[str] = ()) -> None:
    """Columns on stdout; the first is left-aligned, the others right."""
    from rich.console import Console
    from rich.table import Table

    grid = Table(box=None, show_header=bool(header), pad_edge=False, padding=(0, 2, 0, 0))
    for number in range(len(rows[0]) if rows else 0):
        grid.add_column(header[number] if header else "", justify="left" if number == 0 else "right", overflow="fold")
    for row in rows:
        grid.add_row(*row)
    # Into a file or pipe a row stays one line.
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 240)
    with console.capture() as drawn:  # rich would end the program itself, with status 1, where a pipe was closed
        console.print(grid)
    print(drawn.get(), end="", flush=True)  # noqa: T201


def human_bytes(count: int) -> str:
    """`98.4 MB`; decimal units."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if round(size, 1) < 1000 or unit == "GB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    raise AssertionError
