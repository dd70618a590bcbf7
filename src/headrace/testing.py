"""A Runner for tests: logits from a script or from a rule, over an honest cache of tokens.

    runner = ScriptedRunner.saying([9, 10, 2], prompt=3, vocab_size=256)
    engine = Engine(runner)

It checks its spans as every runner must and remembers them, so that a test can tell what was computed. No model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np

from headrace.runtime.runner import Logits, SlotLengths, Span

__all__ = ["ScriptedRunner", "prefix_logits"]


class ScriptedRunner:
    """A `Runner` whose logits are a function of all tokens up to the one they follow.

    Args:
        logits: the tokens of a slot so far → logits (V,) of the next one.
        vocab_size, context, slots, prompt_length, fine_tokens: as a `Runner` has them.

    Attributes:
        calls: the spans of every `run`, in order.
        cache: the tokens each slot holds.
        closed: `close` was called.
    """

    kv_bytes = 0

    def __init__(
        self,
        logits: Callable[[Sequence[int]], Logits],
        *,
        vocab_size: int,
        context: int = 64,
        slots: int = 1,
        prompt_length: int = 8,
        fine_tokens: int = 0,
    ) -> None:
        self.vocab_size = vocab_size
        self.context = context
        self.slots = slots
        self.prompt_length = prompt_length
        self.fine_tokens = fine_tokens
        self.calls: list[tuple[Span, ...]] = []
        self.cache: list[list[int]] = [[] for _ in range(slots)]
        self.closed = False
        self._logits = logits
        self._held = SlotLengths(slots, context, vocab_size)

    @classmethod
    def saying(
        cls, tokens: Sequence[int], *, prompt: int, vocab_size: int, context: int = 64, slots: int = 1
    ) -> ScriptedRunner:
        """Says these tokens, greedily sampled, behind any prompt of `prompt` tokens; then token 0."""
        said = list(tokens)

        def logits(ids: Sequence[int]) -> Logits:
            row = np.zeros(vocab_size, np.float32)
            at = len(ids) - prompt
            row[said[at] if 0 <= at < len(said) else 0] = 9
            return row

        return cls(logits, vocab_size=vocab_size, context=context, slots=slots)

    @property
    def spans(self) -> list[Span]:
        """All spans so far, whatever call they came in."""
        return [span for call in self.calls for span in call]

    @property
    def computed(self) -> int:
        """Tokens computed so far."""
        return sum(len(span.ids) for span in self.spans)

    def run(self, spans: Sequence[Span]) -> Logits:
        self._held.begin(spans)
        self.calls.append(tuple(spans))
        rows = [np.empty((0, self.vocab_size), np.float32)]
        for span in spans:
            cache = self.cache[span.slot]
            cache[span.start :] = span.ids
            rows += [self._logits(cache[: span.start + place + 1])[None] for place in span.wanted]
            self._held.done(span)
        return np.concatenate(rows)

    def copy(self, source: int, target: int, count: int) -> None:
        self._held.copied(source, target, count)
        self.cache[target] = self.cache[source][:count]

    def read(self, slot: int, start: int, stop: int) -> bytes:
        self._held.check_held(slot, start, stop)
        return np.array(self.cache[slot][start:stop], np.int64).tobytes()

    def write(self, slot: int, start: int, content: bytes) -> None:
        self._held.written(slot, start, len(content), 8)
        self.cache[slot][start:] = np.frombuffer(content, np.int64).tolist()

    def close(self) -> None:
        self.closed = True


def prefix_logits(vocab_size: int) -> Callable[[Sequence[int]], Logits]:
    """Random logits that depend on every token before: two runs agree only where their whole sequences do."""

    def logits(ids: Sequence[int]) -> Logits:
        digest = hashlib.sha256(np.array(ids, np.int64).tobytes()).digest()
        row = np.random.default_rng(int.from_bytes(digest[:8], "little")).normal(size=vocab_size)
        return row.astype(np.float32)

    return logits
