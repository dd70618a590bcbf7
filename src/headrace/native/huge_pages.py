"""Weights copied into huge pages: memory of 2 MB pages is read faster than a mapped file's 4 KB ones.

Prefetchers stop at the end of a page, and the processor looks up a page's place less often. What that gains depends on
the machine, what it costs is the copy when a model is opened; memory in use stays the same, since the files' pages are
then the system's to drop. Knows tensors, not what they are for.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrace.bundle.weights import StoredTensor

__all__ = ["in_huge_pages"]

_DTYPES: Mapping[str, np.dtype[Any]] = {"U8": np.dtype(np.uint8), "F16": np.dtype("<f2"), "F32": np.dtype("<f4")}
_HUGE = 2 << 20
_LINE = 64  # bytes of a cache line: where each tensor begins


def in_huge_pages(root: Path, tensors: Mapping[str, StoredTensor]) -> dict[str, NDArray[Any]]:
    """The tensors' contents, by name, in one stretch of memory that the system is asked to make of huge pages.

    Args:
        root: the bundle's folder.
        tensors: where each is in its files.

    Raises:
        OSError: there is not so much memory.
    """
    size = sum(_padded(tensor.nbytes) for tensor in tensors.values())
    memory = mmap.mmap(-1, size + _HUGE)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(memory, np.uint8)
    at = -whole.ctypes.data % _HUGE
    found = {}
    for name, tensor in tensors.items():
        place = whole[at : at + tensor.nbytes]
        place[:] = np.memmap(root / tensor.file, np.uint8, "r", tensor.offset, (tensor.nbytes,))
        found[name] = place.view(_DTYPES[tensor.dtype]).reshape(tensor.shape)
        at += _padded(tensor.nbytes)
    return found


def _padded(size: int) -> int:
    return -(-size // _LINE) * _LINE
