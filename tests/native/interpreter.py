"""A program of docs/kernels.md, interpreted with NumPy in float32: one sequence from position 0, no cache kept.

Reads the weights at the places that the program names. Shares no code with headrace.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
DTYPES = {"U8": np.dtype(np.uint8), "F16": np.dtype("<f2"), "F32": np.dtype("<f4")}


class Interpreter:
    """Runs a program over one sequence.

    Args:
        program: as docs/kernels.md has it.
        arrays: tensors that are given, by name.
    """

    def __init__(self, program: Mapping[str, Any], arrays: Mapping[str, Array]) -> None:
        self.program = program
        self.arrays = arrays
        self.geometry = program["geometry"]

    def run(self, ids: Sequence[int], wanted: Sequence[int]) -> Array:
        """Logits (wanted, vocab)."""
        held: dict[int, Array] = {}
        cache: dict[int, tuple[Array, Array]] = {}
        for step in self.program["instructions"]:
            match step["op"]:
                case "embed":
                    held[step["out"]] = self.weight(step["weight"])[list(ids)]
                case "rms_norm":
                    held[step["out"]] = self.norm(held[step["in"]], step["weight"])
                case "add_norm":
                    total = held[step["in"]] + held[step["update"]]
                    held[step["out"]] = self.norm(total, step["weight"])
                    held[step["sum"]] = total
                case "add":
                    held[step["out"]] = held[step["in"]] + held[step["update"]]
                case "linear":
                    made = [self.linear(held[step["in"]], name) for name in step["weights"]]
                    held |= dict(zip(step["out"], made))
                case "rope_cache":
                    held[step["q"]] = self.turned(held[step["q"]], step)
                    cache[step["layer"]] = self.turned(held[step["k"]], step), held[step["v"]]
                case "attention":
                    held[step["out"]] = self.attention(held[step["q"]], *cache[step["layer"]])
                case "silu_mul":
                    gate = held[step["gate"]]
                    held[step["out"]] = gate / (1 + np.exp(-gate)) * held[step["up"]]
                case "rows":
                    held[step["out"]] = held[step["in"]][list(wanted)]
                case "head":
                    return self.linear(held[step["in"]], step["weight"])
        raise AssertionError("a program ends with its head")

    def tensor(self, name: str) -> NDArray[Any]:
        if name in self.arrays:
            return self.arrays[name]
        place = self.program["tensors"][name]
        file = self.program["files"][place["file"]]
        count = int(np.prod(place["shape"]))
        return np.fromfile(file, DTYPES[place["dtype"]], count, offset=place["offset"]).reshape(place["shape"])

    def weight(self, name: str) -> Array:
        entry = self.program["weights"][name]
        packed, scale = self.tensor(entry["packed"]), self.tensor(entry["scale"]).astype(np.float32)
        codes = packed.astype(np.int32) - 128
        if entry["bits"] < 8:
            codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1).astype(np.int32)
            if "high" in entry:
                above, column = entry["bits"] - 4, np.arange(codes.shape[1])
                place, n = column % 64 // 2 + column % 2 * 32, 8 * above  # bytes of 64 columns
                stored = self.tensor(entry["high"])[:, column // 64 * n + place % n].astype(np.int32)
                codes += (stored >> place // n * above & ((1 << above) - 1)) << 4
            codes -= 1 << (entry["bits"] - 1)
        if "factors" in entry:
            factors = self.tensor(entry["factors"])
            factors = np.stack([factors & 15, factors >> 4], axis=-1).reshape(len(factors), -1)
            scale = scale * (factors[:, : codes.shape[1] // entry["block"]] + np.float32(1))
        return codes * np.repeat(scale, codes.shape[1] // scale.shape[1], axis=1)

    def linear(self, x: Array, name: str) -> Array:
        bias = self.program["weights"][name].get("bias")
        return x @ self.weight(name).T + (0 if bias is None else self.tensor(bias))

    def norm(self, x: Array, name: str) -> Array:
        return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + self.geometry["eps"]) * self.tensor(name)

    def turned(self, x: Array, step: Mapping[str, Any]) -> Array:
        d = self.geometry["head_dim"]
        cos, sin = (self.tensor(step[table])[: len(x), None] for table in ("cos", "sin"))
        low, high = np.split(x.reshape(len(x), -1, d), 2, axis=-1)
        return np.concatenate([low * cos - high * sin, high * cos + low * sin], -1).reshape(x.shape)

    def attention(self, q: Array, k: Array, v: Array) -> Array:
        g = self.geometry
        groups = g["heads"] // g["kv_heads"]
        q, k, v = (x.reshape(len(x), -1, g["head_dim"]).swapaxes(0, 1) for x in (q, k, v))
        k, v = np.repeat(k, groups, axis=0), np.repeat(v, groups, axis=0)
        scores = q @ k.swapaxes(1, 2) / np.sqrt(g["head_dim"])
        scores = np.where(np.tri(q.shape[1], dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = weights / weights.sum(-1, keepdims=True) @ v
        return mixed.swapaxes(0, 1).reshape(q.shape[1], -1).astype(np.float32)
