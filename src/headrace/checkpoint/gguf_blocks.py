"""GGUF's block formats to float32, whole rows at a time. Knows nothing about files or models.

A row is a sequence of blocks of 32 or 256 values; each block has its scales and its packed codes.
Source of the layouts: ggml's quants (ggml-common.h, `block_q4_0` …); fp16 scales are little-endian.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["BLOCK_TYPES", "TYPE_NAMES", "BlockType"]

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


def _q2_k(blocks: Bytes) -> Floats:
    scales, minima = _line(_half(blocks, 80), blocks[:, :16] & 15), _line(_half(blocks, 82), blocks[:, :16] >> 4)
    values = _line(scales[:, :, None], _two_bits(blocks[:, 16:80]), -minima[:, :, None])
    return values.reshape(len(blocks), 256)


def _q3_k(blocks: Bytes) -> Floats:
    """Codes −4 … 3: two low bits, and a third one that is set where 4 need not be taken away."""
    bits = np.arange(8, dtype=np.uint8)[None, :, None]
    third = ((blocks[:, None, :32] >> bits) & np.uint8(1)).reshape(-1, 16, 16) << np.uint8(2)
    codes = (_two_bits(blocks[:, 32:96]) | third).view(np.int8) - np.int8(4)
    packed = blocks[:, 96:108]  # sixteen 6-bit scales: low halves in 8 bytes, then the four groups of upper bits
    low = np.concatenate([packed[:, :8] & 15, packed[:, :8] >> 4], axis=1)
    high = np.concatenate([(packed[:, 8:] >> np.uint8(shift)) & 3 for shift in (0, 2, 4, 6)], axis=1)
    scales = _line(_half(blocks, 108), (low | high << np.uint8(4)).view(np.int8) - np.int8(32))
    return _line(scales[:, :, None], codes).reshape(len(blocks), 256)


def _two_bits(packed: Bytes) -> Bytes:
    """64 bytes in two runs of 32, each read at bits 0, 2, 4 and 6: (N, 16, 16)."""
    shifts = np.array([0, 2, 4, 6], np.uint8).reshape(1, 1, 4, 1)
    return ((packed.reshape(-1, 2, 1, 32) >> shifts) & np.uint8(3)).reshape(-1, 16, 16)


# Codes of 4 bits that mean values of a table, not steps of a line.
IQ4_VALUES = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8)
FP4_VALUES = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)  # e2m1, doubled


def _iq4_nl(blocks: Bytes) -> Floats:
    return _line(_half(blocks, 0), IQ4_VALUES[_nibbles(blocks[:, 2:18])])


def _iq4_xs(blocks: Bytes) -> Floats:
    runs = np.arange(8, dtype=np.uint16)
    low = np.repeat(blocks[:, 4:8], 2, axis=1) >> (4 * (runs % 2)).astype(np.uint8) & np.uint8(15)
    upper = np.ascontiguousarray(blocks[:, 2:4]).view(np.uint16) >> (2 * runs) & np.uint16(3)
    scales = _line(_half(blocks, 0), (low | upper.astype(np.uint8) << np.uint8(4)).view(np.int8) - np.int8(32))
    codes = _nibbles(blocks[:, 8:136].reshape(-1, 16)).reshape(-1, 8, 32)
    return _line(scales[:, :, None], IQ4_VALUES[codes]).reshape(len(blocks), 256)


def _mxfp4(blocks: Bytes) -> Floats:
    halved = np.ldexp(1.0, blocks[:, :1].astype(np.int32) - 128)  # e8m0 is 2^(e−127); the table's values are doubled
    return _line(halved.astype(np.float32), FP4_VALUES[_nibbles(blocks[:, 1:17])])


def _float32(blocks: Bytes) -> Floats:
    return np.array(blocks, order="C").view(np.float32)


def _float16(blocks: Bytes) -> Floats:
    return np.ascontiguousarray(blocks).view(np.float16).astype(np.float32)


def _bfloat16(blocks: Bytes) -> Floats:
    return (np.ascontiguousarray(blocks).view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)


def _float64(blocks: Bytes) -> Floats:
    with np.errstate(over="ignore"):  # beyond float32 becomes infinite
        return np.ascontiguousarray(blocks).view(np.float64).astype(np.float32)


# By ggml's number for the type.
BLOCK_TYPES = {
    0: BlockType("float32", 1, 4, _float32),
    1: BlockType("float16", 1, 2, _float16),
    2: BlockType("q4_0", 32, 18, _q4_0),
    3: BlockType("q4_1", 32, 20, _q4_1),
    6: BlockType("q5_0", 32, 22, _q5_0),
    7: BlockType("q5_1", 32, 24, _q5_1),
    8: BlockType("q8_0", 32, 34, _q8_0),
    10: BlockType("q2_k", 256, 84, _q2_k),
    11: BlockType("q3_k", 256, 110, _q3_k),
    12: BlockType("q4_k", 256, 144, _q4_k),
    13: BlockType("q5_k", 256, 176, _q5_k),
    14: BlockType("q6_k", 256, 210, _q6_k),
    20: BlockType("iq4_nl", 32, 18, _iq4_nl),
    23: BlockType("iq4_xs", 256, 136, _iq4_xs),
    28: BlockType("float64", 1, 8, _float64),
    30: BlockType("bfloat16", 1, 2, _bfloat16),
    39: BlockType("mxfp4", 32, 17, _mxfp4),
}

# Types that are not read: codes of large codebooks, integers, what only arithmetic in flight uses, and what ggml has
# taken out again.
TYPE_NAMES = {number: kind.name for number, kind in BLOCK_TYPES.items()} | {
    4: "q4_2", 5: "q4_3", 9: "q8_1", 15: "q8_k", 16: "iq2_xxs", 17: "iq2_xs", 18: "iq3_xxs", 19: "iq1_s",
    21: "iq3_s", 22: "iq2_s", 24: "int8", 25: "int16", 26: "int32", 27: "int64", 29: "iq1_m", 31: "q4_0_4_4",
    32: "q4_0_4_8", 33: "q4_0_8_8", 34: "tq1_0", 35: "tq2_0", 36: "iq4_nl_4_4", 37: "iq4_nl_4_8",
    38: "iq4_nl_8_8", 40: "nvfp4", 41: "q1_0",
}  # fmt: skip
