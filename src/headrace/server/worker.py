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
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from headrace.errors import HeadraceError, UserError
from headrace.language_model import LanguageModel
from headrace.model.weights import weight_table
from headrace.runtime.answer import Answer
from headrace.runtime.request import Request
from headrace.runtime.session import read_session, write_session
from headrace.server.generation import GenerationRequest, Piece, Refused, Usage
from headrace.server.job import Generation, Job, deliver
from headrace.server.metrics import Metrics
from headrace.server.prompts import compiled, prepare, render, spelled_out
from headrace.server.sessions import message_object, message_of

__all__ = ["ModelWorker", "WorkerOptions"]

_log = logging.getLogger(__name__)
RETRY_SECONDS = 2  # what a client is told to wait when there is no room for its request

T = TypeVar("T")


@dataclass(frozen=True)
class WorkerOptions:
    """Limits of one model.

    Attributes:
        queue: requests that may wait beside those that run; one more is refused with 429.
        seconds: the longest time a request may take, from its arrival; one that has not begun by then is refused.
    """

    queue: int = 64
    seconds: float = 600.0


@dataclass(frozen=True)
class _Task:
    """Something else that the engine's thread does between two steps, once a slot is vacant."""

    work: Callable[[], Any]
    done: Future[Any]


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
        self._metrics = metrics.of(name)
        self._inbox: queue.SimpleQueue[Job | _Task | None] = queue.SimpleQueue()
        self._tasks: deque[_Task] = deque()
        self._open = 0  # answers asked for that have not ended
        self._counting = threading.Lock()
        self._jobs: dict[Request, tuple[Job, int]] = {}
        self._closing = False
        self._parameters = sum(
            math.prod(row.shape) for row in weight_table(model.bundle.config).values() if row.stored_as == row.name
        )
        # Grammars are compiled one at a time, and some take seconds to be refused: in a thread that nobody else needs.
        self._compiler = ThreadPoolExecutor(1, f"headrace-{name}-grammars")
        self._thread = threading.Thread(target=self._serve, name=f"headrace-{name}", daemon=True)
        self._metrics.cache_bytes.set(self._engine.runner.kv_bytes)

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Requests are answered."""
        return self._thread.is_alive()

    def close(self) -> None:
        """Stop answering and give back the model's memory; what runs is cut off."""
        self._compiler.shutdown(cancel_futures=True)
        self._closing = True
        self._inbox.put(None)
        self._thread.join()

    # On the event loop

    async def submit(self, request: GenerationRequest) -> Generation:
        """Queue a request. Its prompt is rendered in a thread and its grammar compiled in another, so that streams
        under way do not wait for that, and requests without a grammar not for those that have one.

        Raises:
            Refused: the queue is full, or a field cannot be served.
            UserError: the prompt cannot be rendered or does not fit.
        """
        slots = self._engine.runner.slots
        if request.n > slots:
            raise Refused(f"n is {request.n}; expected at most {slots}, the answers that run at once", field="n")
        if self._open + request.n > slots + self._options.queue:
            raise Refused(
                f"{self._open - slots} answers wait already; try again in {RETRY_SECONDS} s",
                status=429,
                retry_after=RETRY_SECONDS,
            )
        arrived, loop = time.monotonic(), asyncio.get_running_loop()
        self._count(request.n)
        try:
            prompt = await asyncio.to_thread(prepare, self._model, request)
            grammar = None
            if request.grammar is not None:
                grammar = await loop.run_in_executor(self._compiler, compiled, self._model, *request.grammar)
        except BaseException:
            self._count(-request.n)
            raise
        usage = Usage(len(prompt.ids))
        job = Job(prompt, grammar, request, loop, asyncio.Queue(), usage, arrived)
        self._inbox.put(job)
        return Generation(job)

    async def save_session(self, request: GenerationRequest, path: Path) -> int:
        """Write a conversation to a file, with what is held of its cache: of how many tokens.

        Raises:
            UserError: the prompt cannot be rendered, or the file cannot be written.
        """
        prompt = await asyncio.to_thread(prepare, self._model, request)
        messages = [message_of(raw) for raw in request.prompt if isinstance(raw, Mapping)]
        session = await self._between_steps(lambda: self._model.session(messages, prompt.ids))
        await asyncio.to_thread(write_session, path, session)
        return len(session.tokens)

    async def restore_session(self, path: Path) -> tuple[list[dict[str, Any]], int]:
        """The messages of a saved conversation, and how many tokens of it are held from now on.

        Raises:
            UserError: the file is damaged, or of another model or runner.
        """
        session = await asyncio.to_thread(read_session, path)
        await self._between_steps(lambda: self._model.hold(session, path))
        return [message_object(message) for message in session.messages], len(session.tokens)

    async def _between_steps(self, work: Callable[[], T]) -> T:
        """Let the engine's thread do something."""
        done: Future[T] = Future()
        self._inbox.put(_Task(work, done))
        return await asyncio.wrap_future(done)

    def _count(self, more: int) -> None:
        """So many answers more are open, from the moment they are asked for until they have ended."""
        slots = self._engine.runner.slots
        with self._counting:
            self._open += more
            self._metrics.queued.set(max(self._open - slots, 0))
            self._metrics.active.set(min(self._open, slots))

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
        ids = render(self._model, request).ids
        return spelled_out(self._model.tokenizer, ids), ids

    # In the worker's thread

    def _serve(self) -> None:
        # The table of the vocabulary that grammars need holds Python's lock while it is made, half a second long: now,
        # before anybody waits.
        with suppress(UserError):  # llguidance is not installed, or the model has no token that ends an answer
            self._model.grammar("json_object")
        while not self._closing:
            idle = self._engine.idle and not self._tasks
            for arrived in self._arrived(wait=idle):
                if isinstance(arrived, _Task):
                    self._tasks.append(arrived)
                elif arrived.gone:
                    self._count(-arrived.request.n)
                else:
                    self._begin(arrived)
            if not self._engine.idle:  # also when everybody has left: their slots are freed
                self._step()
            while self._tasks and self._engine.slots.vacancy:
                self._do(self._tasks.popleft())
        closing = Refused("the server is closing", status=503)
        left = [*self._tasks, *self._arrived(wait=False), *{id(job): job for job, _ in self._jobs.values()}.values()]
        for one in left:
            if isinstance(one, Job):
                deliver([(one, [closing])])
            elif one.done.set_running_or_notify_cancel():
                one.done.set_exception(closing)
        self._model.close()

    def _arrived(self, *, wait: bool) -> Iterator[Job | _Task]:
        """What has come; `wait`: for the first, as there is nothing else to do."""
        while True:
            try:
                one = self._inbox.get(wait)
            except queue.Empty:
                return
            if one is not None:
                yield one
            wait = False

    def _do(self, task: _Task) -> None:
        if not task.done.set_running_or_notify_cancel():
            return
        try:
            task.done.set_result(task.work())
        except Exception as error:  # it is told to whoever asked
            task.done.set_exception(error)

    def _begin(self, job: Job) -> None:
        prompt, made = job.prompt, list[Request]()
        try:
            for index in range(job.request.n):
                seed = prompt.options.seed
                # Each answer of one request needs random numbers of its own, the same whatever else runs.
                options = prompt.options if seed is None or index == 0 else replace(prompt.options, seed=seed + index)
                answer = Answer(
                    self._model.tokenizer,
                    prompt.limits,
                    continues=prompt.continues,
                    logprobs=job.request.top_logprobs,
                    prompt_logprobs=job.request.echo and index == 0,
                    grammar=job.grammar,
                )
                made.append(self._engine.submit(prompt.ids, options, answer, after=made[0] if made else None))
        except Exception as error:  # whatever is wrong with one request, the others go on
            if not isinstance(error, HeadraceError):
                _log.exception("a request of %s could not begin", self.name)
            for request in made:
                request.cancel()
            self._count(-job.request.n)
            deliver([(job, [error])])
            return
        job.answers = made
        self._jobs |= {request: (job, index) for index, request in enumerate(made)}
        self._metrics.prompt_tokens.inc(len(prompt.ids))

    def _too_late(self) -> Refused:
        """A request's time has ended before its answer began."""
        return Refused(
            f"{self._options.seconds:g} s were not enough to begin an answer; try again in {RETRY_SECONDS} s",
            status=503,
            retry_after=RETRY_SECONDS,
        )

    def _end(self, request: Request) -> None:
        """Nothing more comes of an answer; where it runs still, it is stopped."""
        request.cancel()
        del self._jobs[request]
        self._count(-1)

    def _step(self) -> None:
        now = time.monotonic()
        for request, (job, index) in list(self._jobs.items()):
            if job.gone or request.cancelled:
                self._end(request)
            elif now - job.arrived > self._options.seconds:
                self._end(request)
                last = job.cut(index, request.answer.cut("length")) if job.last else self._too_late()
                deliver([(job, [last])])
        try:
            made = self._engine.step()
        except Exception as error:
            # What runs is lost, and told so; the engine goes on with the next requests.
            _log.exception("a step of %s failed", self.name)
            for request, (job, _) in list(self._jobs.items()):
                self._end(request)
                deliver([(job, [error])])
            return
        pieces: dict[int, tuple[Job, list[Piece | Exception]]] = {}
        for request, token in made:
            if request in self._jobs:
                job, index = self._jobs[request]
                pieces.setdefault(id(job), (job, []))[1].append(
                    job.piece(index, token, self._model.tokenizer, self._metrics)
                )
        for request, (job, _) in list(self._jobs.items()):
            if request.done:
                self._end(request)
                if request.error is not None:
                    pieces.setdefault(id(job), (job, []))[1].append(request.error)
        deliver(list(pieces.values()))
