"""Which generation of Baichuan a GGUF holds: its header does not say, and head and vocabulary differ. Knows no file."""

from __future__ import annotations

__all__ = ["is_second_generation"]

FIRST, SECOND = 64_000, 125_696  # tokens of the published models


def is_second_generation(tokens: int) -> bool:
    """The generation with so many tokens: the nearer one, as vocabularies are padded and get tokens of their own."""
    return tokens > (FIRST + SECOND) // 2
