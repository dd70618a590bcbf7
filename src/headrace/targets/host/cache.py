"""The KV cache of the host graphs: one buffer a tensor, with a row a slot, which sessions write in place."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from headrace.config import ModelConfig
from headrace.plan import host_head_dim

__all__ = ["HostCache"]

_DTYPES = {"int8": np.int8, "float32": np.float32}


class HostCache:
    """Keys and values of all layers and slots.

    Args:
        config: the geometry.
        dtype: "int8" or "float32".
        slots: rows.
        context: positions C of a row.

    Attributes:
        buffers: `past_key_3`, `past_value_3` …: (slots, kvH, C, D).
        nbytes: all of it at full context.
        position_bytes: of one position of one slot, over all layers.
    """

    def __init__(self, config: ModelConfig, dtype: str, slots: int, context: int) -> None:
        # np.zeros maps pages when they are first written: a long context costs memory only as it fills.
        shape = (slots, config.num_kv_heads, context, host_head_dim(config))
        self.buffers: dict[str, NDArray[Any]] = {
            f"past_{kind}_{layer}": np.zeros(shape, _DTYPES[dtype])
            for layer in range(config.num_layers)
            for kind in ("key", "value")
        }
        self.nbytes = sum(buffer.nbytes for buffer in self.buffers.values())
        self.position_bytes = self.nbytes // (slots * context)

    def value(self, name: str, slot: int, count: int) -> Any:
        """The buffer `past_key_3` of slots slot … slot+count−1 as an OrtValue over the very same memory: rows of a
        C-contiguous array are contiguous, so ONNX Runtime takes a slice of them without a copy."""
        return ort.OrtValue.ortvalue_from_numpy(self.buffers[name][slot : slot + count])

    def copy(self, source: int, target: int, count: int) -> None:
        """The first `count` positions of one slot into another."""
        for buffer in self.buffers.values():
            buffer[target, :, :count] = buffer[source, :, :count]

    def read(self, slot: int, start: int, stop: int) -> bytes:
        """Positions start … stop−1: each layer's keys (kvH, positions, D), then its values."""
        return b"".join(buffer[slot, :, start:stop].tobytes() for buffer in self.buffers.values())

    def write(self, slot: int, start: int, content: bytes) -> None:
        """What `read` gave, at `start`."""
        count = len(content) // self.position_bytes
        for buffer, part in self._cut(content, count):
            buffer[slot, :, start : start + count] = part

    def close(self) -> None:
        """Let go of the memory."""
        self.buffers.clear()

    def _cut(self, content: bytes, count: int) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
        at = 0
        for buffer in self.buffers.values():
            heads, _, width = buffer.shape[1:]
            part = np.frombuffer(content, buffer.dtype, heads * count * width, at).reshape(heads, count, width)
            at += part.nbytes
            yield buffer, part
