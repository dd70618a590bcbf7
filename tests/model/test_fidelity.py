"""Fidelity against its definitions, and streaming against everything at once."""

from __future__ import annotations

import math

import numpy as np
import pytest

from headrace.model import fidelity
from headrace.model.fidelity import FidelityMeter, no_target

# float32 logits, float64 sums.
EXACT = 1e-9


def sample(rows: int = 7, vocab: int = 31) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    a = rng.normal(0, 3, (rows, vocab)).astype(np.float32)
    b = a + rng.normal(0, 0.5, a.shape).astype(np.float32)
    return a, b, rng.integers(0, vocab, rows)


def test_definitions() -> None:
    a, b, targets = sample()
    targets[2] = no_target
    meter = FidelityMeter()
    meter.add(a, b, targets)
    found = meter.result()
    kls, losses, same = [], [], []
    for x, y, t in zip(a, b, targets, strict=True):
        p = [math.exp(v) for v in x.tolist()]
        q = [math.exp(v) for v in y.tolist()]
        p, q = [v / sum(p) for v in p], [v / sum(q) for v in q]
        kls.append(sum(u * math.log(u / v) for u, v in zip(p, q, strict=True)))
        same.append(p.index(max(p)) == q.index(max(q)))
        if t != no_target:
            losses.append((-math.log(p[t]), -math.log(q[t])))
    assert found.tokens == 7
    assert found.kl == pytest.approx(sum(kls) / 7, abs=EXACT)
    assert found.kl_p99 == pytest.approx(np.quantile(kls, 0.99), abs=EXACT)
    assert found.top1 == sum(same) / 7
    assert found.reference_perplexity == pytest.approx(math.exp(sum(x for x, _ in losses) / 6), rel=EXACT)
    assert found.perplexity == pytest.approx(math.exp(sum(y for _, y in losses) / 6), rel=EXACT)


def test_streaming_is_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, targets = sample(40)
    whole, pieces = FidelityMeter(), FidelityMeter()
    whole.add(a, b, targets)
    monkeypatch.setattr(fidelity, "_ELEMENTS", 100)
    for start in range(0, 40, 13):
        pieces.add(a[start : start + 13], b[start : start + 13], targets[start : start + 13])
    assert pieces.result() == whole.result()


def test_equal_logits_have_no_divergence() -> None:
    a, _, targets = sample()
    meter = FidelityMeter()
    meter.add(a, a, targets)
    found = meter.result()
    assert found.kl == 0 and found.top1 == 1 and found.perplexity == found.reference_perplexity


def test_huge_logits_do_not_overflow() -> None:
    a = np.array([[1e4, -1e4, 0]], np.float32)
    meter = FidelityMeter()
    meter.add(a, a + np.float32(500), np.array([0]))
    assert meter.result().kl == pytest.approx(0, abs=EXACT)


def test_misuse_is_refused() -> None:
    a, b, targets = sample()
    with pytest.raises(ValueError, match="expected equal rows"):
        FidelityMeter().add(a, b[:3], targets)
    with pytest.raises(ValueError, match="no positions"):
        FidelityMeter().result()
