"""Calibration windows, their hidden states, and a layer computed on them in little memory.

The text is cut into windows. All windows are computed a layer at a time, so that memory holds one layer's weights and
the hidden states of every window. Within a layer, batches of a few windows are computed up to the next group of
linears; once all have reached it, their inputs there are known and the group can be quantized. Knows no method, no file
and no text: only token ids.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrace.bundle.grid import QuantizedTensor, dequantize
from headrace.checkpoint.tensor import LazyTensor
from headrace.config import ModelConfig
from headrace.errors import CalibrationError
from headrace.files import allocate
from headrace.model.decoder import Residual, walk
from headrace.model.ops import Array, Eager, Positions
from headrace.model.reference import causal_mask
from headrace.model.rope import rope_tables
from headrace.model.weights import EMBEDDING, Role, Weight, find_weight
from headrace.quantize.parallel import parallel_map

__all__ = [
    "LayerWalk",
    "LeanEager",
    "attention_energy",
    "causal_positions",
    "cut_windows",
    "embed_windows",
    "window_batches",
]

_TOKENS = 2048  # of the windows that are computed together
_BATCHES = 8  # and at least so many batches, where there are as many windows: cores share them
_MAPPED = 1 << 30  # bytes of hidden states above which they are in a file, which the system may write out
_HEADS = 8  # KV heads that attention energy is measured on
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
    return evenly_spaced(np.asarray(ids[: have * length], np.int64).reshape(have, length), count)


def evenly_spaced(windows: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """At most `count` windows, from the first to the last: of several texts, some of each."""
    return windows[np.linspace(0, len(windows) - 1, min(count, len(windows))).round().astype(np.intp)]


def causal_positions(config: ModelConfig, length: int, start: int = 0) -> Positions[Array]:
    """Positions of a window that has no past, wherever it starts: attention sees only how far tokens are apart."""
    cos, sin = rope_tables(config, start + length)
    return Positions(cos[None, None, start:], sin[None, None, start:], causal_mask(0, length))


def embed_windows(
    config: ModelConfig, table: Array | LazyTensor | QuantizedTensor, windows: NDArray[np.int64]
) -> Array:
    """Hidden states of windows (W, S) before the first layer, (W, S, H) float32; in an unnamed file when large.

    Args:
        config: the geometry.
        table: the embedding's (V, H), of which only the rows of these tokens become float32.
        windows: token ids.

    Raises:
        CalibrationError: the folder of temporary files has no room for them.
    """
    shape = (*windows.shape, config.hidden_size)
    if (need := 4 * math.prod(shape)) > _MAPPED:
        folder = tempfile.gettempdir()
        if (free := shutil.disk_usage(folder).free) < need:
            raise CalibrationError(
                f"{folder} has {free / 1e9:.1f} GB free and hidden states take {need / 1e9:.1f} GB; "
                "set TMPDIR to a folder with more, or use fewer windows"
            )
        with tempfile.TemporaryFile() as file:
            allocate(file, need)
            states: Array = np.memmap(file, np.float32, "w+", shape=shape)
    else:
        states = np.empty(shape, np.float32)
    tokens, places = np.unique(windows, return_inverse=True)
    if isinstance(table, QuantizedTensor):
        rows = dequantize(table.rows(tokens))
    else:
        rows = table.select(tokens) if isinstance(table, LazyTensor) else table[tokens]
    ops = LeanEager(config, {EMBEDDING: rows})
    for batch, few in zip(window_batches(states), window_batches(places.reshape(windows.shape)), strict=True):
        batch[:] = ops.embed(few, EMBEDDING)
    return states


def window_batches(of_windows: NDArray[Any]) -> list[NDArray[Any]]:
    """Views of an array (W, S, …), a few windows each: those that are computed together."""
    count = max(1, min(_TOKENS // of_windows.shape[1], len(of_windows) // _BATCHES))
    return [of_windows[start : start + count] for start in range(0, len(of_windows), count)]


class LeanEager(Eager):
    """Eager with one layer's weights, in little memory: arrays that are not read again are overwritten.

    The sums of the residual stream take the place of the stream that a block was given. Keys and values are not kept,
    only how large they were.

    Args:
        config: the geometry.
        weights: canonical name → float32 array; may change between two groups of linears.

    Attributes:
        key_peaks: the largest |key|, after rope, of each channel, (kv_heads, D).
        value_peaks: the same of values.
    """

    def __init__(self, config: ModelConfig, weights: Mapping[str, Array]) -> None:
        super().__init__(config, weights.__getitem__)
        self.key_peaks = np.zeros((config.num_kv_heads, config.head_dim), np.float32)
        self.value_peaks = np.zeros((config.num_kv_heads, config.head_dim), np.float32)

    def add_update(self, x: Array, update: Array, name: str) -> Array:
        """As `Ops.add_update`, in x's own memory."""
        x += update
        return x

    def attention(
        self, q: Array, k: Array, v: Array, at: Positions[Array], past: tuple[Array, Array] | None, layer: int
    ) -> tuple[Array, tuple[Array, Array]]:
        """As `Ops.attention`, but empty keys and values are returned."""
        mixed, (keys, values) = super().attention(q, k, v, at, past, layer)
        if keys.size:
            np.maximum(self.key_peaks, np.abs(keys).max((0, 3)), out=self.key_peaks)
            np.maximum(self.value_peaks, np.abs(values).max((0, 2)), out=self.value_peaks)
        return mixed, (keys[..., :0].copy(), values[:, :, :0].copy())

    def gated(self, gate: Array, up: Array, layer: int) -> Array:
        """As `Ops.gated`, in the gate's own memory: these arrays are the largest of all, and it is not read again."""
        e = np.negative(gate)
        np.minimum(e, _STEEP, out=e)  # exp must not overflow
        np.exp(e, out=e)
        e += 1
        gate /= e
        gate *= up
        return gate

    def weighted_values(self, q: Array, keys: Array, values: Array, mask: Array, name: str) -> Array:
        """As `Ops.weighted_values` for windows without a past."""
        batch, heads, length, width = q.shape
        kv_heads = keys.shape[1]
        out = np.empty((batch, length, heads, width), np.float32)
        for window, at, shares in self.shares(q, keys, mask):
            mixed = shares.reshape(kv_heads, -1, at.stop) @ values[window, :, : at.stop]
            out[window, at] = mixed.reshape(heads, -1, width).transpose(1, 0, 2)
        return out.reshape(batch, length, heads * width)

    def shares(self, q: Array, keys: Array, mask: Array) -> Iterator[tuple[int, slice, Array]]:
        """The attention of a few queries of a window at a time and without their future: (window, queries, shares
        (heads, queries, tokens up to the last of them)). The scores of all windows would not fit in memory, and half
        of them would be blocked."""
        batch, heads, length, width = q.shape
        for window in range(batch):
            for start in range(0, length, _QUERIES):
                at = slice(start, min(start + _QUERIES, length))
                few = q[window, :, at].reshape(keys.shape[1], -1, width)  # (kvH, G·s, D)
                scores = (few @ keys[window, :, :, : at.stop]).reshape(heads, -1, at.stop)
                scores += mask[0, 0, at, : at.stop]
                scores -= scores.max(-1, keepdims=True)
                np.exp(scores, out=scores)
                scores /= scores.sum(-1, keepdims=True)
                yield window, at, scores


