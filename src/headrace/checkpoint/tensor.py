"""LazyTensor: a weight that is read when it is used, and the element types files store. Knows nothing about formats."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from headrace.errors import CheckpointError, reason
from headrace.files import stands_for

__all__ = [
    "ELEMENTS",
    "FLOATS",
    "Element",
    "LazyTensor",
    "from_storage",
    "let_go",
    "map_file",
    "same_values",
    "select_rows",
    "unit_rows",
]

SMALLEST_NORM = 1e-12  # torch.nn.functional.normalize's eps: a row of zeros stays one
_ROWS = 4096  # of a table that are looked at together


@dataclass(frozen=True)
class Element:
    """A stored element type.

    Attributes:
        bits: its size.
        stored: the numpy type of its bytes; None where numpy has none.
        values: the numpy type that means them; None where nothing here reads it.
    """

    bits: int
    stored: Any
    values: Any


def _plain(kind: Any) -> Element:
    return Element(8 * np.dtype(kind).itemsize, kind, kind)


FLOATS = ("float32", "float16", "bfloat16", "float64")  # what a weight may be stored in

# By torch's names. Buffers of masks and positions are integers; the 8-bit floats and what is below belong to
# quantized checkpoints, and are known so that a message can name them.
ELEMENTS = {
    "float32": _plain(np.float32),
    "float16": _plain(np.float16),
    "bfloat16": Element(16, np.uint16, ml_dtypes.bfloat16),
    "float64": _plain(np.float64),
    "int64": _plain(np.int64),
    "int32": _plain(np.int32),
    "int16": _plain(np.int16),
    "int8": _plain(np.int8),
    "uint64": _plain(np.uint64),
    "uint32": _plain(np.uint32),
    "uint16": _plain(np.uint16),
    "uint8": _plain(np.uint8),
    "bool": Element(8, np.uint8, np.uint8),
    "float8_e4m3fn": Element(8, np.uint8, ml_dtypes.float8_e4m3fn),
    "float8_e5m2": Element(8, np.uint8, ml_dtypes.float8_e5m2),
    "float8_e4m3fnuz": Element(8, np.uint8, ml_dtypes.float8_e4m3fnuz),
    "float8_e5m2fnuz": Element(8, np.uint8, ml_dtypes.float8_e5m2fnuz),
    "float8_e8m0fnu": Element(8, np.uint8, ml_dtypes.float8_e8m0fnu),
    "float4_e2m1fn": Element(4, None, None),
    "float6_e2m3fn": Element(6, None, None),
    "float6_e3m2fn": Element(6, None, None),
    "complex64": Element(64, np.uint64, None),
    "complex128": Element(128, None, None),
}


@dataclass(frozen=True)
class LazyTensor:
    """A weight on disk.

    Attributes:
        shape: its shape; axis 0 is rows.
        dtype: the stored element type ("bfloat16", "float16", "float32" …), or the block format ("q4_1") in a GGUF.
        read: rows start … stop−1 as a float32 array of its own; nothing else is read or converted.
    """

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[int, int], NDArray[np.float32]]

    def load(self) -> NDArray[np.float32]:
        """The whole tensor, float32."""
        return self.read(0, self.shape[0]) if self.shape else self.read(0, 1)

    def select(self, rows: NDArray[np.integer[Any]]) -> NDArray[np.float32]:
        """Rows by their numbers, which rise; a stretch of the table is in memory at a time."""
        found = [np.empty((0, *self.shape[1:]), np.float32)]
        for start in range(0, self.shape[0], _ROWS):
            stop = min(start + _ROWS, self.shape[0])
            few = rows[np.searchsorted(rows, start) : np.searchsorted(rows, stop)]
            if len(few):
                found.append(self.read(start, stop)[few - start])
        return np.concatenate(found)


def from_storage(stored: NDArray[Any] | None, shape: tuple[int, ...], dtype: str, negated: bool = False) -> LazyTensor:
    """A tensor over mapped memory.

    Args:
        stored: elements as `ELEMENTS[dtype].stored`, of that shape; None where numpy has no such type.
        shape: the tensor's shape.
        dtype: a name of `ELEMENTS`.
        negated: the values are the stored ones times −1.
    """
    values = ELEMENTS[dtype].values

    def read(start: int, stop: int) -> NDArray[np.float32]:
        if stored is None or values is None:
            raise CheckpointError(f"elements of type {dtype} cannot be read; expected {', '.join(FLOATS)}")
        rows = stored[start:stop] if shape else stored
        if dtype == "bfloat16":  # the upper half of a float32
            wide = rows.astype(np.uint32)
            wide <<= np.uint32(16)
            result = wide.view(np.float32)
        else:
            with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite, as torch makes it
                result = np.array(rows.view(values) if values is not rows.dtype.type else rows, np.float32, order="C")
        let_go(rows)
        return np.negative(result, out=result) if negated else result

    return LazyTensor(shape, dtype, read)


def select_rows(tensor: LazyTensor, first: int, last: int) -> LazyTensor:
    """Rows first … last−1 as a tensor of its own."""
    return LazyTensor(
        (last - first, *tensor.shape[1:]),
        tensor.dtype,
        lambda start, stop: tensor.read(first + start, min(first + stop, last)),
    )


def same_values(a: LazyTensor, b: LazyTensor) -> bool:
    """Whether two tensors have the same shape and values; a stretch of each is in memory at a time."""
    rows = a.shape[0] if a.shape else 1
    return a is b or (
        a.shape == b.shape
        and all(
            np.array_equal(a.read(start, stop), b.read(start, stop), equal_nan=True)
            for start, stop in ((first, min(first + _ROWS, rows)) for first in range(0, rows, _ROWS))
        )
    )


def unit_rows(tensor: LazyTensor) -> LazyTensor:
    """Each row divided by its L2 norm, as it is read."""

    def read(start: int, stop: int) -> NDArray[np.float32]:
        rows = tensor.read(start, stop)
        for first in range(0, len(rows), _ROWS):  # the squares of a whole head would be gigabytes
            few = rows[first : first + _ROWS]
            norms = np.sqrt(np.sum(np.square(few), axis=1, keepdims=True, dtype=np.float64))
            few *= (1 / np.maximum(norms, SMALLEST_NORM)).astype(np.float32)
        return rows

    return LazyTensor(tensor.shape, tensor.dtype, read)


def map_file(path: Path) -> NDArray[np.uint8]:
    """A file's bytes, memory-mapped for reading.

    Raises:
        CheckpointError: it is empty, no file, cannot be read, or stands for another file.
    """
    try:
        if not path.is_file():  # a pipe would be waited for
            raise CheckpointError(f"{path} is no file; expected a checkpoint file; fetch it again")
        data: NDArray[np.uint8] = np.memmap(path, np.uint8, mode="r")
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({reason(error)}); expected a checkpoint file; fetch it again"
        ) from error
    if instead := stands_for(data[:512].tobytes()):
        raise CheckpointError(f"{path} is {instead}")
    return data


def let_go(mapped: NDArray[Any]) -> None:
    """Tell the system that this memory, if it is mapped from a file, will not be read again soon.

    Its pages leave the process, which would otherwise seem to hold every file that it has read; the system keeps them
    as long as it has room, so reading them once more costs little.
    """
    base: Any = mapped
    while base is not None and not isinstance(base, mmap.mmap):
        base = getattr(base, "base", None)
    if base is None or not hasattr(base, "madvise") or not mapped.size:
        return
    begin, end = np.lib.array_utils.byte_bounds(mapped)
    start = np.frombuffer(base, np.uint8).ctypes.data
    first = (begin - start) // mmap.PAGESIZE * mmap.PAGESIZE
    base.madvise(mmap.MADV_DONTNEED, first, end - start - first)
