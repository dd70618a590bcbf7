"""The Ops seam: what the decoder may ask for, and Eager, its NumPy interpretation.

The decoder is written once over `Ops[T]`. For Eager, T is a NumPy array; for the emitters, T is a value of a graph or
a program being recorded. `PrimitiveOps` builds attention and the gate of primitives, which an interpretation may
replace by a fused operator; one that knows only the fused operations (native/program.py) is an `Ops` itself.

Every primitive whose result a fixed-point device must represent takes the result's `name`; `linear`, `embed` and
`rms_norm` are named after their weight's module. Eager shows each named result to `tap`, the place where calibration
looks and where simulated quantization changes values.

This file does not know the decoder's structure, nor where weights come from.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from headrace.config import ModelConfig
from headrace.model.weights import weight_table

__all__ = ["Array", "Eager", "Ops", "Positions", "PrimitiveOps", "attention_name", "mlp_name"]

T = TypeVar("T")
Array = NDArray[np.float32]


class Positions(Generic[T]):
    """Where a step's tokens stand: rotary tables and who may look at whom.

    Attributes:
        cos, sin: (1, 1, S, D/2).
        mask: (1, 1, S, C), added to the scores; C = past + S columns, past first.
    """

    def __init__(self, cos: T, sin: T, mask: T) -> None:
        self.cos = cos
        self.sin = sin
        self.mask = mask


class Ops(ABC, Generic[T]):
    """What the decoder asks for. B: batch, S: tokens of the step, C: past + S, D: head_dim."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config

    @abstractmethod
    def embed(self, ids: T, weight: str) -> T:
        """Rows of a table: ids (B, S) → (B, S, H)."""

    @abstractmethod
    def linear(self, x: T, weight: str) -> T:
        """x (…, K) by a weight (N, K), transposed, and its bias where it has one → (…, N)."""

    def linears(self, x: T, weights: Sequence[str]) -> tuple[T, ...]:
        """Several linears of one input."""
        return tuple(self.linear(x, weight) for weight in weights)

    @abstractmethod
    def rms_norm(self, x: T, weight: str) -> T:
        """x / sqrt(mean(x²) + eps) · weight, over the last axis."""

    @abstractmethod
    def add(self, a: T, b: T, name: str) -> T:
        """Elementwise sum with broadcasting."""

    def add_norm(self, x: T, update: T, weight: str, name: str) -> tuple[T, T]:
        """The residual sum, and its RMSNorm: (rms_norm(x + update), x + update)."""
        total = self.add_update(x, update, name)
        return self.rms_norm(total, weight), total

    def add_update(self, x: T, update: T, name: str) -> T:
        """The residual sum."""
        return self.add(x, update, name)

    @abstractmethod
    def rows(self, x: T, wanted: T) -> T:
        """The wanted tokens of x (B, S, H) → (B, R, H)."""

    @abstractmethod
    def gated(self, gate: T, up: T, layer: int) -> T:
        """silu(gate) · up, in the feed-forward of a layer."""

    @abstractmethod
    def attention(
        self, q: T, k: T, v: T, at: Positions[T], past: tuple[T, T] | None, layer: int
    ) -> tuple[T, tuple[T, T]]:
        """Causal grouped-query attention with a KV cache.

        Args:
            q: (B, S, heads·D); k, v: (B, S, kv_heads·D), before rope.
            at: positions of the S tokens.
            past: keys (B, kv_heads, D, P), after rope, and values (B, kv_heads, P, D); None when there are none.
            layer: which layer's attention it is; the results are named after it.

        Returns:
            (B, S, heads·D) and the step's own keys (B, kv_heads, D, S) and values (B, kv_heads, S, D).
        """


