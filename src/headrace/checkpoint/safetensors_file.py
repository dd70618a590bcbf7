"""One .safetensors file, mapped: a length, a JSON header, the bytes. Knows nothing about models.

Every number of the header is checked against the file's length before it is used.
Source: the format's description at huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrace.checkpoint.tensor import LazyTensor, from_storage, map_file
from headrace.errors import CheckpointError

__all__ = ["read_safetensors"]

HEADER_LIMIT = 100_000_000  # bytes; the reference reader's own
DIMENSIONS_LIMIT = 8
TYPES = {"F32": ("float32", np.float32), "F16": ("float16", np.float16), "BF16": ("bfloat16", np.uint16)}


def read_safetensors(path: Path) -> dict[str, LazyTensor]:
    """The file's tensors by name.

    Raises:
        CheckpointError: the file is truncated or its header makes no sense.
    """
    data = map_file(path)
    if len(data) < 8:
        raise CheckpointError(f"{path} has {len(data)} bytes; expected a safetensors file; fetch it again")
    length = int.from_bytes(data[:8].tobytes(), "little")
    if length > min(len(data) - 8, HEADER_LIMIT):
        raise CheckpointError(
            f"{path} states a header of {length} bytes, but has {len(data)} in all; it is truncated or no "
            "safetensors file; fetch it again"
        )
    try:
        header = json.loads(data[8 : 8 + length].tobytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} has a header that is not JSON; the file is damaged; fetch it again") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} has a header that is no JSON object; the file is damaged; fetch it again")
    body = data[8 + length :]
    return {name: _tensor(path, name, entry, body) for name, entry in header.items() if name != "__metadata__"}


def _tensor(path: Path, name: str, entry: Any, body: NDArray[np.uint8]) -> LazyTensor:
    """One entry of the header, checked."""
    try:
        kind, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: tensor {name!r} lacks dtype, shape or data_offsets; fetch it again") from error
    if not isinstance(shape, list) or len(shape) > DIMENSIONS_LIMIT or not all(_count(n) for n in [*shape, begin, end]):
        raise CheckpointError(f"{path}: tensor {name!r} has shape {shape!r} at {begin!r}…{end!r}; fetch it again")
    if kind not in TYPES:
        raise CheckpointError(f"{path}: tensor {name!r} is {kind!r}; expected one of {', '.join(TYPES)}")
    dtype, stored = TYPES[kind]
    size = math.prod(shape) * np.dtype(stored).itemsize
    if end - begin != size:
        raise CheckpointError(f"{path}: tensor {name!r} of shape {shape} has {end - begin} bytes; expected {size}")
    if end > len(body):
        raise CheckpointError(
            f"{path} is truncated: tensor {name!r} ends at byte {end} of the data, which has {len(body)}; "
            "fetch it again"
        )
    return from_storage(body[begin:end].view(stored).reshape(shape), dtype)


def _count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
