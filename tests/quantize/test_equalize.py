"""Equalized keys: every score is the same to the last bit, and one scale holds all keys better."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from headrace.bundle.grid import Grid, QuantizedTensor, dequantize, quantize_nearest
from headrace.quantize.equalize import equalize_keys

KV_HEADS, GROUP, WIDTH, HIDDEN = 2, 3, 8, 32


def projections(seed: int, bits: int, spread: float) -> tuple[QuantizedTensor, QuantizedTensor, np.ndarray]:
    """q_proj and k_proj of a few heads whose rotary pairs have very different sizes, and some inputs."""
    rng = np.random.default_rng(seed)
    sizes = np.exp(rng.normal(0, spread, (KV_HEADS, 1, WIDTH // 2))).astype(np.float32)
    both = np.concatenate([sizes, sizes], 2)
    biases = rng.normal(0, 1, KV_HEADS * GROUP * WIDTH), rng.normal(0, 1, KV_HEADS * WIDTH) * both.reshape(-1)
    key = rng.normal(0, 1, (KV_HEADS * WIDTH, HIDDEN)).astype(np.float32) * both.reshape(-1, 1)
    query = rng.normal(0, 1, (KV_HEADS * GROUP * WIDTH, HIDDEN)).astype(np.float32)
    q, k = (
        quantize_nearest(weight, Grid(bits))._replace(bias=bias.astype(np.float32))
        for weight, bias in zip((query, key), biases, strict=True)
    )
    return q, k, rng.normal(0, 1, (40, HIDDEN))


def heads(x: np.ndarray, weight: QuantizedTensor) -> np.ndarray:
    assert weight.bias is not None
    return (x.astype(np.float32) @ dequantize(weight).T + weight.bias).reshape(len(x), -1, WIDTH)


def turned(x: np.ndarray) -> np.ndarray:
    """Rotated by a position's angles, rotate-half, as a stand-in for rope."""
    angle = np.arange(len(x))[:, None, None] * np.linspace(1, 0.01, WIDTH // 2)
    low, high = x[..., : WIDTH // 2], x[..., WIDTH // 2 :]
    return np.concatenate([low * np.cos(angle) - high * np.sin(angle), high * np.cos(angle) + low * np.sin(angle)], -1)


def scores(q: np.ndarray, k: np.ndarray) -> np.ndarray:
    return np.einsum("tgd,sgd->gts", q, np.repeat(k, GROUP, 1))


@given(seed=st.integers(0, 200), bits=st.sampled_from([4, 8]), spread=st.floats(0, 4))
def test_scores_stay_and_codes_stay(seed: int, bits: int, spread: float) -> None:
    q, k, x = projections(seed, bits, spread)
    peaks = np.abs(turned(heads(x, k))).max(0).astype(np.float32)
    new_q, new_k, peak = equalize_keys(q, k, peaks)
    assert new_q.codes is q.codes and new_k.codes is k.codes
    before = scores(turned(heads(x, q)), turned(heads(x, k)))
    after = scores(turned(heads(x, new_q)), turned(heads(x, new_k)))
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5 * np.abs(before).max())
    for old, new in ((q, new_q), (k, new_k)):
        factor = new.scales.astype(np.float64) / old.scales
        assert (np.log2(factor) == np.rint(np.log2(factor))).all()  # exact: powers of two
    keys = np.abs(turned(heads(x, new_k))).max((0, 2))
    assert peak == np.float32(peaks.max())
    assert (keys <= peak * (1 + 1e-5)).all()


def test_one_scale_holds_all_keys_better() -> None:
    q, k, x = projections(1, 8, 2.0)
    errors = []
    for one, other in ((q, k), equalize_keys(q, k, np.abs(turned(heads(x, k))).max(0).astype(np.float32))[:2]):
        keys = turned(heads(x, other))
        step = np.abs(keys).max() / 127
        rounded = np.rint(keys / step) * step
        queries = turned(heads(x, one))
        errors.append(np.square(scores(queries, rounded) - scores(queries, keys)).mean())
    assert errors[1] < errors[0] / 2


def test_a_dead_pair_under_large_queries_stays_finite() -> None:
    q, k, _ = projections(3, 8, 0.0)
    q, k = q._replace(scales=q.scales * np.float16(1000)), k._replace(scales=k.scales * np.float16(0.01))
    peaks = np.full((KV_HEADS, WIDTH), 1e-9, np.float32)
    peaks[0] = 1
    new_q, new_k, peak = equalize_keys(q, k, peaks)
    assert (new_q.scales > 0).all() and np.isfinite(new_k.scales).all() and peak == 1


def test_nothing_seen_changes_nothing() -> None:
    q, k, _ = projections(0, 4, 1.0)
    new_q, new_k, peak = equalize_keys(q, k, np.zeros((KV_HEADS, WIDTH), np.float32))
    np.testing.assert_array_equal(new_q.scales, q.scales)
    np.testing.assert_array_equal(new_k.scales, k.scales)
    assert peak == 0
