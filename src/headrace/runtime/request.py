"""Request: an answer that is being made: its sequence, how tokens are chosen, what became of it. Computes nothing."""

from __future__ import annotations

from collections.abc import Sequence as Items

from headrace.errors import ContextFull
from headrace.runtime.answer import Answer, Token
from headrace.runtime.runner import Logits
from headrace.runtime.sampling import Sampler, SamplingOptions
from headrace.runtime.sequence import Sequence

__all__ = ["Request"]


class Request:
    """One answer in the making. Made by `Engine.submit`.

    Attributes:
        prompt: its token ids.
        sequence: prompt and answer so far; None until the engine first works on it.
        cached_tokens: of the prompt, how many were there already and needed no computing.
        done: it has ended or was cancelled; its slot is free.
    """

    def __init__(self, prompt: Items[int], options: SamplingOptions, answer: Answer, context: int) -> None:
        if not len(prompt):
            raise ValueError("an empty prompt has no logits")
        if len(prompt) >= context:
            raise ContextFull(len(prompt), context)
        self.prompt = [int(i) for i in prompt]
        self.sequence: Sequence | None = None
        self.cached_tokens = 0
        self.cancelled = False
        self.done = False
        self._answer = answer
        self._sampler = Sampler(options)
        self._context = context

    def cancel(self) -> None:
        """Stop; the engine frees the slot before its next step. The one call that any thread may make."""
        self.cancelled = True

    def take(self, logits: Logits) -> Token:
        """Choose the next token from logits (V,) of the last one. The end token is not part of the sequence."""
        sequence = self.sequence
        assert sequence is not None
        token = self._answer.take(self._sampler.sample(logits, sequence.tokens))
        if token.finish is None and len(sequence.tokens) >= self._context:
            token = self._answer.end(token, "context")  # nothing can be computed behind the last place
        if token.finish is None:
            sequence.extend([token.id])
        else:
            self.done = True
        return token
