"""The worker: the one thread that owns a model's engine; requests go in from the event loop, pieces come back to it.

    event loop   submit ─► inbox ───────────────┐                       ┌─► queue of each request ─► pieces
    worker                 engine.submit ─► engine.step ─► tokens ──────┘

All answers advance together, one token a step, beside one chunk of one waiting prompt, so that no stream waits longer
than a chunk takes. Knows no dialect and no HTTP.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import math
import queue
import threading
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from headrace.errors import HeadraceError, UserError
from headrace.language_model import LanguageModel
from headrace.model.weights import weight_table
from headrace.runtime.answer import Answer, Limits, Token
from headrace.runtime.grammar import Grammar
from headrace.runtime.request import Request
from headrace.runtime.sampling import SamplingOptions
from headrace.server.generation import GenerationRequest, Logprob, Piece, Refused, Usage
from headrace.server.metrics import Metrics
from headrace.text.tokenizer import Tokenizer
from headrace.text.turns import Message

__all__ = ["ModelWorker", "WorkerOptions"]

_log = logging.getLogger(__name__)
_WHOLE = 1 << 62  # room for any prompt: what does not fit is refused, not cut
RETRY_SECONDS = 2  # what a client is told to wait when the queue is full


@dataclass(frozen=True)
class WorkerOptions:
    """Limits of one model.

    Attributes:
        queue: requests that may wait beside those that run; one more is refused with 429.
        seconds: the longest time a request may take, from its arrival.
    """

    queue: int = 64
    seconds: float = 600.0


@dataclass
class _Job:
    """A request on its way: what the engine needs, and where its pieces go."""

    ids: list[int]
    options: SamplingOptions
    limits: Limits
    request: GenerationRequest
    continues: bool
    grammar: Grammar | None
    loop: asyncio.AbstractEventLoop
    pieces: asyncio.Queue[Piece | Exception]
    usage: Usage
    arrived: float = field(default_factory=time.monotonic)
    answers: list[Request] = field(default_factory=list)
    last: dict[int, float] = field(default_factory=dict)  # when each answer's newest token came
    gone: bool = False

    def _arrive(self, items: Sequence[Piece | Exception]) -> None:
        for item in items:
            self.pieces.put_nowait(item)

    def put(self, items: Sequence[Piece | Exception]) -> None:
        """Hand pieces to the event loop; called by the worker."""
        try:
            self.loop.call_soon_threadsafe(self._arrive, items)
        except RuntimeError:  # the loop has closed, and with it everybody who listened
            self.gone = True


class Generation:
    """A request under way, as the event loop sees it. A `Generator`."""

    def __init__(self, job: _Job) -> None:
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


class ModelWorker:
    """A model that is served. A `ServedModel`.

    Args:
        name: what clients call it.
        model: whose runner has the slots that answers run in.
        options: limits.
        metrics: what is counted.
    """

    def __init__(self, name: str, model: LanguageModel, options: WorkerOptions, metrics: Metrics) -> None:
        self.name = name
        self.created = int(time.time())
        self._model = model
        self._engine = model.engine
        self._options = options
        self._metrics = metrics
        self._inbox: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._waiting = 0  # jobs handed in and not yet begun
        self._jobs: dict[Request, tuple[_Job, int]] = {}
        self._closing = False
        self._parameters = sum(
            math.prod(row.shape) for row in weight_table(model.bundle.config).values() if row.stored_as == row.name
        )
        self._thread = threading.Thread(target=self._serve, name=f"headrace-{name}", daemon=True)
        metrics.cache_bytes.labels(name).set(self._engine.runner.kv_bytes)

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def close(self) -> None:
        """Stop answering and give back the model's memory; what runs is cut off."""
        self._closing = True
        self._inbox.put(None)
        self._thread.join()

    # On the event loop

    def submit(self, request: GenerationRequest) -> Generation:
        """Queue a request.

        Raises:
            Refused: the queue is full, or a field cannot be served.
            UserError: the prompt cannot be rendered or does not fit.
        """
        model, slots = self._model, self._engine.runner.slots
        if request.n > slots:
            raise Refused(f"n is {request.n}; expected at most {slots}, the answers that run at once", field="n")
        ids, continues, stop_ids = self._prompt(request)
        room = self._engine.context - len(ids)
        limits = Limits(min(request.max_tokens or room, room), stop_ids, request.stop)
        options = model.sampling_options(**request.sampling)
        grammar = self._grammar(request)
        if self._waiting + request.n > self._options.queue:
            raise Refused(
                f"{self._waiting} requests wait already; try again in {RETRY_SECONDS} s",
                status=429,
                retry_after=RETRY_SECONDS,
            )
        job = _Job(
            ids,
            options,
            limits,
            request,
            continues,
            grammar,
            asyncio.get_running_loop(),
            asyncio.Queue(),
            Usage(len(ids)),
        )
        self._waiting += request.n
        self._metrics.queued.labels(self.name).set(self._waiting)
        self._inbox.put(job)
        return Generation(job)

    def properties(self) -> Mapping[str, Any]:
        """What the model is: context length, sizes, precision, slots, turn format."""
        bundle, runner = self._model.bundle, self._engine.runner
        return {
            "context_length": self._engine.context,
            "slots": runner.slots,
            "parameters": f"{self._parameters / 1e9:.2f}B",
            "weight_bytes": bundle.weight_bytes,
            "kv_cache_bytes": runner.kv_bytes,
            "recipe": bundle.recipe.name,
            "runner": type(runner).__name__,
            "turn_format": self._model.turns.name,
            "tools": self._model.turns.takes_tools,
            "chat_template": self._model.tokenizer.chat_template,
            "checkpoint": bundle.provenance.get("checkpoint"),
            "digest": hashlib.sha256(json.dumps(bundle.files, sort_keys=True).encode()).hexdigest(),
        }

    def tokenize(self, text: str, *, special: bool) -> list[int]:
        """Ids of a text; `special`: with the begin token where the model wants one."""
        return self._model.encode_raw(text) if special else self._model.tokenizer.encode(text)

    def detokenize(self, ids: list[int]) -> str:
        """The text of ids.

        Raises:
            Refused: an id is not in the vocabulary.
        """
        size = self._model.tokenizer.vocab_size
        if any(not 0 <= i < size for i in ids):
            raise Refused(f"tokens has an id outside of the vocabulary; expected 0 … {size - 1}", field="tokens")
        return self._model.tokenizer.decode(ids)

    def render(self, request: GenerationRequest) -> tuple[str, list[int]]:
        """The prompt of a conversation, as text and ids."""
        ids, _, _ = self._prompt(request)
        return spelled_out(self._model.tokenizer, ids), ids

    def _prompt(self, request: GenerationRequest) -> tuple[list[int], bool, frozenset[int]]:
        """Ids of the prompt, whether the answer goes on from its text, and the tokens that end it."""
        model, prompt = self._model, request.prompt
        if request.is_conversation:
            messages = [message_of(raw) for raw in prompt if isinstance(raw, Mapping)]
            turns = model.turns
            return turns.render(messages, _WHOLE, request.tools), turns.continues, frozenset(turns.stop_ids)
        ids = model.encode_raw(prompt) if isinstance(prompt, str) else [int(i) for i in prompt if isinstance(i, int)]
        size = model.tokenizer.vocab_size
        if any(not 0 <= i < size for i in ids):
            raise Refused(f"prompt has an id outside of the vocabulary; expected 0 … {size - 1}", field="prompt")
        return ids, True, frozenset(model.tokenizer.eos_ids)

    def _grammar(self, request: GenerationRequest) -> Grammar | None:
        if request.grammar is None:
            return None
        try:
            return self._model.grammar(*request.grammar)
        except UserError as error:
            raise Refused(str(error), field="response_format") from None

    # In the worker's thread

    def _serve(self) -> None:
        while not self._closing:
            self._take_in(block=not self._jobs)
            if self._jobs:
                self._step()
        for job in {id(job): job for job, _ in self._jobs.values()}.values():
            job.put([Refused("the server is closing", status=503)])
        self._model.close()

    def _take_in(self, *, block: bool) -> None:
        """Begin what has arrived; `block`: wait for it, as there is nothing else to do."""
        while True:
            try:
                job = self._inbox.get(block)
            except queue.Empty:
                return
            block = False
            if job is None:
                return
            self._waiting -= job.request.n
            self._metrics.queued.labels(self.name).set(self._waiting)
            if not job.gone:
                self._begin(job)

    def _begin(self, job: _Job) -> None:
        made: list[Request] = []
        try:
            for index in range(job.request.n):
                seed = job.options.seed
                # Each answer of one request needs random numbers of its own, the same whatever else runs.
                options = job.options if seed is None or index == 0 else replace(job.options, seed=seed + index)
                answer = Answer(
                    self._model.tokenizer,
                    job.limits,
                    continues=job.continues,
                    logprobs=job.request.top_logprobs,
                    grammar=job.grammar,
                )
                request = self._engine.submit(job.ids, options, answer, after=made[0] if made else None)
                made.append(request)
                self._jobs[request] = (job, index)
        except Exception as error:  # whatever is wrong with one request, the others go on
            if not isinstance(error, HeadraceError):
                _log.exception("a request of %s could not begin", self.name)
            for request in made:
                request.cancel()
                self._jobs.pop(request, None)
            job.put([error])
            return
        job.answers = made
        self._metrics.prompt_tokens.labels(self.name).inc(len(job.ids))

    def _step(self) -> None:
        now = time.monotonic()
        for request, (job, index) in list(self._jobs.items()):
            if job.gone or request.cancelled:
                request.cancel()
                del self._jobs[request]
            elif now - job.arrived > self._options.seconds:
                request.cancel()
                del self._jobs[request]
                job.put([Piece(index, "", "length")])
        self._metrics.active.labels(self.name).set(len(self._jobs))
        try:
            made = self._engine.step()
        except Exception as error:
            # What runs is lost, and told so; the engine goes on with the next requests.
            _log.exception("a step of %s failed", self.name)
            for request, (job, _) in self._jobs.items():
                request.cancel()
                job.put([error])
            self._jobs.clear()
            return
        for request, (job, _) in list(self._jobs.items()):
            if request.error is not None:
                del self._jobs[request]
                job.put([request.error])
        pieces: dict[int, tuple[_Job, list[Piece]]] = {}
        for request, token in made:
            if request not in self._jobs:
                continue
            job, index = self._jobs[request]
            pieces.setdefault(id(job), (job, []))[1].append(self._piece(job, request, index, token))
            if token.finish is not None:
                del self._jobs[request]
        for job, items in pieces.values():
            job.put(items)

    def _piece(self, job: _Job, request: Request, index: int, token: Token) -> Piece:
        now = time.monotonic()
        if index in job.last:
            self._metrics.between_tokens.labels(self.name).observe(now - job.last[index])
        elif not job.last:
            cached = request.answer.usage.cached_tokens
            job.usage.cached_tokens = cached
            job.usage.prompt_seconds = now - job.arrived
            self._metrics.first_token.labels(self.name).observe(now - job.arrived)
            self._metrics.cached_tokens.labels(self.name).inc(cached)
        job.last[index] = now
        job.usage.completion_tokens += 1
        self._metrics.generated_tokens.labels(self.name).inc()
        if token.finish is not None:
            took = request.answer.usage
            self._metrics.drafted_tokens.labels(self.name).inc(took.drafted_tokens)
            self._metrics.accepted_tokens.labels(self.name).inc(took.accepted_tokens)
        if token.likelihood is None:
            return Piece(index, token.text, token.finish)
        spell, told = self._spell, token.likelihood
        top = tuple(Logprob(spell(other), logprob) for other, logprob in told.top)
        return Piece(index, token.text, token.finish, spell(token.id), told.logprob, top)

    def _spell(self, token: int) -> str:
        tokenizer = self._model.tokenizer
        return (
            tokenizer.id_to_piece(token)
            if token in tokenizer.special_ids
            else tokenizer.decode([token], continues=True)
        )


def message_of(raw: Mapping[str, Any]) -> Message:
    """A message of a request as the turn format takes it."""
    return Message(raw["role"], raw["content"], calls=tuple(raw.get("tool_calls", ())))


def spelled_out(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The text of ids, with special tokens as they are spelled."""
    text = ""
    run: list[int] = []
    for token in ids:
        if token in tokenizer.special_ids:
            text += tokenizer.decode(run, continues=True) + tokenizer.id_to_piece(token)
            run = []
        else:
            run.append(token)
    return text + tokenizer.decode(run, continues=True)
