"""Jobs in forks of this process: run to their end, or killed at random moments."""

from __future__ import annotations

import os
import random
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from disturbances.findings import fault
from headrace.errors import HeadraceError

_SAID = tempfile.TemporaryFile()  # noqa: SIM115 (shared with the forks, as long as this process)


@contextmanager
def forked(job: Callable[[], object]) -> Iterator[int]:
    """A fork that does a job and leaves: 0, 2 where it was refused, 1 where it broke (`last_words`)."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            job()
            status = 0
        except BaseException as error:
            status = 2 if isinstance(error, HeadraceError) else 1
            os.ftruncate(_SAID.fileno(), 0)
            os.pwrite(_SAID.fileno(), f"{type(error).__name__}: {error}".encode(), 0)
        finally:
            os._exit(status)
    yield pid
    with_status(pid)


def last_words() -> str:
    """Why the last fork that failed did."""
    return os.pread(_SAID.fileno(), 2000, 0).decode("utf-8", "replace")


def with_status(pid: int) -> int | None:
    """How it ended; None when that was asked before."""
    try:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    except ChildProcessError:
        return None


def run(job: Callable[[], object]) -> int:
    """A job in a fork of its own: its status."""
    with forked(job) as pid:
        return with_status(pid) or 0


def moments(rng: random.Random, times: int, job: Callable[[], object]) -> Iterator[float]:
    """Random moments of a job that is done once to see how long it takes."""
    start = time.perf_counter()
    if status := run(job):
        fault(f"the job itself ended with {status}")
    took = time.perf_counter() - start
    for _ in range(times):
        yield rng.uniform(0, took)


def killed(job: Callable[[], object], seconds: float) -> None:
    with forked(job) as pid:
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
