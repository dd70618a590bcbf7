"""bench: how fast a bundle loads, reads prompts and answers, and what memory it takes. Times only; judges nothing.

    prompts    time to first token of whole prompts, from an empty cache: a measured curve, and beside it the formula
               that model cards use, steps × the time of one step
    decode     tokens one by one after each depth, in one conversation that is rewound between repetitions

docs/bench-format.md has the result's form; comparing two of them is compare.py's business.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from headrace.bundle.folder import Bundle, open_bundle
from headrace.errors import TargetError, UserError
from headrace.measure.record import make_record
from headrace.measure.speculation_gain import LEAST_TOKENS, time_speculation
from headrace.model.weights import weight_table
from headrace.progress import Progress, silent
from headrace.runners import Options, default_runner, open_runner
from headrace.runtime.engine import Engine

__all__ = ["bench_bundle", "parameter_count", "peak_rss"]

_SEED = 0
_WARM_TOKENS = 8
# A new process, from its start to the first token: what a user waits for who opens the program.
_COLD = """
import sys
from pathlib import Path
from headrace.bundle.folder import open_bundle
from headrace.runners import Options, open_runner
from headrace.runtime.engine import Engine
options = Options(threads=int(sys.argv[3]) or None)
engine = Engine(open_runner(open_bundle(Path(sys.argv[1])), sys.argv[2], options))
engine.extend(engine.open([1]))
engine.close()
"""


def bench_bundle(
    path: Path,
    *,
    prompts: Sequence[int] = (128, 512, 1024),
    tokens: int = 128,
    depths: Sequence[int] = (128,),
    repeats: int = 5,
    threads: int | None = None,
    huge_pages: bool | None = None,
    runner: str | None = None,
    speculate: str | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Measure a bundle through a runner, on random tokens.

    Args:
        path: the bundle.
        prompts: prompt lengths, tokens; one as long as the context leaves no room but for its first token.
        tokens: decoded a repetition; 0 for none.
        depths: tokens in the cache before decoding starts.
        repeats: repetitions of each; all are kept, medians are told.
        threads: of the shared pool, physical cores by default.
        huge_pages: see `headrace.load`.
        runner: its name; the fastest that is installed by default.
        speculate: also answer prompts with and without speculation: "lookup" or a draft bundle (speculation_gain.py).
        progress: told how far it is.

    Returns:
        A record of kind "bench", see docs/bench-format.md.

    Raises:
        BundleError: the bundle cannot be opened.
        UserError: a prompt or the decoding does not fit the context, or answers are too short to time speculation.
        TargetError: the runner gives no logits, or what it needs is not installed.
    """
    from headrace.targets.host.sessions import default_threads

    started = time.perf_counter()
    bundle = open_bundle(path)
    for length in prompts:
        if length > bundle.context:
            raise UserError(f"a prompt of {length} tokens does not fit the context of {bundle.context}; take a shorter")
    for depth in depths if tokens else ():
        if max(depth, 1) + tokens > bundle.context:  # decoding begins behind a token
            raise UserError(
                f"{tokens} tokens behind {max(depth, 1)} do not fit the context of {bundle.context}; decode fewer, or "
                "after fewer"
            )
    if speculate is not None and tokens < LEAST_TOKENS:
        raise UserError(f"speculation is timed over answers of {tokens} tokens; expected at least {LEAST_TOKENS}")
    found = time.perf_counter() - started
    name = default_runner() if runner is None else runner
    decoded = sorted(set(depths)) if tokens else []
    total = repeats * (len(prompts) + len(decoded)) + 2
    advance = _counter(progress, total)
    cold = _cold_start(bundle, name, threads)  # first, since the system's cache keeps what a process has mapped
    advance()
    started = time.perf_counter()
    opened = open_runner(bundle, name, Options(threads=threads, huge_pages=huge_pages))
    loaded = found + time.perf_counter() - started
    engine = Engine(opened)
    try:
        timer = _Timer(engine, bundle)
        timer.warm()
        advance()
        step = timer.prompt(min(bundle.prompt_length, bundle.context), repeats, lambda: None)
        read = [(length, timer.prompt(length, repeats, advance)) for length in prompts]
        spoken = list(timer.decode(decoded, tokens, repeats, advance))
    finally:
        engine.close()
    peak = peak_rss()  # before other models are loaded
    guessed = None
    if speculate is not None:
        guessed = time_speculation(path, speculate, tokens=tokens, repeats=repeats, runner=name, threads=threads)
    one = statistics.median(step)
    return make_record(
        "bench",
        bundle,
        name,
        {
            "settings": {
                "prompts": list(prompts),
                "tokens": tokens,
                "depths": list(depths),
                "repeats": repeats,
                "threads": threads or default_threads(),
            },
            "parameters": parameter_count(bundle),
            "load": {"seconds": _digits(loaded), "cold_start_seconds": _digits(cold)},
            "step": {"tokens": bundle.prompt_length, **_spread(step)},
            "prompts": [_prompt(length, samples, bundle.prompt_length, one) for length, samples in read],
            "decode": [_decode(depth, gaps) for depth, gaps in spoken],
            **({} if guessed is None else {"speculation": guessed}),
            "memory": {
                "peak_rss_bytes": peak,
                "kv_bytes": opened.kv_bytes,
                "weight_bytes": bundle.weight_bytes,
            },
        },
    )


