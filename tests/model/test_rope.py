"""Rotary tables against the formula written apart, and scaling as its sources describe it."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from headrace.config import ModelConfig, RopeScaling
from headrace.model.rope import rope_angles, rope_tables
from tests.oracle.llama import frequencies

CONFIG = ModelConfig("llama", 160, 64, 96, 3, 4, 2, 16, 1e-5, 50000.0, 512, False)
SAME = 1e-12  # relative; the same formula in float64, in another order of operations
FLOAT32 = 6e-8  # half a unit in the last place of float32 below 1


@pytest.mark.parametrize(
    "scaling",
    [
        None,
        {"type": "linear", "factor": 2.5},
        {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ],
    ids=["plain", "linear", "llama3"],
)  # fmt: skip
def test_angles_follow_the_papers(scaling: dict | None) -> None:
    config = CONFIG
    if scaling is not None:
        kind = scaling.get("type") or scaling["rope_type"]
        config = replace(CONFIG, rope_scaling=RopeScaling(kind, scaling["factor"], original_context=64))
    expected = frequencies({"rope_theta": 50000.0, "rope_scaling": scaling}, 16)
    angles = rope_angles(config, 300)
    assert angles.shape == (300, 8)
    assert angles.dtype == np.float64
    np.testing.assert_allclose(angles, np.outer(np.arange(300), expected), rtol=SAME)


def test_llama3_keeps_fast_divides_slow_and_blends_between() -> None:
    scaling = RopeScaling("llama3", 8.0, 1.0, 4.0, original_context=64)
    plain, scaled = rope_angles(CONFIG, 2)[1], rope_angles(replace(CONFIG, rope_scaling=scaling), 2)[1]
    turns = 64 * plain / (2 * math.pi)
    np.testing.assert_array_equal(scaled[turns > 4], plain[turns > 4])
    np.testing.assert_allclose(scaled[turns < 1], plain[turns < 1] / 8, rtol=SAME)
    between = (turns >= 1) & (turns <= 4)
    assert between.any(), "the example has a frequency of each kind"
    assert ((scaled[between] <= plain[between]) & (scaled[between] >= plain[between] / 8)).all()


def test_tables_are_as_exact_far_out_as_at_the_start() -> None:
    cos, sin = rope_tables(CONFIG, 4096)
    assert cos.dtype == sin.dtype == np.float32
    exact = [math.cos(4095 * 50000.0 ** (-i / 8)) for i in range(8)]
    np.testing.assert_allclose(cos[4095], exact, atol=FLOAT32)
    np.testing.assert_allclose(cos**2 + sin**2, 1, atol=4 * FLOAT32)
    assert (cos[0] == 1).all()
    assert (sin[0] == 0).all()
