"""Methods that round linears: what they promise, on random weights and inputs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from headrace.bundle.grid import Grid, dequantize, factored
from headrace.errors import RecipeError
from headrace.quantize import corrected, descent, gptq, nearest
from headrace.quantize.methods import METHODS, find_method
from headrace.quantize.statistics import InputStatistics

LPBQ = (
    Grid(4, 16, lpbq=True),
    Grid(4, 64, lpbq=True),  # a whole row of the problem below
    Grid(5, 16, lpbq=True),
    Grid(6, 32, lpbq=True),
)
GRIDS = (Grid(4, 16), Grid(4, 32), Grid(4, None), Grid(5, 32), Grid(6, 16), Grid(8, None), *LPBQ)

# Coordinate descent minimises in float32 and rounds scales to float16; it may lose this share by rounding alone.
FLOAT_NOISE = 1e-4
# Two orders of the same float32 sums may round a code differently when it lies on the edge of two.
EDGE_SHARE = 0.002
# A float32 factor multiplied out again, relative to the largest moment.
FACTOR_NOISE = 1e-5
# The same noise, times a condition of about a hundred.
DIVIDED_NOISE = 1e-3
# Sums of a few hundred float32 products, relative to the largest.
SUM_NOISE = 1e-5
# Half of a loss that is linear in the inputs is taken away: a quarter of its square is left, and damping leaves more.
HALF_WAY = 0.6


def problem(
    seed: int, rows: int = 24, columns: int = 64, tokens: int = 400
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """A weight (N, K) and correlated inputs (tokens, K), one channel far larger than the others."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(columns, columns)) * rng.uniform(0.1, 2, columns)
    inputs = rng.normal(size=(tokens, columns)) @ mixing
    inputs[:, seed % columns] *= 20
    return rng.normal(size=(rows, columns)).astype(np.float32), inputs.astype(np.float32)


@given(seed=st.integers(0, 10_000), grid=st.sampled_from(GRIDS))
def test_gptq_loses_no_more_than_rounding_on_its_own_hessian(seed: int, grid: Grid) -> None:
    weight, inputs = problem(seed)
    statistics = InputStatistics.of(inputs)
    moment = gptq.damped(statistics.moment)
    rounded = gptq.rounding_loss(weight, dequantize(nearest.quantize(weight, statistics, grid)), moment)
    solved = gptq.rounding_loss(weight, dequantize(gptq.quantize(weight, statistics, grid)), moment)
    assert solved <= rounded


@given(seed=st.integers(0, 10_000), grid=st.sampled_from(GRIDS))
def test_descent_loses_no_more_than_gptq(seed: int, grid: Grid) -> None:
    weight, inputs = problem(seed)
    moment = gptq.damped(InputStatistics.of(inputs).moment)
    start = gptq.solve(weight, moment, grid)
    before = gptq.rounding_loss(weight, dequantize(start), moment)
    after = gptq.rounding_loss(weight, dequantize(descent.improve(weight, moment, start)), moment)
    assert after <= before * (1 + FLOAT_NOISE)


@pytest.mark.parametrize("grid", GRIDS)
def test_descent_gains_something(grid: Grid) -> None:
    weight, inputs = problem(3, rows=48)
    moment = gptq.damped(InputStatistics.of(inputs).moment)
    start = gptq.solve(weight, moment, grid)
    better = descent.improve(weight, moment, start)
    assert gptq.rounding_loss(weight, dequantize(better), moment) < gptq.rounding_loss(
        weight, dequantize(start), moment
    )


@pytest.mark.parametrize("lpbq", [False, True])
@pytest.mark.parametrize("name", ["gptq", "descent", "best"])
def test_the_loss_falls_with_the_bits(name: str, lpbq: bool) -> None:
    """A bit more halves the step, so that the loss falls to a quarter; what LPBQ's coarser factors take is less."""
    weight, inputs = problem(7, rows=48)
    statistics = InputStatistics.of(inputs)
    losses = []
    for bits in (4, 5, 6):
        found = find_method(name).quantize(weight, statistics, Grid(bits, 16, lpbq))
        losses.append(gptq.rounding_loss(weight, dequantize(found), gptq.damped(statistics.moment)))
    assert losses[1] < losses[0] / 2
    assert losses[2] < losses[1] / 2


