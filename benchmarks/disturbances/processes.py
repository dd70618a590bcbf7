"""Jobs in forks of this process: run to their end, or killed at random moments."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from disturbances.findings import fault
from headrace.errors import HeadraceError


@contextmanager
def forked(job: Callable[[], object]) -> Iterator[int]:
    """A fork that does a job and leaves: 0, or 2 where it was refused. Its words go nowhere."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            job()
            status = 0
        except HeadraceError:
            status = 2
        finally:
            os._exit(status)
    yield pid
    with_status(pid)


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
