"""bench: how fast a bundle loads, reads a prompt and answers, and what it needs. Times only; judges nothing."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from headrace.bundle.folder import open_bundle
from headrace.errors import ContextFull
from headrace.progress import Progress, silent
from headrace.runners import Options, open_runner
from headrace.runtime.engine import Engine

__all__ = ["bench_bundle", "peak_rss"]

_SEED = 0


def bench_bundle(
    path: Path,
    *,
    prompts: Sequence[int] = (128, 512, 1024),
    tokens: int = 128,
    depth: int = 128,
    repeats: int = 5,
    threads: int | None = None,
    runner: str | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Measure a bundle through a runner, on random tokens.

    Args:
        path: the bundle.
        prompts: prompt lengths, tokens.
        tokens: tokens decoded a repetition.
        depth: tokens in the cache before decoding starts.
        repeats: repetitions; medians are told.
        threads: of the shared pool, physical cores by default.
        runner: its name; the fastest that is installed by default.
        progress: told how far it is.

    Returns:
        load_ms; prompts [{tokens, ttft_ms, tok_s}]; decode_tok_s; peak_rss_bytes; kv_bytes; weight_bytes; threads.

    Raises:
        BundleError: the bundle cannot be opened.
        ContextFull: a prompt or the decoding does not fit the context.
    """
    from headrace.targets.host.sessions import default_threads

    started = time.perf_counter()
    bundle = open_bundle(path)
    opened = open_runner(bundle, runner, Options(threads=threads))
    engine = Engine(opened)
    load = time.perf_counter() - started
    for length in (*prompts, depth + tokens):
        if length >= bundle.context:
            raise ContextFull(length, bundle.context)
    ids = np.random.default_rng(_SEED).integers(0, bundle.config.vocab_size, max(*prompts, depth, 1)).tolist()
    total, done = repeats * (len(prompts) + 1) + 1, 0

    def advance() -> None:
        nonlocal done
        done += 1
        progress("measuring", done, total)

    engine.score(ids[:1])  # the first step of a process pays for page faults that no later one does
    advance()
    first: dict[int, list[float]] = {length: [] for length in prompts}
    decode = []
    for _ in range(repeats):
        for length in prompts:
            sequence = engine.open(reuse=False)
            started = time.perf_counter()
            int(engine.extend(sequence, ids[:length]).argmax())
            first[length].append(time.perf_counter() - started)
            engine.release(sequence)
            advance()
        sequence = engine.open(reuse=False)
        logits = engine.extend(sequence, ids[: max(depth, 1)])
        started = time.perf_counter()
        for _ in range(tokens):
            logits = engine.extend(sequence, [int(logits.argmax())])
        engine.release(sequence)
        decode.append((time.perf_counter() - started) / tokens)
        advance()
    report = {
        "load_ms": round(load * 1e3, 1),
        "prompts": [
            {"tokens": n, "ttft_ms": round(statistics.median(t) * 1e3, 2), "tok_s": round(n / statistics.median(t), 2)}
            for n, t in first.items()
        ],
        "decode_tok_s": round(1 / statistics.median(decode), 2),
        "depth": depth,
        "tokens": tokens,
        "repeats": repeats,
        "threads": threads or default_threads(),
        "peak_rss_bytes": peak_rss(),
        "kv_bytes": opened.kv_bytes,
        "weight_bytes": bundle.weight_bytes,
    }
    engine.close()
    return report


def peak_rss() -> int:
    """The most memory this process has held, bytes."""
    try:
        import resource
        import sys

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    except ImportError:  # Windows
        import psutil

        return int(getattr(psutil.Process().memory_info(), "peak_wset"))  # noqa: B009  (Windows only)