@given(seed=st.integers(0, 1000), batch=st.sampled_from([1, 7, 16, 64, 100]))
def test_gptq_codes_do_not_depend_on_its_block_size(seed: int, batch: int) -> None:
    weight, inputs = problem(seed)
    grid = Grid(4, 32)
    moment = gptq.damped(InputStatistics.of(inputs).moment)
    scales = gptq.solve(weight, moment, grid).scales
    whole = gptq.solve_codes(weight, gptq.factorize(moment), scales, grid, batch=weight.shape[1])
    parts = gptq.solve_codes(weight, gptq.factorize(moment), scales, grid, batch=batch)
    assert np.mean(whole != parts) <= EDGE_SHARE


def test_gptq_without_correlation_is_rounding() -> None:
    weight, _ = problem(1)
    scales = nearest.quantize(weight, None, Grid(4, 32)).scales
    codes = gptq.solve_codes(weight, gptq.factorize(np.eye(64, dtype=np.float32)), scales, Grid(4, 32))
    exact = np.clip(np.rint(weight / np.repeat(scales.astype(np.float32), 32, axis=1)), -8, 7)
    assert np.array_equal(codes, exact)


@pytest.mark.parametrize("size", [1, 5, 64, 600])
def test_upper_factor_is_one(size: int) -> None:
    x = np.random.default_rng(size).normal(size=(size * 2, size)).astype(np.float32)
    moment = gptq.damped(x.T @ x)
    factor = gptq.upper_factor(moment)
    assert factor.dtype == np.float32 and np.array_equal(factor, np.triu(factor)) and (np.diagonal(factor) > 0).all()
    assert np.abs(factor @ factor.T - moment).max() < FACTOR_NOISE * np.abs(moment).max()
    order, unit = gptq.factorize(moment)
    diagonal = np.diagonal(gptq.upper_factor(moment[np.ix_(order, order)])) ** 2
    assert np.array_equal(np.diagonal(unit), np.ones(size))
    assert np.abs(unit * diagonal @ unit.T - moment[np.ix_(order, order)]).max() < FACTOR_NOISE * np.abs(moment).max()


@pytest.mark.parametrize("size", [1, 64, 600])
def test_division_undoes_the_product(size: int) -> None:
    rng = np.random.default_rng(size)
    x, wanted = rng.normal(size=(size * 2, size)).astype(np.float32), rng.normal(size=(5, size)).astype(np.float32)
    moment = gptq.damped(x.T @ x)
    found = gptq.divide_by_moment(wanted @ moment, gptq.upper_factor(moment))
    assert np.abs(found - wanted).max() < DIVIDED_NOISE * np.abs(wanted).max()


def test_a_factor_beyond_float32_is_found_in_float64() -> None:
    # Exact in float32, and what is left of the last of these when the first is known is lost there.
    moment = np.full((600, 600), 2.0**24, np.float32) + 2 * np.eye(600, dtype=np.float32)
    with pytest.raises(np.linalg.LinAlgError):
        gptq._factor_in_place(moment.copy())
    factor = gptq.upper_factor(moment)
    assert np.abs(factor @ factor.T - moment).max() < FACTOR_NOISE * np.abs(moment).max()


@pytest.mark.parametrize("name", list(METHODS))
def test_methods_are_deterministic_and_fill_their_grid(name: str) -> None:
    weight, inputs = problem(9)
    statistics = InputStatistics.of(inputs)
    for grid in GRIDS:
        first, second = (find_method(name).quantize(weight, statistics, grid) for _ in range(2))
        assert np.array_equal(first.codes, second.codes) and np.array_equal(first.scales, second.scales)
        assert first.codes.dtype == np.int8 and first.scales.dtype == np.float16 and first.grid == grid
        assert first.codes.min() >= grid.bottom and first.codes.max() <= grid.top
        if grid.lpbq:
            assert (factored(first.scales, grid)[1].max(1) == grid.largest_factor).all()


