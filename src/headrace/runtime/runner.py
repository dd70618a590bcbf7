"""Runner: what computes a model's logits, whoever it is, and the spans it is asked for.

    slot 0   │ a conversation: positions 0 … n−1 are held │ span (start n, ids) │ room
    slot 1   │ another one           │ span │ room

Each slot holds the keys and values of one sequence. A runner knows no text, no sampling and no order of work.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from headrace.errors import ContextFull, UserError

__all__ = ["Logits", "Runner", "SlotLengths", "Span"]

Logits: TypeAlias = NDArray[np.float32]


class Span(NamedTuple):
    """A stretch of one sequence that is to be computed.

    Attributes:
        slot: the slot that holds the sequence.
        start: position of the first token; the slot holds 0 … start−1. What it holds from `start` on is forgotten.
        ids: the tokens, at least one.
        wanted: places among `ids` whose logits are asked for, in any order; row i predicts the token after ids[i].
    """

    slot: int
    start: int
    ids: tuple[int, ...]
    wanted: tuple[int, ...] = ()

    @property
    def stop(self) -> int:
        """The position behind the last token."""
        return self.start + len(self.ids)


@runtime_checkable
class Runner(Protocol):
    """One model, ready to compute, with a KV cache of several slots.

    Attributes:
        vocab_size: V, the width of the logits.
        context: positions that each slot has.
        slots: how many sequences it holds at once.
        prompt_length: the most tokens of a span that it computes well in one go; more are allowed.
        fine_tokens: spans of so few tokens are computed in a finer arithmetic than longer ones; 0 where all are alike.
        kv_bytes: bytes of all slots at full context.
    """

    vocab_size: int
    context: int
    slots: int
    prompt_length: int
    fine_tokens: int
    kv_bytes: int

    def run(self, spans: Sequence[Span]) -> Logits:
        """Compute spans of different slots; any mixture of prompts, single tokens and drafts.

        Returns:
            float32 (wanted rows of all spans, V): span after span, as each asked; the caller's own.

        Raises:
            ContextFull: a span goes beyond the context.
            UserError: an id is not in the vocabulary.
            ValueError: a slot does not exist or comes twice, or a span leaves a gap behind what its slot holds.
        """
        ...

    def copy(self, source: int, target: int, count: int) -> None:
        """Make slot `target` hold the first `count` positions of slot `source`, and nothing else."""
        ...

    def read(self, slot: int, start: int, stop: int) -> bytes:
        """The cache of positions start … stop−1, in the runner's own layout; the same number of bytes a position."""
        ...

    def write(self, slot: int, start: int, content: bytes) -> None:
        """Put back what `read` gave, at `start`; what the slot holds from there on is forgotten.

        Raises:
            ValueError: the bytes are no whole number of positions, do not fit, or leave a gap.
        """
        ...

    def close(self) -> None:
        """Give back memory and processes."""
        ...


class SlotLengths:
    """How many positions each slot holds: what a runner checks its spans against.

    Args:
        slots, context, vocab_size: the runner's.
    """

    def __init__(self, slots: int, context: int, vocab_size: int) -> None:
        if slots < 1:
            raise ValueError(f"{slots} slots are not possible; expected 1 or more")
        self.context = context
        self.vocab_size = vocab_size
        self._held = [0] * slots

    def __getitem__(self, slot: int) -> int:
        return self._held[slot]

    def begin(self, spans: Sequence[Span]) -> None:
        """Check all spans, then forget what their slots hold from each start on. Nothing changes on an error."""
        seen: set[int] = set()
        for span in spans:
            self._slot(span.slot)
            if span.slot in seen:
                raise ValueError(f"slot {span.slot} comes twice in one run; expected one span a slot")
            seen.add(span.slot)
            if not span.ids:
                raise ValueError(f"the span of slot {span.slot} is empty; expected at least one token")
            self._start(span.slot, span.start)
            if span.stop > self.context:
                raise ContextFull(span.stop, self.context)
            for token in (min(span.ids), max(span.ids)):
                if not 0 <= token < self.vocab_size:
                    raise UserError(f"token {token} is not in the model's vocabulary of {self.vocab_size} tokens")
            for place in span.wanted:
                if not 0 <= place < len(span.ids):
                    raise ValueError(f"logits of token {place} are wanted of a span of {len(span.ids)} tokens")
        for span in spans:
            self._held[span.slot] = span.start

    def done(self, span: Span) -> None:
        """The span is in its slot."""
        self._held[span.slot] = span.stop

    def copied(self, source: int, target: int, count: int) -> None:
        """Check a copy, and note it."""
        self._slot(target)
        self.check_held(source, 0, count)
        self._held[target] = count

    def check_held(self, slot: int, start: int, stop: int) -> None:
        """Raise ValueError where the slot does not hold positions start … stop−1."""
        self._slot(slot)
        if not 0 <= start <= stop <= self._held[slot]:
            raise ValueError(f"positions {start} to {stop} of slot {slot} are not there; it holds {self._held[slot]}")

    def written(self, slot: int, start: int, size: int, position_bytes: int) -> int:
        """Check a write of `size` bytes, and note it: how many positions they are."""
        self._slot(slot)
        self._start(slot, start)
        count, rest = divmod(size, position_bytes)
        if rest:
            raise ValueError(f"{size} bytes are no whole number of positions of {position_bytes} bytes each")
        if start + count > self.context:
            raise ValueError(f"{count} positions from {start} on do not fit a context of {self.context}")
        self._held[slot] = start + count
        return count

    def _slot(self, slot: int) -> None:
        if not 0 <= slot < len(self._held):
            raise ValueError(f"slot {slot} does not exist; expected 0 to {len(self._held) - 1}")

    def _start(self, slot: int, start: int) -> None:
        if not 0 <= start <= self._held[slot]:
            raise ValueError(f"position {start} leaves a gap: slot {slot} holds {self._held[slot]} positions")
