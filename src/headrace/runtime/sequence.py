"""Sequence: what one conversation has said, as tokens, and how much of it a slot holds. Computes nothing."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Items

from headrace.runtime.runner import Logits

__all__ = ["Sequence", "common_prefix"]


class Sequence:
    """Tokens said so far. Made by `Engine.open`, which alone changes `slot`, `held` and `last`.

    Attributes:
        tokens: all that was said; those from `held` on are yet to be computed.
        slot: where its keys and values are; None before the first step, and while others needed the slot.
        held: how many of the tokens the slot holds.
        last: logits (V,) after the last token, where they are known.
        answered: its prompt has been computed; what is pending from then on is the answer's.
        released: the engine may give its slot away; it takes no part in any step again.
        reuses: what others hold of it need not be computed again, and others may use what it holds.
        hears: told a position and the logits (n, V) after it and those that follow, as its prompt is computed; None
            behind that.
    """

    def __init__(
        self, ids: Items[int] = (), *, reuses: bool = True, hears: Callable[[int, Logits], None] | None = None
    ) -> None:
        self.tokens = [int(i) for i in ids]
        self.slot: int | None = None
        self.held = 0
        self.last: Logits | None = None
        self.answered = False
        self.released = False
        self.reuses = reuses
        self.hears = hears

    @property
    def pending(self) -> int:
        """Tokens that are yet to be computed."""
        return len(self.tokens) - self.held

    def extend(self, ids: Items[int]) -> None:
        """Say more."""
        if len(ids):
            self.tokens.extend(int(i) for i in ids)
            self.last = None

    def rewind(self, count: int) -> None:
        """Forget all but the first `count` tokens.

        Raises:
            ValueError: there are not so many.
        """
        if not 0 <= count <= len(self.tokens):
            raise ValueError(f"cannot rewind {len(self.tokens)} tokens to {count}")
        if count < len(self.tokens):
            del self.tokens[count:]
            self.held = min(self.held, count)
            self.last = None


def common_prefix(a: Items[int], b: Items[int]) -> int:
    """How many tokens two sequences begin with in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
