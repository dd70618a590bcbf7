"""LazyTensor: a weight that is read when it is used. Knows nothing about file formats."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["LazyTensor"]


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