class LayerWalk:
    """One layer computed on all windows, pausing before each group of linears until all windows have reached it.

    Args:
        config: the geometry.
        weights: of the layer; those of the group that is paused at may change.
        layer: its number.
        states: hidden states (W, S, H); after the last group they are those after the layer.
        at: positions of a window.

    Attributes:
        inputs: of the group that is paused at, (W', S, K) of each batch of windows; empty at the end.
    """

    def __init__(
        self, config: ModelConfig, weights: Mapping[str, Array], layer: int, states: Array, at: Positions[Array]
    ) -> None:
        self.states = window_batches(states)
        self._ops = [LeanEager(config, weights) for _ in self.states]
        self._steps = [
            walk(ops, layer, Residual(batch), at, None) for ops, batch in zip(self._ops, self.states, strict=True)
        ]
        self.inputs: list[Array] = []

    def advance(self) -> tuple[str, ...]:
        """Go on to the next group of linears: its weights' names, or none at the end."""
        self.inputs.clear()
        groups = parallel_map(self._step, range(len(self._steps)))
        self.inputs = [group[1] for group in groups if group is not None]
        return next((group[0] for group in groups if group is not None), ())

    def finish(self) -> None:
        """Compute the rest of the layer without pausing."""
        while self.advance():
            pass

    def _step(self, number: int) -> tuple[tuple[str, ...], Array] | None:
        try:
            return next(self._steps[number])
        except StopIteration as end:
            end.value[0].settle(self._ops[number])
            return None

    @property
    def key_peaks(self) -> Array:
        """The largest |key|, after rope, of each channel, (kv_heads, D)."""
        return np.asarray(np.max([ops.key_peaks for ops in self._ops], 0), np.float32)

    @property
    def value_peaks(self) -> Array:
        """The largest |value| of each channel, (kv_heads, D)."""
        return np.asarray(np.max([ops.value_peaks for ops in self._ops], 0), np.float32)


