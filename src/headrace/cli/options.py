"""Options that several verbs share, and how their values are read. Knows no verb."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from headrace.errors import UserError

__all__ = ["BundlePath", "Json", "Threads", "lengths", "size"]

Json = Annotated[bool, typer.Option("--json", help="One JSON object as the last line of stdout.")]
BundlePath = Annotated[Path, typer.Argument(metavar="BUNDLE", help="A folder made by: headrace export")]
Threads = Annotated[int | None, typer.Option("-t", "--threads", min=1, help="Threads; physical cores by default.")]


def lengths(option: str, text: str | None) -> tuple[int, ...] | None:
    """ "512,4096" → (512, 4096); None stays None.

    Raises:
        UserError: the text is anything else.
    """
    if text is None:
        return None
    items = text.split(",")
    if not all(item.strip().isdecimal() and int(item) > 0 for item in items):
        raise UserError(f"{option} {text!r} is not possible; expected whole numbers above 0, separated by commas")
    return tuple(map(int, items))


def size(text: str | None) -> int | None:
    """ "105MB" → 105,000,000; None stays None.

    Raises:
        UserError: the text is anything else.
    """
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(|B|kB|MB|GB)", text.strip())
    if match is None:
        raise UserError(f"--size {text!r} is not possible; expected a number of bytes, such as 105MB or 5.06GB")
    return int(float(match[1]) * {"": 1, "B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}[match[2]])
