"""The export's own options as the command line takes them: every field of `ExportOptions`. Knows no verb."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Annotated, Any, TypeVar

from headrace.cli.command import Option

__all__ = ["takes_export_options"]

Verb = TypeVar("Verb", bound=Callable[..., None])


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
