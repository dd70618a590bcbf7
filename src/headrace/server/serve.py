"""serve: models behind one address, until somebody says stop. Knows no dialect."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn

from headrace.errors import UserError
from headrace.language_model import load
from headrace.progress import Progress, silent
from headrace.server.app import create_app
from headrace.server.connections import Connection, Patience
from headrace.server.door import ServerOptions
from headrace.server.logs import LOGGING
from headrace.server.metrics import Metrics
from headrace.server.worker import ModelWorker, WorkerOptions

__all__ = ["http_config", "serve"]

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
        progress: told how many models are loaded.
        listening: told the address, once requests are answered.

    Raises:
        UserError: a bundle cannot be opened, or two have one name.
    """
    metrics = Metrics()
    workers: dict[str, ModelWorker] = {}
    try:
        for number, path in enumerate(bundles):
            progress("loading", number, len(bundles))
            name = path.resolve().name.removesuffix(".bundle")
            if name in workers:
                raise UserError(f"two bundles are called {name}; rename one of the folders")
            model = load(path, runner=runner, threads=threads, huge_pages=huge_pages, slots=slots, speculate=speculate)
            workers[name] = ModelWorker(name, model, limits or WorkerOptions(), metrics)
        progress("loading", len(bundles), len(bundles))
        for worker in workers.values():
            worker.start()
        app = create_app(workers, door or ServerOptions(), metrics)
        _Announced(http_config(app, host=host, port=port), listening).run()
    finally:
        for worker in workers.values():
            worker.close()


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
    """A server that says where it listens, once it does."""

    def __init__(self, config: uvicorn.Config, listening: Callable[[str], None]) -> None:
        super().__init__(config)
        self._listening = listening

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            address, port = self.servers[0].sockets[0].getsockname()[:2]
            self._listening(f"http://{f'[{address}]' if ':' in address else address}:{port}")
