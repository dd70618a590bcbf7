"""Rotation: the same model in another basis, exact in float, whose activations have no huge channels.

    residual   x → x·R everywhere: norm gains move into the linears that follow, R into every weight that reads or
               writes the stream; RMSNorm does not see a rotation. The head is no longer the embedding's table.
    values     v → v·Hᵀ per head, o_proj reads it back through H

R is a Hadamard matrix with random signs, so that the residual stream's few huge channels, which would decide the step
of a fixed 16-bit grid, are shared by all.
Source: Ashkboos et al. 2024 (QuaRot), the parts that are folded offline. This file does not know what gains by it.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from headrace.checkpoint.tensor import LazyTensor
from headrace.config import ModelConfig
from headrace.model.decoder import EMBEDDING, FINAL_NORM, HEAD
from headrace.quantize.pipeline import Source

__all__ = ["Rotated", "orthogonal"]

Array = NDArray[np.float32]


@functools.cache
def orthogonal(size: int, seed: int = 0) -> Array:
    """An orthogonal matrix (size, size), float32, that spreads every channel evenly over all: Hadamard, random signs.

    Where no Hadamard matrix of the size is at hand, one of a power of two times a small random rotation. Read-only.
    """
    generator = np.random.default_rng(seed)
    odd = size // (size & -size)
    base = _paley(4 * odd) if odd > 1 and size % 4 == 0 else None
    if base is None:
        base = np.linalg.qr(generator.normal(size=(odd, odd)))[0] if odd > 1 else np.ones((1, 1))
    spread = np.asarray(base / np.sqrt((base * base).sum(0)[0]), np.float32)
    while len(spread) < size:
        spread = np.block([[spread, spread], [spread, -spread]]) / np.sqrt(np.float32(2))
    spread *= generator.choice(np.array([-1, 1], np.float32), size)
    spread.flags.writeable = False
    return spread


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
        plain = self.source.tensor(name)
        if name in (EMBEDDING, HEAD, FINAL_NORM) or name.endswith("layernorm.weight"):
            if not self.residual:
                return plain
            return replace(plain, dtype="float32", read=lambda start, stop: self._stream_rows(name, plain, start, stop))
        return replace(plain, dtype="float32", read=lambda start, stop: self._linear(name, plain.load())[start:stop])

    def _stream_rows(self, name: str, plain: LazyTensor, start: int, stop: int) -> Array:
        if len(plain.shape) == 1:
            return np.ones(stop - start, np.float32)
        rows = plain.read(start, stop)
        if name == HEAD:
            rows = rows * self.source.tensor(FINAL_NORM).load()
        return np.asarray(rows @ self._basis(), np.float32)

    def _linear(self, name: str, weight: Array) -> Array:
        prefix, kind, _ = name.rsplit(".", 2)
        if self.values and kind == "v_proj":
            weight = self._per_head(weight)
        if self.values and kind == "o_proj":
            weight = self._per_head(weight.T).T
        if not self.residual:
            return np.ascontiguousarray(weight)
        if kind in ("o_proj", "down_proj"):
            return np.ascontiguousarray(self._basis().T @ weight)
        layer = prefix.rsplit(".", 1)[0]
        norm = "input_layernorm" if prefix.endswith("self_attn") else "post_attention_layernorm"
        gain = self.source.tensor(f"{layer}.{norm}.weight").load()
        return np.asarray((weight * gain) @ self._basis(), np.float32)

    def _per_head(self, weight: Array) -> Array:
        """Each head's rows turned by one matrix: (heads·D, K) → the same."""
        width = self.source.config.head_dim
        turn = orthogonal(width, self.seed + 1)
        turned = turn @ weight.reshape(-1, width, weight.shape[1])
        return np.asarray(turned.reshape(weight.shape), np.float32)

    def _basis(self) -> Array:
        return orthogonal(self.source.config.hidden_size, self.seed)
