"""Regular expressions that come with a file, matched in time that grows with the text and not beyond.

Python's own `re` tries one way after the other, and a short expression in a stranger's recipe or adapter can make it
try for ever. Here all ways are followed at once (Thompson 1968, "Regular expression search algorithm"), so a text of n
characters takes at most n steps over the places of the expression. What needs trying back (back references, looking
ahead or behind, possessive repeats) is refused. Knows nothing about what is matched.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

from headrace.errors import shown

__all__ = ["Pattern", "PatternError"]

MAX_PLACES = 10_000  # of one expression, its counted repeats written out
MAX_DEPTH = 50  # groups inside groups
_KEPT = 4096  # transitions that are remembered
_REPEAT = re.compile(r"(?:([*+?])|\{(\d{1,4})?(,)?(\d{1,4})?\})\??")
_CLASS = re.compile(r"\[\^?\]?(?:\\[dDsSwW\W_]|[^\]\\])*\]")
_UNCLEAR = re.compile(r"\[|--|&&|~~|\|\|")  # Python warns that in a class these will mean sets one day
_SINGLE = re.compile(r"[^\\]|\\[dDsSwW\W_]")
_BEGIN, _END = ("^", r"\A"), ("$", r"\Z")


class PatternError(ValueError):
    """An expression that is wrong, too large, or would need trying back."""


class _One(NamedTuple):
    """One character, told by Python's own expression for it: a literal, `.`, a class, an escape."""

    fits: re.Pattern[str]


class _Edge(NamedTuple):
    """The text's beginning, or its end."""

    begin: bool


class _Repeated(NamedTuple):
    """A part that stands `least` to `most` times; None: any number of times."""

    part: _Node
    least: int
    most: int | None


class _Row(NamedTuple):
    """Parts one behind the other."""

    parts: Sequence[_Node]


class _Either(NamedTuple):
    """Alternatives."""

    ways: Sequence[_Node]


_Node = _One | _Edge | _Repeated | _Row | _Either


class Pattern:
    """A regular expression in Python's syntax.

    Args:
        text: literals, `.`, classes, `\\d \\s \\w` and their opposites, groups, `|`, `* + ? {m,n}`, `^` and `$`.

    Raises:
        PatternError: it is none, is too large, or has something else.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        # Each place: what must be there (an edge, one character, or nothing), and the places that come after it.
        # Place 0 is the end of the expression.
        self._places: list[tuple[_One | _Edge | None, list[int]]] = [(None, [])]
        self._work = 0
        self._first = self._placed(_Reader(text).whole(), 0)
        self._states: dict[tuple[frozenset[int], bool], _State] = {}
        self._kept = 0

    def found_in(self, text: str) -> bool:
        """Whether it matches anywhere in the text; `^` is the text's beginning, `$` its very end."""
        state = self._state(frozenset(), begin=True)
        for character in text:
            after = state[character]
            if after is None:
                return True
            state = after
        return state.is_whole

    def whole(self, state: _State) -> bool:
        """Whether the expression is complete where the text ends."""
        return 0 in self._arrived(state.reached, begin=state.begin, end=True)

    def after(self, state: _State, character: str) -> _State | None:
        """Where one character leads; None where the expression was complete before it."""
        self._kept += 1
        if self._kept > _KEPT:  # what was known is let go, once nobody is on the way through it
            self._kept = 0
            self._states.clear()
        here = self._arrived(state.reached, begin=state.begin, end=False)
        if 0 in here:
            return None
        after: set[int] = set()
        for number in here:
            what, following = self._places[number]
            if isinstance(what, _One) and what.fits.fullmatch(character):
                after.update(following)
        return self._state(frozenset(after), begin=False)

    def _state(self, reached: frozenset[int], *, begin: bool) -> _State:
        key = reached, begin
        if key not in self._states:
            self._states[key] = _State(self, reached, begin)
        return self._states[key]

    def _arrived(self, reached: frozenset[int], *, begin: bool, end: bool) -> set[int]:
        """The places where one is without a further character; the first is among them: a match may begin anywhere."""
        found: set[int] = set()
        pending = [self._first, *reached]
        while pending:
            number = pending.pop()
            if number in found:
                continue
            found.add(number)
            what, following = self._places[number]
            if what is None or (isinstance(what, _Edge) and (begin if what.begin else end)):
                pending += following
        return found

    def _placed(self, node: _Node, after: int) -> int:
        """The place where a part begins, in front of the place `after`."""
        self._work += 1
        if self._work > MAX_PLACES:
            raise PatternError(f"it has more than {MAX_PLACES} places")
        if isinstance(node, _Row):
            for part in reversed(node.parts):
                after = self._placed(part, after)
            return after
        if isinstance(node, _Either):
            return self._add(None, [self._placed(way, after) for way in node.ways])
        if not isinstance(node, _Repeated):
            return self._add(node, [after])
        if node.most is None:
            loop = self._add(None, [after])
            self._places[loop][1].append(self._placed(node.part, loop))
            after = loop
        else:
            behind = after
            for _ in range(node.most - node.least):
                after = self._add(None, [self._placed(node.part, after), behind])
        for _ in range(node.least):
            after = self._placed(node.part, after)
        return after

    def _add(self, what: _One | _Edge | None, following: list[int]) -> int:
        self._places.append((what, following))
        return len(self._places) - 1


