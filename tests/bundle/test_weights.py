"""Weights on disk: files that any safetensors reader opens, whose layout is known before a weight is."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from headrace.bundle.grid import Grid, QuantizedTensor, dequantize, pack, pack_high, quantize_nearest
from headrace.bundle.weights import WeightStore, layouts, part_weights
from headrace.config import ModelConfig
from headrace.errors import RecipeError
from headrace.model.weights import EMBEDDING, HEAD, quantized_weights, weight_table
from headrace.plan import plan_parts

UNTIED = ModelConfig("llama", 31, 64, 96, 3, 4, 2, 16, 1e-5, 10000.0, 512, False)
TIED = ModelConfig("llama", 31, 64, 96, 3, 4, 2, 16, 1e-5, 10000.0, 512, True)


def grids_of(config: ModelConfig) -> dict[str, Grid]:
    """int8 tables, int4 linears, one in 8 bits; some in blocks, with either kind of scales, with 5 and 6 bits too."""
    grids = {name: Grid(4) for name in quantized_weights(config)}
    grids |= {name: Grid(8) for name in grids if name in (EMBEDDING, HEAD)}
    return grids | {
        "layers.0.mlp.up_proj.weight": Grid(4, 32),
        "layers.1.mlp.up_proj.weight": Grid(4, 32, lpbq=True),
        "layers.2.mlp.down_proj.weight": Grid(4, 32, lpbq=True),
        "layers.1.mlp.down_proj.weight": Grid(8, 16),
        "layers.0.self_attn.k_proj.weight": Grid(5, 32),
        "layers.0.self_attn.v_proj.weight": Grid(5, 32),
        "layers.1.mlp.gate_proj.weight": Grid(5, 32, lpbq=True),
        "layers.2.mlp.gate_proj.weight": Grid(6, 16, lpbq=True),
        "layers.2.mlp.up_proj.weight": Grid(6, 16, lpbq=True),
    }


def filled(root: Path, config: ModelConfig, parts: int) -> tuple[WeightStore, dict[str, QuantizedTensor | np.ndarray]]:
    rng = np.random.default_rng(0)
    grids = grids_of(config)
    store = WeightStore(root, config, plan_parts(config, parts), grids, create=True)
    values: dict[str, QuantizedTensor | np.ndarray] = {}
    for name in reversed(store.names):  # any order
        if name in grids:
            shape = weight_table(config)[name].shape
            values[name] = quantize_nearest(rng.normal(size=shape).astype(np.float32), grids[name])
        else:
            values[name] = rng.normal(size=config.hidden_size).astype(np.float32)
        store.write(name, values[name])
    store.sync()
    return store, values


@pytest.mark.parametrize("config", [UNTIED, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_what_was_written_is_read(tmp_path: Path, config: ModelConfig, parts: int) -> None:
    store, values = filled(tmp_path, config, parts)
    opened = WeightStore(tmp_path, config, plan_parts(config, parts), grids_of(config))
    for name, value in values.items():
        if isinstance(value, QuantizedTensor):
            read = opened.read_codes(name)
            np.testing.assert_array_equal(read.codes, value.codes)
            np.testing.assert_array_equal(read.scales, value.scales)
            assert read.scales.dtype == np.float16
            assert read.grid == value.grid
            np.testing.assert_array_equal(opened.read(name), dequantize(value))
        else:
            np.testing.assert_array_equal(opened.read(name), value)
    if config.tied_head:
        np.testing.assert_array_equal(opened.read(HEAD), store.read(EMBEDDING))


@pytest.mark.parametrize("config", [UNTIED, TIED], ids=["untied", "tied"])
def test_anyone_can_open_the_files(tmp_path: Path, config: ModelConfig) -> None:
    _, values = filled(tmp_path, config, 4)
    found: dict[str, np.ndarray] = {}
    for part in plan_parts(config, 4):
        path = tmp_path / "weights" / f"{part.name}.safetensors"
        with safe_open(path, framework="numpy") as file:
            assert file.metadata() == {"format": "headrace"}
        tensors = load_file(path)
        expected = {re.sub("_(packed|high|scale|factors)$", "", key) for key in tensors}
        assert expected == {name for name, row in part_weights(config, part).items() if row.stored_as == name}
        found |= tensors
    for name, value in values.items():
        if isinstance(value, QuantizedTensor):
            np.testing.assert_array_equal(found[f"{name}_packed"], pack(value.codes, value.grid.bits))
            assert (f"{name}_high" in found) == (value.grid.bits in (5, 6))
            if f"{name}_high" in found:
                np.testing.assert_array_equal(found[f"{name}_high"], pack_high(value.codes, value.grid.bits))
            scales = found[f"{name}_scale"].astype(np.float32)
            if value.grid.lpbq:
                bytes_of = found[f"{name}_factors"]
                factors = 1 + np.stack([bytes_of & 15, bytes_of >> 4], 2).reshape(len(bytes_of), -1)
                scales = scales * factors[:, : value.scales.shape[1]]
            np.testing.assert_array_equal(scales, value.scales)
        else:
            np.testing.assert_array_equal(found[name], value)


@pytest.mark.parametrize("parts", [1, 3])
def test_offsets_point_at_the_bytes(tmp_path: Path, parts: int) -> None:
    """What graphs use: file, offset and length of each tensor, aligned for its type."""
    store, _ = filled(tmp_path, UNTIED, parts)
    tensors = {}
    for file in (tmp_path / "weights").iterdir():
        tensors |= load_file(file)
    assert set(tensors) == set(store.tensors)
    for name, stored in store.tensors.items():
        data = (tmp_path / stored.file).read_bytes()[stored.offset : stored.offset + stored.nbytes]
        assert data == tensors[name].tobytes(), name
        assert stored.offset % tensors[name].itemsize == 0


def test_linears_of_one_input_follow_each_other(tmp_path: Path) -> None:
    """Each kind of bytes of q, k, v, and of gate and up, so that one pointer takes those of one grid together."""
    store, _ = filled(tmp_path, UNTIED, 1)
    for names in (
        ("layers.0.self_attn.k_proj", "layers.0.self_attn.v_proj"),
        ("layers.2.mlp.gate_proj", "layers.2.mlp.up_proj"),
    ):
        kinds = [
            kind for kind in ("packed", "high", "scale", "factors") if f"{names[0]}.weight_{kind}" in store.tensors
        ]
        assert len(kinds) >= 3
        for kind in kinds:
            first, second = (store.tensors[f"{name}.weight_{kind}"] for name in names)
            assert first.offset + first.nbytes == second.offset, kind


def test_layouts_know_sizes_before_weights(tmp_path: Path) -> None:
    filled(tmp_path, UNTIED, 4)
    for layout in layouts(UNTIED, plan_parts(UNTIED, 4), grids_of(UNTIED)):
        assert (tmp_path / layout.file).stat().st_size == layout.nbytes


def test_every_linear_has_a_shape() -> None:
    shapes = {name: weight_table(UNTIED)[name].matrix for name in quantized_weights(UNTIED)}
    assert shapes[EMBEDDING] == shapes[HEAD] == (31, 64)
    assert shapes["layers.2.self_attn.q_proj.weight"] == (64, 64)
    assert shapes["layers.2.self_attn.k_proj.weight"] == shapes["layers.2.self_attn.v_proj.weight"] == (32, 64)
    assert shapes["layers.2.mlp.down_proj.weight"] == (64, 96)
    assert len(shapes) == 2 + 3 * 7
    assert HEAD not in quantized_weights(TIED)


def test_a_wrong_shape_is_refused(tmp_path: Path) -> None:
    store, _ = filled(tmp_path, UNTIED, 1)
    with pytest.raises(ValueError, match=r"norm.weight: \(3,\) is not the planned \(64,\)"):
        store.write("norm.weight", np.zeros(3, np.float32))


def test_a_block_that_does_not_divide_names_the_weight() -> None:
    grids = grids_of(UNTIED) | {"layers.0.mlp.down_proj.weight": Grid(4, 64)}
    with pytest.raises(RecipeError, match=r"block 64 does not divide the rows of layers.0.mlp.down_proj.weight \(96"):
        layouts(UNTIED, plan_parts(UNTIED, 1), grids)
