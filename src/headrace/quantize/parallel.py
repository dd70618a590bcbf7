"""Work on several cores: Python threads, each with a BLAS that has one.

A BLAS with threads of its own, called from several threads or on a busy machine, waits for itself most of the time;
with one thread, what it computes does not depend on the computer's cores either. Knows nothing about what is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

from threadpoolctl import threadpool_limits

__all__ = ["cores", "parallel_map"]

T = TypeVar("T")
R = TypeVar("R")

# The pool's own threads do not inherit it: a parallel_map inside one of them runs in that thread.
_POOL: ContextVar[ThreadPoolExecutor | None] = ContextVar("pool", default=None)


@contextmanager
def cores(jobs: int) -> Iterator[None]:
    """Inside, `parallel_map` uses `jobs` threads."""
    with threadpool_limits(limits=1, user_api="blas"), ThreadPoolExecutor(jobs) as pool:
        token = _POOL.set(pool)
        try:
            yield
        finally:
            _POOL.reset(token)


def parallel_map(function: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """The function's results in the order of the items; the first error is raised. Without `cores`, in this thread."""
    pool = _POOL.get()
    return list(map(function, items)) if pool is None else list(pool.map(function, items))
