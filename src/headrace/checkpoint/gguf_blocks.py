"""GGUF's block formats to float32, whole rows at a time. Knows nothing about files or models.

A row is a sequence of blocks of 32 or 256 values; each block has its scales and its packed codes.
Source of the layouts: ggml's quants (ggml-common.h, `block_q4_0` …); fp16 scales are little-endian.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["BLOCK_TYPES", "BlockType"]

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class BlockType:
    """A stored element type.

    Attributes:
        name: "q4_1" …; plain floats have the names of `LazyTensor.dtype`.
        values: values a block.
        size: bytes a block.
        decode: blocks (N, size) of bytes → float32 (N, values).
    """

    name: str
    values: int
    size: int
    decode: Callable[[Bytes], Floats]


def _half(blocks: Bytes, start: int) -> Floats:
    """The fp16 at byte `start` of each block, (N, 1)."""
    return np.ascontiguousarray(blocks[:, start : start + 2]).view(np.float16).astype(np.float32)


def _nibbles(packed: Bytes) -> Bytes:
    """Low nibbles of all bytes, then high nibbles: (N, k) → (N, 2k)."""
    count, half = packed.shape
    codes = np.empty((count, 2 * half), np.uint8)
    np.bitwise_and(packed, 15, out=codes[:, :half])
    np.right_shift(packed, 4, out=codes[:, half:])
    return codes


def _line(scale: Floats, codes: NDArray[np.integer], minimum: Floats | None = None) -> Floats:
    """scale · codes + minimum, without temporaries: these are the formats whole models are read from."""
    values: Floats = np.multiply(scale, codes, dtype=np.float32)
    if minimum is not None:
        values += minimum
    return values


def _fifth_bits(blocks: Bytes, start: int) -> Bytes:
    """32 single bits, least significant first, each at the place of value 16: (N, 32)."""
    return np.unpackbits(blocks[:, start : start + 4], axis=1, bitorder="little") << np.uint8(4)


def _q4_0(blocks: Bytes) -> Floats:
    return _line(_half(blocks, 0), _nibbles(blocks[:, 2:18]).view(np.int8) - np.int8(8))


def _q4_1(blocks: Bytes) -> Floats:
    return _line(_half(blocks, 0), _nibbles(blocks[:, 4:20]), _half(blocks, 2))


def _q5_0(blocks: Bytes) -> Floats:
    codes = _nibbles(blocks[:, 6:22]) | _fifth_bits(blocks, 2)
    return _line(_half(blocks, 0), codes.view(np.int8) - np.int8(16))


def _q5_1(blocks: Bytes) -> Floats:
    codes = _nibbles(blocks[:, 8:24]) | _fifth_bits(blocks, 4)
    return _line(_half(blocks, 0), codes, _half(blocks, 2))


def _q8_0(blocks: Bytes) -> Floats:
    return _line(_half(blocks, 0), blocks[:, 2:34].view(np.int8))


def _scales_and_minima(packed: Bytes) -> tuple[Floats, Floats]:
    """The eight 6-bit scales and eight 6-bit minima in a K block's 12 bytes, each (N, 8)."""
    low, middle, high = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([low & 63, (high & 15) | ((low >> 6) << 4)], axis=1)
    minima = np.concatenate([middle & 63, (high >> 4) | ((middle >> 6) << 4)], axis=1)
    return scales.astype(np.float32), minima.astype(np.float32)


def _k_block(blocks: Bytes, codes: Bytes) -> Floats:
    """Codes (N, 8, 32) with the scales in front of a q4_k or q5_k block."""
    scales, minima = _scales_and_minima(blocks[:, 4:16])
    scales, minima = _half(blocks, 0) * scales, _half(blocks, 2) * minima
    return (scales[:, :, None] * codes - minima[:, :, None]).reshape(len(blocks), 256)


def _k_nibbles(packed: Bytes) -> Bytes:
    """128 bytes in four runs of 32, each first its low then its high nibbles: (N, 8, 32)."""
    runs = packed.reshape(-1, 4, 1, 32)
    return np.concatenate([runs & 15, runs >> 4], axis=2).reshape(-1, 8, 32)


def _q4_k(blocks: Bytes) -> Floats:
    return _k_block(blocks, _k_nibbles(blocks[:, 16:144]))


def _q5_k(blocks: Bytes) -> Floats:
    bits = np.arange(8, dtype=np.uint8)[None, :, None]  # run r of 32 values has its fifth bits at bit r
    fifth = ((blocks[:, None, 16:48] >> bits) & np.uint8(1)) << np.uint8(4)
    return _k_block(blocks, _k_nibbles(blocks[:, 48:176]) | fifth)


def _q6_k(blocks: Bytes) -> Floats:
    low = blocks[:, 0:128].reshape(-1, 2, 1, 64)
    low = np.concatenate([low & 15, low >> 4], axis=2).reshape(-1, 2, 4, 32)
    shifts = np.array([0, 2, 4, 6], np.uint8).reshape(1, 1, 4, 1)
    high = (blocks[:, 128:192].reshape(-1, 2, 1, 32) >> shifts) & 3
    codes = (low | (high << 4)).reshape(-1, 16, 16).astype(np.float32) - 32
    scales = _half(blocks, 208) * blocks[:, 192:208].view(np.int8)
    return (scales[:, :, None] * codes).reshape(len(blocks), 256)


def _float32(blocks: Bytes) -> Floats:
    return np.ascontiguousarray(blocks).view(np.float32)


def _float16(blocks: Bytes) -> Floats:
    return np.ascontiguousarray(blocks).view(np.float16).astype(np.float32)


def _bfloat16(blocks: Bytes) -> Floats:
    return (np.ascontiguousarray(blocks).view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)


# By ggml's number for the type.
BLOCK_TYPES = {
    0: BlockType("float32", 1, 4, _float32),
    1: BlockType("float16", 1, 2, _float16),
    2: BlockType("q4_0", 32, 18, _q4_0),
    3: BlockType("q4_1", 32, 20, _q4_1),
    6: BlockType("q5_0", 32, 22, _q5_0),
    7: BlockType("q5_1", 32, 24, _q5_1),
    8: BlockType("q8_0", 32, 34, _q8_0),
    12: BlockType("q4_k", 256, 144, _q4_k),
    13: BlockType("q5_k", 256, 176, _q5_k),
    14: BlockType("q6_k", 256, 210, _q6_k),
    30: BlockType("bfloat16", 1, 2, _bfloat16),
}
