"""What a phone will do, estimated: tokens a second by memory traffic, time to first token by operations.

A token moves every weight once, and every byte of the cache three times: the device graphs join past and new keys and
values, so that the past is read, written and read again. One number is fitted: the share of the data sheet's bandwidth
that such traffic reaches, the geometric mean over published rows (published_speeds.json). A prompt step is bound by
operations; theirs a second are fitted alike. Both come with the range of the rows and, in `calibration`, with what the
estimate of each row is off when it is made without that row. Measures nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

__all__ = [
    "LEAST_SHARE",
    "Estimate",
    "Published",
    "Workload",
    "calibration",
    "chips",
    "estimate_decode",
    "estimate_step",
    "published",
]

LEAST_SHARE = 0.5  # of the smallest published model's bytes: below, other costs than bytes show
CACHE_PASSES = 3  # read, written joined with the step's own, read by attention


@dataclass(frozen=True)
class Workload:
    """What a model moves and computes.

    Attributes:
        weight_bytes: read by every token: linears and head; of the embedding only a row is read.
        cache_bytes: keys and values of a full context: static graphs read all of it at any fill.
        step_operations: multiplications and additions of one prompt step.
    """

    weight_bytes: float
    cache_bytes: float
    step_operations: float

    @classmethod
    def of(
        cls,
        *,
        layers: int,
        hidden: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        feed_forward: int,
        vocabulary: int,
        context: int,
        weight_bytes: float | None = None,
        step: int = 128,
    ) -> Workload:
        """A decoder's workload from its geometry.

        Args:
            layers, hidden, heads, kv_heads, head_dim, feed_forward, vocabulary: the geometry.
            context: positions of the cache.
            weight_bytes: what a token reads; None: linears at 4 bits, the head at 8.
            step: tokens of a prompt step.
        """
        linear = layers * (2 * hidden * heads * head_dim + 2 * hidden * kv_heads * head_dim + 3 * hidden * feed_forward)
        head = vocabulary * hidden
        scores = layers * heads * head_dim * context
        return cls(
            linear / 2 + head if weight_bytes is None else weight_bytes,
            2.0 * layers * kv_heads * head_dim * context,  # a byte each
            2.0 * step * (linear + head + 2 * scores),
        )

    @property
    def token_bytes(self) -> float:
        """Moved by one token."""
        return self.weight_bytes + CACHE_PASSES * self.cache_bytes


@dataclass(frozen=True)
class Published:
    """A published row: a model on a chip.

    Attributes:
        chip, model, context: which.
        workload: what it moves and computes.
        tok_s: its response rate.
        step_seconds: of a prompt step of 128 tokens, or None.
        prompt_tok_s: measured for prompts, beside the step's time, or None.
    """

    chip: str
    model: str
    context: int
    workload: Workload
    tok_s: float
    step_seconds: float | None = None
    prompt_tok_s: float | None = None

    @property
    def share(self) -> float:
        """Of the data sheet's bandwidth."""
        return self.tok_s * self.workload.token_bytes / chips()[self.chip]


@dataclass(frozen=True)
class Estimate:
    """An estimated number: the middle, and what the least and the most efficient published row would give."""

    middle: float
    low: float
    high: float

    def times(self, factor: float) -> Estimate:
        """As many times as much."""
        return Estimate(self.middle * factor, self.low * factor, self.high * factor)

    def to_dict(self, digits: int = 3) -> dict[str, float]:
        """As plain JSON values, rounded to significant digits."""
        return {
            name: float(f"{value:.{digits}g}")
            for name, value in (("estimated", self.middle), ("low", self.low), ("high", self.high))
        }


def chips() -> Mapping[str, float]:
    """Peak memory bandwidth by the makers' data sheets, bytes a second."""
    return {name: float(chip["bandwidth"]) for name, chip in _data()["chips"].items()}


@cache
def published() -> tuple[Published, ...]:
    """All published rows."""
    data, rows = _data(), []
    for row in data["rows"]:
        geometry = dict(data["models"][row["model"]])
        total = geometry.pop("weight_bytes", None)
        # A card states all weights; of the embedding, a byte a value, a token reads only a row.
        read = None if total is None else total - geometry["vocabulary"] * geometry["hidden"]
        workload = Workload.of(**geometry, context=row["context"], weight_bytes=read)
        rows.append(
            Published(
                row["chip"], row["model"], row["context"], workload, row["tok_s"],
                row.get("step_seconds"), row.get("prompt_tok_s"),
            )
        )  # fmt: skip
    return tuple(rows)


def estimate_decode(chip: str, workload: Workload, rows: Sequence[Published] | None = None) -> Estimate:
    """Tokens a second after the first, with a full context.

    Args:
        chip: a key of `chips`.
        workload: the model's.
        rows: calibrate on these; all published ones when None.
    """
    peak = chips()[chip] / workload.token_bytes
    return _scaled(peak, [row.share for row in (published() if rows is None else rows)])


def estimate_step(chip: str, workload: Workload, rows: Sequence[Published] | None = None) -> Estimate | None:
    """Seconds of a prompt step; None where no row of this chip tells how fast it computes.

    Args:
        chip: a key of `chips`.
        workload: the model's.
        rows: calibrate on these; all published ones when None.
    """
    speeds = [
        row.workload.step_operations / row.step_seconds
        for row in (published() if rows is None else rows)
        if row.step_seconds is not None and row.chip == chip
    ]
    if not speeds:
        return None
    rate = _scaled(1.0, speeds)
    return Estimate(*(workload.step_operations / value for value in (rate.middle, rate.high, rate.low)))


def calibration() -> list[dict[str, Any]]:
    """Each published row beside what is estimated for it when it is left out: {chip, model, context, tok_s, estimated,
    error, step_seconds, step_estimated, step_error}; errors are relative, None where nothing is left to say it."""
    report = []
    for row in published():
        others = [other for other in published() if other is not row]
        rate = estimate_decode(row.chip, row.workload, others).middle
        step = None if row.step_seconds is None else estimate_step(row.chip, row.workload, others)
        report.append(
            {
                "chip": row.chip,
                "model": row.model,
                "context": row.context,
                "tok_s": row.tok_s,
                "estimated": round(rate, 2),
                "error": round(rate / row.tok_s - 1, 3),
                "step_seconds": row.step_seconds,
                "step_estimated": None if step is None else round(step.middle, 4),
                "step_error": None if step is None else round(step.middle / (row.step_seconds or 1) - 1, 3),
            }
        )
    return report


def _scaled(peak: float, shares: Sequence[float]) -> Estimate:
    middle = math.exp(sum(map(math.log, shares)) / len(shares))
    return Estimate(peak * middle, peak * min(shares), peak * max(shares))


@cache
def _data() -> dict[str, Any]:
    text = resources.files("headrace.forecast").joinpath("published_speeds.json").read_text(encoding="utf-8")
    data: dict[str, Any] = json.loads(text)
    return data
