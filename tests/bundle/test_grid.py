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
    FACTORS,
    Grid,
    QuantizedTensor,
    dequantize,
    factored,
    fit_scales,
    pack,
    quantize_nearest,
    round_codes,
    storable,
    unpack,
)
from headrace.errors import RecipeError

BLOCKS = (None, 16, 32, 64, 128, 256)
# Sums of squares in float32 over at most 512 columns: a tie between two clips may be decided by rounding.
TIE = 1e-5
LPBQ_LOSS = 1.1

codes_of = {
    bits: arrays.arrays(
        np.int8,
        st.tuples(st.integers(1, 5), st.integers(1, 9).map(lambda n: 2 * n)),
        elements=st.integers(Grid(bits).bottom, Grid(bits).top),
    )
    for bits in (4, 8)
}


def weights(seed: int, rows: int = 6, columns: int = 256) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_t(4, (rows, columns)).astype(np.float32)


def squared_error(weight: NDArray[np.float32], q: QuantizedTensor) -> NDArray[np.float64]:
    """Of each block, (N, blocks)."""
    error = (weight.astype(np.float64) - dequantize(q)).reshape(len(weight), q.scales.shape[1], -1)
    return np.square(error).sum(2)


@pytest.mark.parametrize("bits", [4, 8])
@given(data=st.data())
def test_pack_and_back(bits: int, data: st.DataObject) -> None:
    codes = data.draw(codes_of[bits])
    stored = pack(codes, bits)
    assert stored.dtype == np.uint8
    assert stored.shape == (codes.shape[0], codes.shape[1] * bits // 8)
    back = unpack(stored, bits)
    assert back.dtype == np.int8
    np.testing.assert_array_equal(back, codes)


def test_the_stored_form_is_the_documented_one() -> None:
    np.testing.assert_array_equal(pack(np.array([[-8, 7, 0, 1]], np.int8), 4), [[0xF0, 0x98]])  # low nibble first
    np.testing.assert_array_equal(pack(np.array([[-127, 0, 127]], np.int8), 8), [[1, 128, 255]])


@pytest.mark.parametrize("bits", [4, 8])
def test_every_byte_unpacks_and_packs_to_itself(bits: int) -> None:
    stored = np.arange(256, dtype=np.uint8)[None]
    np.testing.assert_array_equal(pack(unpack(stored, bits), bits), stored)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block", BLOCKS)
def test_codes_are_the_nearest_for_the_stored_scales(bits: int, block: int | None) -> None:
    weight, grid = weights(1), Grid(bits, block)
    q = quantize_nearest(weight, grid)
    assert q.scales.dtype == np.float16
    assert q.scales.shape == (6, 256 // (block or 256))
    assert q.codes.dtype == np.int8
    assert q.codes.min() >= grid.bottom
    assert q.codes.max() <= grid.top
    assert q.nbytes == pack(q.codes, bits).nbytes + q.scales.nbytes
    step = np.repeat(q.scales.astype(np.float64), block or 256, axis=1)
    np.testing.assert_array_equal(dequantize(q), (q.codes * step).astype(np.float32))
    exact = np.clip(weight / step, grid.bottom, grid.top)
    assert (np.abs(exact - q.codes) <= 0.5 + 1e-5).all()


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("bits", [4, 8])
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
    assert best.sum() <= squared_error(weight, plain).sum() * (1 + TIE)


@pytest.mark.parametrize("block", BLOCKS[1:])
@settings(max_examples=25)
@given(seed=st.integers(0, 1 << 30), spread=st.floats(1e-9, 1e5))
def test_lpbq_scales_are_whole_factors_of_one_a_row(block: int, seed: int, spread: float) -> None:
    weight, grid = weights(seed) * np.float32(spread), Grid(4, block, lpbq=True)
    q = quantize_nearest(weight, grid)
    row, factors = factored(q.scales)
    assert row.shape == (6, 1)
    assert (factors.max(1) == FACTORS).all(), "a device rounds scales again unless a row's largest factor is 16"
    assert set(factors.ravel()) <= set(range(1, FACTORS + 1))
    np.testing.assert_array_equal((row * factors).astype(np.float16), q.scales)
    np.testing.assert_array_equal(row.astype(np.float16), row, err_msg="it is stored as float16")
    assert grid.nbytes(6, 256) == 6 * (128 + 2 + (256 // block + 1) // 2)


@pytest.mark.parametrize("block", [16, 32, 64])
def test_lpbq_scales_lose_little(block: int) -> None:
    """Beside scales of their own; a sixteenth of a row's largest is a step of 6 to 12 % of most blocks' scales."""
    weight = weights(7, rows=64)
    free, whole = (
        squared_error(weight, quantize_nearest(weight, Grid(4, block, lpbq))).sum() for lpbq in (False, True)
    )
    assert free < whole < LPBQ_LOSS * free


def test_lpbq_scales_where_no_error_is_a_number() -> None:
    """Importance that no float32 sum holds decides nothing, but every row has scales of the form."""
    q = quantize_nearest(weights(9), Grid(4, 32, lpbq=True), np.full(256, np.inf, np.float32))
    assert (factored(q.scales)[1].max(1) == FACTORS).all()


def test_rows_of_lpbq_scales_are_scaled() -> None:
    q = quantize_nearest(weights(8), Grid(4, 32, lpbq=True))
    larger = q.scaled(np.linspace(0.3, 5, 6))
    np.testing.assert_array_equal(factored(larger.scales)[1], factored(q.scales)[1])
    np.testing.assert_allclose(
        factored(larger.scales)[0], factored(q.scales)[0] * np.linspace(0.3, 5, 6)[:, None], rtol=2**-7
    )


@pytest.mark.parametrize("scales", [[[1.0, 0.3]], [[1.0, 0.01]]])
def test_scales_that_are_not_whole_factors(scales: list[list[float]]) -> None:
    with pytest.raises(ValueError, match="not whole multiples of a sixteenth"):
        factored(np.array(scales, np.float16))


@pytest.mark.parametrize(("bits", "block"), [(8, 32), (4, None)])
def test_lpbq_is_for_blocks_of_four_bits(bits: int, block: int | None) -> None:
    with pytest.raises(RecipeError, match="LPBQ scales are for blocks of 4 bits; expected bits 4 and a block"):
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
@pytest.mark.parametrize("value", [0.0, 1e-30, 1e6, -1e6])
def test_extreme_rows_stay_finite(value: float, lpbq: bool) -> None:
    q = quantize_nearest(np.full((2, 32), value, np.float32), Grid(4, 16, lpbq))
    assert np.isfinite(dequantize(q)).all()
    if lpbq:
        factored(q.scales)  # raises where they are no such scales
    if not value:
        assert not q.codes.any()


def test_a_grid_point_comes_back_exactly() -> None:
    rng = np.random.default_rng(3)
    codes = rng.integers(-8, 8, (8, 128)).astype(np.int8)
    codes[:, ::32] = -8  # so that the largest magnitude shows the scale
    scales = rng.uniform(0.01, 1, (8, 4)).astype(np.float16)
    known = QuantizedTensor(codes, scales, Grid(4, 32))
    again = quantize_nearest(dequantize(known), Grid(4, 32))
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
    with pytest.raises(RecipeError, match="bits 3 is not possible; expected 4 or 8"):
        Grid(3)
    with pytest.raises(RecipeError, match="block 48 is not possible; expected channel, 16, 32, 64, 128 or 256"):
        Grid(4, 48)
    with pytest.raises(RecipeError, match=r"block 128 does not divide the rows of x \(192 columns\); expected channel"):
        Grid(4, 128).blocks(192, "x")
    with pytest.raises(RecipeError, match=r"expected channel or 16 or 32 or 64$"):
        Grid(4, 256).blocks(192, "x")