def attention_energy(
    config: ModelConfig, weights: Mapping[str, Array], layer: int, states: Array, at: Positions[Array]
) -> Array:
    """How much attention each token gets in a layer: the sum of its squared attention shares over all queries and
    heads. A query counts in inverse proportion to the energy of its residual stream `states` (W, S, H).

    An error in a token's value reaches every query in proportion to its share. Many heads attend to the first
    token when nothing else is relevant, so it has hundreds of times the energy of the others.

    Returns:
        (windows, length) float32.
    """
    energy = np.zeros(states.shape[:2], np.float32)
    query, key = (find_weight(config, role, layer) for role in (Role.QUERY, Role.KEY))
    config, weights = _some_heads(config, weights, [query, key])

    def add_energy(batch: tuple[Array, Array]) -> None:
        steps = walk(_EnergyObserver(config, weights, *batch), layer, Residual(batch[0]), at, None)
        next(steps), next(steps)  # attention lies between the first two groups of linears
        steps.close()

    parallel_map(add_energy, zip(window_batches(states), window_batches(energy), strict=True))
    return energy


class _EnergyObserver(LeanEager):
    """Computes attention shares alone, and adds up their energy.

    Not a class within a function: such a one is part of a cycle, and with it a layer's weights outlive the layer.
    """

    def __init__(self, config: ModelConfig, weights: Mapping[str, Array], stream: Array, energy: Array) -> None:
        super().__init__(config, weights)
        self.query_weights = 1 / np.maximum(np.einsum("bsk,bsk->bs", stream, stream), np.finfo(np.float32).tiny)
        self.energy = energy

    def linears(self, x: Array, weights: Sequence[str]) -> tuple[Array, ...]:
        q, k = (self.linear(x, name) for name in weights[:2])
        return q, k, k  # values play no part

    def weighted_values(self, q: Array, keys: Array, values: Array, mask: Array, name: str) -> Array:
        for window, queries, shares in self.shares(q, keys, mask):
            np.square(shares, out=shares)
            self.energy[window, : queries.stop] += (self.query_weights[window, queries] @ shares).sum(0)
        return q


def _some_heads(
    config: ModelConfig, weights: Mapping[str, Array], projections: Sequence[Weight]
) -> tuple[ModelConfig, Mapping[str, Array]]:
    """A layer reduced to a few of its KV heads and the query heads that share them, as a sample of all."""
    kv_heads = config.num_kv_heads
    chosen = range(0, kv_heads, max(1, kv_heads // _HEADS))
    few = replace(config, num_kv_heads=len(chosen), num_heads=len(chosen) * config.group_size)
    names = [name for weight in projections for name in (weight.name, weight.bias) if name is not None]

    def cut(whole: Array) -> Array:
        """Rows of the chosen heads, of a linear or of a bias."""
        by_head = whole.reshape(kv_heads, -1, *whole.shape[1:])
        return np.asarray(by_head[chosen].reshape(-1, *whole.shape[1:]), np.float32)

    return few, {**weights, **{name: cut(weights[name]) for name in names}}
