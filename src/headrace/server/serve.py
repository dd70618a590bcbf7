"""serve: models behind one address, until somebody says stop. Knows no dialect."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn
from sse_starlette.sse import AppStatus

from headrace.errors import HeadraceError, UserError
from headrace.language_model import load
from headrace.progress import Progress, silent
from headrace.server.address import bound
from headrace.server.app import create_app
from headrace.server.connections import Connection, Patience
from headrace.server.door import ServedModel, ServerOptions
from headrace.server.logs import LOGGING
from headrace.server.metrics import Metrics
from headrace.server.replicas import Loading, RemoteModel, replicated
from headrace.server.worker import ModelWorker, WorkerOptions

__all__ = ["http_config", "serve"]

_log = logging.getLogger(__name__)
CONNECTIONS = 1024  # open at once; who comes then is told 503
DRAIN_SECONDS = 30  # for answers under way, once somebody said stop


def serve(
    bundles: Sequence[Path],
    *,
    host: str = "127.0.0.1",
    port: int = 8080,
    runner: str | None = None,
    threads: int | None = None,
    huge_pages: bool | None = None,
    slots: int = 4,
    speculate: str | None = None,
    door: ServerOptions | None = None,
    limits: WorkerOptions | None = None,
    ray: str | None = None,
    replicas: int = 1,
    progress: Progress = silent,
    listening: Callable[[str], None] = lambda address: None,
) -> None:
    """Serve bundles until SIGINT or SIGTERM; answers under way are finished first, for at most `DRAIN_SECONDS`.

    Args:
        bundles: folders; a model is called what its folder is called, without `.bundle`.
        host: address to listen on.
        port: 0 takes a free one.
        runner: the best installed one by default.
        threads: physical cores by default.
        huge_pages: see `headrace.load`.
        slots: answers that run at once, for each model.
        speculate: guess ahead, "lookup" or a draft bundle's folder (see `headrace.load`).
        door: key and limits of requests.
        limits: limits of each model.
        ray: address of a Ray cluster where the models run instead of here; SIGHUP replaces their replicas one by one.
        replicas: of each model there.
        progress: told how many models are loaded.
        listening: told the address, once requests are answered.

    Raises:
        UserError: a bundle cannot be opened, two have one name, or the address cannot be listened on.
        TargetError: there is no cluster, or the replicas do not start there.
    """
    metrics, given = Metrics(), limits or WorkerOptions()
    named: dict[str, Path] = {}
    for path in bundles:
        name = path.resolve().name.removesuffix(".bundle")
        if name in named:
            raise UserError(f"two bundles are called {name}; rename one of the folders")
        named[name] = path
    models: dict[str, ServedModel] = {}
    with ExitStack() as stack:
        sockets = bound(host, port)  # an address that is taken is told before models of gigabytes are loaded
        for one in sockets:
            stack.enter_context(one)
        for number, (name, path) in enumerate(named.items()):
            progress("loading", number, len(named))
            opening: dict[str, Any] = {"runner": runner, "huge_pages": huge_pages, "speculate": speculate}
            if ray is not None:
                loading = Loading(path, slots, threads or 1, given, opening)
                models[name] = stack.enter_context(replicated(ray, name, loading, replicas, progress))
                continue
            model = load(path, threads=threads, slots=slots, **opening)
            models[name] = worker = ModelWorker(name, model, given, metrics)
            worker.start()
            stack.callback(worker.close)
        progress("loading", len(named), len(named))
        app = create_app(models, door or ServerOptions(), metrics)
        remote = [model for model in models.values() if isinstance(model, RemoteModel)]
        # Else a stream ends in the middle once somebody said stop.
        AppStatus.disable_automatic_graceful_drain()  # type: ignore[no-untyped-call]
        _Announced(http_config(app), listening, remote).run(sockets)


def http_config(app: Any, *, patience: Patience | None = None, **uvicorn_: Any) -> uvicorn.Config:
    """How HTTP is spoken, the same whatever of uvicorn's extras is installed.

    Args:
        app: the ASGI application.
        patience: how long clients may take.
        uvicorn_: `host`, `port` and what else uvicorn's Config takes.
    """
    settings: dict[str, Any] = {
        "http": partial(Connection, patience=patience or Patience()),
        "ws": "none",
        "log_config": LOGGING,
        "access_log": False,  # prompts are in bodies, but keys could be in a query
        "timeout_graceful_shutdown": DRAIN_SECONDS,
        "server_header": False,
        "proxy_headers": False,
        "limit_concurrency": CONNECTIONS,
    }
    return uvicorn.Config(app, **(settings | uvicorn_))


class _Announced(uvicorn.Server):
    """A server that says where it listens, once it does, and replaces replicas when SIGHUP comes."""

    def __init__(self, config: uvicorn.Config, listening: Callable[[str], None], remote: Sequence[RemoteModel]) -> None:
        super().__init__(config)
        self._listening = listening
        self._remote = remote

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self._remote and self.started:
            loop = asyncio.get_running_loop()
            loop.add_signal_handler(signal.SIGHUP, lambda: loop.run_in_executor(None, self._restart))
        if self.started:
            address, port = self.servers[0].sockets[0].getsockname()[:2]
            self._listening(f"http://{f'[{address}]' if ':' in address else address}:{port}")

    def _restart(self) -> None:
        for model in self._remote:
            try:
                model.restart()
            except HeadraceError as error:
                _log.warning("%s", error)
