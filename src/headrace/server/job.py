"""A request on its way between the event loop, where somebody waits for it, and the worker, who answers it.

    event loop   Generation ◄─ queue ◄─┐               the client's side: pieces, or to stop
    worker                  Job.piece ─┴─ deliver      the engine's side: tokens become pieces and are counted

Knows neither engine nor HTTP.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from headrace.runtime.answer import Token
from headrace.runtime.grammar import Grammar
from headrace.runtime.request import Request
from headrace.server.generation import GenerationRequest, Logprob, Piece, Usage
from headrace.server.metrics import ModelMetrics
from headrace.server.prompts import Prompt
from headrace.text.tokenizer import Tokenizer

__all__ = ["Delivery", "Generation", "Job", "deliver"]


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
    gone: bool = False

    def piece(self, index: int, token: Token, tokenizer: Tokenizer, metrics: ModelMetrics) -> Piece:
        """What a token adds to answer `index`; it is counted, and so is the time until it came."""
        now, took = time.monotonic(), self.answers[index].answer.usage
        if index in self.last:
            metrics.between_tokens.observe(now - self.last[index])
        elif not self.last:
            self.usage.cached_tokens = took.cached_tokens
            self.usage.prompt_seconds = now - self.arrived
            metrics.first_token.observe(now - self.arrived)
            metrics.cached_tokens.inc(took.cached_tokens)
        self.last[index] = now
        self.usage.completion_tokens += 1
        metrics.generated_tokens.inc()
        if token.finish is not None:
            metrics.drafted_tokens.inc(took.drafted_tokens)
            metrics.accepted_tokens.inc(took.accepted_tokens)
        if token.likelihood is None:
            return Piece(index, token.text, token.finish, token.stop)
        told = token.likelihood
        top = tuple(Logprob(_spelled(tokenizer, other), logprob) for other, logprob in told.top)
        return Piece(index, token.text, token.finish, token.stop, _spelled(tokenizer, token.id), told.logprob, top)


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


def _spelled(tokenizer: Tokenizer, token: int) -> str:
    """A token's own text; special ones have none, and are told as the vocabulary spells them."""
    if token in tokenizer.special_ids:
        return tokenizer.id_to_piece(token)
    return tokenizer.decode([token], continues=True)
