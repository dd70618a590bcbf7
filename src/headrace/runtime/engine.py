"""Engine: a growing sequence of tokens over a runner. Knows chunks and what is cached; no text, no sampling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from headrace.errors import ContextFull

__all__ = ["Engine", "Runner"]

Logits = NDArray[np.float32]


class Runner(Protocol):
    """One model, ready to compute; its KV cache is addressed by position.

    Attributes:
        vocab_size: width of the logits.
        context: positions the cache holds.
        prompt_length: most tokens a step takes.
        kv_bytes: bytes of the cache at full context.
    """

    vocab_size: int
    context: int
    prompt_length: int
    kv_bytes: int

    def step(self, ids: NDArray[np.int64], start: int, wanted: NDArray[np.int64]) -> Logits:
        """Run tokens ids (S,) at positions start … start+S−1, over the cache of the positions before.

        Returns:
            float32 (len(wanted), V): logits of the wanted ones among the S tokens.
        """
        ...

    def close(self) -> None:
        """Give back memory and processes."""
        ...


class Engine:
    """What has been said, as tokens, and the logits of what may follow.

    Args:
        runner: computes.

    Attributes:
        tokens: the tokens whose keys and values are in the cache.
    """

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.tokens: list[int] = []
        self._last: Logits | None = None

    @property
    def context(self) -> int:
        """Positions in all."""
        return self.runner.context

    @property
    def room(self) -> int:
        """Positions that are left."""
        return self.context - len(self.tokens)

    def reset(self) -> None:
        """Forget everything."""
        self.tokens.clear()
        self._last = None

    def prefill(self, ids: Sequence[int]) -> Logits:
        """Make `ids` the whole sequence, computing only what differs from what is there: logits (V,) of the last.

        Raises:
            ContextFull: they leave no room for a token of the answer.
        """
        if len(ids) >= self.context:
            raise ContextFull(len(ids), self.context)
        if not ids:
            raise ValueError("an empty prompt has no logits")
        shared = 0
        for ours, theirs in zip(self.tokens, ids):
            if ours != theirs:
                break
            shared += 1
        if shared == len(ids) and shared == len(self.tokens) and self._last is not None:
            return self._last
        shared = min(shared, len(ids) - 1)  # the last token's logits have to be computed
        del self.tokens[shared:]
        return self.append(ids[shared:])

    def append(self, ids: Sequence[int]) -> Logits:
        """Add tokens: logits (V,) of the last.

        Raises:
            ContextFull: they do not fit.
        """
        if len(ids) > self.room:
            raise ContextFull(len(self.tokens) + len(ids), self.context)
        self._last = None  # an interrupted step must not leave an older sequence's logits behind
        size = self.runner.prompt_length
        for at in range(0, len(ids), size):
            chunk = np.asarray(ids[at : at + size], np.int64)
            last = at + size >= len(ids)
            wanted = np.array([len(chunk) - 1] if last else [], np.int64)
            logits = self.runner.step(chunk, len(self.tokens), wanted)
            self.tokens.extend(int(i) for i in chunk)
        self._last = logits[0]
        return self._last

    def score(self, ids: Sequence[int], chunk: int | None = None) -> Logits:
        """Logits (len(ids), V) of every token of a new sequence; what was said before is forgotten.

        Args:
            ids: the tokens, as many as the context at most.
            chunk: tokens a step, the runner's most by default.

        Raises:
            ContextFull: they do not fit.
        """
        self.reset()
        if len(ids) > self.context:
            raise ContextFull(len(ids), self.context)
        size = min(chunk or self.runner.prompt_length, self.runner.prompt_length)
        out = np.empty((len(ids), self.runner.vocab_size), np.float32)
        for at in range(0, len(ids), size):
            part = np.asarray(ids[at : at + size], np.int64)
            out[at : at + len(part)] = self.runner.step(part, at, np.arange(len(part)))
        self.tokens = [int(i) for i in ids]
        self._last = out[-1] if len(ids) else None
        return out

    def close(self) -> None:
        """Give back the runner's memory and processes."""
        self.runner.close()
