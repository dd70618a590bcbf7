"""Answer: from chosen tokens to text and a reason to end; the same for every runner, also one that samples by itself.

    chosen ids ─► Answer.take ─► Token(id, text, finish)
                    stop ids · stop strings · max_tokens · whole characters

Knows no model and no turn format.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

from headrace.runtime.grammar import Grammar
from headrace.runtime.sampling import SamplingOptions
from headrace.text.streaming import TextStream
from headrace.text.tokenizer import Tokenizer

__all__ = ["Answer", "Answerer", "Likelihood", "Limits", "Token", "Usage"]


@dataclass
class Usage:
    """What an answer took, counted as it goes.

    Attributes:
        prompt_tokens: tokens of the prompt.
        cached_tokens: of these, how many were held already and needed no computing.
        tokens: tokens of the answer, its end token included.
        dropped_tokens: tokens of the conversation that the model did not see, or no longer, for want of room.
        drafted_tokens, accepted_tokens: tokens guessed ahead, and those of them that came (speculation.py).
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    tokens: int = 0
    dropped_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0


class Likelihood(NamedTuple):
    """How likely the model found a token, before any penalty or temperature.

    Attributes:
        logprob: natural logarithm of its probability.
        top: (id, logprob) of the likeliest tokens, the likeliest first.
    """

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Token:
    """One step of an answer.

    Attributes:
        id: the token.
        text: text that became certain with it; may be empty. All texts joined are the answer.
        finish: on the last one, why: "stop" (an end token or stop string), "length" (max_tokens) or "context".
        stop: the stop string it ended at, or None.
        usage: on the last one, what the answer took.
        likelihood: where it was asked for.
        raw: the bytes it adds to the text; none for an end token. Its text comes once they are whole characters.
        start: the character of the answer that these bytes begin, or go on with; exact in valid UTF-8.
    """

    id: int
    text: str
    finish: str | None = None
    stop: str | None = None
    usage: Usage | None = field(default=None, compare=False)
    likelihood: Likelihood | None = None
    raw: bytes = b""
    start: int = 0


class Limits(NamedTuple):
    """Where an answer ends.

    Attributes:
        max_tokens: after so many tokens.
        stop_ids: at any of these tokens.
        stops: at any of these strings, which are not part of it.
        beginning: not at the end of the context: so many first tokens of the prompt and the newest tokens then stay,
            others go (context.py, `window`). None ends there.
    """

    max_tokens: int
    stop_ids: Collection[int] = ()
    stops: Sequence[str] = ()
    beginning: int | None = None


class Answer:
    """One answer, token by token.

    Args:
        tokenizer: turns tokens to text.
        limits: where the answer ends.
        continues: the answer goes on from the prompt's text (see `Tokenizer.decode`).
        logprobs: tell how likely each token was, and so many of the likeliest at its place; None: tell nothing.
        prompt_logprobs: with `logprobs`, tell the same of the prompt's tokens, all of which are then computed.
        grammar: what the text must be; a stop string then ends it only where it is complete.

    Attributes:
        limits, logprobs, prompt_logprobs: as given.
        prompt: how likely each token of the prompt was, where that was asked for; None for the first.
        grammar: where the text is in its grammar, or None.
        usage: what it took so far.
        tokens: prompt and answer so far as the model has them before it, where an engine answers.
        finish: why it has ended, or None.

    Raises:
        UserError: a stop string is empty.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        limits: Limits,
        *,
        continues: bool = False,
        logprobs: int | None = None,
        prompt_logprobs: bool = False,
        grammar: Grammar | None = None,
    ) -> None:
        self.limits = limits
        self.logprobs = logprobs
        self.prompt_logprobs = prompt_logprobs and logprobs is not None
        self.prompt: list[Likelihood | None] = []
        self.usage = Usage()
        self.tokens: list[int] = []
        self.finish: str | None = None
        self.grammar = None if grammar is None else grammar.start()
        # A grammar is about every byte, so then no leading space is taken away.
        self._stream = TextStream(
            tokenizer,
            limits.stops,
            continues=continues or grammar is not None,
            may_stop=None if grammar is None else grammar.accepts,
        )

    def take(self, token: int, likelihood: Likelihood | None = None) -> Token:
        """The next chosen token. An end token gives its Token too, without text of its own.

        Raises:
            ValueError: the answer has ended.
        """
        if self.finish is not None:
            raise ValueError(f"the answer has ended ({self.finish}); it takes no more tokens")
        self.usage.tokens += 1
        stream, start = self._stream, self._stream.length
        if token in self.limits.stop_ids:
            return self.end(Token(token, "", likelihood=likelihood, start=start), "stop")
        text = stream.push(token)
        made = Token(token, text, stop=stream.stop, likelihood=likelihood, raw=stream.raw, start=start)
        complete = self.grammar is not None and self.grammar.take(token)
        if made.stop is not None or complete:
            return self.end(made, "stop")
        return self.end(made, "length") if self.usage.tokens >= self.limits.max_tokens else made

    def end(self, token: Token, finish: str) -> Token:
        """End with this token, for a reason that only the caller knows, such as "context"; what of the text was held
        back comes with it."""
        return replace(token, text=token.text + self.cut(finish), finish=finish, usage=self.usage)

    def cut(self, finish: str) -> str:
        """End without another token: what of the text was held back."""
        self.finish = finish
        return self._stream.finish()


class Answerer(Protocol):
    """Who answers prompts of token ids: an Engine over any runner, or one that chooses tokens by itself (Genie).

    Attributes:
        context: tokens of a prompt and its answer that there is room for.
    """

    @property
    def context(self) -> int: ...

    def answer(self, ids: Sequence[int], options: SamplingOptions, answer: Answer) -> Iterator[Token]:
        """Continue token ids; the prompt is computed when the first token is asked for. Closing the iterator stops
        the answer.

        Raises:
            ContextFull: the prompt leaves no room for an answer.
        """
        ...

    def close(self) -> None:
        """Give back memory and processes."""
        ...
