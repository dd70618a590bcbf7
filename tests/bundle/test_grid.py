"""Integer grids: packing is exact, scales are stored as they are used, the clip search never does worse than none."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from headrace.bundle import grid as grid_module
from headrace.bundle.grid import (
    Grid,
    QuantizedTensor,
    dequantize,
    factored,
    fit_scales,
    pack,
    pack_high,
    quantize_nearest,
    round_codes,
    storable,
    unpack,
)
from headrace.errors import RecipeError

BLOCKS = (None, 16, 32, 64, 128, 256)
# Sums of squares in float32 over at most 512 columns: a tie between two clips may be decided by rounding.
TIE = 1e-5
# Squared error beside scales of their own. Factors end at 16, 8 and 4: a step is 6 to 12, 25 and 50 % of the scale of a
# block half as large as its row's largest. Heavy-tailed weights in blocks of 16 lose most: 1.10, 1.29 and 1.61.
LPBQ_LOSS = {4: 1.11, 5: 1.35, 6: 1.7}
WIDTHS = (4, 5, 6, 8)
GRIDS = [(bits, block) for bits in WIDTHS for block in BLOCKS if block is not None or bits in (4, 8)]

codes_of = {
    bits: arrays.arrays(
        np.int8,
        st.tuples(st.integers(1, 5), st.sampled_from((16, 32, 80) if bits in (5, 6) else (2, 6, 16, 18))),
        elements=st.integers(-128 if bits == 8 else Grid(bits, 16).bottom, Grid(bits, 16).top),
    )
    for bits in WIDTHS
}


def weights(seed: int, rows: int = 6, columns: int = 256) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_t(4, (rows, columns)).astype(np.float32)


def squared_error(weight: NDArray[np.float32], q: QuantizedTensor) -> NDArray[np.float64]:
    """Of each block, (N, blocks)."""
    error = (weight.astype(np.float64) - dequantize(q)).reshape(len(weight), q.scales.shape[1], -1)
    return np.square(error).sum(2)


def packed_one_by_one(codes: NDArray[np.int8], bits: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The stored bytes as docs/bundle-format.md has them, a code at a time: low bits, and those above."""
    rows, columns = codes.shape
    low = np.zeros((rows, columns if bits == 8 else columns // 2), np.uint8)
    above = 0 if bits == 8 else bits - 4
    width = 8 * above  # bytes of 64 columns
    high = np.zeros((rows, -(-columns // 64) * width), np.uint8)
    for n in range(rows):
        for k in range(columns):
            code = int(codes[n, k]) + 2 ** (bits - 1)
            if bits == 8:
                low[n, k] = code
                continue
            low[n, k // 2] += code % 16 * (16 if k % 2 else 1)
            if above:
                place = k % 64 // 2 + (32 if k % 2 else 0)
                high[n, k // 64 * width + place % width] += code // 16 * 2 ** (above * (place // width))
    return low, high


@pytest.mark.parametrize("bits", WIDTHS)
@given(data=st.data())
def test_pack_and_back(bits: int, data: st.DataObject) -> None:
    codes = data.draw(codes_of[bits])
    stored = pack(codes, bits)
    high = pack_high(codes, bits) if bits in (5, 6) else None
    low_wanted, high_wanted = packed_one_by_one(codes, bits)
    assert stored.dtype == np.uint8
    np.testing.assert_array_equal(stored, low_wanted)
    if high is not None:
        assert high.dtype == np.uint8
        np.testing.assert_array_equal(high, high_wanted)
    back = unpack(stored, bits, high)
    assert back.dtype == np.int8
    np.testing.assert_array_equal(back, codes)


def test_the_stored_form_is_the_documented_one() -> None:
    np.testing.assert_array_equal(pack(np.array([[-8, 7, 0, 1]], np.int8), 4), [[0xF0, 0x98]])  # low nibble first
    np.testing.assert_array_equal(pack(np.array([[-127, 0, 127]], np.int8), 8), [[1, 128, 255]])
    codes = np.array([[-32, 31, 0, 1, -1, 16, -16, -17]], np.int8)  # unsigned 0, 63, 32, 33, 31, 48, 16, 15
    np.testing.assert_array_equal(pack(codes, 6), [[0xF0, 0x10, 0x0F, 0xF0]])
    # Their high bits are 0 3, 2 2, 1 3, 1 0: those of column 2j and, 4 bits above, of column 2j + 1 in byte j.
    np.testing.assert_array_equal(pack_high(codes, 6), [[0x30, 0x22, 0x31, 0x01, *[0] * 12]])
    codes = np.array([[-16, 15, 0, 1, -1, 8, -8, -9] * 8], np.int8)  # unsigned 0, 31, 16, 17, 15, 24, 8, 7
    np.testing.assert_array_equal(pack_high(codes, 5), [[0xF0, 0xFF, 0xF0, 0x00] * 2])


@pytest.mark.parametrize("bits", [4, 8])
def test_every_byte_unpacks_and_packs_to_itself(bits: int) -> None:
    stored = np.arange(256, dtype=np.uint8)[None]
    np.testing.assert_array_equal(pack(unpack(stored, bits), bits), stored)


def test_high_bits_are_needed_where_there_are_any() -> None:
    with pytest.raises(ValueError, match="5 bits come without high bits"):
        unpack(np.zeros((1, 8), np.uint8), 5)
    with pytest.raises(ValueError, match="4 bits come with high bits"):
        unpack(np.zeros((1, 8), np.uint8), 4, np.zeros((1, 8), np.uint8))


@pytest.mark.parametrize(("bits", "block"), GRIDS)
def test_codes_are_the_nearest_for_the_stored_scales(bits: int, block: int | None) -> None:
    weight, grid = weights(1), Grid(bits, block)
    q = quantize_nearest(weight, grid)
    assert q.scales.dtype == np.float16
    assert q.scales.shape == (6, 256 // (block or 256))
    assert q.codes.dtype == np.int8
    assert q.codes.min() >= grid.bottom
    assert q.codes.max() <= grid.top
    high = pack_high(q.codes, bits).nbytes if bits in (5, 6) else 0
    assert q.nbytes == pack(q.codes, bits).nbytes + high + q.scales.nbytes
    step = np.repeat(q.scales.astype(np.float64), block or 256, axis=1)
    np.testing.assert_array_equal(dequantize(q), (q.codes * step).astype(np.float32))
    exact = np.clip(weight / step, grid.bottom, grid.top)
    assert (np.abs(exact - q.codes) <= 0.5 + 1e-5).all()


@pytest.mark.parametrize(("bits", "block"), GRIDS)
@settings(max_examples=25)
@given(seed=st.integers(0, 1 << 30), spread=st.floats(1e-3, 1e3))
def test_the_clip_search_is_no_worse_than_the_largest_magnitude(
    bits: int, block: int | None, seed: int, spread: float
) -> None:
    weight, grid = weights(seed) * np.float32(spread), Grid(bits, block)
    blocks = weight.reshape(6, grid.blocks(256), -1)
    largest = storable(np.abs(blocks).max(2) / grid.top)
    plain = QuantizedTensor(round_codes(weight, largest, grid), largest, grid)
    full = storable(np.maximum(blocks.max(2) / grid.top, blocks.min(2) / grid.bottom))
    whole = QuantizedTensor(round_codes(weight, full, grid), full, grid)
    best = squared_error(weight, quantize_nearest(weight, grid))
    assert (best <= squared_error(weight, whole) * (1 + TIE)).all(), "the unclipped scale is one of the candidates"
    if bits in (4, 8):  # at 5 and 6 bits a scale that is no candidate can be the better one by chance
        assert best.sum() <= squared_error(weight, plain).sum() * (1 + TIE)


@pytest.mark.parametrize("block", BLOCKS[1:])
@pytest.mark.parametrize(("bits", "most"), [(4, 16), (5, 8), (6, 4)])
@settings(max_examples=25)
@given(seed=st.integers(0, 1 << 30), spread=st.floats(1e-9, 1e5))
def test_lpbq_scales_are_whole_factors_of_one_a_row(bits: int, most: int, block: int, seed: int, spread: float) -> None:
    weight, grid = weights(seed) * np.float32(spread), Grid(bits, block, lpbq=True)
    q = quantize_nearest(weight, grid)
    row, factors = factored(q.scales, grid)
    assert row.shape == (6, 1)
    assert (factors.max(1) == most).all(), "a device rounds scales again unless a row has the largest factor"
    assert set(factors.ravel()) <= set(range(1, most + 1))
    np.testing.assert_array_equal((row * factors).astype(np.float16), q.scales)
    np.testing.assert_array_equal(row.astype(np.float16), row, err_msg="it is stored as float16")
    assert grid.nbytes(6, 256) == 6 * (32 * bits + 2 + (256 // block + 1) // 2)


@pytest.mark.parametrize("block", [16, 32, 64])
@pytest.mark.parametrize("bits", [4, 5, 6])
def test_lpbq_scales_lose_little(bits: int, block: int) -> None:
    """Beside scales of their own."""
    weight = weights(7, rows=64)
    free, whole = (
        squared_error(weight, quantize_nearest(weight, Grid(bits, block, lpbq))).sum() for lpbq in (False, True)
    )
    assert free < whole < LPBQ_LOSS[bits] * free


@pytest.mark.parametrize("lpbq", [False, True])
@pytest.mark.parametrize("block", [16, 32, 64])
def test_the_error_falls_with_the_bits(block: int, lpbq: bool) -> None:
    """A bit more halves the step, so that the squared error falls to a quarter; LPBQ's coarser factors take some."""
    weight = weights(8, rows=64)
    errors = [squared_error(weight, quantize_nearest(weight, Grid(bits, block, lpbq))).sum() for bits in (4, 5, 6)]
    assert errors[1] < errors[0] / 2
    assert errors[2] < errors[1] / 2


def test_lpbq_scales_where_no_error_is_a_number() -> None:
    """Importance that no float32 sum holds decides nothing, but every row has scales of the form."""
    for bits in (4, 5, 6):
        grid = Grid(bits, 32, lpbq=True)
        q = quantize_nearest(weights(9), grid, np.full(256, np.inf, np.float32))
        assert (factored(q.scales, grid)[1].max(1) == grid.largest_factor).all()


@pytest.mark.parametrize("bits", [4, 5, 6])
def test_rows_of_lpbq_scales_are_scaled(bits: int) -> None:
    grid = Grid(bits, 32, lpbq=True)
    q = quantize_nearest(weights(8), grid)
    larger = q.scaled(np.linspace(0.3, 5, 6))
    (row, factors), (new_row, new_factors) = factored(q.scales, grid), factored(larger.scales, grid)
    np.testing.assert_array_equal(new_factors, factors)
    np.testing.assert_allclose(new_row, row * np.linspace(0.3, 5, 6)[:, None], rtol=2**-7)


@pytest.mark.parametrize("bits", [4, 5, 6])
@given(data=st.data())
def test_lpbq_is_int8_with_a_scale_a_row(bits: int, data: st.DataObject) -> None:
    """Codes times factors are bytes, −128 included, and mean the same values."""
    grid = Grid(bits, 16, lpbq=True)
    codes = data.draw(arrays.arrays(np.int8, (3, 64), elements=st.integers(grid.bottom, grid.top)))
    factors = data.draw(arrays.arrays(np.float32, (3, 4), elements=st.integers(1, grid.largest_factor)))
    codes[0, 5], factors[:, 0] = grid.bottom, grid.largest_factor  # so that −128 occurs
    bias = np.arange(3, dtype=np.float32)
    scales = (np.float32([[0.5], [0.0078125], [3.0]]) * factors).astype(np.float16)
    q = QuantizedTensor(codes, scales, grid, bias)
    wide = q.as_int8()
    assert wide.codes.dtype == np.int8
    assert wide.codes[0, 5] == -128
    assert wide.grid == Grid(8)
    assert wide.scales.shape == (3, 1)
    assert wide.scales.dtype == np.float16
    assert wide.bias is bias
    np.testing.assert_array_equal(dequantize(wide), dequantize(q))


def test_only_lpbq_is_int8_with_a_scale_a_row() -> None:
    with pytest.raises(ValueError, match="only LPBQ scales are whole multiples of a row's"):
        quantize_nearest(weights(1), Grid(5, 32)).as_int8()


@pytest.mark.parametrize("scales", [[[1.0, 0.3]], [[1.0, 0.01]]])
def test_scales_that_are_not_whole_factors(scales: list[list[float]]) -> None:
    for bits, most in ((4, 16), (5, 8), (6, 4)):
        with pytest.raises(ValueError, match=f"not whole multiples of 1/{most} of their row's largest"):
            factored(np.array(scales, np.float16), Grid(bits, 16, lpbq=True))


@pytest.mark.parametrize(("bits", "block"), [(8, 32), (4, None)])
def test_lpbq_is_for_blocks_of_less_than_eight_bits(bits: int, block: int | None) -> None:
    with pytest.raises(RecipeError, match="LPBQ scales are for blocks of 4, 5 or 6 bits; expected such bits and a blo"):
        Grid(bits, block, lpbq=True)


def test_importance_moves_the_error_to_columns_that_matter_less() -> None:
    weight, grid = weights(5, rows=64), Grid(4)
    importance = np.where(np.arange(256) % 2, 100.0, 1.0).astype(np.float32)
    with_it, without = quantize_nearest(weight, grid, importance), quantize_nearest(weight, grid)
    cost = [(np.square(weight - dequantize(q)) * importance).sum() for q in (with_it, without)]
    assert cost[0] < cost[1]


def test_equal_importance_is_none() -> None:
    weight = weights(6)
    ones = np.ones(256, np.float32)
    np.testing.assert_array_equal(fit_scales(weight, Grid(4, 32), ones), fit_scales(weight, Grid(4, 32)))


@given(arrays.arrays(np.float32, 20, elements=st.floats(0, 2.0**100, width=32)))
def test_stored_scales_are_finite_and_above_zero(scales: NDArray[np.float32]) -> None:
    stored = storable(scales)
    assert stored.dtype == np.float16
    assert np.isfinite(stored).all()
    assert (stored > 0).all()


@pytest.mark.parametrize("lpbq", [False, True])
@pytest.mark.parametrize("bits", [4, 5, 6])
@pytest.mark.parametrize("value", [0.0, 1e-30, 1e6, -1e6])
def test_extreme_rows_stay_finite(value: float, bits: int, lpbq: bool) -> None:
    q = quantize_nearest(np.full((2, 32), value, np.float32), Grid(bits, 16, lpbq))
    assert np.isfinite(dequantize(q)).all()
    if lpbq:
        factored(q.scales, q.grid)  # raises where they are no such scales
    if not value:
        assert not q.codes.any()


@pytest.mark.parametrize("bits", [4, 5, 6])
def test_a_grid_point_comes_back_exactly(bits: int) -> None:
    rng, grid = np.random.default_rng(3), Grid(bits, 32)
    codes = rng.integers(grid.bottom, grid.top + 1, (8, 128)).astype(np.int8)
    codes[:, ::32] = grid.bottom  # so that the largest magnitude shows the scale
    scales = rng.uniform(0.01, 1, (8, 4)).astype(np.float16)
    known = QuantizedTensor(codes, scales, grid)
    again = quantize_nearest(dequantize(known), grid)
    np.testing.assert_array_equal(again.codes, codes)
    np.testing.assert_array_equal(again.scales, scales)


@pytest.mark.parametrize("block", [None, 16])
def test_few_rows_at_a_time_give_the_same(monkeypatch: pytest.MonkeyPatch, block: int | None) -> None:
    weight = weights(9, rows=7)
    whole = quantize_nearest(weight, Grid(4, block))
    monkeypatch.setattr(grid_module, "_ROWS_AT_ONCE", 2 * 256)
    pieces = quantize_nearest(weight, Grid(4, block))
    np.testing.assert_array_equal(whole.codes, pieces.codes)
    np.testing.assert_array_equal(whole.scales, pieces.scales)


def test_impossible_grids() -> None:
    with pytest.raises(RecipeError, match="bits 3 is not possible; expected 4, 5, 6 or 8"):
        Grid(3)
    with pytest.raises(RecipeError, match=r"bits 8\.0 is not possible; expected 4, 5, 6 or 8"):
        Grid(8.0)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="5 bits are for blocks; expected a block, such as 32, or 4 or 8 bits"):
        Grid(5)
    with pytest.raises(RecipeError, match="block 48 is not possible; expected channel, 16, 32, 64, 128 or 256"):
        Grid(4, 48)
    with pytest.raises(RecipeError, match=r"block 128 does not divide the rows of x \(192 columns\); expected channel"):
        Grid(4, 128).blocks(192, "x")
    with pytest.raises(RecipeError, match=r"expected channel or 16 or 32 or 64$"):
        Grid(4, 256).blocks(192, "x")
