"""Texts that are far too long are refused by their beginnings: a tokenizer takes seconds for some megabytes, and that
long nobody else would be answered. Knows no HTTP.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from headrace.errors import ContextFull

__all__ = ["refuse_too_long"]

CHARACTERS = 8  # of a first beginning, for each token of the context: more than a text has, so that most are not cut
SEAM = 16  # tokens that the end of a beginning may have more than the same place within the text


def refuse_too_long(text: str, encode: Callable[[str], Sequence[int]], context: int, *, times: int = 1) -> None:
    """Raise where a text has certainly more tokens than the context holds, without encoding much more than these.

    Args:
        text: of any length.
        encode: the tokenizer.
        context: what the context holds, in tokens.
        times: only a text of more than so many contexts is refused, where a part of it may be left out.

    Raises:
        ContextFull: there is no room for the text; a text that passes may still be too long.
    """
    tokens = times * context
    size = CHARACTERS * tokens
    while size < len(text):
        if (count := len(encode(text[:size]))) > tokens + SEAM:
            raise ContextFull(count, context, "more than ")
        size *= 2
