"""Patterns: as Python's own expressions say, in time that no expression can stretch."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from headrace.patterns import MAX_PLACES, Pattern, PatternError

PIECES = st.recursive(
    st.sampled_from(["a", "b", ".", r"\.", "[ab]", "[^a]", r"\d", r"\w", "1", "^", "$", "", r"[\d.]", r"\A", r"\Z"]),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map("({0[0]}|{0[1]})".format),
        inner.map("(?:{})".format),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{0,2}", "{1,}", "*?"])).map("({0[0]}){0[1]}".format),
    ),
    max_leaves=8,
)
SECONDS = 2.0  # for what takes milliseconds here, and longer than the universe with trying back


@given(PIECES, st.text("ab1.", max_size=8))
@settings(max_examples=600)
def test_as_python_has_it(expression: str, text: str) -> None:
    assert Pattern(expression).found_in(text) == bool(re.search(expression, text))


@given(st.text(r"ab(|)[]^$*+?{}\d1,-.:", max_size=12), st.text("ab1.", max_size=8))
@settings(max_examples=600)
def test_whatever_is_accepted_means_what_it_means_to_python(expression: str, text: str) -> None:
    try:
        pattern = Pattern(expression)
    except PatternError as error:
        assert str(error).isprintable()
        return
    try:
        expected = re.search(expression, text)
    except re.error:  # a quantifier of an edge, which Python refuses here and there
        assume(False)
    assert pattern.found_in(text) == bool(expected)


@pytest.mark.parametrize(
    ("expression", "text"),
    [
        ("(a*)*b", "a" * 60),
        ("(a|a)" * 39 + "b", "a" * 60),
        ("a?" * 60 + "a" * 60 + "b", "a" * 60),
        ("(.*)(.*)(.*)(.*)x", "a" * 2000),
        (r"(.*\.)?(.*.*.*.*x)$", "a" * 2000),
        ("((a{0,9}){0,9}){0,9}b", "a" * 200),
    ],
)
def test_no_expression_takes_for_ever(expression: str, text: str) -> None:
    before = time.process_time()
    assert not Pattern(expression).found_in(text)
    assert time.process_time() - before < SECONDS


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("(", "a ( without its )"),
        (")", "a ) without its ("),
        ("[a", "nothing that is supported begins"),
        ("[z-a]", "bad character range z-a"),
        ("[[a]]", "nothing that is supported begins"),
        ("*a", "a * with nothing to repeat"),
        ("a**", "it repeats a repeat"),
        ("a++", "it repeats a repeat"),
        ("a{}", "a { that counts nothing"),
        ("a{3,2}", "it repeats something 3 to 2 times"),
        ("(?=a)", "it has (?=, which is not supported"),
        ("(?P<n>a)", "it has (?P, which is not supported"),
        (r"(a)\1", "nothing that is supported begins"),
        ("\\", "nothing that is supported begins"),
        ("(" * 99 + ")" * 99, "groups more than 50 deep"),
        ("a{9999}{2}", "it repeats a repeat"),
        ("(a{999}){999}", f"more than {MAX_PLACES} places"),
        ("((){999}){999}", f"more than {MAX_PLACES} places"),
    ],
)
def test_what_is_refused(expression: str, message: str) -> None:
    with pytest.raises(PatternError) as error:
        Pattern(expression)
    assert message in str(error.value)
