"""Many hostile inputs through every reader, each reader in a child with limits of memory and time.

    python benchmarks/fuzz_readers.py [--inputs 100000] [--readers gguf,torch] [--seed 0]

An input fails when anything but one printable line comes out, when it takes more than its seconds of the processor or
its memory above what the child had before, or when it ends the child; the seed that makes it again is printed. Exit 1
if one failed. The inputs are those of tests/hostile, at most some tens of KB each.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import logging
import mmap
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnxruntime
import psutil

ROOT = Path(__file__).parents[1]
FAILURES = 20  # after so many a reader is given up
BATCH = 20_000  # inputs a child: what a library keeps of each is not a later one's memory
WARM = 100  # inputs before memory is looked at
STUCK = 20  # seconds of the processor that an input may take where no signal of Python's reaches it


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--readers", default="")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trace", action="store_true", help="show where a failure came from")
    parser.add_argument("--child", default="")
    parser.add_argument("--at", default="", help="file that says which seed is being tried")
    parser.add_argument("--result", default="", help="file that gets what came of a child's inputs")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if options.child:
        return run(options.child, options)
    from tests.hostile.formats import FORMATS

    names = options.readers.split(",") if options.readers else list(FORMATS)
    return max(guard(name, options) for name in names)


@dataclass
class Tally:
    """What came of the inputs of one reader."""

    inputs: int = 0
    failed: int = 0
    lines: collections.Counter[str] = field(default_factory=collections.Counter)
    slowest: float = 0.0  # seconds of the processor
    grown: int = 0  # bytes, at most, of a child
    used: float = 0.0  # seconds of the processor

    def add(self, result: dict[str, Any]) -> None:
        """A child has come to its end."""
        self.failed += result["failed"]
        self.lines.update(result["lines"])
        self.slowest = max(self.slowest, result["slowest"])
        self.grown = max(self.grown, result["grown"])
        self.used += result["used"]


def guard(name: str, options: argparse.Namespace) -> int:
    """One reader, some inputs a child; an input that ends the child, or holds it up, is told and left out."""
    seed, end, began = options.seed, options.seed + options.inputs, time.perf_counter()
    tally = Tally()
    with tempfile.TemporaryDirectory() as scratch:
        at, result = Path(scratch) / "at", Path(scratch) / "result"
        while seed < end and tally.failed < FAILURES:
            at.write_bytes(seed.to_bytes(8, "little"))
            behind = min(seed + BATCH, end)
            command = [sys.executable, __file__, "--child", name, "--inputs", str(behind - seed), "--seed", str(seed)]
            command += ["--at", str(at), "--result", str(result), *(["--trace"] if options.trace else [])]
            # A panic in Rust would look up the name of every function on the way.
            child = subprocess.Popen(command, env={**os.environ, "RUST_BACKTRACE": "0"})
            code = _watch(child, at)
            last = int.from_bytes(at.read_bytes(), "little")
            if code == 0:
                tally.add(json.loads(result.read_bytes()))
            else:
                reason = signal.Signals(-code).name if code < 0 else f"status {code}"
                print(f"{name}: seed {last}: ended the process ({reason})", flush=True)
                tally.failed += 1
            tally.inputs += last + 1 - seed
            seed = last + 1
    opened = tally.lines.pop("opened", 0)
    print(
        f"{name}: {tally.inputs} inputs, {tally.failed} failed, {opened} opened, {len(tally.lines)} kinds of refusal, "
        f"slowest {tally.slowest * 1000:.0f} ms, memory grew by {tally.grown / 1e6:.0f} MB, "
        f"{time.perf_counter() - began:.0f} s, {tally.used:.0f} s of the processor",
        flush=True,
    )
    return int(tally.failed > 0)


def _watch(child: subprocess.Popen[bytes], at: Path) -> int:
    """How the child ended; it is killed when an input takes too long."""
    last, since = -1, 0.0
    while (code := child.poll()) is None:
        time.sleep(0.2)
        now = int.from_bytes(at.read_bytes(), "little")
        with contextlib.suppress(psutil.NoSuchProcess):
            used = sum(psutil.Process(child.pid).cpu_times()[:2])
            if now != last:
                last, since = now, used
            elif used - since > STUCK:
                child.kill()
    return code


def run(name: str, options: argparse.Namespace) -> int:
    """Inputs of one reader, in this process."""
    from tests.hostile.format import try_one
    from tests.hostile.formats import FORMATS

    form = FORMATS[name]
    lines: collections.Counter[str] = collections.Counter()
    failed, slowest = 0, 0.0
    shared = Path("/dev/shm")
    logging.disable()  # what a config leaves out is told by a warning, thousands of times
    onnxruntime.set_default_logger_severity(4)  # it would tell every refusal once more
    warnings.simplefilter("error")
    with (
        tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as scratch,
        Path(options.at).open("r+b") as file,
    ):
        trying = mmap.mmap(file.fileno(), 8)
        folder = Path(scratch) / "fuzz"
        good = form.prepare(folder)
        for number in range(WARM):  # what is imported late is not the input's memory
            with contextlib.suppress(Exception):
                try_one(form, random.Random(-1 - number), folder, good)
        signal.signal(signal.SIGPROF, _too_long)
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + form.memory, held + form.memory))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for number in range(options.seed, options.seed + options.inputs):
            trying[:] = number.to_bytes(8, "little")
            start = time.process_time()
            signal.setitimer(signal.ITIMER_PROF, form.seconds)
            try:
                line = try_one(form, random.Random(number), folder, good)
            except BaseException as error:
                signal.setitimer(signal.ITIMER_PROF, 0)
                if isinstance(error, KeyboardInterrupt):
                    raise
                failed += 1
                print(f"{name}: seed {number}: {type(error).__name__}: {ascii(str(error))[:200]}", flush=True)
                if options.trace:
                    traceback.print_exc(limit=-6)
                if failed == FAILURES:
                    break
                continue
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
                slowest = max(slowest, time.process_time() - start)
            lines["opened" if line is None else line.replace(str(folder), "").split(";")[0][:48]] += 1
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    found = {"failed": failed, "lines": lines, "slowest": slowest, "grown": grown, "used": time.process_time()}
    Path(options.result).write_text(json.dumps(found))
    return 0


def _too_long(*_: object) -> None:
    raise TimeoutError("took too long")


if __name__ == "__main__":
    sys.exit(main())
