"""What an expression may cost, held to a matcher of the test's own that tries one way after the other and counts."""

from __future__ import annotations

import re._constants as kinds
import re._parser as parser
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.text.expression_cost import expression_problem
from headrace.text.pre_tokenizers import PRE_TOKENIZERS

PASSES = (
    "a", "", "a+", "a+b", "^a+$", "(?i)a+b", "(?:ab)+c", "(?#a comment)a*b", r"\s+(?!\S)", "[]a]+c", "[^]a]+b",
    "[[a-z]&&[^b]]+c", "a{3}b{2,5}c", "a{,3}b", "(a|b)c", "a|b+c|d+e", "a++b", "a*?b", "[^(\\s|[.,])]+",
    r"\p{L}+\x{41}",
    r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))", "|".join("abcdefgh" * 99),
    r"[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
)  # fmt: skip
REFUSED = {
    "a+a+b": "has 2 repeats that can be tried against each other",
    "a*[ab]*c*d": "has 3 repeats",
    "(?:a+|b)c+d": "has 2 repeats",
    "a+(?=b+c)": "has 2 repeats",
    "a+(?!b+c)": "has 2 repeats",
    "(?<=x)a+a+(?<!y)": "has 2 repeats",
    "(a*a*)?b": "has 2 repeats",
    "x{0,20}y{0,20}z": "has 2 repeats",
    "a+a+$": "has 2 repeats",
    r"a+a+\b": "has 2 repeats",
    "[[a]+]+a+b": "has 2 repeats",
    "(a+)+$": "repeats what repeats",
    "(?:a|b|ab)*c": "repeats what repeats",
    "((a*))*b": "repeats what repeats",
    "(a?){30}b": "repeats what repeats",
    "a{1,3}+b": "repeats what repeats",
    "a**b": "repeats what repeats",
    "a?" * 30 + "a" * 30: "in more than 4096 ways",
    "a?" * 6 + "a+b": "in more than 32 ways",
    "|".join(f"a+{c}" for c in "bcdefghi" * 9): "in more than 32 ways",
    "a{1,99999}": "counts above 1000",
    r"(a)\1": "refers back",
    r"(?<n>a)\k<n>": "refers back",
    r"\g<0>": "refers back",
    "(?~a)": "a group of an unknown kind",
    "(?(1)a|b)": "a group of an unknown kind",
    "(*FAIL)": "a group of an unknown kind",
    "(": "not closed",
    "[a": "not closed",
    "a)": "a bracket too many",
    "(" * 50 + "a" + ")" * 50: "nests deeper than 20",
}


@pytest.mark.parametrize("text", PASSES)
def test_what_is_cheap_passes(text: str) -> None:
    assert expression_problem(text) is None


@pytest.mark.parametrize("family", PRE_TOKENIZERS)
def test_every_familys_expressions_pass(family: str) -> None:
    assert [
        expression_problem(pattern) for pattern in PRE_TOKENIZERS[family].patterns if expression_problem(pattern)
    ] == []


@pytest.mark.parametrize("text", REFUSED)
def test_what_is_dear_is_refused(text: str) -> None:
    problem = expression_problem(text)
    assert problem is not None and REFUSED[text] in problem and " the pattern " in problem


class _Counter:
    """All ways of matching an expression at a place, one after the other, as Python's parser reads it."""

    def __init__(self, text: str) -> None:
        self.text, self.steps = text, 0

    def sequence(self, items: list[Any], at: int) -> Iterator[int]:
        if not items:
            yield at
            return
        for end in self.one(items[0], at):
            yield from self.sequence(items[1:], end)

    def one(self, item: Any, at: int) -> Iterator[int]:
        self.steps += 1
        kind, value = item
        if kind is kinds.LITERAL:
            if self.text[at : at + 1] == chr(value):
                yield at + 1
        elif kind is kinds.IN:
            if self.text[at : at + 1] in {chr(code) for _, code in value}:
                yield at + 1
        elif kind is kinds.SUBPATTERN:
            yield from self.sequence(list(value[3]), at)
        elif kind is kinds.BRANCH:
            for branch in value[1]:
                yield from self.sequence(list(branch), at)
        elif kind is kinds.MAX_REPEAT:
            least, most, inside = value
            yield from self.repeat(
                list(inside), at, int(least), len(self.text) if most == kinds.MAXREPEAT else int(most)
            )
        elif kind is kinds.ASSERT or kind is kinds.ASSERT_NOT:
            found = next(self.sequence(list(value[1]), at), None) is not None
            if found == (kind is kinds.ASSERT):
                yield at
        else:
            raise AssertionError(kind)

    def repeat(self, inside: list[Any], at: int, least: int, most: int) -> Iterator[int]:
        if most:
            for end in self.sequence(inside, at):
                if end > at:  # one that matches nothing is not repeated
                    yield from self.repeat(inside, end, max(least - 1, 0), most - 1)
        if not least:
            yield at


def _steps(expression: str, text: str) -> int:
    """Until it matches at the beginning, or cannot."""
    counter = _Counter(text)
    next(counter.sequence(list(parser.parse(expression)), 0), None)
    return counter.steps


def test_the_counter_counts() -> None:
    """Held to what is known: a+a+b takes the square, a+b the length, (a+)+b doubles."""
    assert 3.5 < _steps("a+a+b", "a" * 40) / _steps("a+a+b", "a" * 20) < 4.5
    assert 1.8 < _steps("a+b", "a" * 40) / _steps("a+b", "a" * 20) < 2.2
    assert _steps("(a+)+b", "a" * 12) > 3.5 * _steps("(a+)+b", "a" * 10)


FEW_STEPS = 400  # what short counts cost where a text is not long enough for all of them
REPEATS = ("*", "+", "?", "{2}", "{1,3}", "{0,18}", "{2,}")
EXPRESSIONS = st.recursive(
    st.sampled_from(("a", "a", "b", "aa")),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, st.sampled_from(REPEATS)).map(lambda pair: f"(?:{pair[0]}){pair[1]}"),
        st.tuples(inner, inner).map(lambda pair: f"(?:{pair[0]}|{pair[1]})"),
        inner.map(lambda text: f"(?={text})"),
        inner.map(lambda text: f"(?!{text})"),
    ),
    max_leaves=7,
)


@settings(max_examples=400, deadline=None)
@given(expression=EXPRESSIONS, end=st.sampled_from(("", "b", "c")))
def test_what_passes_is_cheap(expression: str, end: str) -> None:
    """At a place, a text that is three times longer costs about three times the steps, not nine times."""
    whole = expression + end
    if expression_problem(whole) is not None:
        return
    for unit, last in (("a", ""), ("ab", ""), ("a", "b"), ("aab", "")):
        short, long = (_steps(whole, unit * (n // len(unit)) + last) for n in (60, 180))
        assert long <= 4 * short + FEW_STEPS, whole
