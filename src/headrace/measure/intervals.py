"""Statistics of right and wrong answers: intervals of a share, of a mean of shares, and whether two models differ.

Pure functions of counts. Knows no model and no question.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["bootstrap_macro", "mcnemar", "wilson"]

Z95 = 1.959963984540054  # standard normal quantile of 0.975
_DRAWS = 2000  # of the bootstrap: its ends then move by about 0.001
_SEED = 0


def wilson(right: int, total: int) -> tuple[float, float]:
    """The 95 % interval of a share (E. B. Wilson, J. Am. Stat. Assoc. 22, 1927).

    Raises:
        ValueError: there is nothing to count, or more right than asked.
    """
    if not 0 <= right <= total or total < 1:
        raise ValueError(f"{right} right of {total}; expected 0 to {total} of at least 1")
    share, z2 = right / total, Z95 * Z95
    middle = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = Z95 / (1 + z2 / total) * math.sqrt(share * (1 - share) / total + z2 / (4 * total * total))
    # Exactly 0 or 1 at the ends, where rounding would leave 1e-17.
    return (0.0 if right == 0 else middle - half), (1.0 if right == total else middle + half)


def bootstrap_macro(subjects: Sequence[NDArray[np.bool_]]) -> tuple[float, float]:
    """The 95 % interval of the mean over subjects of the share of right answers, by drawing items anew within each
    subject (percentile bootstrap, seeded).

    Args:
        subjects: right or wrong of every item, (items,) each.
    """
    rng = np.random.default_rng(_SEED)
    means = np.zeros(_DRAWS)
    for right in subjects:
        # So many right of so many drawn: the binomial is the bootstrap of zeros and ones.
        means += rng.binomial(len(right), float(right.mean()), _DRAWS) / len(right)
    low, high = np.quantile(means / len(subjects), (0.025, 0.975))
    return float(low), float(high)


def mcnemar(lost: int, gained: int) -> float:
    """How likely flips at least this uneven are when both models are equally good: McNemar's test, exact and
    two-sided (Q. McNemar, Psychometrika 12, 1947).

    Args:
        lost: items that only the first model has right.
        gained: items that only the second has right.
    """
    total = lost + gained
    tail = sum(math.comb(total, k) for k in range(min(lost, gained) + 1))
    return float(min(1.0, 2 * tail / 2**total))
