"""A function's signature as a command line: argparse reads it and shows its help. Knows no verb.

    def chat(
        bundle: Annotated[Path, Argument(metavar="BUNDLE", help="A folder made by: headrace export")],
        top_k: Annotated[int | None, Option("-k", "--top-k", min=1, help="Only the k likeliest tokens.")] = None,
    ) -> None: ...

    call(chat, "headrace chat", ["folder", "-k5"])

Kinds of values: str, int, float, Path, bool (a flag; "--on/--no-on" spells both), each `| None`; `list` of a kind for
what may be given several times, or for an option that takes several values at once (`count`).

argparse comes with Python and is imported in a few milliseconds; typer needed 60, of an answer that comes after 300,
and `inspect` needs 10.
"""

from __future__ import annotations

import argparse
import types
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Union, get_args, get_origin, get_type_hints

from headrace.errors import UserError, did_you_mean

__all__ = ["Argument", "Option", "Parser", "Verb", "call", "parser"]

Verb = Callable[..., None]
KINDS: Mapping[type, tuple[str, str]] = {  # kind → what stands for a value in the help, and its name in a message
    str: ("TEXT", "a text"),
    Path: ("PATH", "a path"),
    int: ("N", "a whole number"),
    float: ("X", "a number"),
}

REQUIRED = object()  # the default of what must be given


class Option:
    """How a parameter is given by name.

    Args:
        spellings: "-n", "--name"; or one "--name/--no-name" of a flag that is either.
        help: a sentence.
        metavar: what stands for the value in the help.
        min: the least number.
        max: the largest number.
        count: values that it takes at once.
    """

    def __init__(
        self,
        *spellings: str,
        help: str,
        metavar: str | None = None,
        min: float | None = None,
        max: float | None = None,
        count: int | None = None,
    ) -> None:
        last, _, off = spellings[-1].partition("/")
        self.spellings, self.either = (*spellings[:-1], last), bool(off)
        self.help, self.metavar, self.min, self.max, self.count = help, metavar, min, max, count


class Argument(Option):
    """A parameter that is given by its place.

    Args:
        metavar: its name in the help and in messages.
        help: a sentence.
    """

    def __init__(self, *, metavar: str, help: str) -> None:
        super().__init__(metavar, help=help, metavar=metavar)


class Parser(argparse.ArgumentParser):
    """argparse, with headrace's errors: one line, raised."""

    def error(self, message: str) -> NoReturn:
        """Raise UserError."""
        raise UserError(f"{message}; see: {self.prog} --help")


class _Value(NamedTuple):
    """Reads one value; called by argparse."""

    given: Option
    kind: type

    def __call__(self, text: str) -> Any:
        least, most = self.given.min, self.given.max
        try:
            value = self.kind(text)
            if self.kind not in (int, float) or (
                value == value and (least is None or value >= least) and (most is None or value <= most)
            ):
                return value
        except ValueError:
            pass
        low, high = "" if least is None else f" from {least:g}", "" if most is None else f" to {most:g}"
        raise argparse.ArgumentTypeError(f"{text!r} is not possible; expected {KINDS[self.kind][1]}{low}{high}")


def parser(verb: Verb, name: str) -> Parser:
    """What reads a verb's command line.

    Args:
        verb: a function whose parameters are annotated with `Option` or `Argument`.
        name: the program and the verb, for messages.
    """
    # Each argument is looked at by a formatter, and one that has to find its width imports shutil: three milliseconds.
    narrow = partial(argparse.HelpFormatter, width=80)
    made = Parser(prog=name, description=verb.__doc__, allow_abbrev=False, formatter_class=narrow)
    places = [_add(made, parameter) for parameter in _parameters(verb)]
    made.formatter_class = argparse.HelpFormatter
    made.usage = " ".join([name, "[OPTIONS]", *filter(None, places)])
    return made


def call(verb: Verb, name: str, words: Sequence[str]) -> None:
    """Run a verb with the words of a command line, or show its help.

    Raises:
        UserError: the words do not fit its parameters.
        SystemExit: help was shown.
    """
    reader = parser(verb, name)
    values, rest = reader.parse_known_args(words)
    if rest:
        known = [word for word in reader.format_help().replace(",", " ").split() if word.startswith("-")]
        reader.error(f"{rest[0]!r} is not expected{did_you_mean(rest[0].partition('=')[0], known)}")
    verb(**vars(values))


class _Parameter(NamedTuple):
    name: str
    annotation: Any
    default: Any


def _parameters(verb: Verb) -> list[_Parameter]:
    """What a verb takes, in order; `inspect.signature` would tell, but chat has no need of that module yet."""
    told = getattr(verb, "__signature__", None)
    if told is not None:
        return [
            _Parameter(each.name, each.annotation, REQUIRED if each.default is each.empty else each.default)
            for each in told.parameters.values()
        ]
    assert isinstance(verb, types.FunctionType)
    code, hints = verb.__code__, get_type_hints(verb, include_extras=True)
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    given = verb.__defaults__ or ()
    defaults = dict(zip(names[code.co_argcount - len(given) :], given)) | (verb.__kwdefaults__ or {})
    return [_Parameter(name, hints[name], defaults.get(name, REQUIRED)) for name in names]


def _add(made: argparse.ArgumentParser, found: _Parameter) -> str | None:
    """Make one parameter known to argparse: its name in the usage when it is given by its place."""
    kind, given = get_args(found.annotation)
    if get_origin(kind) in (Union, types.UnionType):  # X | None
        (kind,) = (one for one in get_args(kind) if one is not types.NoneType)
    outer, inner = get_origin(kind), get_args(kind)
    one = inner[0] if inner else kind
    required = found.default is REQUIRED
    settings: dict[str, Any] = {"help": given.help.replace("%", "%%")}
    if not required:
        settings["default"] = found.default
    if one is not bool:
        settings |= {"type": _Value(given, one), "metavar": given.metavar or KINDS[one][0]}
    if isinstance(given, Argument):
        nargs = "+" if outer is list else None if required else "?"
        made.add_argument(found.name, nargs=nargs, **settings)
        return given.metavar
    if required:
        settings["help"] += " [required]"
    elif found.default not in (None, False):
        settings["help"] += f" [default: {found.default}]"
    if one is bool:
        settings["action"] = argparse.BooleanOptionalAction if given.either else "store_true"
    elif given.count:
        settings["nargs"] = given.count
    elif outer is list:
        settings["action"] = "append"
    made.add_argument(*given.spellings, dest=found.name, required=required, **settings)
    return None
