"""What the engine should compute, in NumPy and from the definitions of docs/kernels.md alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Weight:
    """Signed codes (N, K), float16 scales (N, blocks), or (N, 1) and whole factors (N, blocks); perhaps a bias (N,)."""

    codes: NDArray[np.int8]
    scale: NDArray[np.float16]
    bits: int
    bias: NDArray[np.float32] | None = None
    factors: NDArray[np.uint8] | None = None

    @property
    def block(self) -> int:
        return self.codes.shape[1] // (self.scale if self.factors is None else self.factors).shape[1]

    @property
    def has_blocks(self) -> bool:
        return self.factors is not None or self.scale.shape[1] > 1 or self.bits in (5, 6)

    def packed(self) -> NDArray[np.uint8]:
        unsigned = self._unsigned()
        if self.bits == 8:
            return unsigned
        low = unsigned & 15
        return np.ascontiguousarray(low[:, 0::2] | (low[:, 1::2] << 4))

    def high_bits(self) -> NDArray[np.uint8] | None:
        """Of 5 and 6 bits those above the low four, (N, (bits - 4) * 8 * ceil(K / 64)): of 64 columns the even ones
        stand before the odd ones, and of n bytes the j-th has columns j, j + n, … of those, the lowest bits first."""
        if self.bits not in (5, 6):
            return None
        above, (rows, k) = self.bits - 4, self.codes.shape
        stored, own = np.zeros((rows, -(-k // 64), 8 * above), np.uint8), self._unsigned() >> 4
        for column in range(k):
            place = 32 * (column % 2) + column % 64 // 2
            stored[:, column // 64, place % (8 * above)] |= own[:, column] << (place // (8 * above) * above)
        return stored.reshape(rows, -1)

    def _unsigned(self) -> NDArray[np.uint8]:
        return (self.codes.astype(np.int16) + (1 << self.bits - 1)).astype(np.uint8)

    def packed_factors(self) -> NDArray[np.uint8]:
        assert self.factors is not None
        even = np.pad(self.factors - 1, ((0, 0), (0, self.factors.shape[1] % 2)))
        return np.ascontiguousarray(even[:, 0::2] | (even[:, 1::2] << 4))

    def values(self) -> NDArray[np.float64]:
        scale = self.scale.astype(np.float64) * (1 if self.factors is None else self.factors)
        return self.codes * np.repeat(scale, self.block, axis=1)


def random_weight(rng: np.random.Generator, n: int, k: int, bits: int, block: int | None, bias: bool = False) -> Weight:
    low, high = -(1 << bits - 1), 1 << bits - 1
    codes = rng.integers(low, high, (n, k)).astype(np.int8)
    blocks = 1 if block is None else k // block
    scale = rng.uniform(0.5, 1.5, (n, blocks)).astype(np.float16) * np.float16(1 / (high * np.sqrt(k / 4)))
    return Weight(codes, scale.astype(np.float16), bits, rng.normal(size=n).astype(np.float32) if bias else None)


def random_factors(rng: np.random.Generator, n: int, k: int, block: int, bias: bool = False, bits: int = 4) -> Weight:
    """A weight of 4, 5 or 6 bits whose blocks have whole factors of a row's scale."""
    w = random_weight(rng, n, k, bits, None, bias)
    most = 1 << 8 - bits
    scale = (w.scale / np.float16(most / 2)).astype(np.float16)
    return Weight(w.codes, scale, bits, w.bias, rng.integers(1, most + 1, (n, k // block)).astype(np.uint8))


def whole(x: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """int16 codes of rows (M, K) and their scales (M, 1)."""
    top = np.abs(x).max(axis=1, keepdims=True)
    inverse = np.divide(np.float32(32639), top, out=np.zeros_like(top), where=top > 0)
    return np.rint(x * inverse).astype(np.int64), (top / np.float32(32639)).astype(np.float64)


def fine(x: NDArray[np.float32], w: Weight) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Codes of rows (M, K) for a weight, and the scales of each column (M, K).

    They are int16 with one scale a row for 8 bits without blocks. Else they are int8, and scales bring columns to at
    most 127: in every 256 columns (128 of 8 bits) there are 16 scales, the first for 8 (4) neighbours and those half of
    it further, and so on; with blocks of 4 bits, and of 5 and 6 bits, those half of it further have their own. A scale
    of 4 bits is a whole number of 1024ths of the row's largest.
    """
    if w.bits == 8 and not w.has_blocks:
        return whole(x)
    unit = 128 if w.bits == 8 else 256
    padded = np.pad(x, ((0, 0), (0, -x.shape[1] % unit))).reshape(len(x), -1, 2, 16, unit // 32)
    alone = w.bits in (5, 6) or (w.bits == 4 and w.has_blocks)
    top = np.abs(padded).max(axis=4 if alone else (2, 4), keepdims=True)
    if w.bits != 4:
        inverse = np.divide(np.float32(127), top, out=np.zeros_like(top), where=top > 0)
        scales = (top / np.float32(127)).astype(np.float64)
    else:
        most = top.max(axis=(1, 2, 3), keepdims=True)
        least = np.maximum(most, np.float32(1e-30))
        factors = np.rint(top * (np.float32(1024) / least) + np.float32(0.5)).clip(1, 1024)
        inverse = np.float32(127 * 1024) / least / factors
        scales = factors * (most / np.float32(127 * 1024)).astype(np.float64)
    codes = np.rint(padded * inverse).astype(np.int64)
    both = [np.broadcast_to(a, padded.shape).reshape(len(x), -1)[:, : x.shape[1]] for a in (codes, scales)]
    return both[0], both[1]


def coarse(x: NDArray[np.float32], group: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """int8 codes of rows (M, K) and the scales of each column (M, K), `group` columns sharing one."""
    codes, scales = np.zeros(x.shape, np.int64), np.zeros(x.shape)
    for g in range(0, x.shape[1], group):
        part = x[:, g : g + group]
        top = np.abs(part).max(axis=1, keepdims=True)
        inverse = np.divide(np.float32(127), top, out=np.zeros_like(top), where=top > 0)
        codes[:, g : g + group] = np.rint(part * inverse)
        scales[:, g : g + group] = top / np.float32(127)
    return codes, scales


def linear(x: NDArray[np.float32], w: Weight, quantize: Any) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The result over quantized activations, and the sum of magnitudes that rounding errors grow with."""
    codes, scales = quantize(x)
    values = codes * scales
    bias = 0 if w.bias is None else w.bias.astype(np.float64)
    return values @ w.values().T + bias, np.abs(values) @ np.abs(w.values()).T + np.abs(bias)


def rms_norm(x: NDArray[np.float64], weight: NDArray[np.float32], eps: float) -> NDArray[np.float64]:
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * weight


@dataclass
class Decoder:
    """A whole model in float64 over dequantized weights, one sequence at a time.

    Its cache is as the engine's, and the inputs of its linears as in decoding.
    """

    program: dict[str, Any]
    weights: dict[str, Weight]
    arrays: dict[str, NDArray[Any]]

    def logits(self, ids: list[int], keep: NDArray[np.int64] | None = None) -> NDArray[np.float64]:
        """Logits of every token (T, vocab), computed one instruction after the other."""
        g = self.program["geometry"]
        registers: dict[int, NDArray[np.float64]] = {}
        cache: dict[int, tuple[NDArray[np.float64], NDArray[np.float64]]] = {}
        for i in self.program["instructions"]:
            match i["op"]:
                case "embed":
                    registers[i["out"]] = self.weights[i["weight"]].values()[ids]
                case "rms_norm":
                    registers[i["out"]] = rms_norm(registers[i["in"]], self.arrays[i["weight"]], g["eps"])
                case "add_norm":
                    total = registers[i["in"]] + registers[i["update"]]
                    registers[i["sum"]], registers[i["out"]] = (
                        total,
                        rms_norm(total, self.arrays[i["weight"]], g["eps"]),
                    )
                case "add":
                    registers[i["out"]] = registers[i["in"]] + registers[i["update"]]
                case "linear":
                    for name, out in zip(i["weights"], i["out"]):
                        registers[out] = self._linear(registers[i["in"]], self.weights[name])
                case "rope_cache":
                    q, k = (self._turned(registers[i[name]], i) for name in ("q", "k"))
                    registers[i["q"]] = q.reshape(len(ids), -1)
                    v = registers[i["v"]].reshape(len(ids), g["kv_heads"], g["head_dim"])
                    cache[i["layer"]] = self._quantized(k, i["layer"], 0), self._quantized(v, i["layer"], 1)
                case "attention":
                    registers[i["out"]] = self._attention(registers[i["q"]], *cache[i["layer"]])
                case "silu_mul":
                    gate = registers[i["gate"]]
                    registers[i["out"]] = gate / (1 + np.exp(-gate)) * registers[i["up"]]
                case "rows":
                    registers[i["out"]] = registers[i["in"]]
                case "head":
                    return self._linear(registers[i["in"]], self.weights[i["weight"]])
        raise AssertionError("no head")

    def _linear(self, x: NDArray[np.float64], w: Weight) -> NDArray[np.float64]:
        return linear(x.astype(np.float32), w, partial(fine, w=w))[0]

    def _turned(self, x: NDArray[np.float64], i: dict[str, Any]) -> NDArray[np.float64]:
        d = self.program["geometry"]["head_dim"]
        x = x.reshape(len(x), -1, d)
        cos, sin = (self.arrays[i[name]][: len(x), None, :].astype(np.float64) for name in ("cos", "sin"))
        low, high = x[..., : d // 2], x[..., d // 2 :]
        return np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)

    def _quantized(self, x: NDArray[np.float64], layer: int, which: int) -> NDArray[np.float64]:
        if self.program["cache"]["dtype"] == "float32":
            return x
        scale = self.program["cache"]["scales"][layer][which]
        return np.clip(np.rint(x / scale), -128, 127) * scale

    def _attention(self, q: NDArray[np.float64], k: NDArray[np.float64], v: NDArray[np.float64]) -> NDArray[np.float64]:
        g = self.program["geometry"]
        t, group = len(q), g["heads"] // g["kv_heads"]
        q = q.reshape(t, g["heads"], g["head_dim"])
        k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
        scores = np.einsum("thd,shd->hts", q, k) / np.sqrt(g["head_dim"])
        scores[:, np.triu(np.ones((t, t), bool), 1)] = -np.inf
        p = np.exp(scores - scores.max(axis=-1, keepdims=True))
        p /= p.sum(axis=-1, keepdims=True)
        return np.einsum("hts,shd->thd", p, v).reshape(t, -1)
