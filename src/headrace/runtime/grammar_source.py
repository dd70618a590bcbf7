"""What a grammar's source may ask for, looked at before llguidance sees it. Knows no vocabulary.

llguidance follows an expression by derivatives: what may come behind a character is written out as an expression
again. Parts in a row that may all be absent, `a?b?c?…`, make one way each, and each way has all parts behind it:
thousands of them take gigabytes for one character, within one step that no limit of the library divides. A trial
(`grammar_trial.py`) meets that only where it goes, at the grammar's beginning; so such parts are counted here. A
terminal of a Lark grammar has the parts of all terminals that it is made of.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from typing import Any

from headrace.errors import UserError, shown

__all__ = ["check_lark", "check_regex", "check_schema"]

SMALLEST_STEP, LARGEST_STEP = 0.001, 1000  # of multipleOf
MAX_WAYS = 1_000_000  # of all expressions of a grammar; 65 bytes each where that was measured
# What lets a part be absent. Too much is counted, as a question mark in a class is, never too little; where spaces have
# no meaning (the flag x) every bracket and bar counts.
_ABSENT = re.compile(r"\\.|([?*~&$]|(?<!\[)\^|\{\s*[0,]|\(\)|(?:^|[(|:])\||\|(?=\)|$))", re.DOTALL)
_SPACED = re.compile(r"\\.|([?*~&$^(|{])", re.DOTALL)
_IGNORES_SPACES = re.compile(r"\(\?[a-zA-Z]*x")
_LARK = re.compile(r'"(?:\\.|[^"\\])*"|(?:#|//)[^\n]*|/(?:\\.|[^/\\])+/([imslux]*)', re.DOTALL)
_EMBEDDED = re.compile(r"%json\s*")
# What begins a definition of Lark, outside of texts and expressions: a name, perhaps a priority and attributes.
_DEFINED = re.compile(r"\b([A-Za-z_][\w-]*)\s*(?:\.\s*-?\d+\s*)?(?:\[[^\]]*\]\s*)?:")
_TERMINAL = re.compile(r"\b_*[A-Z][_A-Z0-9]*\b")


def check_regex(source: str) -> None:
    """Look at a regular expression.

    Raises:
        UserError: it has too many ways.
    """
    _refuse(_ways(source), source)


def check_schema(schema: Any) -> None:
    """Look at a JSON schema.

    Raises:
        UserError: its expressions have too many ways, or a number is to be a multiple of a very large or small one.
    """
    ways = 0
    for name, value in _members(schema):
        if name == "multipleOf" and isinstance(value, int | float) and not SMALLEST_STEP <= abs(value) <= LARGEST_STEP:
            # llguidance counts remainders, and takes all memory for them.
            raise UserError(f"multipleOf is {value}; expected {SMALLEST_STEP} to {LARGEST_STEP}")
        for expression in _expressions(name, value):
            ways += _ways(expression)
            _refuse(ways, expression)


def check_lark(source: str) -> None:
    """Look at a Lark grammar, and at the schemas in it.

    Raises:
        UserError: as the other two, or a terminal is made of itself.
    """
    at, outside = 0, ""
    while found := _EMBEDDED.search(source, at):
        outside += source[at : found.start()]
        try:
            schema, at = json.JSONDecoder().raw_decode(source, found.end())
        except (ValueError, RecursionError):
            raise UserError("%json in a grammar is followed by what is no JSON; expected a JSON schema") from None
        check_schema(schema)
    outside += source[at:]
    # What may be absent in Lark alone, as marks of the same length: an empty text, and %regex, a part of a given text.
    outside = _LARK.sub(lambda found: "()" if found[0] == '""' else found[0], outside).replace("%regex", "     ?")
    spaced = any("x" in (found[1] or "") for found in _LARK.finditer(outside))
    _refuse(_ways(outside, spaced), outside)
    _refuse(_ways_of_terminals(outside, spaced), outside)


def _ways_of_terminals(source: str, spaced: bool) -> int:
    """The ways of all terminals of a Lark grammar, each with what it is made of written out."""
    names_only = _LARK.sub(lambda found: " " * len(found[0]), source)
    found = list(_DEFINED.finditer(names_only))
    bodies: dict[str, list[slice]] = {}
    for one, end in zip(found, [*(f.start() for f in found[1:]), len(source)]):
        bodies.setdefault(one[1], []).append(slice(one.end(), end))
    made_of = {
        name: [part for place in places for part in _TERMINAL.findall(names_only[place]) if part in bodies]
        for name, places in bodies.items()
        if _TERMINAL.fullmatch(name)
    }
    try:
        order = tuple(TopologicalSorter(made_of).static_order())
    except CycleError as error:
        raise UserError(
            f"the terminal {shown(error.args[1][0])} is made of itself; expected a rule, in small letters"
        ) from None
    counts: dict[str, tuple[int, int]] = {}
    ways = 0
    for name in order:
        own = [_absent(source[place], spaced) for place in bodies[name]] + [counts[part] for part in made_of[name]]
        absent, choices = (min(sum(each), MAX_WAYS) for each in zip(*own))
        counts[name] = absent, choices
        ways += absent * (absent + choices)
    return ways


def _members(schema: Any) -> Iterator[tuple[str, Any]]:
    pending = [schema]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            yield from value.items()
            pending += value.values()
        elif isinstance(value, list):
            pending += value


def _expressions(name: str, value: Any) -> list[str]:
    """Those that a member of a schema has: x-guidance has what stands between tokens."""
    if name == "pattern" and isinstance(value, str):
        return [value]
    if name == "patternProperties" and isinstance(value, dict):
        return list(value)
    if name == "x-guidance" and isinstance(value, dict):
        return [each for each in value.values() if isinstance(each, str)]
    return []


def _ways(expression: str, spaced: bool = False) -> int:
    absent, choices = _absent(expression, spaced)
    return absent * (absent + choices)


def _absent(expression: str, spaced: bool) -> tuple[int, int]:
    """How many parts may be absent, and how many choices there are."""
    marks = _SPACED if spaced or _IGNORES_SPACES.search(expression) else _ABSENT
    return sum(1 for found in marks.finditer(expression) if found[1]), expression.count("|")


def _refuse(ways: int, expression: str) -> None:
    if ways > MAX_WAYS:
        raise UserError(
            f"the expression {shown(expression)} has too many parts that may be absent (?, *, {{0,…}}) for its "
            f"alternatives: {ways} ways, expected at most {MAX_WAYS}; make it simpler"
        )