class _State(dict[str, "_State | None"]):
    """The places that are reached behind some text, and, by the next character, where that leads: worked out when it is
    first asked for, so that texts which are alike are read as fast as a dictionary is."""

    def __init__(self, pattern: Pattern, reached: frozenset[int], begin: bool) -> None:
        super().__init__()
        self.pattern = pattern
        self.reached = reached
        self.begin = begin

    @cached_property
    def is_whole(self) -> bool:
        """The expression is complete where the text ends."""
        return self.pattern.whole(self)

    def __missing__(self, character: str) -> _State | None:
        self[character] = self.pattern.after(self, character)
        return self[character]


class _Reader:
    """Reads an expression from left to right."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0

    def whole(self) -> _Node:
        """The expression."""
        node = self._either(0)
        if self._at < len(self._text):
            raise PatternError("it has a ) without its (")
        return node

    def _either(self, depth: int) -> _Node:
        ways = [self._row(depth)]
        while self._peek() == "|":
            self._at += 1
            ways.append(self._row(depth))
        return _Either(ways)

    def _row(self, depth: int) -> _Node:
        parts: list[_Node] = []
        while self._peek() not in ("", "|", ")"):
            part = self._group(depth + 1) if self._peek() == "(" else self._single()
            parts.append(self._repeated(part))
        return _Row(parts)

    def _group(self, depth: int) -> _Node:
        if depth > MAX_DEPTH:
            raise PatternError(f"it has groups more than {MAX_DEPTH} deep")
        self._at += 1
        if self._peek() == "?":
            if not self._text.startswith("?:", self._at):
                raise PatternError(
                    f"it has ({shown(self._text[self._at : self._at + 2])[1:-1]}, which is not supported"
                )
            self._at += 2
        inside = self._either(depth)
        if self._peek() != ")":
            raise PatternError("it has a ( without its )")
        self._at += 1
        return inside

    def _single(self) -> _Node:
        """A character, a class, or an edge."""
        if self._peek() in ("*", "+", "?", "{"):
            raise PatternError(f"it has a {self._peek()} with nothing to repeat")
        escaped = self._text[self._at : self._at + 2]
        for begin, signs in ((True, _BEGIN), (False, _END)):
            if (sign := self._peek()) in signs or (sign := escaped) in signs:
                self._at += len(sign)
                return _Edge(begin)
        found = (_CLASS if self._peek() == "[" else _SINGLE).match(self._text, self._at)
        if found is None or (found[0][0] == "[" and _UNCLEAR.search(found[0], 1)):
            raise PatternError(f"it has {shown(escaped)[1:-1]} where nothing that is supported begins")
        self._at = found.end()
        try:
            return _One(re.compile(found[0]))
        except re.error as error:
            raise PatternError(str(error)) from None

    def _repeated(self, part: _Node) -> _Node:
        found = _REPEAT.match(self._text, self._at)
        if found is None:
            return part
        self._at = found.end()
        sign, least, comma, most = found.groups()
        if self._peek() in ("*", "+", "?", "{"):
            raise PatternError("it repeats a repeat")
        if sign:
            return _Repeated(part, int(sign == "+"), 1 if sign == "?" else None)
        if least is most is None:
            raise PatternError("it has a { that counts nothing; expected \\{")
        low = int(least or 0)
        high = low if comma is None else None if most is None else int(most)
        if high is not None and high < low:
            raise PatternError(f"it repeats something {low} to {high} times")
        return _Repeated(part, low, high)

    def _peek(self) -> str:
        return self._text[self._at : self._at + 1]
