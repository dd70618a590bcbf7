"""Static ranges: the smallest and largest value of every named result, over calibration windows.

Walks the decoder a layer at a time, so that one layer of weights is in memory. Plain minimum and maximum: the residual
stream of some models has one token a thousand times larger than the others, and clipping it destroys the model. It is
the first one, whichever that is, so tokens from all over the vocabulary are looked at as first ones too: a chat begins
with a mark that no text holds. Knows no encoding and no text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from headrace.config import ModelConfig
from headrace.model.decoder import Residual, block, embed
from headrace.model.ops import Array, Positions
from headrace.model.weights import EMBEDDING, FINAL_NORM, HEAD, Role, find_weight, layer_weights
from headrace.quantize.outliers import SplitEager, find_outliers
from headrace.quantize.parallel import parallel_map
from headrace.quantize.windows import causal_positions

__all__ = ["HEAD_TOKENS", "RANGE_WINDOWS", "Ranges", "collect_ranges", "mask_gap", "range_tokens"]

RANGE_WINDOWS = 4  # minimum and maximum settle after two thousand tokens: docs/LOG.md

_ELEMENTS = 1 << 24  # of scores or logits held at once
_FIRST_TOKENS = 512  # of the vocabulary, each a window of its own
HEAD_TOKENS = 512  # whose logits are looked at: a large model's head costs as much as three layers, for each token
_TOGETHER = 256  # tokens whose product with a weight a core computes at once


@dataclass(frozen=True)
class Ranges:
    """What calibration saw.

    Attributes:
        seen: (low, high) of each named result.
        outliers: the outlier channels of each feed-forward's gated product that has some, by the feed-forward's name.
        mask_gaps: `mask_gap` of each attention, by its name.
    """

    seen: dict[str, tuple[float, float]] = field(default_factory=dict)
    outliers: dict[str, tuple[int, ...]] = field(default_factory=dict)
    mask_gaps: dict[str, float] = field(default_factory=dict)


class _Observer(SplitEager):
    """Eager that notes each named result's range, and finds outlier channels."""

    def __init__(self, config: ModelConfig, weights: Mapping[str, Array], found: Ranges) -> None:
        super().__init__(config, weights.__getitem__)
        self.seen, self.apart, self.gaps = found.seen, found.outliers, found.mask_gaps

    def outliers(self, name: str, gated: Array) -> Sequence[int]:
        if f"{name}.gated" not in self.seen:  # the first windows decide
            channels = find_outliers(np.abs(gated).reshape(-1, gated.shape[-1]).max(0))
            if channels:
                self.apart[name] = channels
        return self.apart.get(name, ())

    def tap(self, name: str, value: Array) -> Array:
        self._note(name, float(value.min()), float(value.max()))
        return value

    def times(self, x: Array, table: Array) -> Array:
        """As `Eager.times`, on several cores."""
        rows = x.reshape(-1, x.shape[-1])
        few = [rows[start : start + _TOGETHER] for start in range(0, len(rows), _TOGETHER)]
        return np.concatenate(parallel_map(lambda some: some @ table.T, few)).reshape(*x.shape[:-1], len(table))

    def rope(self, x: Array, at: Positions[Array], name: str) -> Array:
        """As `Ops.rope`, noting what it comes to at any position: a slow pair has hardly turned within a window, and
        what its sine gives then grows for thousands of tokens."""
        squares = np.square(x)
        half = x.shape[3] // 2
        low, high = squares[..., :half], squares[..., half:]
        for part, square in (("low", low), ("high", high)):
            peak = math.sqrt(square.max())
            self._note(f"{name}.{part}_cos", -peak, peak)
            self._note(f"{name}.{part}_sin", -peak, peak)
        low += high
        radius = math.sqrt(low.max())
        self._note(f"{name}.low", -radius, radius)
        self._note(f"{name}.high", -radius, radius)
        return super().rope(x, at, name)

    def _note(self, name: str, low: float, high: float) -> None:
        lowest, highest = self.seen.get(name, (np.inf, -np.inf))
        self.seen[name] = (min(lowest, low), max(highest, high))

    def masked(self, scores: Array, mask: Array, name: str) -> Array:
        """As `Ops.masked`, noting how deep a device's mask must be."""
        attention = name.removesuffix(".masked_scores")
        self.gaps[attention] = max(self.gaps.get(attention, 0.0), mask_gap(scores, mask))
        return super().masked(scores, mask, name)

    def weighted_values(self, q: Array, keys: Array, values: Array, mask: Array, name: str) -> Array:
        """A few windows at a time: the scores of all would not fit in memory."""
        step = max(1, _ELEMENTS // (q.shape[1] * q.shape[2] * keys.shape[3]))
        return np.concatenate(
            [
                super(_Observer, self).weighted_values(q[at], keys[at], values[at], mask, name)
                for at in (slice(start, start + step) for start in range(0, len(q), step))
            ]
        )


def mask_gap(scores: Array, mask: Array) -> float:
    """How far a token's best score may be below those that the mask blocks: what a mask must take from these at least.

    Blocked are later tokens of the same step, which may score anything, and empty positions of the cache, which score
    0. Keys with large biases leave a token alone with −64 as its best score (Qwen2.5-0.5B).

    Args:
        scores: (B, heads, S, C), before the mask.
        mask: (1, 1, S, C): 0 where a token may look, far below elsewhere.
    """
    best = (scores + mask).max(-1)
    blocked = np.where(mask < 0, scores, np.float32(0)).max(-1)  # 0 also stands for the empty positions
    return max(0.0, float((np.maximum(blocked, 0) - best).max()))


def range_tokens(config: ModelConfig, windows: int, length: int) -> int:
    """How many tokens are looked at, given so many calibration windows of `length` tokens."""
    return min(windows, RANGE_WINDOWS) * length + min(_FIRST_TOKENS, config.vocab_size)


def collect_ranges(
    config: ModelConfig,
    weights: Callable[[str], Array],
    windows: NDArray[np.integer[Any]],
    *,
    progress: Callable[[int, int], Any] | None = None,
) -> Ranges:
    """(low, high) of every named result of the decoder, with outlier channels apart.

    The embedding's range is its whole table's, so that no token is ever clipped there; logits are looked at for
    `HEAD_TOKENS` of all tokens, evenly. Scores that the mask blocks
    count as scores, but `masked_scores` says what the device's own mask makes of them elsewhere: its range here holds
    the mask of the eager decoder and is of no use.

    Args:
        config: the geometry.
        weights: gives a weight by canonical name, float32: the ones the graphs will compute with.
        windows: token ids (windows, length), each from position 0.
        progress: called with (layers done, layers).
    """
    found = Ranges()
    first = np.linspace(0, config.vocab_size - 1, min(_FIRST_TOKENS, config.vocab_size)).round().astype(np.int64)
    groups = (windows, first[:, None])
    positions = [causal_positions(config, ids.shape[1]) for ids in groups]
    table = weights(EMBEDDING)
    ops = _Observer(config, {EMBEDDING: table}, found)
    streams = [cast(Residual[Array], embed(ops, cast(Array, ids))) for ids in groups]
    found.seen[find_weight(config, Role.EMBEDDING).module] = (float(table.min()), float(table.max()))
    del ops, table
    for layer in range(config.num_layers):
        if progress is not None:
            progress(layer, config.num_layers)
        ops = _Observer(config, {name: weights(name) for name in layer_weights(config, layer)}, found)
        after = [block(ops, layer, stream, at, None)[0] for stream, at in zip(streams, positions, strict=True)]
        streams = [Residual(stream.settle(ops)) for stream in after]
    del ops, after  # with the last layer's weights
    last = {FINAL_NORM: weights(FINAL_NORM), HEAD: weights(EMBEDDING if config.tied_head else HEAD)}
    ops = _Observer(config, last, found)
    states = np.concatenate([stream.x.reshape(-1, config.hidden_size) for stream in streams])
    normed = ops.rms_norm(states, FINAL_NORM)[:: -(-len(states) // HEAD_TOKENS)]
    step = max(1, _ELEMENTS // config.vocab_size)
    for start in range(0, len(normed), step):
        ops.linear(normed[start : start + step], HEAD)
    if progress is not None:
        progress(config.num_layers, config.num_layers)
    return found
