"""How near a model stays to its reference: perplexity, KL divergence over the whole vocabulary, top-1 agreement.

Works on logits, a few rows at a time, so that no more than a few rows of probabilities exist at once. Knows nothing
about where logits come from.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Fidelity", "FidelityMeter", "fidelity", "log_softmax", "no_target"]

no_target = -1
"""In place of the next token where it is not known."""

_ELEMENTS = 1 << 22  # float64 values of probabilities held at once


@dataclass(frozen=True)
class Fidelity:
    """What was measured over `tokens` positions.

    Attributes:
        tokens: positions compared.
        reference_perplexity: exp of the reference's mean negative log likelihood of the next token.
        perplexity: the same of the model under test.
        kl: mean KL(reference ‖ model), in nats.
        kl_p99: its 99th percentile over positions.
        top1: share of positions where both have the same likeliest token.
    """

    tokens: int
    reference_perplexity: float
    perplexity: float
    kl: float
    kl_p99: float
    top1: float

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)


class FidelityMeter:
    """Collects positions, a few rows at a time; `result` gives their `Fidelity`."""

    def __init__(self) -> None:
        self._kl: list[NDArray[np.float64]] = []
        self._same: list[NDArray[np.bool_]] = []
        self._loss: list[NDArray[np.float64]] = []  # (2, rows): reference, model

    def add(self, reference: NDArray[np.float32], logits: NDArray[np.float32], targets: NDArray[np.int64]) -> None:
        """Compare rows.

        Args:
            reference: the reference's logits, (rows, V).
            logits: the model's, (rows, V).
            targets: the token that follows each row, (rows,), or `no_target`.

        Raises:
            ValueError: the shapes differ.
        """
        if reference.shape != logits.shape or targets.shape != logits.shape[:1]:
            raise ValueError(
                f"logits of shapes {reference.shape} and {logits.shape} with {targets.shape} targets; "
                "expected equal rows and vocabularies"
            )
        step = max(1, _ELEMENTS // logits.shape[1])
        for start in range(0, len(targets), step):
            at = slice(start, start + step)
            self._add(reference[at], logits[at], targets[at])

    def result(self) -> Fidelity:
        """All positions added so far.

        Raises:
            ValueError: there are none.
        """
        if not self._kl:
            raise ValueError("no positions were compared")
        kl = np.concatenate(self._kl)
        loss = np.concatenate(self._loss, axis=1)
        mean = loss.mean(1) if loss.shape[1] else np.full(2, np.nan)
        return Fidelity(
            tokens=len(kl),
            reference_perplexity=float(np.exp(mean[0])),
            perplexity=float(np.exp(mean[1])),
            kl=float(kl.mean()),
            kl_p99=float(np.quantile(kl, 0.99)),
            top1=float(np.concatenate(self._same).mean()),
        )

    def _add(self, reference: NDArray[np.float32], logits: NDArray[np.float32], targets: NDArray[np.int64]) -> None:
        a, b = log_softmax(reference), log_softmax(logits)
        self._kl.append(np.einsum("rv,rv->r", np.exp(a), a - b))
        self._same.append(a.argmax(1) == b.argmax(1))
        known = np.flatnonzero(targets != no_target)
        self._loss.append(-np.stack([a[known, targets[known]], b[known, targets[known]]]))


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """log of the softmax over the last axis, in float64."""
    x = logits.astype(np.float64)
    x -= x.max(-1, keepdims=True)
    x -= np.log(np.exp(x).sum(-1, keepdims=True))
    return x


def fidelity(reference: NDArray[np.float32], logits: NDArray[np.float32]) -> Fidelity:
    """KL and top-1 agreement of logits (rows, V) whose next tokens are not known; the perplexities are NaN."""
    meter = FidelityMeter()
    meter.add(reference, logits, np.full(len(reference), no_target, np.int64))
    return meter.result()
