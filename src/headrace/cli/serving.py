"""Verbs that keep a bundle at work: serve, generate."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from headrace.cli.command import Argument, Option
from headrace.cli.console import note, print_json, progress_bars
from headrace.cli.options import (
    BundlePath,
    HugePages,
    Json,
    RayAddress,
    RunnerName,
    Threads,
    limit_threads,
    refuse_place,
)
from headrace.errors import UserError

__all__ = ["generate", "serve"]


def serve(
    bundles: Annotated[list[Path], Argument(metavar="BUNDLE…", help="Folders made by: headrace export")],
    host: Annotated[str, Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, Option("--port", min=0, max=65535, help="Port; 0 takes a free one.")] = 8080,
    api_key: Annotated[
        str | None, Option("--api-key", help="What clients must send; better in HEADRACE_API_KEY.")
    ] = None,
    slots: Annotated[int, Option("--slots", min=1, help="Answers that run at once, for each model.")] = 4,
    queue: Annotated[int, Option("--queue", min=0, help="Requests that may wait beside them.")] = 64,
    seconds: Annotated[float, Option("--seconds", min=1, help="The longest time of a request.")] = 600,
    max_body: Annotated[int, Option("--max-body", min=1024, help="Bytes of a request's body.")] = 8 << 20,
    speculate: Annotated[
        str | None, Option("--speculate", help="Guess ahead: lookup (texts repeat themselves) or a draft BUNDLE.")
    ] = None,
    sessions: Annotated[Path | None, Option("--sessions", help="Folder where clients may save conversations.")] = None,
    runner: RunnerName = None,
    threads: Threads = None,
    huge_pages: HugePages = None,
    ray: RayAddress = None,
    replicas: Annotated[int, Option("--replicas", min=1, help="With --ray: of each model.")] = 1,
) -> None:
    """Serve bundles: OpenAI's, Anthropic's and Ollama's APIs and a web page."""
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import sse_starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UserError(f"serving needs {error.name}, which is not installed: pip install 'headrace[serve]'") from None
    from headrace.bundle.folder import open_bundle
    from headrace.server.door import ServerOptions
    from headrace.server.serve import serve as run
    from headrace.server.worker import WorkerOptions

    if sessions is not None and not sessions.is_dir():
        raise UserError(f"--sessions {sessions} is no folder; make it first")
    if ray is None and replicas != 1:
        raise UserError(f"--replicas {replicas} needs a cluster for them; expected --ray ADDRESS beside it")
    if ray is not None and sessions is not None:
        raise UserError("--sessions is not possible with --ray: a conversation would be of one replica; leave one out")
    for bundle in bundles if ray is None else ():  # what is wrong with one of them is told before another is loaded
        open_bundle(bundle)
    key = api_key or os.environ.get("HEADRACE_API_KEY")
    if key is None and host not in ("127.0.0.1", "localhost", "::1"):
        note(f"warning: anybody who reaches {host} can use this server; set HEADRACE_API_KEY")
    with progress_bars() as progress:
        run(
            bundles,
            host=host,
            port=port,
            runner=runner,
            threads=threads if ray else limit_threads(threads),
            huge_pages=huge_pages,
            slots=slots,
            speculate=speculate,
            door=ServerOptions(api_key=key, max_body=max_body, sessions=sessions),
            limits=WorkerOptions(queue=queue, seconds=seconds),
            ray=ray,
            replicas=replicas,
            progress=progress,
            listening=lambda address: note(f"listening on {address}  (the page is there too; Ctrl-C ends)"),
        )


def generate(
    bundle: BundlePath,
    source: Annotated[Path, Option("--input", help='Prompts, JSON lines: {"prompt": …} or {"messages": […]}.')],
    output: Annotated[Path, Option("--output", help="Answers, JSON lines; goes on where it stopped.")],
    max_tokens: Annotated[int, Option("-n", "--max-tokens", min=1, help="Most tokens of an answer.")] = 256,
    temperature: Annotated[float | None, Option("--temp", help="Sampling temperature; 0 is greedy.")] = None,
    top_k: Annotated[int | None, Option("--top-k", help="Only the k likeliest tokens.")] = None,
    top_p: Annotated[float | None, Option("--top-p", help="Only the likeliest tokens of this probability.")] = None,
    seed: Annotated[int | None, Option("-s", "--seed", help="The same seed, the same answers.")] = None,
    greedy: Annotated[bool, Option("--greedy", help="Always the likeliest token.")] = False,
    stop: Annotated[list[str] | None, Option("--stop", help="End an answer at this text; repeatable.")] = None,
    slots: Annotated[int, Option("--slots", min=1, help="Answers that run at once.")] = 8,
    runner: RunnerName = None,
    threads: Threads = None,
    huge_pages: HugePages = None,
    ray: RayAddress = None,
    json: Json = False,
) -> None:
    """Answer a file of prompts: many at once, in order, resumable."""
    from headrace.batch import answer_file, answer_file_on, answers_kept, read_prompts
    from headrace.language_model import load

    count = len(read_prompts(source))  # what is wrong there is told before a model is loaded
    refuse_place("--output", output)
    if kept := answers_kept(output, count):
        note(f"{kept} of {count} answers are in {output} and stay as they are; remove it to have them made anew")
    chosen = {"temperature": 0.0 if greedy else temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    with progress_bars() as progress:
        if ray is not None:
            failed = answer_file_on(
                ray, bundle.resolve(), source, output, max_tokens=max_tokens, sampling=chosen, stop=stop or (),
                slots=slots, threads=threads, runner=runner, huge_pages=huge_pages, progress=progress,
            )  # fmt: skip
        else:
            opened = load(
                bundle,
                runner=runner,
                threads=limit_threads(threads),
                huge_pages=huge_pages,
                slots=slots,
                progress=progress,
            )
            with opened as model:
                sampling = model.sampling_options(**chosen)
                failed = answer_file(
                    model, source, output, max_tokens=max_tokens, options=sampling, stop=stop or (), progress=progress
                )
    if json:
        print_json({"prompts": count, "failed": failed, "output": str(output)})
    elif failed:
        note(f"{failed} of {count} prompts have no answer; each line says why in its field error")
