"""Options that several verbs share, and the export's own as the command line takes them. Knows no verb."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, TypeVar

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
    "takes_export_options",
]

Verb = TypeVar("Verb", bound=Callable[..., None])

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


def takes_export_options(verb: Verb) -> Verb:
    """The verb with every field of `ExportOptions` as an option of the command line, given to its `**options`.

    Texts are handed over as they were typed: `ExportOptions` reads them, for Python callers too.
    """
    signature = inspect.signature(verb, eval_str=True)
    own = list(signature.parameters.values())
    if own.pop().kind is not inspect.Parameter.VAR_KEYWORD:
        raise TypeError(f"{verb.__name__} takes no **options")
    places = [parameter for parameter in own if parameter.kind is not inspect.Parameter.KEYWORD_ONLY]
    signature = signature.replace(parameters=[*places, *_parameters(), *own[len(places) :]])
    verb.__signature__ = signature  # type: ignore[attr-defined]
    return verb


def _parameters() -> list[inspect.Parameter]:
    from headrace.exporter.options import ExportOptions, flag, spelled

    made = []
    for option in fields(ExportOptions):
        kind: Any
        name, default, described = flag(option), option.default, option.metadata
        if described["repeats"]:
            kind, default = list[str] | None, None
        elif described["metavar"]:
            kind, default = str | None, spelled(default)
        elif default is None:
            kind, name = bool | None, f"{name}/--no-{name.removeprefix('--')}"
        else:
            kind = bool
        shown = Option(name, help=described["help"], metavar=described["metavar"] or None)
        made.append(
            inspect.Parameter(
                option.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, shown]
            )
        )
    return made