class PrimitiveOps(Ops[T]):
    """Single products, sums and shapes, and the decoder's composites made of them."""

    # Primitives.

    @abstractmethod
    def product(self, x: T, weight: str, name: str) -> T:
        """x (…, K) by a weight (N, K), transposed → (…, N)."""

    @abstractmethod
    def bias(self, weight: str) -> T:
        """A bias (N,) as a value, by its own canonical name."""

    @abstractmethod
    def matmul(self, a: T, b: T, name: str) -> T:
        """Matrix product over the last two axes; leading axes equal."""

    @abstractmethod
    def softmax(self, x: T, name: str) -> T:
        """Softmax over the last axis."""

    @abstractmethod
    def sigmoid(self, x: T, name: str) -> T:
        """1 / (1 + exp(−x))."""

    @abstractmethod
    def subtract(self, a: T, b: T, name: str) -> T:
        """Elementwise difference with broadcasting."""

    @abstractmethod
    def multiply(self, a: T, b: T, name: str) -> T:
        """Elementwise product with broadcasting."""

    @abstractmethod
    def scale(self, x: T, factor: float, name: str) -> T:
        """Product with one number."""

    @abstractmethod
    def concat(self, parts: Sequence[T], axis: int, name: str) -> T:
        """Join along `axis`."""

    @abstractmethod
    def slice(self, x: T, axis: int, start: int, stop: int) -> T:
        """x[start:stop] along `axis`."""

    @abstractmethod
    def reshape(self, x: T, shape: Sequence[int]) -> T:
        """Same elements, new shape: 0 keeps an axis, −1 is inferred."""

    @abstractmethod
    def transpose(self, x: T, order: Sequence[int]) -> T:
        """Axes in a new order."""

    @abstractmethod
    def to_cache(self, x: T, name: str) -> T:
        """What the KV cache gives back for x: the place of its 8-bit quantization."""

    # Composites.

    def linear(self, x: T, weight: str) -> T:
        row = weight_table(self.config)[weight]
        if row.bias is None:
            return self.product(x, weight, row.module)
        return self.add(self.product(x, weight, f"{row.module}.product"), self.bias(row.bias), row.module)

    def silu(self, x: T, name: str) -> T:
        """x · sigmoid(x)."""
        return self.multiply(x, self.sigmoid(x, f"{name}.sigmoid"), name)

    def gated(self, gate: T, up: T, layer: int) -> T:
        name = mlp_name(layer)
        return self.multiply(self.silu(gate, f"{name}.silu"), up, f"{name}.gated")

    def rope(self, x: T, at: Positions[T], name: str) -> T:
        """Rotate-half rotary embedding of x (B, heads, S, D)."""
        half = self.config.head_dim // 2
        low, high = self.slice(x, 3, 0, half), self.slice(x, 3, half, 2 * half)
        turned_low = self.subtract(
            self.multiply(low, at.cos, f"{name}.low_cos"),
            self.multiply(high, at.sin, f"{name}.high_sin"),
            f"{name}.low",
        )
        turned_high = self.add(
            self.multiply(high, at.cos, f"{name}.high_cos"),
            self.multiply(low, at.sin, f"{name}.low_sin"),
            f"{name}.high",
        )
        return self.concat([turned_low, turned_high], 3, name)

    def attention(
        self, q: T, k: T, v: T, at: Positions[T], past: tuple[T, T] | None, layer: int
    ) -> tuple[T, tuple[T, T]]:
        name = attention_name(layer)
        q, new_k, new_v = self.rotated(q, k, v, at, name)
        keys = new_k if past is None else self.concat([past[0], new_k], 3, f"{name}.k_cache")
        values = new_v if past is None else self.concat([past[1], new_v], 2, f"{name}.v_cache")
        return self.weighted_values(q, keys, values, at.mask, name), (new_k, new_v)

    def rotated(self, q: T, k: T, v: T, at: Positions[T], name: str) -> tuple[T, T, T]:
        """Heads, rotated and ready: scaled q (B, heads, S, D), and what the cache gives back of k (B, kv_heads, D, S)
        and v (B, kv_heads, S, D)."""
        c = self.config
        q = self.rope(self._split_heads(q, c.num_heads), at, f"{name}.q_rope")
        k = self.rope(self._split_heads(k, c.num_kv_heads), at, f"{name}.k_rope")
        q = self.scale(q, 1 / math.sqrt(c.head_dim), f"{name}.q_scaled")
        new_k = self.to_cache(self.transpose(k, (0, 1, 3, 2)), f"{name}.k_cache")
        new_v = self.to_cache(self._split_heads(v, c.num_kv_heads), f"{name}.v_cache")
        return q, new_k, new_v

    def weighted_values(self, q: T, keys: T, values: T, mask: T, name: str) -> T:
        """softmax(q·keys + mask)·values: q (B, heads, S, D) → (B, S, heads·D).

        The query heads of one KV head are its rows, so that both products are plain batched ones.
        """
        c = self.config
        q = self.reshape(q, (0, c.num_kv_heads, -1, 0))  # (B, kvH, G·S, D)
        scores = self.matmul(q, keys, f"{name}.scores")  # (B, kvH, G·S, C)
        scores = self.reshape(scores, (0, c.num_heads, -1, 0))  # (B, H, S, C)
        scores = self.masked(scores, mask, f"{name}.masked_scores")
        weights = self.softmax(scores, f"{name}.weights")
        weights = self.reshape(weights, (0, c.num_kv_heads, -1, 0))  # (B, kvH, G·S, C)
        mixed = self.matmul(weights, values, f"{name}.mixed")  # (B, kvH, G·S, D)
        mixed = self.reshape(mixed, (0, c.num_heads, -1, 0))  # (B, H, S, D)
        return self.reshape(self.transpose(mixed, (0, 2, 1, 3)), (0, 0, c.query_size))

    def masked(self, scores: T, mask: T, name: str) -> T:
        """Scores with the mask added."""
        return self.add(scores, mask, name)

    def _split_heads(self, x: T, heads: int) -> T:
        """(B, S, heads·D) → (B, heads, S, D)."""
        return self.transpose(self.reshape(x, (0, 0, heads, self.config.head_dim)), (0, 2, 1, 3))


