"""Weights that already lie on the grid are found again, bit for bit; others are not pretended to."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from headrace.bundle.grid import Grid, dequantize
from headrace.bundle.recipe import Rule
from headrace.checkpoint import open_checkpoint
from headrace.model.weights import linears
from headrace.quantize.exact import keep_grid
from headrace.quantize.layer import QuantizedLayer
from headrace.quantize.pipeline import quantize_layers
from headrace.quantize.sensitivity import measure_sensitivity
from tests.oracle.quantized import is_kept
from tests.tiny import write_gguf

Kind = gguf.GGMLQuantizationType


def stored_as(kind: Kind, shape: tuple[int, int] = (6, 96), seed: int = 0) -> NDArray[np.float32]:
    """A random weight after a round through a GGUF block format, by gguf's own code."""
    weight = np.random.default_rng(seed).standard_normal(shape).astype(np.float32) * np.float32(0.05)
    return np.asarray(gguf.quants.dequantize(gguf.quants.quantize(weight, kind), kind), np.float32)


@pytest.mark.parametrize(("kind", "bits"), [(Kind.Q4_0, 4), (Kind.Q5_0, 5), (Kind.Q8_0, 8)])
def test_a_grid_is_found_again(kind: Kind, bits: int) -> None:
    weight = stored_as(kind)
    kept = keep_grid(weight, Grid(bits, 32))
    assert kept is not None
    np.testing.assert_array_equal(dequantize(kept), weight)
    if bits < 8:
        assert (kept.codes == kept.grid.bottom).any() and (kept.scales < 0).any(), "of the larger side of a block"


def test_zeros_are_kept() -> None:
    kept = keep_grid(np.zeros((2, 32), np.float32), Grid(4, 32))
    assert kept is not None and not kept.codes.any()


@pytest.mark.parametrize("kind", [Kind.Q4_1, Kind.Q5_0])
def test_another_grid_is_refused(kind: Kind) -> None:
    assert keep_grid(stored_as(kind), Grid(4, 32)) is None


@pytest.mark.parametrize("grid", [Grid(5, 16), Grid(5, 32, lpbq=True), Grid(6, 32)])
def test_what_blocks_of_a_grid_lie_on_a_finer_one_too(grid: Grid) -> None:
    weight = stored_as(Kind.Q5_0)
    kept = keep_grid(weight, grid)
    assert (kept is None) is grid.lpbq
    if kept is not None:
        np.testing.assert_array_equal(dequantize(kept), weight)


def test_a_larger_block_is_refused() -> None:
    assert keep_grid(stored_as(Kind.Q8_0), Grid(8, None)) is None


def test_one_block_of_many_is_enough_to_be_refused() -> None:
    weight = stored_as(Kind.Q5_0, (2000, 96))
    assert keep_grid(weight, Grid(5, 32)) is not None
    weight[-1, -1] += np.float32(1e-3)
    assert keep_grid(weight, Grid(5, 32)) is None


@pytest.mark.parametrize(("kind", "bits"), [("Q4_0", 4), ("Q5_0", 5)])
def test_export_keeps_what_it_can(tmp_path: Path, kind: str, bits: int) -> None:
    source = open_checkpoint(write_gguf(tmp_path / "model.gguf", type=kind))
    windows = np.random.default_rng(0).integers(0, source.config.vocab_size, (1, 8))
    for kept_bits, keep in ((bits, True), (9 - bits, True), (bits, False)):
        rules = {name: Rule("proj", kept_bits, 32, "gptq") for name in linears(source.config)}
        layers: list[QuantizedLayer] = []
        quantize_layers(source, rules, windows, layers.append, keep=keep, jobs=1)
        exact = all(
            is_kept(name, dequantize(linear), source.tensor(name).load())
            for layer in layers
            for name, linear in layer.linears.items()
        )
        # What has 4 bits lies on a grid of 5 as well.
        assert exact is (keep and kept_bits >= bits)


def test_a_kept_grid_costs_nothing(tmp_path: Path) -> None:
    source = open_checkpoint(write_gguf(tmp_path / "model.gguf", type="Q5_0", layers=1))
    windows = np.random.default_rng(0).integers(0, source.config.vocab_size, (1, 8))
    rules = {name: Rule("proj", 4, 32, "gptq") for name in linears(source.config)}
    grids = (Grid(4, 32), Grid(5, 32), Grid(6, 32), Grid(8))
    costs = measure_sensitivity(source, rules, windows, grids=dict.fromkeys(rules, grids), keep=True)
    for by_grid in costs.values():
        assert [kl == 0 for kl in by_grid.values()] == [False, True, True, False]
