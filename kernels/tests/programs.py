"""Programs for the tests: a linear alone, and small random decoders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oracle import Decoder, Weight, random_factors, random_weight

PAGE = 4096


def weight_entries(weights: dict[str, Weight]) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """The `weights` of a program, and the arrays they name."""
    entries: dict[str, Any] = {}
    arrays: dict[str, NDArray[Any]] = {}
    for name, w in weights.items():
        entries[name] = {"bits": w.bits, "packed": f"{name}_packed", "scale": f"{name}_scale"}
        arrays[f"{name}_packed"], arrays[f"{name}_scale"] = w.packed(), w.scale
        if (high := w.high_bits()) is not None:
            entries[name]["high"] = f"{name}_high"
            arrays[f"{name}_high"] = high
        if w.factors is not None:
            entries[name] |= {"factors": f"{name}_factors", "block": w.block}
            arrays[f"{name}_factors"] = w.packed_factors()
        if w.bias is not None:
            entries[name]["bias"] = f"{name}_bias"
            arrays[f"{name}_bias"] = w.bias
    return entries, arrays


def linear_program(table: Weight, w: Weight, group: int = 64) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Logits are rows of the table by w: what a linear alone computes."""
    entries, arrays = weight_entries({"table": table, "w": w})
    n, k = w.codes.shape
    program = {
        "format": 4,
        "geometry": {
            "layers": 1, "heads": 1, "kv_heads": 1, "head_dim": 2, "hidden": k, "vocab": n, "eps": 1e-5, "context": 256,
        },
        "cache": {"dtype": "float32"},
        "files": [],
        "tensors": {},
        "weights": entries,
        "registers": [k, k],
        "instructions": [
            {"op": "embed", "weight": "table", "out": 0},
            {"op": "rows", "in": 0, "out": 1},
            {"op": "head", "group": group, "in": 1, "weight": "w"},
        ],
    }  # fmt: skip
    return program, arrays


def stored_linear(path: Path) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """A linear whose weights lie in a file, 19 MB, which the system holds in small pages; the table's come first."""
    rng = np.random.default_rng(0)
    program, arrays = linear_program(random_weight(rng, 1536, 8192, 8, None), random_weight(rng, 1536, 8192, 4, None))
    program["files"] = [str(path)]
    with path.open("wb", buffering=0) as file:
        for name in [n for n in arrays if n.endswith("_packed")]:
            array = arrays.pop(name)
            program["tensors"][name] = {"file": 0, "offset": file.tell(), "dtype": "U8", "shape": list(array.shape)}
            for at in range(0, array.nbytes, PAGE):
                file.write(array.reshape(-1)[at : at + PAGE])
    return program, arrays


def decoder(
    seed: int = 0,
    *,
    layers: int = 2,
    heads: int = 6,
    kv_heads: int = 2,
    head_dim: int = 64,
    hidden: int = 96,
    feed_forward: int = 160,
    vocab: int = 131,
    context: int = 320,
    bits: int = 4,
    block: int | None = None,
    factors: bool = False,
    bias: bool = False,
    cache: str = "int8",
) -> Decoder:
    """A random decoder with the instructions that headrace records."""
    rng = np.random.default_rng(seed)
    group = 32 if block in (16, 32) else 64
    q, kv = heads * head_dim, kv_heads * head_dim
    weights = {"embed": random_weight(rng, vocab, hidden, 8, None)}
    weights["embed"] = Weight(weights["embed"].codes, (weights["embed"].scale * np.float16(8)).astype(np.float16), 8)
    arrays: dict[str, NDArray[Any]] = {}
    angles = np.arange(context)[:, None] * 10000.0 ** (-np.arange(head_dim // 2) / (head_dim // 2))
    arrays["cos"], arrays["sin"] = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    x, normed, rq, rk, rv, mixed, update, x2, gate, up, gated, kept = range(12)
    widths = [hidden, hidden, q, kv, kv, q, hidden, hidden, feed_forward, feed_forward, feed_forward, hidden]
    instructions: list[dict[str, Any]] = [{"op": "embed", "weight": "embed", "out": x}]

    def norm(name: str) -> str:
        arrays[name] = rng.uniform(0.5, 1.5, hidden).astype(np.float32)
        return name

    for i in range(layers):
        shapes = {"q": (q, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, q)}
        shapes |= {"gate": (feed_forward, hidden), "up": (feed_forward, hidden), "down": (hidden, feed_forward)}
        for name, (n, k) in shapes.items():
            wide = 8 if name == "v" else bits  # a group of mixed widths
            if factors and block and wide < 8:
                weights[f"{i}.{name}"] = random_factors(rng, n, k, block, bias and name in "qkv", wide)
            else:
                weights[f"{i}.{name}"] = random_weight(rng, n, k, wide, block, bias and name in "qkv")
        if i == 0:
            instructions.append({"op": "rms_norm", "in": x, "weight": norm("n0"), "out": normed})
        else:
            instructions.append(
                {"op": "add_norm", "in": x2, "update": update, "weight": norm(f"n{i}"), "sum": x, "out": normed}
            )
        instructions += [
            {"op": "linear", "group": group, "in": normed, "weights": [f"{i}.{n}" for n in "qkv"], "out": [rq, rk, rv]},
            {"op": "rope_cache", "layer": i, "q": rq, "k": rk, "v": rv, "cos": "cos", "sin": "sin"},
            {"op": "attention", "layer": i, "q": rq, "out": mixed},
            {"op": "linear", "group": group, "in": mixed, "weights": [f"{i}.o"], "out": [update]},
            {"op": "add_norm", "in": x, "update": update, "weight": norm(f"m{i}"), "sum": x2, "out": normed},
            {"op": "linear", "group": group, "in": normed, "weights": [f"{i}.gate", f"{i}.up"], "out": [gate, up]},
            {"op": "silu_mul", "gate": gate, "up": up, "out": gated},
            {"op": "linear", "group": group, "in": gated, "weights": [f"{i}.down"], "out": [update]},
        ]
    instructions += [
        {"op": "add_norm", "in": x2, "update": update, "weight": norm("final"), "sum": x, "out": normed},
        {"op": "rows", "in": normed, "out": kept},
        {"op": "head", "group": 0, "in": kept, "weight": "embed"},
    ]
    entries, more = weight_entries(weights)
    program = {
        "format": 4,
        "geometry": {
            "layers": layers, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "hidden": hidden,
            "vocab": vocab, "eps": 1e-5, "context": context,
        },
        "cache": {"dtype": "int8", "scales": [[0.03, 0.02]] * layers} if cache == "int8" else {"dtype": "float32"},
        "files": [],
        "tensors": {},
        "weights": entries,
        "registers": widths,
        "instructions": instructions,
    }  # fmt: skip
    return Decoder(program, weights, arrays | more)
