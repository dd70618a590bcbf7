"""Calibration windows, and the Eager that shows a group of linears their input before it computes them.

The text is cut into windows; all windows walk through the decoder together, a layer at a time, so that one layer's
weights are in memory and every window's hidden states are. Knows no method, no file and no text: only token ids.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrace.config import ModelConfig
from headrace.errors import CalibrationError
from headrace.model.decoder import Residual, block, layer_linears
from headrace.model.ops import Array, Eager, Positions
from headrace.model.reference import causal_mask
from headrace.rope import rope_tables

__all__ = ["Follower", "attention_energy", "causal_positions", "cut_windows"]

_QUERIES = 128  # of a window, whose scores are held at once
_STEEP = np.float32(80)  # silu(−80) is −1e-33: zero beside anything


def cut_windows(ids: NDArray[np.integer[Any]], length: int, count: int) -> NDArray[np.int64]:
    """At most `count` windows of `length` tokens, spread evenly over the text, int64 (count, length).

    Args:
        ids: the text's tokens, (tokens,).
        length: tokens of a window.
        count: windows wanted; fewer when the text is short.

    Raises:
        CalibrationError: the text is shorter than one window.
    """
    have = len(ids) // length
    if have < 1:
        raise CalibrationError(
            f"the text has {len(ids)} tokens, which is less than one window of {length}; "
            "give more text or a shorter window"
        )
    chosen = np.linspace(0, have - 1, min(count, have)).round().astype(np.int64)
    return np.asarray(ids[: have * length], np.int64).reshape(have, length)[chosen]


def causal_positions(config: ModelConfig, length: int) -> Positions[Array]:
    """Positions of a window that starts at 0 and has no past."""
    cos, sin = rope_tables(config, length)
    return Positions(cos[None, None], sin[None, None], causal_mask(0, length))


class Follower(Eager):
    """Eager with one layer's weights, which calls `arrive` when all windows' input of a group of linears is known.

    Args:
        config: the geometry.
        weights: canonical name → float32 array; may be changed by `arrive`, and is read after it.
        arrive: called with a group's weight names and their input (…, K), before the first of them is computed.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Array],
        arrive: Callable[[tuple[str, ...], Array], None] | None = None,
    ) -> None:
        super().__init__(config, weights.__getitem__)
        self._arrive = arrive
        self.residual: Array | None = None
        groups = (group for layer in range(config.num_layers) for group in layer_linears(layer))
        self._groups = {group[0]: group for group in groups}

    def tap_linear(self, weight: str, x: Array) -> None:
        if self._arrive is not None and weight in self._groups:
            self._arrive(self._groups[weight], x)

    def add(self, a: Array, b: Array, name: str) -> Array:
        """As `Ops.add`; the last sum of the residual stream, as its name says, is kept in `residual`."""
        total = super().add(a, b, name)
        if name.endswith("residual"):
            self.residual = total
        return total

    def silu(self, x: Array, name: str) -> Array:
        """As `Ops.silu`, in x's own memory: these arrays are the largest of all, and nobody reads x again."""
        e = np.negative(x)
        np.minimum(e, _STEEP, out=e)  # exp must not overflow
        np.exp(e, out=e)
        e += 1
        x /= e
        return x

    def multiply(self, a: Array, b: Array, name: str) -> Array:
        """As `Ops.multiply`; the gated product takes the place of the gate, which `silu` gave."""
        if name.endswith(".gated"):
            a *= b
            return a
        return super().multiply(a, b, name)

    def attended(self, window: int, shares: Array) -> None:
        """Called with the attention of a few queries of a window, (heads, queries, tokens up to the last of them)."""

    def weighted_values(self, q: Array, keys: Array, values: Array, mask: Array, name: str) -> Array:
        """As `Ops.weighted_values` for windows without a past, a few queries at a time and without their future:
        the scores of all windows would not fit in memory, and half of them would be blocked."""
        batch, heads, length, width = q.shape
        kv_heads = keys.shape[1]
        out = np.empty((batch, length, heads, width), np.float32)
        for window in range(batch):
            for start in range(0, length, _QUERIES):
                stop = min(start + _QUERIES, length)
                few = q[window, :, start:stop].reshape(kv_heads, -1, width)  # (kvH, G·s, D)
                scores = (few @ keys[window, :, :, :stop]).reshape(heads, stop - start, stop)
                scores += mask[0, 0, start:stop, :stop]
                scores -= scores.max(-1, keepdims=True)
                np.exp(scores, out=scores)
                scores /= scores.sum(-1, keepdims=True)
                self.attended(window, scores)
                mixed = (scores.reshape(kv_heads, -1, stop) @ values[window, :, :stop]).reshape(
                    heads, stop - start, width
                )
                out[window, start:stop] = mixed.transpose(1, 0, 2)
        return out.reshape(batch, length, heads * width)


def attention_energy(
    config: ModelConfig, weights: Mapping[str, Array], layer: int, stream: Residual[Array], at: Positions[Array]
) -> Array:
    """How much each token is looked at in a layer: the sum of squared attention shares over all queries and heads,
    each query's in proportion to its residual stream.

    An error in a token's value reaches every query in proportion to its share. The first token, where many heads
    rest when they have nothing to look for, has hundreds of times the energy of the others.

    Returns:
        (windows, length) float32.
    """
    energy = np.zeros(stream.x.shape[:2], np.float32)
    weak = 1 / np.maximum(np.einsum("bsk,bsk->bs", stream.x, stream.x), np.finfo(np.float32).tiny)

    class Watch(Follower):
        def attended(self, window: int, shares: Array) -> None:
            queries, tokens = shares.shape[1:]
            counts = weak[window, tokens - queries : tokens]
            energy[window, :tokens] += np.einsum("q,hqt,hqt->t", counts, shares, shares)

        def add_norm(self, x: Array, update: Array, weight: str, name: str) -> tuple[Array, Array]:
            if weight.endswith("post_attention_layernorm.weight"):
                raise _Seen
            return super().add_norm(x, update, weight, name)

    with contextlib.suppress(_Seen):
        block(Watch(config, weights), layer, stream, at, None)
    return energy


class _Seen(Exception):
    """The part of a block that was wanted has been computed."""
