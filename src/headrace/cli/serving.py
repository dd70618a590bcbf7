"""Verbs that keep a bundle at work: serve."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from headrace.cli.console import note, progress_bars
from headrace.cli.options import Threads
from headrace.errors import UserError

__all__ = ["serve"]


def serve(
    bundles: Annotated[list[Path], typer.Argument(metavar="BUNDLE…", help="Folders made by: headrace export")],
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port; 0 takes a free one.")] = 8080,
    api_key: Annotated[
        str | None, typer.Option("--api-key", help="What clients must send; better in HEADRACE_API_KEY.")
    ] = None,
    slots: Annotated[int, typer.Option("--slots", min=1, help="Answers that run at once, for each model.")] = 4,
    queue: Annotated[int, typer.Option("--queue", min=0, help="Requests that may wait beside them.")] = 64,
    seconds: Annotated[float, typer.Option("--seconds", min=1, help="The longest time of a request.")] = 600,
    max_body: Annotated[int, typer.Option("--max-body", min=1024, help="Bytes of a request's body.")] = 8 << 20,
    runner: Annotated[str | None, typer.Option("--runner", help="native or host; the fastest by default.")] = None,
    threads: Threads = None,
) -> None:
    """Serve bundles: OpenAI's, Anthropic's and Ollama's APIs and a web page."""
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import sse_starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UserError(f"serving needs {error.name}, which is not installed: pip install 'headrace[serve]'") from None
    from headrace.server.door import ServerOptions
    from headrace.server.serve import serve as run
    from headrace.server.worker import WorkerOptions

    key = api_key or os.environ.get("HEADRACE_API_KEY")
    if key is None and host not in ("127.0.0.1", "localhost", "::1"):
        note(f"warning: anybody who reaches {host} can use this server; set HEADRACE_API_KEY")
    with progress_bars() as progress:
        run(
            bundles,
            host=host,
            port=port,
            runner=runner,
            threads=threads,
            slots=slots,
            door=ServerOptions(api_key=key, max_body=max_body),
            limits=WorkerOptions(queue=queue, seconds=seconds),
            progress=progress,
            listening=lambda address: note(f"listening on {address}  (the page is there too; Ctrl-C ends)"),
        )