class _Timer:
    """Times random tokens through an engine; new ones each time, since an engine reuses prefixes it has computed."""

    def __init__(self, engine: Engine, bundle: Bundle) -> None:
        self._engine = engine
        self._random = np.random.default_rng(_SEED)
        self._vocabulary = bundle.config.vocab_size
        self._step = min(bundle.prompt_length, bundle.context - _WARM_TOKENS)

    def warm(self) -> None:
        """The first steps of a process pay for page faults and kernels' own tables that no later one does."""
        sequence = self._engine.open()
        logits = self._engine.extend(sequence, self._tokens(self._step))
        for _ in range(_WARM_TOKENS):
            logits = self._engine.extend(sequence, [int(logits.argmax())])
        self._engine.release(sequence)

    def prompt(self, length: int, repeats: int, advance: Callable[[], None]) -> list[float]:
        """Seconds to the first token of a whole prompt."""
        samples = []
        for _ in range(repeats):
            ids = self._tokens(length)
            started = time.perf_counter()
            sequence = self._engine.open(ids)
            int(self._engine.extend(sequence).argmax())
            samples.append(time.perf_counter() - started)
            self._engine.release(sequence)
            advance()
        return samples

    def decode(
        self, depths: Sequence[int], tokens: int, repeats: int, advance: Callable[[], None]
    ) -> list[tuple[int, list[list[float]]]]:
        """For each rising depth, the seconds of each token of each repetition."""
        found = []
        sequence = self._engine.open()
        for depth in depths:
            start = max(depth, 1)  # a token needs one before it
            runs = []
            for _ in range(repeats):
                sequence.rewind(min(start - 1, len(sequence.tokens)))  # the last token's logits are computed again
                logits = self._engine.extend(sequence, self._tokens(start - len(sequence.tokens)))
                gaps = []
                for _ in range(tokens):
                    started = time.perf_counter()
                    logits = self._engine.extend(sequence, [int(logits.argmax())])
                    gaps.append(time.perf_counter() - started)
                runs.append(gaps)
                advance()
            sequence.rewind(start)
            found.append((depth, runs))
        self._engine.release(sequence)
        return found

    def _tokens(self, count: int) -> list[int]:
        return [int(token) for token in self._random.integers(0, self._vocabulary, count)]


def _prompt(length: int, samples: list[float], step_tokens: int, step_seconds: float) -> dict[str, Any]:
    steps = -(-length // step_tokens)
    middle = statistics.median(samples)
    return {
        "tokens": length,
        "steps": steps,
        **_spread(samples),
        "formula_seconds": _digits(steps * step_seconds),
        "useful_tok_s": _digits(length / middle),
        "padded_tok_s": _digits(steps * step_tokens / middle),
    }


def _decode(depth: int, runs: list[list[float]]) -> dict[str, Any]:
    samples = [sum(gaps) for gaps in runs]
    p50, p90, p99 = np.quantile(np.concatenate(runs), (0.5, 0.9, 0.99)) * 1e3
    return {
        "depth": depth,
        "tokens": len(runs[0]),
        **_spread(samples),
        "tok_s": _digits(len(runs[0]) / statistics.median(samples)),
        "gap_ms": {"p50": _digits(p50), "p90": _digits(p90), "p99": _digits(p99)},
    }


def _spread(samples: list[float]) -> dict[str, Any]:
    """Seconds: all of them, the median, the fastest and the slowest."""
    return {
        "seconds": _digits(statistics.median(samples)),
        "fastest": _digits(min(samples)),
        "slowest": _digits(max(samples)),
        "samples": [_digits(sample) for sample in samples],
    }


def _digits(value: float) -> float:
    return float(f"{value:.5g}")


def _counter(progress: Progress, total: int) -> Callable[[], None]:
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        progress("measuring", done, total)

    return advance


def _cold_start(bundle: Bundle, runner: str, threads: int | None) -> float:
    """Seconds of a new process to its first token, the bundle's files not in the system's cache where that can be
    asked for.

    Raises:
        TargetError: the process fails.
    """
    if hasattr(os, "posix_fadvise"):
        for name in bundle.files:
            handle = os.open(bundle.root / name, os.O_RDONLY)
            try:
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(handle)
    command = [sys.executable, "-c", _COLD, str(bundle.root), runner, str(threads or 0)]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    seconds = time.perf_counter() - started
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise TargetError(f"a new process could not run {bundle.root} on {runner}: {reason}")
    return seconds


def parameter_count(bundle: Bundle) -> int:
    """Values of all weights, a tied head counted once."""
    return sum(w.size for name, w in weight_table(bundle.config).items() if w.stored_as == name)


def peak_rss() -> int:
    """The most memory this process has held, bytes."""
    try:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    except ImportError:  # Windows
        import psutil

        return int(getattr(psutil.Process().memory_info(), "peak_wset"))  # noqa: B009  (Windows only)
