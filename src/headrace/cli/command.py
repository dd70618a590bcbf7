"""A function's signature as a command line: its arguments are read, its help is shown. Knows no verb.

    def chat(
        bundle: Annotated[Path, Argument(metavar="BUNDLE", help="A folder made by: headrace export")],
        top_k: Annotated[int | None, Option("-k", "--top-k", min=1, help="Only the k likeliest tokens.")] = None,
    ) -> None: ...

    call(chat, "headrace chat", ["folder", "-k5"])

Written as POSIX and GNU have it: `--name value`, `--name=value`, `-n value`, `-nvalue`, several flags in one word,
options and arguments in any order, and `--` before arguments that begin with a dash. Whatever follows an option that
takes a value is its value. Of an option given twice the last value counts.

Kinds of values: str, int, float, Path, bool (a flag; "--on/--off" spells both), each `| None`; `list` of a kind for
what may be given several times; `tuple` for an option that takes several values at once.
"""

from __future__ import annotations

import inspect
import shutil
import textwrap
import types
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union, get_args, get_origin

from headrace.errors import UserError, did_you_mean

__all__ = ["HELP", "Argument", "Option", "Verb", "call", "columns", "parameters"]

Verb = Callable[..., None]
KINDS: Mapping[type, tuple[str, str]] = {  # kind → what stands for a value in the help, and its name in a message
    str: ("TEXT", "a text"),
    Path: ("PATH", "a path"),
    int: ("N", "a whole number"),
    float: ("X", "a number"),
}
HELP = ("-h", "--help")
WIDTH = 100  # of the help at most, characters
INDENT = 30  # where the help's second column begins


class Option:
    """How a parameter is given by name.

    Args:
        spellings: "-n", "--name"; or one "--on/--off" of a flag that is either.
        help: a sentence.
        metavar: what stands for the value in the help.
        min: the least number.
        max: the largest number.
    """

    def __init__(
        self,
        *spellings: str,
        help: str,
        metavar: str | None = None,
        min: float | None = None,
        max: float | None = None,
    ) -> None:
        on, _, self.off = spellings[-1].partition("/")
        self.spellings = (*spellings[:-1], on)
        self.help, self.metavar, self.min, self.max = help, metavar, min, max


class Argument(Option):
    """A parameter that is given by its place.

    Args:
        metavar: its name in the help and in messages.
        help: a sentence.
    """

    def __init__(self, *, metavar: str, help: str) -> None:
        super().__init__("", help=help, metavar=metavar)


@dataclass(frozen=True)
class Parameter:
    """A parameter of a verb.

    Attributes:
        name: as the function has it.
        given: how it is given.
        kind: of one value.
        count: values that it takes at once.
        repeats: it may be given several times.
        default: its value when it is not given; `inspect.Parameter.empty` where it must be.
    """

    name: str
    given: Option
    kind: type
    count: int
    repeats: bool
    default: Any

    @property
    def required(self) -> bool:
        """It must be given."""
        return self.default is inspect.Parameter.empty

    @property
    def is_argument(self) -> bool:
        """It is given by its place."""
        return isinstance(self.given, Argument)

    @property
    def shown(self) -> str:
        """Its name in a message."""
        return self.given.metavar or "" if self.is_argument else self.given.spellings[-1]

    def read(self, text: str) -> Any:
        """One value.

        Raises:
            UserError: it is no such value, or out of range.
        """
        least, most = self.given.min, self.given.max
        try:
            value = self.kind(text)
            possible = self.kind not in (int, float) or (
                value == value and (least is None or value >= least) and (most is None or value <= most)
            )
        except ValueError:
            possible = False
        if not possible:
            low, high = "" if least is None else f" from {least:g}", "" if most is None else f" to {most:g}"
            raise UserError(f"{self.shown} {text!r} is not possible; expected {KINDS[self.kind][1]}{low}{high}")
        return value


def parameters(verb: Verb) -> list[Parameter]:
    """The parameters of a verb, in order."""
    return [_parameter(found) for found in inspect.signature(verb, eval_str=True).parameters.values()]


def _parameter(found: inspect.Parameter) -> Parameter:
    kind, given = get_args(found.annotation)
    if get_origin(kind) in (Union, types.UnionType):  # X | None
        (kind,) = (one for one in get_args(kind) if one is not types.NoneType)
    outer, inner = get_origin(kind), get_args(kind)
    return Parameter(
        found.name,
        given,
        inner[0] if inner else kind,
        len(inner) if outer is tuple else 1,
        outer is list,
        found.default,
    )


