"""Many hostile inputs through every checkpoint reader, each reader in a child with limits of memory and time.

    python benchmarks/fuzz_readers.py [--inputs 100000] [--readers gguf,torch] [--seed 0]

An input fails when anything but one printable line comes out, when it takes more than SECONDS of the processor, or when
it needs more than MEMORY above what the child had before; the seed that makes it again is printed. Exit 1 if one
failed. The inputs are those of tests/checkpoint/hostile.py, at most some tens of KB each.
"""

from __future__ import annotations

import argparse
import collections
import logging
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
SECONDS = 5  # of the processor for one input; the slowest good one takes some 20 ms
MEMORY = 256 << 20  # bytes of address space beyond the child's own; an expanded tensor is read a row at a time
FAILURES = 20  # after so many a reader is given up


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--readers", default="")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", default="")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if options.child:
        return run(options.child, options.inputs, options.seed)
    from tests.checkpoint.hostile import FORMATS

    status = 0
    for name in options.readers.split(",") if options.readers else FORMATS:
        command = [
            sys.executable,
            __file__,
            "--child",
            name,
            "--inputs",
            str(options.inputs),
            "--seed",
            str(options.seed),
        ]
        status |= subprocess.run(command).returncode != 0
    return status


def run(name: str, inputs: int, seed: int) -> int:
    """One reader, in this process."""
    from tests.checkpoint.hostile import prepare, try_one

    lines: collections.Counter[str] = collections.Counter()
    failed, slowest, began = 0, 0.0, time.perf_counter()
    shared = Path("/dev/shm")
    logging.disable()  # what a config leaves out is told by a warning, thousands of times
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as scratch:
        folder = Path(scratch) / "fuzz"
        good = prepare(folder)
        try_one(name, random.Random(seed), folder, good)  # what is imported late is not the input's memory
        signal.signal(signal.SIGPROF, _too_long)
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, held + MEMORY))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for number in range(seed, seed + inputs):
            start = time.process_time()
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            try:
                line = try_one(name, random.Random(number), folder, good)
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                failed += 1
                print(f"{name}: seed {number}: {type(error).__name__}: {ascii(str(error))[:300]}", flush=True)
                if failed == FAILURES:
                    break
                continue
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
                slowest = max(slowest, time.process_time() - start)
            lines["opened" if line is None else line.replace(str(folder), "").split(";")[0][:48]] += 1
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    done = sum(lines.values()) + failed
    print(
        f"{name}: {done} inputs, {failed} failed, {lines['opened']} opened, {len(lines) - 1} kinds of refusal, slowest "
        f"{slowest * 1000:.0f} ms, memory grew by {grown / 1024:.0f} MB, {time.perf_counter() - began:.0f} s",
        flush=True,
    )
    return int(failed > 0)


def _too_long(*_: object) -> None:
    raise TimeoutError(f"over {SECONDS} s")


if __name__ == "__main__":
    sys.exit(main())
