"""Request: an answer that is being made: its sequence, how tokens are chosen, what became of it. Computes nothing."""

from __future__ import annotations

from collections.abc import Sequence as Items

from headrace.errors import ContextFull, UserError
from headrace.runtime.answer import Answer, Token
from headrace.runtime.runner import Logits
from headrace.runtime.sampling import Sampler, SamplingOptions
from headrace.runtime.sequence import Sequence

__all__ = ["Request"]


class Request:
    """One answer in the making. Made by `Engine.submit`.

    Attributes:
        sequence: prompt and answer so far.
        answer: text, why it ended (`answer.finish`), and what it took (`answer.usage`).
        after: a request of the same prompt, whose cache this one waits for.
        done: it has ended or was cancelled; its slot is free.
    """

    def __init__(
        self,
        prompt: Items[int],
        options: SamplingOptions,
        answer: Answer,
        context: int,
        after: Request | None = None,
    ) -> None:
        if not len(prompt):
            raise ValueError("an empty prompt has no logits")
        if len(prompt) >= context:
            raise ContextFull(len(prompt), context)
        if answer.limits.max_tokens < 1:
            raise UserError(f"max_tokens is {answer.limits.max_tokens}; expected 1 or more")
        self.sequence = Sequence(prompt)
        self.answer = answer
        self.answer.usage.prompt_tokens = len(prompt)
        self.after = after
        self.cancelled = False
        self.done = False
        self._sampler = Sampler(options)
        self._context = context

    def cancel(self) -> None:
        """Stop; the engine frees the slot before its next step. The one call that any thread may make."""
        self.cancelled = True

    @property
    def waits(self) -> bool:
        """It has to wait for another request of the same prompt, which has not said anything yet."""
        return self.after is not None and not self.after.done and not self.after.answer.usage.tokens

    def take(self, logits: Logits) -> Token:
        """Choose the next token from logits (V,) of the last one. The end token is not part of the sequence."""
        sequence = self.sequence
        token = self.answer.take(self._sampler.sample(logits, sequence.tokens))
        if token.finish is None and len(sequence.tokens) >= self._context:
            token = self.answer.end(token, "context")  # nothing can be computed behind the last place
        if token.finish is None:
            sequence.extend([token.id])
        else:
            self.done = True
        return token