def call(verb: Verb, name: str, words: Sequence[str]) -> None:
    """Run a verb with the words of a command line, or show its help.

    Args:
        verb: a function whose parameters are annotated with `Option` or `Argument`.
        name: the program and the verb, for messages.
        words: what follows the verb.

    Raises:
        UserError: the words do not fit its parameters.
    """
    known = parameters(verb)
    try:
        values = _read(known, deque(words))
    except UserError as error:
        raise UserError(f"{error}; see: {name} --help") from None
    if values is None:
        print(_help(verb, name, known))  # noqa: T201
    else:
        verb(**values)


def _read(known: Sequence[Parameter], words: deque[str]) -> dict[str, Any] | None:
    """Values by the names of parameters; None when help is asked for."""
    options = {spelling: p for p in known if not p.is_argument for spelling in (*p.given.spellings, p.given.off)}
    given: dict[str, list[Any]] = {}
    places: list[str] = []
    while words:
        word = words.popleft()
        if word == "--":
            places += words
            break
        if not word.startswith("-") or word == "-":
            places.append(word)
            continue
        spelling, equals, attached = (
            word.partition("=") if word.startswith("--") else (word[:2], word[2:] and "=", word[2:])
        )
        if spelling in HELP:
            return None
        option = options.get(spelling)
        if option is None:
            raise UserError(f"there is no option {spelling}{did_you_mean(spelling, [*filter(None, options)])}")
        values = given.setdefault(option.name, [])
        if option.kind is not bool:
            values.append(_values(option, [attached] if equals else [], words))
            continue
        if equals and word.startswith("--"):
            raise UserError(f"{spelling} takes no value, but {attached!r} was given")
        if attached:  # -abc: the other flags are a word of their own
            words.appendleft(f"-{attached}")
        values.append(spelling != option.given.off)
    _place([p for p in known if p.is_argument], places, given)
    return {p.name: _settled(p, given.get(p.name, [])) for p in known}


def _values(option: Parameter, found: list[str], words: deque[str]) -> Any:
    """An option's value, or the tuple of its values."""
    while len(found) < option.count:
        if not words:
            raise UserError(f"{option.shown} needs {'a value' if option.count == 1 else f'{option.count} values'}")
        found.append(words.popleft())
    read = tuple(map(option.read, found))
    return read if option.count > 1 else read[0]


def _place(arguments: Sequence[Parameter], places: list[str], given: dict[str, list[Any]]) -> None:
    """Give the arguments their words, in order; one that repeats takes all that are left."""
    for argument in arguments:
        count = len(places) if argument.repeats else 1
        if places:
            given[argument.name] = [argument.read(word) for word in places[:count]]
        del places[:count]
    if places:
        raise UserError(f"{places[0]!r} is one argument too many")


def _settled(parameter: Parameter, values: list[Any]) -> Any:
    if values:
        return values if parameter.repeats else values[-1]
    if parameter.required:
        raise UserError(f"{parameter.shown.removesuffix('…')} is missing")
    return parameter.default


def _help(verb: Verb, name: str, known: Sequence[Parameter]) -> str:
    arguments, options = [p for p in known if p.is_argument], [p for p in known if not p.is_argument]
    lines = [f"Usage: {' '.join([name, '[OPTIONS]', *(p.shown for p in arguments)])}", ""]
    lines += textwrap.wrap(inspect.getdoc(verb) or "", _width(), initial_indent="  ", subsequent_indent="  ")
    if arguments:
        lines += ["", "Arguments:", *columns([(p.shown, _sentence(p)) for p in arguments])]
    shown = [(_spelled(p), _sentence(p)) for p in options]
    lines += ["", "Options:", *columns([*shown, (", ".join(HELP), "Show this message and exit.")])]
    return "\n".join(lines)


def _spelled(option: Parameter) -> str:
    names = ", ".join((*option.given.spellings, *filter(None, [option.given.off])))
    if option.kind is bool:
        return names
    return f"{names} {' '.join([option.given.metavar or KINDS[option.kind][0]] * option.count)}"


def _sentence(parameter: Parameter) -> str:
    """Its help, and what its default is where that is a value."""
    default = parameter.default
    if parameter.required:
        note = "" if parameter.is_argument else "  [required]"
    elif parameter.given.off and default is not None:
        note = f"  [default: {parameter.given.spellings[-1] if default else parameter.given.off}]"
    else:
        note = "" if default is None or default is False else f"  [default: {default}]"
    return parameter.given.help + note


def columns(rows: Sequence[tuple[str, str]]) -> list[str]:
    """Lines of two columns, the second one wrapped."""
    room = " " * INDENT
    lines = []
    for name, text in rows:
        wrapped = textwrap.wrap(text, max(_width() - INDENT, 20)) or [""]
        first = f"  {name}"
        head = [f"{first:<{INDENT}}{wrapped[0]}"] if len(first) <= INDENT - 2 else [first, room + wrapped[0]]
        lines += [*head, *(room + line for line in wrapped[1:])]
    return lines


def _width() -> int:
    return min(shutil.get_terminal_size().columns, WIDTH)