class Eager(PrimitiveOps[Array]):
    """NumPy, float32: the oracle of every other interpretation.

    Args:
        config: the geometry.
        weights: gives a weight by canonical name, float32; called at each use, so that the caller decides how many
            weights are in memory.
    """

    def __init__(self, config: ModelConfig, weights: Callable[[str], Array]) -> None:
        super().__init__(config)
        self.weights = weights

    def tap(self, name: str, value: Array) -> Array:
        """Called with every named result; what it returns is used in its place."""
        return value

    def tap_linear(self, weight: str, x: Array) -> None:
        """Called with the input of every linear, before it is computed."""

    def embed(self, ids: Array, weight: str) -> Array:
        return self.tap(self._module(weight), self.weights(weight)[ids])

    def product(self, x: Array, weight: str, name: str) -> Array:
        self.tap_linear(weight, x)
        return self.tap(name, self.times(x, self.weights(weight)))

    def times(self, x: Array, table: Array) -> Array:
        """x (…, K) by a table (N, K), transposed. All rows in one product: NumPy makes one for each leading index, and
        reads the table again for each."""
        return (x.reshape(-1, x.shape[-1]) @ table.T).reshape(*x.shape[:-1], len(table))

    def bias(self, weight: str) -> Array:
        return self.weights(weight)

    def rms_norm(self, x: Array, weight: str) -> Array:
        mean_square = np.mean(np.square(x), axis=-1, keepdims=True)
        normed = x / np.sqrt(mean_square + np.float32(self.config.rms_norm_eps))
        return self.tap(self._module(weight), normed * self.weights(weight))

    def matmul(self, a: Array, b: Array, name: str) -> Array:
        return self.tap(name, a @ b)

    def softmax(self, x: Array, name: str) -> Array:
        e = np.exp(x - x.max(axis=-1, keepdims=True))
        return self.tap(name, e / e.sum(axis=-1, keepdims=True))

    def sigmoid(self, x: Array, name: str) -> Array:
        e = np.exp(-np.abs(x))  # never overflows
        return self.tap(name, np.where(x >= 0, np.float32(1), e) / (1 + e))

    def add(self, a: Array, b: Array, name: str) -> Array:
        return self.tap(name, a + b)

    def subtract(self, a: Array, b: Array, name: str) -> Array:
        return self.tap(name, a - b)

    def multiply(self, a: Array, b: Array, name: str) -> Array:
        return self.tap(name, a * b)

    def scale(self, x: Array, factor: float, name: str) -> Array:
        return self.tap(name, x * np.float32(factor))

    def concat(self, parts: Sequence[Array], axis: int, name: str) -> Array:
        return np.concatenate(parts, axis)

    def slice(self, x: Array, axis: int, start: int, stop: int) -> Array:
        index = [slice(None)] * x.ndim
        index[axis] = slice(start, stop)
        return x[tuple(index)]

    def reshape(self, x: Array, shape: Sequence[int]) -> Array:
        return x.reshape([x.shape[i] if n == 0 else n for i, n in enumerate(shape)])

    def transpose(self, x: Array, order: Sequence[int]) -> Array:
        return np.transpose(x, order)

    def rows(self, x: Array, wanted: Array) -> Array:
        return np.take(x, wanted.astype(np.int64), axis=1)

    def to_cache(self, x: Array, name: str) -> Array:
        return self.tap(name, x)

    def _module(self, weight: str) -> str:
        return weight_table(self.config)[weight].module


def attention_name(layer: int) -> str:
    """What the names of the results of a layer's attention begin with."""
    return f"layers.{layer}.self_attn"


def mlp_name(layer: int) -> str:
    """What the names of the results of a layer's feed-forward begin with."""
    return f"layers.{layer}.mlp"
