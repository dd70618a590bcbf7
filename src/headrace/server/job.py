"""A request on its way between the event loop, where somebody waits for it, and the worker, who answers it.

    event loop   Generation ◄─ queue ◄─┐               the client's side: pieces, or to stop
    worker                  Job.piece ─┴─ deliver      the engine's side: tokens become pieces and are counted

Knows neither engine nor HTTP.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from headrace.runtime.answer import Likelihood, Token
from headrace.runtime.grammar import Grammar
from headrace.runtime.request import Request
from headrace.server.generation import GenerationRequest, Logprob, Piece, Usage
from headrace.server.metrics import ModelMetrics
from headrace.server.prompts import Prompt
from headrace.text.streaming import TextStream
from headrace.text.tokenizer import Tokenizer

__all__ = ["Delivery", "Generation", "Job", "deliver"]


@dataclass
class _Telling:
    """Tokens of an answer and how likely they were, each told once text of it was given out: a token of a stop string
    is none of the answer.

    Attributes:
        begins: characters of the prompt that are given before it.
        given: characters so far, these included.
        waiting: tokens whose text was not given yet.
    """

    begins: int
    given: int
    waiting: list[Logprob] = field(default_factory=list)

    def tell(self, text: str, ended: bool) -> tuple[Logprob, ...]:
        """What is told with the next text of the answer; where it ends, tokens without text too."""
        self.given += len(text)
        told = tuple(one for one in self.waiting if one.start < self.given or (ended and not one.raw))
        self.waiting = [one for one in self.waiting if one.start >= self.given]
        return told


@dataclass
class Job:
    """A request on its way: what the engine needs, and where its pieces go.

    Attributes:
        prompt: what is computed.
        grammar: what answers must be, or None.
        request: what was asked for.
        loop: where somebody waits.
        pieces: what has come for them, in order.
        usage: what was counted.
        arrived: when it came, by the monotonic clock.
        answers: as the engine has them.
        last: when each answer's newest token came.
        telling: of each answer, the tokens that are told with their probabilities.
        gone: nobody waits any more.
    """

    prompt: Prompt
    grammar: Grammar | None
    request: GenerationRequest
    loop: asyncio.AbstractEventLoop
    pieces: asyncio.Queue[Piece | Exception]
    usage: Usage
    arrived: float = field(default_factory=time.monotonic)
    answers: list[Request] = field(default_factory=list)
    last: dict[int, float] = field(default_factory=dict)
    telling: dict[int, _Telling] = field(default_factory=dict)
    gone: bool = False

    def piece(self, index: int, token: Token, tokenizer: Tokenizer, metrics: ModelMetrics) -> Piece:
        """What a token adds to answer `index`; it is counted, and so is the time until it came."""
        now, took = time.monotonic(), self.answers[index].answer.usage
        echo = self._echo(tokenizer) if self.request.echo and index not in self.last else Piece(index, "")
        if index in self.last:
            metrics.between_tokens.observe(now - self.last[index])
        elif not self.last:
            self.usage.cached_tokens = took.cached_tokens
            self.usage.prompt_seconds = now - self.arrived
            metrics.first_token.observe(now - self.arrived)
            metrics.cached_tokens.inc(took.cached_tokens)
        self.last[index] = now
        if self.request.max_tokens == 0:
            return replace(echo, choice=index, finish="length")
        self.usage.completion_tokens += 1
        metrics.generated_tokens.inc()
        if token.finish is not None:
            metrics.drafted_tokens.inc(took.drafted_tokens)
            metrics.accepted_tokens.inc(took.accepted_tokens)
        tokens: tuple[Logprob, ...] = ()
        if token.likelihood is not None:
            telling = self.telling.setdefault(index, _Telling(len(echo.text), len(echo.text)))
            start = telling.begins + token.start
            telling.waiting.append(_logprob(tokenizer, token.id, token.raw, start, token.likelihood))
            tokens = telling.tell(token.text, token.finish is not None)
        return Piece(index, echo.text + token.text, token.finish, token.stop, (*echo.tokens, *tokens))

    def cut(self, index: int, text: str) -> Piece:
        """The last piece of an answer that is stopped before its end; text: what was held back of it."""
        telling = self.telling.get(index)
        return Piece(index, text, "length", tokens=telling.tell(text, ended=False) if telling else ())

    def _echo(self, tokenizer: Tokenizer) -> Piece:
        """The prompt's text, with its tokens where they are told."""
        said, stream, tokens = self.request.prompt, TextStream(tokenizer), []
        for token, likelihood in zip(self.prompt.ids, self.answers[0].answer.prompt):
            start = stream.length
            stream.push(token)
            tokens.append(_logprob(tokenizer, token, stream.raw, start, likelihood))
        return Piece(0, said if isinstance(said, str) else tokenizer.decode(self.prompt.ids), tokens=tuple(tokens))


Delivery: TypeAlias = list[tuple[Job, list[Piece | Exception]]]


class Generation:
    """A request under way, as the event loop sees it. A `Generator`."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self.usage = job.usage

    async def __aiter__(self) -> AsyncIterator[Piece]:
        left = self._job.request.n
        while left:
            item = await self._job.pieces.get()
            if isinstance(item, Exception):
                raise item
            yield item
            left -= item.finish is not None

    async def aclose(self) -> None:
        """Stop; the worker frees the slots before its next step."""
        self._job.gone = True
        for request in self._job.answers:
            request.cancel()


def deliver(items: Delivery) -> None:
    """Hand pieces to the event loops that wait for them; called by the worker. Once for all answers of a step: each
    call wakes the loop, which then wants Python's lock while the worker still has it."""
    for loop in {job.loop for job, _ in items}:
        mine = [(job, pieces) for job, pieces in items if job.loop is loop]
        try:
            loop.call_soon_threadsafe(_take_all, mine)
        except RuntimeError:  # the loop has closed, and with it everybody who listened
            for job, _ in mine:
                job.gone = True


def _take_all(items: Sequence[tuple[Job, list[Piece | Exception]]]) -> None:
    for job, pieces in items:
        for piece in pieces:
            job.pieces.put_nowait(piece)


def _logprob(tokenizer: Tokenizer, token: int, raw: bytes, start: int, likelihood: Likelihood | None) -> Logprob:
    """A token as it is told, with the likeliest at its place."""
    if likelihood is None:
        return Logprob(_spelled(tokenizer, token, raw), raw, None, start)
    top = []
    for other, logprob in likelihood.top:
        theirs = raw if other == token else tokenizer.piece_bytes(other)
        top.append(Logprob(_spelled(tokenizer, other, theirs), theirs, logprob))
    return Logprob(_spelled(tokenizer, token, raw), raw, likelihood.logprob, start, tuple(top))


def _spelled(tokenizer: Tokenizer, token: int, raw: bytes) -> str:
    """A token's own text; one without, such as a special one, as the vocabulary spells it, or by its number."""
    return raw.decode("utf-8", errors="backslashreplace") or tokenizer.id_to_piece(token) or f"<{token}>"
