"""Options that several verbs share. Knows no verb."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from headrace.cli.command import Argument, Option
from headrace.cli.console import note
from headrace.errors import UserError

__all__ = [
    "Adapters",
    "BundlePath",
    "CheckpointPath",
    "HugePages",
    "Json",
    "RayAddress",
    "RunnerName",
    "Save",
    "Threads",
    "limit_threads",
    "refuse_place",
]

Json = Annotated[bool, Option("--json", help="One JSON object as the last line of stdout.")]
BundlePath = Annotated[Path, Argument(metavar="BUNDLE", help="A folder made by: headrace export")]
CheckpointPath = Annotated[Path, Argument(metavar="CHECKPOINT", help="A Hugging Face folder or a .gguf file.")]
Adapters = Annotated[
    list[Path] | None,
    Option("--lora", help="An adapter that was merged into the checkpoint; repeatable.", metavar="DIR"),
]
Threads = Annotated[int | None, Option("-t", "--threads", min=1, help="Threads; physical cores by default.")]

HugePages = Annotated[
    bool | None,
    Option(
        "--huge-pages/--no-huge-pages",
        help="native: weights in memory pages of 2 MB, copied at once or never; by default after a second of work.",
    ),
]
RunnerName = Annotated[
    str | None, Option("--runner", help="native, host, device or genie; the first that is installed by default.")
]
RayAddress = Annotated[
    str | None, Option("--ray", help="Work on this Ray cluster: HOST:PORT, or auto.", metavar="ADDRESS")
]
Save = Annotated[
    bool, Option("--save", help="Keep the numbers with the bundle, in its folder measurements, for: card.")
]


def refuse_place(option: str, path: Path) -> None:
    """Raise UserError where no file can come to be under a name, before there is work that would be lost."""
    if path.is_dir():
        raise UserError(f"{option} {path} is a folder; expected a file")
    if path.exists() and not path.is_file():  # a device or a pipe, which cannot be read again
        raise UserError(f"{option} {path} is no regular file; expected one, or a name that is free")
    if not path.parent.is_dir():
        raise UserError(f"{option} {path}: there is no folder {path.parent}; make it first")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise UserError(f"{option} {path}: nothing can be written in the folder {path.parent}; choose another")


def limit_threads(threads: int | None) -> int | None:
    """As many threads as were asked for, but no more than this program has processors, with a note: more would wait
    for each other, and a step could take minutes."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if threads is None or threads <= processors:
        return threads
    s = "" if processors == 1 else "s"
    note(f"--threads {threads} is more than the {processors} processor{s} here: {processors} thread{s} will run")
    return processors
