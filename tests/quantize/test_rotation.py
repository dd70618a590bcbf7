"""Rotation is exact in float, for every geometry, and takes huge channels away."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.checkpoint import open_checkpoint
from headrace.model.reference import eager_logits
from headrace.quantize.rotation import Rotated, orthogonal, turned
from tests.tiny import write_baichuan, write_llama

# float32 weights in another basis: rounding of products and sums, relative to the largest logit.
BASIS_NOISE = 1e-4
ORTHOGONAL_NOISE = 1e-5


@given(size=st.integers(1, 200), seed=st.integers(0, 50))
def test_orthogonal(size: int, seed: int) -> None:
    matrix = orthogonal(size, seed)
    assert np.abs(matrix @ matrix.T - np.eye(size)).max() < ORTHOGONAL_NOISE


@given(size=st.integers(1, 200), seed=st.integers(0, 50))
def test_two_small_products_are_the_large_one(size: int, seed: int) -> None:
    rows = np.random.default_rng(seed).normal(size=(3, size)).astype(np.float32)
    assert np.abs(turned(rows, seed) - rows @ orthogonal(size, seed)).max() < ORTHOGONAL_NOISE * size


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("kind", ["gqa", "tied", "mha", "odd", "biased"])
def test_logits_stay(tmp_path: Path, kind: str, residual: bool) -> None:
    shape = {"hidden": 72, "heads": 3, "kv_heads": 1, "head_dim": 24} if kind == "odd" else {}
    shape |= {"attention_bias": True, "mlp_bias": True} if kind == "biased" else {}
    folder = (
        write_baichuan(tmp_path / "m") if kind == "mha" else write_llama(tmp_path / "m", tied=kind == "tied", **shape)
    )  # type: ignore[arg-type]
    source = open_checkpoint(folder)
    rotated = Rotated(source, residual=residual)
    ids = np.random.default_rng(1).integers(0, 160, (2, 20))
    plain = eager_logits(source.config, lambda name: source.tensor(name).load(), ids)
    turned = eager_logits(rotated.config, lambda name: rotated.tensor(name).load(), ids)
    assert np.abs(plain - turned).max() < BASIS_NOISE * np.abs(plain).max()
    assert rotated.config.tied_head == (kind == "tied" and not residual)


def test_rows_are_read_as_asked(tmp_path: Path) -> None:
    rotated = Rotated(open_checkpoint(write_llama(tmp_path / "m", tied=True)))
    for name in (
        "embed_tokens.weight",
        "lm_head.weight",
        "layers.1.mlp.down_proj.weight",
        "layers.0.self_attn.v_proj.weight",
    ):
        tensor = rotated.tensor(name)
        assert np.allclose(tensor.read(3, 7), tensor.load()[3:7], atol=ORTHOGONAL_NOISE)


@pytest.mark.parametrize("size", [2, 64, 192, 576, 896, 1536, 2560, 4096])
def test_widths_of_real_models_are_spread_evenly(size: int) -> None:
    np.testing.assert_allclose(np.abs(orthogonal(size)), size**-0.5, rtol=1e-5)


def test_a_huge_channel_is_spread() -> None:
    x = np.zeros(576, np.float32)
    x[17] = 30_000
    assert np.abs(x @ orthogonal(576)).max() < 30_000 / 23
