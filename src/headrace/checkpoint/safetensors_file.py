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

from headrace.checkpoint.tensor import ELEMENTS, LazyTensor, from_storage, map_file
from headrace.errors import CheckpointError, shown

__all__ = ["read_safetensors"]

HEADER_LIMIT = 100_000_000  # bytes; the reference reader's own
DIMENSIONS_LIMIT = 8
TYPES = {
    "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu", "F4": "float4_e2m1fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F6_E2M3": "float6_e2m3fn", "F6_E3M2": "float6_e3m2fn", "C64": "complex64",
}  # fmt: skip


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
        header = json.loads(data[8 : 8 + length].tobytes(), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} has a header that is not JSON ({shown(str(error))}); the file is damaged; fetch it again"
        ) from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} has a header that is no JSON object; the file is damaged; fetch it again")
    body = data[8 + length :]
    return {name: _tensor(path, name, entry, body) for name, entry in header.items() if name != "__metadata__"}


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys are all different: readers do not agree which of two would count."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("of which a key stands twice")
    return found


def _tensor(path: Path, name: str, entry: Any, body: NDArray[np.uint8]) -> LazyTensor:
    """One entry of the header, checked."""
    title = f"{path}: tensor {shown(name)}"
    try:
        kind, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{title} lacks dtype, shape or data_offsets; fetch it again") from error
    if not isinstance(shape, list) or len(shape) > DIMENSIONS_LIMIT or not all(_count(n) for n in [*shape, begin, end]):
        raise CheckpointError(f"{title} has shape {shown(shape)} at {shown(begin)}…{shown(end)}; fetch it again")
    if not isinstance(kind, str) or kind not in TYPES:
        raise CheckpointError(f"{title} is {shown(kind)}; expected one of {', '.join(TYPES)}")
    element = ELEMENTS[TYPES[kind]]
    size = -(-math.prod(shape) * element.bits // 8)
    if end - begin != size:
        raise CheckpointError(f"{title} of shape {shown(shape)} has {end - begin} bytes; expected {size}")
    if end > len(body):
        raise CheckpointError(
            f"{path} is truncated: tensor {shown(name)} ends at byte {end} of the data, which has {len(body)}; "
            "fetch it again"
        )
    stored = None if element.stored is None else body[begin:end].view(element.stored).reshape(shape)
    return from_storage(stored, tuple(shape), TYPES[kind])


def _count(value: object) -> bool:
    """A whole number that fits 63 bits: a longer one could not even be printed."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63
