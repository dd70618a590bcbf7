"""How long a regular expression of a tokenizer.json may take, reckoned from the expression before any text is seen.

The `tokenizers` library matches by trying one way after the other (Oniguruma). Ways are tried again only where
something behind a choice can still fail: `a+b` gives up one a after the other, `a+` does not. So each alternative of
an expression gets a count of the repeats that something can fail behind: with none of them a text is passed in one go;
with one, each place of the text can cost as many steps as the text is long; with two (`a+a+b`), the square of it. Two
are refused, and with them whatever repeats a choice (`(a|b)*`, `(a+)+`), which doubles with every character.

What the parts match is not looked at, so that the count is at most too high. Every published vocabulary of this family
has at most one. Source of the syntax: Oniguruma's doc/RE.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from headrace.errors import shown

__all__ = ["expression_problem"]

MAX_REPEATS = 1  # with something behind them that can fail
MAX_WAYS = (4096, 32)  # of all choices and alternatives together: of an expression without such a repeat, and with one
MAX_COUNT = 1000
FEW = 16  # a repeat with no more counts than this is a choice among them
MAX_DEPTH = 20  # groups in groups; published ones have 3
_ATOM = re.compile(r"\\[pP]\{[^}]*\}|\\x\{[^}]*\}|\\x[0-9a-fA-F]{1,2}|\\u[0-9a-fA-F]{4}|\\c.|\\.|.", re.DOTALL)
_COUNT = re.compile(r"\{(\d*)(,?)(\d*)\}")
_GROUP = re.compile(r"\((?:\?(?:#[^)]*\)|[imxW]*(?:-[imx]+)?[:)]|<?[=!]|>|<\w+>))?")
_FAILS = r"\b\B\A\z\Z\G\y\Y^$"  # match no character, and may not match at all
_REFUSED = re.compile(r"\\(?:[1-9kgKRX])")


class _Refused(ValueError):
    """Why an expression is not taken."""


class _Cost(NamedTuple):
    """Of a part: how often what is behind it may be tried again."""

    repeats: int = 0
    ways: int = 1

    def then(self, other: _Cost) -> _Cost:
        """Of two parts, one behind the other."""
        return _Cost(self.repeats + other.repeats, self.ways * other.ways)

    def alternatively(self, other: _Cost) -> _Cost:
        """Of two alternatives: those that repeat less than others do not count beside them."""
        most = max(self.repeats, other.repeats)
        return _Cost(most, sum(each.ways for each in (self, other) if each.repeats == most))


class _Part(NamedTuple):
    """What stands in a sequence.

    Attributes:
        inside: the alternatives of a group, each a sequence; none of a character.
        least, most: how often it is there; `most` None without end.
        looks: matches no character; what is in it is tried once and for all.
        nested: repeats what repeats: a{1,3}+.
    """

    inside: tuple[tuple[_Part, ...], ...] = ()
    least: int = 1
    most: int | None = 1
    looks: bool = False
    nested: bool = False

    @property
    def can_fail(self) -> bool:
        """Whether it may not match where it stands."""
        inside = not self.inside or all(any(part.can_fail for part in sequence) for sequence in self.inside)
        return self.least > 0 and (inside or self.looks)

    def cost(self, behind: bool) -> _Cost:
        """`behind`: something behind it can fail."""
        inner = _Cost()
        for number, sequence in enumerate(self.inside):
            each = _sequence_cost(sequence, behind or self.looks)
            inner = inner.alternatively(each) if number else each
        if self.looks or not behind:
            return inner  # which has only what can be tried again within it
        if self.nested:
            raise _Refused("repeats what repeats")
        if self.most is None or self.most - self.least > FEW:
            return inner.then(_Cost(repeats=1))
        return inner.then(_Cost(ways=self.most - self.least + 1))


def _sequence_cost(sequence: tuple[_Part, ...], behind: bool) -> _Cost:
    total = _Cost()
    for part in reversed(sequence):
        total = part.cost(behind).then(total)
        behind = behind or part.can_fail
    return total


def expression_problem(text: str) -> str | None:
    """Why an expression could take too long; None for one that cannot.

    Args:
        text: in Oniguruma's syntax; whether it is right is not looked at.
    """
    try:
        alternatives, end = _alternatives(text, 0, 0)
        if end != len(text):
            raise _Refused("has a bracket too many")
        total = _Part(alternatives).cost(behind=False)
    except _Refused as refused:
        return f"{refused} in the pattern {shown(text)}"
    if total.repeats > MAX_REPEATS:
        return f"has {total.repeats} repeats that can be tried against each other in the pattern {shown(text)}"
    if total.ways > (most := MAX_WAYS[total.repeats]):
        return f"can be tried in more than {most} ways at each place: the pattern {shown(text)}"
    return None


def _alternatives(text: str, at: int, depth: int) -> tuple[tuple[tuple[_Part, ...], ...], int]:
    """All alternatives up to the end or a closing bracket, and where that is."""
    if depth > MAX_DEPTH:
        raise _Refused(f"nests deeper than {MAX_DEPTH}")
    made: list[tuple[_Part, ...]] = []
    sequence: list[_Part] = []
    while at < len(text) and text[at] != ")":
        if text[at] == "|":
            made.append(tuple(sequence))
            sequence, at = [], at + 1
            continue
        part, at = _part(text, at, depth)
        if part is not None:
            part, at = _repeated(part, text, at)
            sequence.append(part)
    return (*made, tuple(sequence)), at


def _part(text: str, at: int, depth: int) -> tuple[_Part | None, int]:
    """A character, a class or a group; None of a comment or a switch."""
    if text[at] == "(":
        begin = _GROUP.match(text, at)
        if begin is None or (begin[0] == "(" and text[at + 1 : at + 2] in ("?", "*")):
            raise _Refused("has a group of an unknown kind")
        if begin[0].endswith(")"):
            return None, begin.end()
        inside, end = _alternatives(text, begin.end(), depth + 1)
        if end == len(text):
            raise _Refused("has a bracket that is not closed")
        return _Part(inside, looks=begin[0].endswith(("=", "!"))), end + 1
    if text[at] == "[":
        return _Part(), _class_end(text, at)
    if _REFUSED.match(text, at):
        raise _Refused("refers back or calls a group")
    atom = _ATOM.match(text, at)
    assert atom is not None
    return _Part(looks=atom[0] in ("^", "$") or (len(atom[0]) == 2 and atom[0] in _FAILS)), atom.end()


def _class_end(text: str, at: int) -> int:
    """Behind a class, which may hold classes."""
    depth, start = 0, at
    while at < len(text):
        if text[at] == "\\":
            at += 1
        elif text[at] == "[":
            depth += 1
            at += text.startswith("^", at + 1)
            at += text.startswith("]", at + 1)  # the first one is a member
        elif text[at] == "]":
            depth -= 1
            if depth == 0:
                return at + 1
        at += 1
    raise _Refused(f"has a class that is not closed at {start}")


def _repeated(part: _Part, text: str, at: int) -> tuple[_Part, int]:
    """A part with all the repeats behind it."""
    while at < len(text):
        least: int
        most: int | None
        if text[at] in "*+?":
            least, most = {"*": (0, None), "+": (1, None), "?": (0, 1)}[text[at]]
            at += 1
            # Behind it a question mark makes it lazy and a plus keeps what it has: neither repeats once more.
            at += text[at : at + 1] in ("?", "+") and text[at : at + 1] != ""
        elif (count := _COUNT.match(text, at)) and (count[1] or count[3]):
            if max(len(count[1]), len(count[3])) > 4 or max(int(count[1] or 0), int(count[3] or 0)) > MAX_COUNT:
                raise _Refused(f"counts above {MAX_COUNT}")
            least = int(count[1] or 0)
            most = least if not count[2] else int(count[3]) if count[3] else None
            at = count.end()
            at += text.startswith("?", at)
        else:
            return part, at
        again = most is None or most > 1
        nested = again and not part.inside and part.most != 1
        if again and not nested and part.cost(behind=True) != _Cost():
            raise _Refused("repeats what repeats")
        part = _Part(((part,),) if part.inside else (), least, most, part.looks, nested or part.nested)
    return part, at
