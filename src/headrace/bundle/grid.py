"""Integer grids: scales, rounding, packing, and what comes back. Knows nothing about calibration or files.

A weight (N, K) is a row per output. Its codes are signed and symmetric (int4: −8 … 7, int5: −16 … 15, int6: −32 … 31,
int8: −127 … 127) with one scale per row, or per block of columns of a row; int5 and int6 are for blocks. On disk codes
are unsigned (code + 8, + 16, + 32, + 128). Their low four bits stand two a byte along K with the low nibble first,
which for int4 is what MatMulNBits reads; what int5 and int6 have above them stands apart, 64 columns together. Scales
are float16.

Scales of blocks of less than 8 bits can be LPBQ (low power blockwise quantization, Qualcomm's form): a scale a row
times a whole factor a block, of which a row's largest is 16 for int4, 8 for int5 and 4 for int6. A code times its
factor is then a byte: the weight is an int8 weight with one scale a row, stored in fewer bytes. A factor takes half a
byte where a float16 takes two, so that blocks of 16 columns cost less than blocks of 32 with scales of their own. Such
a scale is a float16 too: a row's scale has so few significant bits that its product with any factor has at most 11.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from headrace.errors import RecipeError

__all__ = [
    "UNIT",
    "Grid",
    "QuantizedTensor",
    "dequantize",
    "factored",
    "fit_scales",
    "nearest_factor",
    "pack",
    "pack_high",
    "quantize_nearest",
    "round_codes",
    "stacked",
    "storable",
    "unpack",
]

UNIT = 64  # columns whose high bits stand together
# Candidates for the clip of the MSE search, as shares of the largest magnitude.
_CLIPS = np.linspace(1.0, 0.55, 19, dtype=np.float32)
# Candidates for a row's LPBQ scale, as shares of the one whose largest factor is the row's largest block.
_ROW_CLIPS = (1.0, 0.94, 0.88)
_ROWS_AT_ONCE = 1 << 18  # elements: the temporary arrays of the search stay in the cache
_WIDTHS = (4, 5, 6, 8)
_FLOAT16_BITS = 11  # significant bits of a float16


@dataclass(frozen=True)
class Grid:
    """Bits (4, 5, 6 or 8), the columns that share a scale (`block`, or None for one scale a row), and whether scales
    of blocks are LPBQ instead of float16.

    Raises:
        RecipeError: bits or block are none of the above, 5 or 6 bits have no block, or LPBQ scales no block of less
            than 8 bits.
    """

    bits: int
    block: int | None = None
    lpbq: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.bits, int) or self.bits not in _WIDTHS:
            raise RecipeError(f"bits {self.bits} is not possible; expected 4, 5, 6 or 8")
        if self.block is not None and self.block not in (16, 32, 64, 128, 256):
            raise RecipeError(f"block {self.block} is not possible; expected channel, 16, 32, 64, 128 or 256")
        if self.high_bits and self.block is None:
            raise RecipeError(f"{self.bits} bits are for blocks; expected a block, such as 32, or 4 or 8 bits")
        if self.lpbq and (self.bits == 8 or self.block is None):
            raise RecipeError("LPBQ scales are for blocks of 4, 5 or 6 bits; expected such bits and a block")

    @property
    def top(self) -> int:
        """The largest code."""
        return self.zero_point - 1

    @property
    def bottom(self) -> int:
        """The smallest code."""
        return -127 if self.bits == 8 else -self.zero_point

    @property
    def zero_point(self) -> int:
        """What is added to a code to store it unsigned."""
        return 1 << (self.bits - 1)

    @property
    def high_bits(self) -> int:
        """How many bits of a code are stored apart, above the lowest four."""
        return 0 if self.bits == 8 else self.bits - 4

    @property
    def largest_factor(self) -> int:
        """Of a row's LPBQ scales: codes times factors are bytes."""
        return 1 << (8 - self.bits)

    @property
    def on_device(self) -> Grid:
        """The grid of the same values for a device, which has no codes of 5 and 6 bits: see `as_int8`."""
        return Grid(8) if self.lpbq and self.high_bits else self

    def blocks(self, columns: int, name: str = "a weight") -> int:
        """How many scales a row of `columns` has.

        Raises:
            RecipeError: the block does not divide the row, or a row of 4-bit codes does not end with a byte.
        """
        if self.block is None and columns * self.bits % 8:
            raise RecipeError(
                f"{name} has an odd number of columns ({columns}), which 4 bits do not pack; give it 8 bits"
            )
        if self.block is None:
            return 1
        if columns % self.block:
            fitting = [b for b in (16, 32, 64, 128, 256) if columns % b == 0]
            raise RecipeError(
                f"block {self.block} does not divide the rows of {name} ({columns} columns); "
                f"expected channel{''.join(f' or {b}' for b in fitting)}"
            )
        return columns // self.block

    def high_bytes(self, columns: int) -> int:
        """Bytes of a row's high bits, of whole units of 64 columns."""
        return -(-columns // UNIT) * UNIT // 8 * self.high_bits

    def nbytes(self, rows: int, columns: int) -> int:
        """Bytes of the packed codes and the scales of a weight."""
        blocks = self.blocks(columns)
        scales = 2 + -(-blocks // 2) if self.lpbq else 2 * blocks
        return rows * (columns * (self.bits - self.high_bits) // 8 + self.high_bytes(columns) + scales)


class QuantizedTensor(NamedTuple):
    """A weight on its grid.

    Attributes:
        codes: int8 (N, K), signed.
        scales: float16 (N, blocks), LPBQ ones multiplied out.
        grid: of codes and scales.
        bias: float32 (N,), what is added to a linear's result, or None.
    """

    codes: NDArray[np.int8]
    scales: NDArray[np.float16]
    grid: Grid
    bias: NDArray[np.float32] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return self.grid.nbytes(*self.codes.shape) + (0 if self.bias is None else self.bias.nbytes)

    def rows(self, at: slice | NDArray[np.integer[Any]]) -> QuantizedTensor:
        """Some rows of a weight without bias."""
        return self._replace(codes=self.codes[at], scales=self.scales[at])

    def scaled(self, factors: NDArray[np.floating]) -> QuantizedTensor:
        """The linear whose results are `factors` (N,) > 0 times as large: scales and bias change, codes stay.

        Exact for powers of two, as long as no scale leaves the range of float16.
        """
        if self.grid.lpbq:
            row, blocks = factored(self.scales, self.grid)
            scales = (_row_scale(row * factors.astype(np.float32)[:, None], self.grid) * blocks).astype(np.float16)
        else:
            wide = self.scales.astype(np.float32) * factors.astype(np.float32)[:, None]
            scales = np.copysign(storable(np.abs(wide)), wide).astype(np.float16)  # a kept grid can have negative ones
        bias = None if self.bias is None else (self.bias * factors).astype(np.float32)
        return self._replace(scales=scales, bias=bias)

    def as_int8(self) -> QuantizedTensor:
        """The same weight with LPBQ scales as the int8 weight with one scale a row that it is: codes times factors.

        A code may be −128, which no search gives an int8 weight but every reader of one takes.

        Raises:
            ValueError: the scales are not LPBQ.
        """
        if not self.grid.lpbq:
            raise ValueError("only LPBQ scales are whole multiples of a row's")
        row, factors = factored(self.scales, self.grid)
        codes = self.codes.reshape(*factors.shape, -1) * factors.astype(np.int8)[:, :, None]
        return self._replace(codes=codes.reshape(self.codes.shape), scales=row.astype(np.float16), grid=Grid(8))


def stacked(strips: Sequence[QuantizedTensor]) -> QuantizedTensor:
    """Strips of the rows of a weight without bias as one."""
    codes, scales = (np.concatenate([getattr(strip, of) for strip in strips]) for of in ("codes", "scales"))
    return QuantizedTensor(codes, scales, strips[0].grid)


def storable(scales: NDArray[np.float32]) -> NDArray[np.float16]:
    """Scales as they are stored: float16, never zero, so that codes may be rounded against the very same value."""
    smallest = np.finfo(np.float16).smallest_subnormal
    return np.maximum(np.minimum(scales, np.float32(65504)).astype(np.float16), smallest)


def factored(scales: NDArray[np.float16], grid: Grid) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """LPBQ scales (N, blocks) as a row's (N, 1) times whole factors (N, blocks), of which a row's largest is the
    grid's.

    Raises:
        ValueError: they are no such products.
    """
    wide = scales.astype(np.float32)
    row = wide.max(1, keepdims=True) / np.float32(grid.largest_factor)
    factors = np.rint(wide / row)
    if not (np.array_equal(factors * row, wide) and factors.min() >= 1 and np.array_equal(row.astype(np.float16), row)):
        raise ValueError(f"scales are not whole multiples of 1/{grid.largest_factor} of their row's largest")
    return row, factors


def nearest_factor(scales: NDArray[np.float32], row: NDArray[np.float32], grid: Grid) -> NDArray[np.float32]:
    """The whole factor, 1 … the grid's largest, whose product with a row's scale is nearest to a scale."""
    factors: NDArray[np.float32] = np.clip(np.rint(scales / row), 1, grid.largest_factor)
    return factors


def _row_scale(wanted: NDArray[np.float32], grid: Grid) -> NDArray[np.float32]:
    """Scales of rows as LPBQ stores them: float16 whose product with any factor is a float16 as well, since a factor
    takes 8 − bits of the significant bits."""
    bits = _FLOAT16_BITS - (8 - grid.bits)
    fraction, exponent = np.frexp(wanted)
    short = np.ldexp(np.rint(np.ldexp(fraction, bits)), exponent - bits)
    most = np.float32((65536 - (65536 >> bits)) / grid.largest_factor)
    return storable(np.minimum(short, most)).astype(np.float32)


def fit_scales(
    weight: NDArray[np.float32], grid: Grid, importance: NDArray[np.float32] | None = None
) -> NDArray[np.float16]:
    """The scale of each block with the least squared rounding error, (N, blocks).

    Args:
        weight: (N, K).
        grid: bits and block.
        importance: (K,) weight of each column's squared error, or None for equal ones.
    """
    rows, columns = weight.shape
    blocks = grid.blocks(columns)
    out = np.empty((rows, blocks), np.float16)
    share = None if importance is None else importance.reshape(1, blocks, -1)
    for at in _chunks(rows, columns):
        w = weight[at].reshape(-1, blocks, columns // blocks)
        # Less than 8 bits reach one step further down than up: the side with the largest magnitude decides.
        limit = np.maximum(w.max(2) / grid.top, w.min(2) / grid.bottom)
        limit = np.maximum(limit, 0)
        best_scale, best_error = storable(limit), np.full(limit.shape, np.inf, np.float32)
        for clip in _CLIPS:
            scale = storable(limit * clip)
            total = _rounding_errors(w, scale, grid, share)
            better = total < best_error
            best_error = np.where(better, total, best_error)
            best_scale = np.where(better, scale, best_scale)
        out[at] = _fit_factors(w, best_scale, grid, share) if grid.lpbq else best_scale
    return out


def _fit_factors(
    w: NDArray[np.float32], scales: NDArray[np.float16], grid: Grid, share: NDArray[np.float32] | None
) -> NDArray[np.float16]:
    """LPBQ scales (N, blocks) near to free ones: of a few scales for each row, and of the two factors next to each
    block's scale, those of least error. The largest block always gets the largest factor."""
    most = np.float32(grid.largest_factor)
    wide = scales.astype(np.float32)
    largest = np.arange(wide.shape[1]) == wide.argmax(1)[:, None]
    best_scale, best_error = scales, np.full((len(wide), 1), np.inf, np.float32)
    for clip in _ROW_CLIPS:
        row = _row_scale(wide.max(1, keepdims=True) * np.float32(clip / grid.largest_factor), grid)
        below = np.where(largest, most, np.clip(np.floor(wide / row), 1, most))
        above = np.minimum(below + 1, most)
        tried = [(row * factors).astype(np.float16) for factors in (below, above)]
        low, high = (_rounding_errors(w, each, grid, share) for each in tried)
        total = np.minimum(low, high).sum(1, keepdims=True)
        scale = np.where(low <= high, *tried)
        better = ~(total > best_error)  # also where no number says so: every row needs a scale of this form
        best_scale = np.where(better, scale, best_scale)
        best_error = np.where(better, total, best_error)
    return best_scale


def _rounding_errors(
    w: NDArray[np.float32], scales: NDArray[np.float16], grid: Grid, share: NDArray[np.float32] | None
) -> NDArray[np.float32]:
    """Squared errors of blocks (N, blocks, columns) rounded with scales (N, blocks), summed over a block's columns."""
    step = scales.astype(np.float32)[:, :, None]
    error = np.clip(np.rint(w / step), grid.bottom, grid.top)
    error *= step
    error -= w
    np.square(error, out=error)
    total: NDArray[np.float32] = error.sum(2) if share is None else (error * share).sum(2)
    return total


def round_codes(weight: NDArray[np.float32], scales: NDArray[np.float16], grid: Grid) -> NDArray[np.int8]:
    """The nearest codes of a weight (N, K) for given scales (N, blocks); halves go to even."""
    rows, columns = weight.shape
    blocks = grid.blocks(columns)
    w = weight.reshape(rows, blocks, columns // blocks) / scales.astype(np.float32)[:, :, None]
    codes: NDArray[np.int8] = np.clip(np.rint(w, out=w), grid.bottom, grid.top).astype(np.int8)
    return codes.reshape(rows, columns)


def quantize_nearest(
    weight: NDArray[np.float32], grid: Grid, importance: NDArray[np.float32] | None = None
) -> QuantizedTensor:
    """Round to nearest under the scales of `fit_scales`."""
    scales = fit_scales(weight, grid, importance)
    codes = np.empty(weight.shape, np.int8)
    for at in _chunks(*weight.shape):
        codes[at] = round_codes(weight[at], scales[at], grid)
    return QuantizedTensor(codes, scales, grid)


def dequantize(tensor: QuantizedTensor) -> NDArray[np.float32]:
    """codes × scales, float32 (N, K)."""
    rows, columns = tensor.codes.shape
    blocks = tensor.scales.shape[1]
    values = tensor.codes.reshape(rows, blocks, columns // blocks) * tensor.scales.astype(np.float32)[:, :, None]
    return np.asarray(values, np.float32).reshape(rows, columns)


def pack(codes: NDArray[np.int8], bits: int) -> NDArray[np.uint8]:
    """Signed codes (N, K) → stored bytes: (N, K) of 8 bits, else (N, K/2) of the low four bits of each."""
    if bits == 8:
        return np.bitwise_xor(codes.view(np.uint8), np.uint8(0x80))  # + 128 in two's complement
    low = _unsigned(codes, bits) & np.uint8(15)
    return np.asarray(low[:, 0::2] | (low[:, 1::2] << np.uint8(4)), np.uint8)


def pack_high(codes: NDArray[np.int8], bits: int) -> NDArray[np.uint8]:
    """The bits of 5- or 6-bit codes (N, K) above the lowest four → (N, (bits − 4)·8·⌈K/64⌉).

    Of 64 columns, 0 where a row has no more, byte j of n holds in its low nibble those of the even columns 2·j,
    2·(j + n), … from the lowest bits on, in its high nibble those of the odd columns beside them. So an engine that has
    even and odd columns in a vector each, as nibbles come, moves all high bits into place with a shift a vector.
    """
    above, (rows, columns) = bits - 4, codes.shape
    high = np.zeros((rows, -(-columns // UNIT) * UNIT), np.uint8)
    high[:, :columns] = _unsigned(codes, bits) >> np.uint8(4)
    parts = high.view("<u8").reshape(-1, 4 // above, 2 * above)  # a word is four pairs of columns
    nibbles = reduce(np.bitwise_or, [parts[:, i] << np.uint64(above * i) for i in range(4 // above)])
    both = (nibbles | nibbles >> np.uint64(4)).view(np.uint8)[:, ::2]
    return both.reshape(rows, -1)


def unpack(stored: NDArray[np.uint8], bits: int, high: NDArray[np.uint8] | None = None) -> NDArray[np.int8]:
    """The inverse of `pack`, and of `pack_high` where codes have 5 or 6 bits.

    Raises:
        ValueError: codes of 5 or 6 bits come without high ones, or others with such.
    """
    if (high is None) != (bits in (4, 8)):
        raise ValueError(f"codes of {bits} bits come {'without' if high is None else 'with'} high bits")
    if bits == 8:
        return np.bitwise_xor(stored, np.uint8(0x80)).view(np.int8)
    rows, columns = stored.shape[0], stored.shape[1] * 2
    codes = np.empty((rows, columns), np.uint8)
    codes[:, 0::2] = stored & np.uint8(15)
    codes[:, 1::2] = stored >> np.uint8(4)
    if high is not None:
        above = bits - 4
        nibbles = np.stack([high & np.uint8(15), high >> np.uint8(4)], axis=2).reshape(rows, -1)
        words = nibbles.view("<u8").reshape(-1, 1, 2 * above)
        shifts = np.arange(0, 4, above, dtype=np.uint64)[:, None]
        parts = (words >> shifts & np.uint64(0x0101010101010101 * ((1 << above) - 1))) << np.uint64(4)
        codes |= parts.view(np.uint8).reshape(rows, -1)[:, :columns]
    return codes.view(np.int8) - np.int8(1 << (bits - 1))


def _unsigned(codes: NDArray[np.int8], bits: int) -> NDArray[np.uint8]:
    return (codes + np.int8(1 << (bits - 1))).view(np.uint8)


def _chunks(rows: int, columns: int) -> Iterator[slice]:
    step = max(1, _ROWS_AT_ONCE // columns)
    return (slice(at, min(at + step, rows)) for at in range(0, rows, step))
