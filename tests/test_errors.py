"""The exception tree: what exits with 2, what with 1, and hints for misspelt words."""

from __future__ import annotations

import re

import pytest

from headrace import errors


def test_the_drawn_tree_is_the_tree() -> None:
    drawn = re.findall(r"── (\w+)", errors.__doc__ or "")
    assert set(drawn) | {"HeadraceError", "did_you_mean", "one_line", "reason", "shown"} == set(errors.__all__)
    for name in set(drawn) - {"UserError", "VerificationFailed"}:
        assert issubclass(getattr(errors, name), errors.UserError), name
    assert not issubclass(errors.VerificationFailed, errors.UserError)
    assert issubclass(errors.VerificationFailed, errors.HeadraceError)


def test_context_full_tells_the_numbers() -> None:
    error = errors.ContextFull(5000, 4096)
    assert (error.needed, error.context) == (5000, 4096)
    for number in ("5000", "4096", "4095"):
        assert number in str(error)
    assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("word", "hint"), [("lama", "; did you mean 'llama'?"), ("baichaun", "; did you mean 'baichuan'?"), ("gpt2", "")]
)
def test_did_you_mean(word: str, hint: str) -> None:
    assert errors.did_you_mean(word, ["llama", "baichuan"]) == hint