@pytest.mark.parametrize("grid", [Grid(4, 16), *LPBQ])
@pytest.mark.parametrize("name", list(METHODS))
def test_methods_survive_silent_channels_and_empty_rows(name: str, grid: Grid) -> None:
    weight, inputs = problem(2)
    inputs[:, 5] = 0
    weight[3] = 0
    result = dequantize(find_method(name).quantize(weight, InputStatistics.of(inputs), grid))
    assert np.isfinite(result).all() and not result[3].any()


@pytest.mark.parametrize("grid", LPBQ)
@pytest.mark.parametrize("name", list(METHODS))
def test_lpbq_scales_of_small_weights_keep_their_form(name: str, grid: Grid) -> None:
    """Below 2⁻¹⁴ a float16 has fewer bits, and a sixteenth of it may be none."""
    weight, inputs = problem(4)
    result = find_method(name).quantize(weight * np.float32(1e-3), InputStatistics.of(inputs), grid)
    assert (factored(result.scales, grid)[1].max(1) == grid.largest_factor).all()


@pytest.mark.parametrize("name", list(METHODS))
def test_a_block_that_does_not_divide_is_refused(name: str) -> None:
    weight, inputs = problem(2, columns=48)
    with pytest.raises(RecipeError, match="block 32 does not divide the rows"):
        find_method(name).quantize(weight, InputStatistics.of(inputs), Grid(4, 32))


def test_an_unknown_method_is_refused_with_a_hint() -> None:
    with pytest.raises(RecipeError, match=r"method 'gtpq' is unknown; did you mean 'gptq'\?; expected nearest"):
        find_method("gtpq")


def test_statistics_are_moments() -> None:
    _, inputs = problem(4)
    weights = np.linspace(0.5, 1.5, len(inputs), dtype=np.float32)
    statistics = InputStatistics.of(inputs, weights)
    exact = (inputs.astype(np.float64) * weights[:, None]).T @ inputs.astype(np.float64) / len(inputs)
    assert np.abs(statistics.moment - exact).max() < SUM_NOISE * np.abs(exact).max()
    assert np.array_equal(statistics.peak, np.abs(inputs).max(0)) and statistics.tokens == len(inputs)
    scale = np.linspace(0.5, 3, inputs.shape[1], dtype=np.float32)
    scaled, again = statistics.scaled(scale), InputStatistics.of(inputs / scale, weights)
    assert np.abs(scaled.moment - again.moment).max() < SUM_NOISE * np.abs(again.moment).max()
    assert np.allclose(scaled.peak, again.peak, rtol=SUM_NOISE)


def test_correction_brings_the_output_nearer_to_the_float_models() -> None:
    weight, inputs = problem(6, tokens=2000)
    rng = np.random.default_rng(1)
    lost = inputs @ rng.normal(0, 0.02, (64, 64)).astype(np.float32)  # what layers before have changed
    statistics = InputStatistics.of(inputs + lost, None, inputs)
    assert statistics.shift is not None
    wanted = inputs @ weight.T
    better = corrected.corrected(weight, statistics)
    before = np.square((inputs + lost) @ weight.T - wanted).sum()
    after = np.square((inputs + lost) @ better.T - wanted).sum()
    assert after < before * HALF_WAY
    assert corrected.corrected(weight, InputStatistics.of(inputs)) is weight
    scale = np.linspace(0.5, 3, 64, dtype=np.float32)
    again = InputStatistics.of((inputs + lost) / scale, None, inputs / scale).shift
    scaled = statistics.scaled(scale).shift
    assert again is not None and scaled is not None
    assert np.abs(scaled - again).max() < SUM_NOISE * 10 * np.abs(again).max()
