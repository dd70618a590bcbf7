"""A model that runs on a Ray cluster, N times, as the door sees it: requests go where their conversation has been.

    door (this process) ─► RemoteModel ─► Ray Serve ─► replica: ModelWorker over an engine
                                            │
                                            └─ by prefix: the replicas in the order of a hash of (beginning, replica)

A replica that dies is started again elsewhere, and only its own conversations move. Each replica holds its caches; a
request whose replica is full goes to the next one in its order. Knows no HTTP.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from headrace.cluster import connect
from headrace.errors import HeadraceError, TargetError
from headrace.language_model import load
from headrace.progress import Progress, silent
from headrace.server.generation import GenerationRequest, Piece, Refused, Usage
from headrace.server.metrics import Metrics
from headrace.server.worker import ModelWorker, WorkerOptions

__all__ = ["Loading", "RemoteModel", "beginning", "in_order", "replicated"]

BEGINNING = 512  # characters of a prompt, or tokens, that say which conversation it is
DRAIN_SECONDS = 30  # for a replica's answers, when it is replaced
RETRY_SECONDS = 2


@dataclass(frozen=True)
class Loading:
    """How each replica opens the bundle.

    Attributes:
        path: the folder, the same on every node.
        slots: answers that run at once.
        threads: of each replica, which takes as many of its node's processors.
        limits: of each replica.
        opening: what else `headrace.load` takes: runner, huge_pages, speculate.
    """

    path: Path
    slots: int = 4
    threads: int = 1
    limits: WorkerOptions = field(default_factory=WorkerOptions)
    opening: Mapping[str, Any] = field(default_factory=dict)


class Replica:
    """One process with the model; its methods are called from elsewhere."""

    def __init__(self, name: str, loading: Loading) -> None:
        model = load(loading.path, slots=loading.slots, threads=loading.threads, **loading.opening)
        self._worker = ModelWorker(name, model, loading.limits, Metrics())
        self._worker.start()

    async def answer(self, request: GenerationRequest) -> AsyncIterator[tuple[Piece | None, Usage]]:
        """The usage once the request is accepted, then each piece with the usage so far."""
        generator = await self._worker.submit(request)
        try:
            yield None, replace(generator.usage)
            async for piece in generator:
                yield piece, replace(generator.usage)
        finally:
            await generator.aclose()

    async def properties(self) -> dict[str, Any]:
        """What the model is."""
        return dict(self._worker.properties())

    async def tokenize(self, text: str, special: bool) -> list[int]:
        """Ids of a text."""
        return self._worker.tokenize(text, special=special)

    async def detokenize(self, ids: list[int]) -> str:
        """The text of ids."""
        return self._worker.detokenize(ids)

    async def render(self, request: GenerationRequest) -> tuple[str, list[int]]:
        """The prompt of a conversation."""
        return self._worker.render(request)

    def check_health(self) -> None:
        """Ray Serve asks this now and then; a replica that raises is replaced."""
        if not self._worker.alive:
            raise RuntimeError("the worker's thread has ended")


class RemoteModel:
    """A model whose replicas are elsewhere. A `ServedModel`.

    Args:
        name: what clients call it.
        loading: how its replicas open it.
        count: how many there are.
    """

    def __init__(self, name: str, loading: Loading, count: int) -> None:
        self.name = name
        self.created = int(time.time())
        self._loading, self._count = loading, count
        self._handle = _deploy(name, loading, count)
        self._properties = _asked(self._handle.properties.remote())

    def restart(self) -> None:
        """Replace one replica after the other, while the others answer; answers under way are finished first.

        Raises:
            TargetError: the new ones do not start; the old ones go on.
        """
        self._handle = _deploy(self.name, self._loading, self._count)

    async def submit(self, request: GenerationRequest) -> RemoteGeneration:
        """Queue a request at its replica.

        Raises:
            Refused: every replica is full, or a field cannot be served.
            UserError: the prompt cannot be rendered or does not fit.
        """
        pieces = self._handle.options(stream=True).answer.remote(request)
        with _telling():
            _, usage = await anext(pieces)
        return RemoteGeneration(pieces, request.n, usage)

    def properties(self) -> Mapping[str, Any]:
        """What the model is, as one of its replicas told at the beginning."""
        return dict(self._properties)

    def tokenize(self, text: str, *, special: bool) -> list[int]:
        """Ids of a text."""
        return list(_asked(self._handle.tokenize.remote(text, special)))

    def detokenize(self, ids: list[int]) -> str:
        """The text of ids."""
        return str(_asked(self._handle.detokenize.remote(ids)))

    def render(self, request: GenerationRequest) -> tuple[str, list[int]]:
        """The prompt of a conversation, as text and ids."""
        text, ids = _asked(self._handle.render.remote(request))
        return text, ids

    async def save_session(self, request: GenerationRequest, path: Path) -> int:
        """Refused: a session would be of one replica.

        Raises:
            Refused: always.
        """
        raise Refused("sessions are not saved where several replicas answer", status=404)

    async def restore_session(self, path: Path) -> tuple[list[dict[str, Any]], int]:
        """Refused, as `save_session`.

        Raises:
            Refused: always.
        """
        raise Refused("sessions are not saved where several replicas answer", status=404)


class RemoteGeneration:
    """A request under way at a replica. A `Generator`."""

    def __init__(self, pieces: Any, n: int, usage: Usage) -> None:
        self._pieces = pieces
        self._left = n
        self.usage = usage

    async def __aiter__(self) -> AsyncIterator[Piece]:
        while self._left:
            with _telling():
                piece, usage = await anext(self._pieces)
            vars(self.usage).update(vars(usage))
            self._left -= piece.finish is not None
            yield piece

    async def aclose(self) -> None:
        """Stop; the replica frees the slots."""
        self._pieces.cancel()


@contextmanager
def replicated(
    address: str, name: str, loading: Loading, count: int, progress: Progress = silent
) -> Iterator[RemoteModel]:
    """A model's replicas on a cluster; they end with the block.

    Args:
        address: of the cluster.
        name: what clients call the model.
        loading: how each replica opens it.
        count: how many replicas.
        progress: told when they are there.

    Raises:
        UserError: ray is not installed.
        TargetError: there is no cluster, or the replicas do not start there.
    """
    connect(address)
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    progress("replicas", 0, count)
    serve.start(proxy_location="Disabled")  # the door speaks HTTP
    try:
        model = RemoteModel(name, loading, count)
        progress("replicas", count, count)
        yield model
    finally:
        serve.delete(name)


def _deploy(name: str, loading: Loading, count: int) -> Any:
    from ray import serve
    from ray.serve.config import RequestRouterConfig

    from headrace.server.prefix_router import PrefixRouter

    one = replace(loading, path=loading.path.resolve())
    deployment = serve.deployment(
        Replica,
        name=name,
        num_replicas=count,
        ray_actor_options={"num_cpus": one.threads},
        max_ongoing_requests=2 * loading.slots,
        max_queued_requests=loading.limits.queue,
        graceful_shutdown_timeout_s=DRAIN_SECONDS,
        health_check_period_s=2,
        request_router_config=RequestRouterConfig(request_router_class=PrefixRouter),
    )
    try:
        return serve.run(deployment.bind(name, one), name=name, route_prefix=None)
    except RuntimeError as error:
        told = str(error).strip().partition("\n")[0]
        raise TargetError(f"the replicas of {name} do not start ({told}); see the cluster's logs") from None


def beginning(request: GenerationRequest) -> str:
    """What says which conversation a request is of: its instructions and first question, or how its text begins."""
    prompt = request.prompt
    if isinstance(prompt, str):
        return prompt[:BEGINNING]
    if not request.is_conversation:
        return json.dumps(list(prompt[:BEGINNING]))
    said = [(m["role"], m["content"]) for m in prompt if isinstance(m, Mapping)]
    first = next((place for place, (role, _) in enumerate(said) if role == "user"), len(said))
    return json.dumps(said[: first + 1])


def in_order(key: str, names: list[str]) -> list[str]:
    """Replicas in the order in which a conversation prefers them; one that comes or goes moves no other conversation.

    Rendezvous hashing: each conversation ranks all replicas by a hash of both (Thaler and Ravishankar, 1998).
    """
    return sorted(names, key=lambda name: hashlib.sha256(f"{name}\0{key}".encode(errors="replace")).digest())


def _asked(response: Any) -> Any:
    with _telling():
        return response.result()


@contextmanager
def _telling() -> Iterator[None]:
    """Errors of a replica as they were raised there; those of the cluster in one line."""
    from ray.exceptions import RayError, RayTaskError
    from ray.serve.exceptions import BackPressureError, RayServeException

    try:
        yield
    except RayTaskError as error:
        cause = error.cause
        raise cause if isinstance(cause, HeadraceError) else RuntimeError("a replica failed") from None
    except BackPressureError:
        raise Refused(
            f"all replicas are busy; try again in {RETRY_SECONDS} s", status=429, retry_after=RETRY_SECONDS
        ) from None
    except (RayError, RayServeException, StopAsyncIteration):
        raise Refused(
            f"the replica was lost; ask again in {RETRY_SECONDS} s", status=503, retry_after=RETRY_SECONDS
        ) from None
