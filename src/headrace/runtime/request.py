"""Request: an answer that is being made: its sequence, how tokens are chosen, what became of it. Computes nothing."""

from __future__ import annotations

from collections.abc import Sequence as Items
from itertools import zip_longest

import numpy as np

from headrace.errors import ContextFull, HeadraceError, UserError
from headrace.runtime.answer import Answer, Likelihood, Token
from headrace.runtime.context import slide
from headrace.runtime.runner import Logits
from headrace.runtime.sampling import Sampler, SamplingOptions, log_probabilities
from headrace.runtime.sequence import Sequence
from headrace.runtime.speculation import Speculation
from headrace.text.tokenizer import check_ids

__all__ = ["Request"]


class Request:
    """One answer in the making. Made by `Engine.submit`.

    Attributes:
        sequence: prompt and answer so far.
        answer: text, why it ended (`answer.finish`), and what it took (`answer.usage`).
        after: a request of the same prompt, whose cache this one waits for.
        done: it has ended, failed or was cancelled; its slot is free.
        error: why it failed: the model's logits are damaged, or its grammar ran into a limit. Others go on.
    """

    def __init__(
        self,
        prompt: Items[int],
        options: SamplingOptions,
        answer: Answer,
        *,
        context: int,
        vocab_size: int,
        after: Request | None = None,
        speculation: Speculation | None = None,
    ) -> None:
        if not len(prompt):
            raise UserError("the prompt is empty; expected at least one token")
        if len(prompt) >= context:
            raise ContextFull(len(prompt), context)
        if answer.limits.max_tokens < 1:
            raise UserError(f"max_tokens is {answer.limits.max_tokens}; expected 1 or more")
        if answer.logprobs is not None and answer.logprobs < 0:
            raise UserError(f"logprobs is {answer.logprobs}; expected 0 or more, or None")
        check_ids(prompt, vocab_size)
        options.check_vocabulary(vocab_size)
        hears = self._hear if answer.prompt_logprobs else None
        self.sequence = Sequence(prompt, reuses=hears is None, hears=hears)
        self.answer = answer
        self.answer.prompt = [None] * len(prompt) if answer.prompt_logprobs else []
        self.answer.usage.prompt_tokens = len(prompt)
        self.answer.tokens = self.sequence.tokens
        self.after = after
        self.cancelled = False
        self.done = False
        self.error: HeadraceError | None = None
        self._said: list[int] = []
        self._speculation = speculation
        self._drafts: list[int] = []
        self._guessed = False  # the step that runs is one of guesses, if only of none
        self._sampler = Sampler(options)
        self._context = context

    def cancel(self) -> None:
        """Stop; the engine frees the slot before its next step. The one call that any thread may make."""
        self.cancelled = True

    @property
    def waits(self) -> bool:
        """It has to wait for another request of the same prompt, which has not said anything yet."""
        return self.after is not None and not self.after.done and not self.after.answer.usage.tokens

    def draft(self) -> list[int]:
        """Guesses for the tokens after the next one, to be computed with it; none while the prompt is."""
        self._drafts, self._guessed = [], self.sequence.pending == 1
        if self._speculation is not None and self._guessed:
            limits = self.answer.limits
            most = min(self._context - len(self.sequence.tokens), limits.max_tokens - self.answer.usage.tokens - 1)
            self._drafts = self._speculation.draft(self.sequence.tokens, most)
        return self._drafts

    def timed(self, seconds: float) -> None:
        """What the step of the last `draft` took."""
        if self._speculation is not None and self._guessed:
            self._speculation.timed(1 + len(self._drafts), seconds)

    def take(self, logits: Logits) -> list[Token]:
        """Choose the next tokens from logits (1 + drafts, V) after the last one and after each draft. The end token is
        not part of the sequence.

        Each token is drawn from the model's own row, as it would be without drafts; as long as it is the one that was
        guessed, the next row is that of the same text. So nothing changes but the number of steps.
        """
        drafts, self._drafts = self._drafts, []
        made: list[Token] = []
        for row, draft in zip_longest(logits, drafts):
            token = self._choose(row)
            if token is None:
                break
            made.append(token)
            if token.id != draft or self.done or self.sequence.pending != 1:
                break
            self.sequence.held += 1  # the slot holds it already
        accepted = sum(token.id == draft for token, draft in zip(made, drafts))
        if drafts and self._speculation is not None:
            self._speculation.told(len(drafts), accepted)
            self.answer.usage.drafted_tokens += len(drafts)
            self.answer.usage.accepted_tokens += accepted
        return made

    def _hear(self, start: int, logits: Logits) -> None:
        """Note how likely the prompt's tokens behind a place were."""
        prompt = self.sequence.tokens
        for place, (row, token) in enumerate(zip(logits, prompt[start + 1 :]), start + 1):
            self.answer.prompt[place] = self._likelihood(row, token)

    def _choose(self, logits: Logits) -> Token | None:
        """The next token; None when the request failed."""
        tokens = self.sequence.tokens
        try:
            allowed = None if self.answer.grammar is None else self.answer.grammar.allowed()
            chosen = self._sampler.sample(logits, tokens, self._said, allowed)
            token = self.answer.take(chosen, self._likelihood(logits, chosen))
        except HeadraceError as error:
            self.error, self.done = error, True
            return None
        if token.finish is None and len(tokens) >= self._context and not self._make_room():
            token = self.answer.end(token, "context")  # nothing can be computed behind the last place
        if token.finish is None:
            self._said.append(chosen)
            self.sequence.extend([chosen])
        else:
            self.done = True
        return token

    def _make_room(self) -> bool:
        """Let older tokens go, where that is wanted. Keys are stored with their places in them, so all that stays is
        computed again."""
        beginning, tokens = self.answer.limits.beginning, self.sequence.tokens
        if beginning is None:
            return False
        left = slide(tokens, beginning, self._context, self._context - 1)
        self.answer.usage.dropped_tokens += len(tokens) - len(left)
        self.sequence.rewind(beginning)
        self.sequence.extend(left[beginning:])
        return True

    def _likelihood(self, logits: Logits, chosen: int) -> Likelihood | None:
        count = self.answer.logprobs
        if count is None:
            return None
        values = log_probabilities(logits)
        count = min(count, len(values))
        top = np.argpartition(-values, range(count))[:count] if count else ()
        return Likelihood(float(values[chosen]), tuple((int(i), float(values[i])) for i in top))
