"""Work on several cores: Python threads, each with a BLAS that has one.

A BLAS with threads of its own, called from several threads or on a busy machine, waits for itself most of the time;
with one thread, what it computes does not depend on the computer's cores either. Knows nothing about what is computed.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

__all__ = ["cores", "spread"]

T = TypeVar("T")
R = TypeVar("R")

# A pool's own threads do not inherit it: what they spread in turn they do themselves.
_POOL: ContextVar[ThreadPoolExecutor | None] = ContextVar("pool", default=None)
_OPENBLAS = ("scipy_openblas_{}_num_threads64_", "scipy_openblas_{}_num_threads", "openblas_{}_num_threads")


@contextmanager
def cores(jobs: int) -> Iterator[None]:
    """Inside, `spread` uses `jobs` threads."""
    with _single_blas(), ThreadPoolExecutor(jobs) as pool:
        token = _POOL.set(pool)
        try:
            yield
        finally:
            _POOL.reset(token)


def spread(function: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """The function's results in the order of the items; the first error is raised."""
    pool = _POOL.get()
    return list(map(function, items)) if pool is None else list(pool.map(function, items))


@contextmanager
def _single_blas() -> Iterator[None]:
    """NumPy's OpenBLAS with one thread; another BLAS is left as it is, which costs speed at most."""
    module = importlib.import_module("numpy._core._multiarray_umath")
    library = ctypes.CDLL(str(module.__file__))  # finds what the module is linked with
    name = next((name for name in _OPENBLAS if hasattr(library, name.format("set"))), None)
    if name is None:
        yield
        return
    count = getattr(library, name.format("get"))()
    getattr(library, name.format("set"))(1)
    try:
        yield
    finally:
        getattr(library, name.format("set"))(count)
