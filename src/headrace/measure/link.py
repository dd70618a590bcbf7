"""Link: one comparison of the chain that `verify` checks. Knows no model."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrace.model.fidelity import fidelity

__all__ = ["Link", "divergence"]


@dataclass(frozen=True)
class Link:
    """One comparison: its name, what was found, what was allowed, and whether that holds."""

    name: str
    found: str
    limit: str
    ok: bool

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)


def divergence(name: str, expected: NDArray[np.float32], found: NDArray[np.float32], limit: float) -> Link:
    """The link that holds the mean KL of logits (S, V) to a limit."""
    result = fidelity(expected, found)
    ok = result.kl <= limit  # False for NaN
    return Link(name, f"KL {result.kl:.4f}, top-1 {result.top1:.3f}", f"KL ≤ {limit:.4g}", ok)
