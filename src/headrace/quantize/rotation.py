"""Rotation: the same model in another basis, exact in float, whose activations have no huge channels.

    residual   x → x·R everywhere: norm gains move into the linears that follow, R into every weight and bias that reads
               or writes the stream; RMSNorm does not see a rotation. The head is no longer the embedding's table.
    values     v → v·Hᵀ per head, o_proj reads it back through H

R is a Hadamard matrix with random signs, so that the residual stream's few huge channels, which would decide the step
of a fixed 16-bit grid, are shared by all.
Source: Ashkboos et al. 2024 (QuaRot), the parts that are folded offline. This file does not know how weights are
quantized afterwards.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from headrace.checkpoint.tensor import LazyTensor
from headrace.config import ModelConfig
from headrace.model.weights import FINAL_NORM, Role, Weight, weight_table
from headrace.quantize.source import Source

__all__ = ["Rotated", "orthogonal", "turned"]

Array = NDArray[np.float32]


@functools.cache
def orthogonal(size: int, seed: int = 0) -> Array:
    """An orthogonal matrix (size, size), float32, that spreads every channel evenly over all: Hadamard, random signs.

    Where no Hadamard matrix of the size is at hand, one of a power of two times a small random rotation. Read-only.
    """
    outer, inner, signs = _factors(size, seed)
    matrix = np.asarray(np.kron(outer, inner) * signs, np.float32)
    matrix.flags.writeable = False
    return matrix


def turned(rows: NDArray[np.floating], seed: int = 0) -> Array:
    """rows (N, size) @ orthogonal(size, seed): two small products for each row instead of a large one."""
    outer, inner, signs = _factors(rows.shape[1], seed)
    blocks = np.matmul(rows.reshape(-1, len(inner)), inner).reshape(len(rows), len(outer), len(inner))
    return np.asarray(np.matmul(outer.T, blocks).reshape(rows.shape) * signs, np.float32)


@functools.cache
def _factors(size: int, seed: int) -> tuple[Array, Array, Array]:
    """`orthogonal` as a Kronecker product of two matrices of about the same size, and the signs of its columns."""
    generator = np.random.default_rng(seed)
    odd = size // (size & -size)
    base = _paley(4 * odd) if odd > 1 and size % 4 == 0 else None
    if base is None:
        base = np.linalg.qr(generator.normal(size=(odd, odd)))[0] if odd > 1 else np.ones((1, 1))
    inner = np.asarray(base / np.sqrt((base * base).sum(0)[0]), np.float32)
    outer = np.ones((1, 1), np.float32)
    half = np.array([[1, 1], [1, -1]], np.float32) / np.sqrt(np.float32(2))
    while len(outer) * len(inner) < size:
        if len(outer) < len(inner):
            outer = np.kron(half, outer)
        else:
            inner = np.kron(half, inner)
    return outer, inner, generator.choice(np.array([-1, 1], np.float32), size)


def _paley(order: int) -> NDArray[np.float64] | None:
    """The Hadamard matrix (order, order) that quadratic residues modulo a prime give, if they do.

    Source: Paley 1933, constructions I (order − 1 prime, 3 mod 4) and II (order/2 − 1 prime, 1 mod 4).
    """
    for prime, residue in ((order - 1, 3), (order // 2 - 1, 1)):
        if prime % 4 != residue or prime < 3 or any(prime % d == 0 for d in range(2, math.isqrt(prime) + 1)):
            continue
        character = np.full(prime, -1.0)
        character[np.square(np.arange(1, prime)) % prime] = 1
        character[0] = 0
        at = np.arange(prime)
        core = np.zeros((prime + 1, prime + 1))
        core[1:, 1:] = character[(at[:, None] - at) % prime]
        core[0, 1:] = 1
        core[1:, 0] = -1 if residue == 3 else 1
        if residue == 3:
            return core + np.eye(prime + 1)
        return np.kron(core, [[1, 1], [1, -1]]) + np.kron(np.eye(prime + 1), [[1, -1], [-1, -1]])
    return None


@dataclass(frozen=True)
class Rotated:
    """A source in another basis: the same logits from other weights, as lazily read as before.

    Attributes:
        source: the model.
        residual: rotate the residual stream; unties the head.
        values: rotate each head's values.
        seed: of the random signs.
    """

    source: Source
    residual: bool = True
    values: bool = True
    seed: int = 0

    @property
    def config(self) -> ModelConfig:
        """The geometry, with a head of its own when the stream is rotated."""
        config = self.source.config
        return replace(config, tied_head=config.tied_head and not self.residual)

    def tensor(self, name: str) -> LazyTensor:
        """A weight in the new basis; what mixes rows reads the whole weight once for each use."""
        plain, weight = self.source.tensor(name), weight_table(self.config)[name]
        if weight.layer is not None and not weight.role.is_norm:
            return replace(plain, dtype="float32", read=lambda start, stop: self._linear(weight, plain)[start:stop])
        if not self.residual:
            return plain
        if weight.role.is_norm:
            return replace(plain, dtype="float32", read=lambda start, stop: np.ones(stop - start, np.float32))
        return replace(plain, dtype="float32", read=lambda start, stop: self._table(weight, plain.read(start, stop)))

    def _table(self, weight: Weight, rows: Array) -> Array:
        """Rows of the embedding or the head."""
        if weight.role is Role.HEAD:
            rows = rows * self.source.tensor(FINAL_NORM).load()
        return turned(rows, self.seed)

    def _linear(self, weight: Weight, plain: LazyTensor) -> Array:
        """A linear (N, K) or its bias (N,): what it gives is turned in both, what it takes in the linear alone."""
        values: NDArray[np.floating] = plain.load()
        if self.values and weight.role is Role.VALUE:
            values = self._per_head(values)
        if self.residual and weight.role.writes_stream:
            values = turned(values[None], self.seed)[0] if values.ndim == 1 else turned(values.T, self.seed).T
        if weight.quantized and self.values and weight.role is Role.OUTPUT:
            values = self._per_head(values.T).T
        if weight.quantized and self.residual and weight.producer is not None:
            before = weight_table(self.config)[weight.producer]
            if before.role.is_norm:
                values = turned(values * self.source.tensor(before.name).load(), self.seed)
        return np.ascontiguousarray(values, np.float32)

    def _per_head(self, weight: NDArray[np.floating]) -> Array:
        """Each head's rows turned by one matrix: (heads·D, K) or (heads·D,) → the same."""
        width = self.source.config.head_dim
        turn = orthogonal(width, self.seed + 1)
        turned = turn @ weight.reshape(-1, width, weight.size // len(weight))
        return np.asarray(turned.reshape(weight.shape), np.float32)
