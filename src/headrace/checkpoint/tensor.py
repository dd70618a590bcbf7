"""LazyTensor: a weight that is read when it is used. Knows nothing about file formats."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrace.errors import CheckpointError

__all__ = ["LazyTensor", "from_storage", "map_file", "select_rows", "unit_rows"]

SMALLEST_NORM = 1e-12  # torch.nn.functional.normalize's eps: a row of zeros stays one


@dataclass(frozen=True)
class LazyTensor:
    """A weight on disk.

    Attributes:
        shape: its shape; axis 0 is rows.
        dtype: the stored element type ("bfloat16", "float16", "float32"), or the block format ("q4_1") in a GGUF.
        read: rows start … stop−1 as a float32 array; nothing else is read or converted.
    """

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[int, int], NDArray[np.float32]]

    def load(self) -> NDArray[np.float32]:
        """The whole tensor, float32."""
        return self.read(0, self.shape[0])


def from_storage(stored: NDArray[Any], dtype: str) -> LazyTensor:
    """A tensor over mapped memory: float32, float16, or bfloat16 as its uint16 bit patterns."""

    def read(start: int, stop: int) -> NDArray[np.float32]:
        rows = stored[start:stop]
        if dtype == "bfloat16":  # the upper half of a float32
            wide = rows.astype(np.uint32)
            wide <<= np.uint32(16)
            return wide.view(np.float32)
        return np.array(rows, np.float32, order="C")

    return LazyTensor(stored.shape, dtype, read)


def select_rows(tensor: LazyTensor, first: int, last: int) -> LazyTensor:
    """Rows first … last−1 as a tensor of its own."""
    return LazyTensor(
        (last - first, *tensor.shape[1:]),
        tensor.dtype,
        lambda start, stop: tensor.read(first + start, min(first + stop, last)),
    )


def unit_rows(tensor: LazyTensor) -> LazyTensor:
    """Each row divided by its L2 norm, as it is read."""

    def read(start: int, stop: int) -> NDArray[np.float32]:
        rows = tensor.read(start, stop)
        norms = np.sqrt(np.sum(np.square(rows), axis=1, keepdims=True, dtype=np.float64))
        scale = (1 / np.maximum(norms, SMALLEST_NORM)).astype(np.float32)
        return rows * scale

    return LazyTensor(tensor.shape, tensor.dtype, read)


def map_file(path: Path) -> NDArray[np.uint8]:
    """A file's bytes, memory-mapped for reading.

    Raises:
        CheckpointError: it is empty or cannot be read.
    """
    try:
        return np.memmap(path, np.uint8, mode="r")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); expected a checkpoint file; fetch it again") from error
