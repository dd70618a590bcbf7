"""Intervals against numbers worked out elsewhere, and against simulation."""

from __future__ import annotations

import numpy as np
import pytest

from headrace.measure.intervals import bootstrap_macro, mcnemar, wilson


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    # R. G. Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson(right: int, total: int, low: float, high: float) -> None:
    assert wilson(right, total) == pytest.approx((low, high), abs=5.1e-5)
    assert wilson(total - right, total) == pytest.approx((1 - high, 1 - low), abs=5.1e-5)


def test_wilson_of_nothing() -> None:
    for right, total in ((0, 0), (3, 2), (-1, 4)):
        with pytest.raises(ValueError, match="expected 0 to"):
            wilson(right, total)


@pytest.mark.parametrize(
    ("lost", "gained", "p"),
    # 2 · (C(10, 0) + C(10, 1)) / 2^10, and so on
    [(1, 9, 22 / 1024), (9, 1, 22 / 1024), (5, 5, 1.0), (0, 0, 1.0), (0, 6, 2 / 64)],
)
def test_mcnemar(lost: int, gained: int, p: float) -> None:
    assert mcnemar(lost, gained) == pytest.approx(p, rel=1e-6)


def test_the_bootstrap_covers_a_mean_of_subjects() -> None:
    rng = np.random.default_rng(1)
    shares = (0.3, 0.6, 0.9)
    held = 0
    for _ in range(100):
        low, high = bootstrap_macro([rng.random(60) < share for share in shares])
        held += low <= np.mean(shares) <= high
    assert 85 <= held <= 100  # of 95 expected; each way three and more standard deviations
    always = np.ones(5, np.bool_)
    assert bootstrap_macro([always, always]) == (1.0, 1.0)
