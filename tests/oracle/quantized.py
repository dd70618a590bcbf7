"""A bundle's forward pass in float64 from its safetensors files alone, with an int8 or a float cache.

Reads codes and scales as docs/bundle-format.md describes them; imports nothing of headrace.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from tests.oracle.llama import Matrix, attend, frequencies, rms, turn

Caches = dict[str, Matrix]


@dataclass(frozen=True)
class Forward:
    """Logits (S, V); and by cache name (`past_key_0` …) what was written, (kv_heads, S, D), in steps of its scale."""

    logits: Matrix
    caches: Caches


def stored_weights(bundle: Path) -> dict[str, Matrix]:
    """Every weight, dequantized."""
    stored: dict[str, NDArray[Any]] = {}
    for file in sorted((bundle / "weights").iterdir()):
        stored.update(load_file(file))
    weights: dict[str, Matrix] = {}
    for name, array in stored.items():
        if name.endswith("_packed"):
            weight = name.removesuffix("_packed")
            scales = stored[f"{weight}_scale"].astype(np.float64)
            columns = _columns(bundle, weight)
            if array.shape[1] * 2 == columns:  # int4: two a byte, low nibble first
                array = np.stack([array & 15, array >> 4], 2).reshape(len(array), -1)
                codes = array.astype(np.float64) - 8
                if f"{weight}_high" in stored:
                    high, above = _high_bits(stored[f"{weight}_high"], columns)
                    codes = array + 16.0 * high - 2.0 ** (3 + above)
            else:
                codes = array.astype(np.float64) - 128
            if f"{weight}_factors" in stored:  # of a row's scale, one less than it is: two a byte, low nibble first
                factors = stored[f"{weight}_factors"]
                scales = scales * (np.stack([factors & 15, factors >> 4], 2).reshape(len(factors), -1) + 1.0)
                scales = scales[:, : columns // _block(bundle, weight)]
            weights[weight] = codes * np.repeat(scales, columns // scales.shape[1], axis=1)
        elif not name.endswith(("_high", "_scale", "_factors")):
            weights[name] = array.astype(np.float64)
    return weights


def _high_bits(stored: NDArray[np.uint8], columns: int) -> tuple[NDArray[np.uint8], int]:
    """Of codes the value of what lies above their low four bits (N, K), and how many bits that is.

    Column c stands in byte p mod n of its 64 columns' n, p being c/2 of an even one and 32 + (c − 1)/2 of an odd one.
    """
    n = stored.shape[1] // -(-columns // 64)
    column = np.arange(columns)
    place = column % 64 // 2 + column % 2 * 32
    above = n // 8
    return stored[:, column // 64 * n + place % n] >> (place // n * above) & ((1 << above) - 1), above


def forward(bundle: Path, ids: Sequence[int], *, int8_cache: bool) -> Forward:
    """The whole sequence in one step; attention reads keys and values as the cache gives them back."""
    manifest = json.loads((bundle / "headrace.json").read_text())
    g = manifest["geometry"]
    heads, kv_heads, width, eps = g["num_heads"], g["num_kv_heads"], g["head_dim"], g["rms_norm_eps"]
    w = stored_weights(bundle)
    angles = np.outer(np.arange(len(ids)), frequencies({"rope_theta": g["rope_theta"]}, width))
    caches: Caches = {}

    def through_cache(x: Matrix, name: str, scale: float) -> Matrix:
        caches[name] = x / scale
        return np.clip(np.rint(x / scale), -128, 127) * scale if int8_cache else x

    def linear(y: Matrix, module: str) -> Matrix:
        return y @ w[f"{module}.weight"].T + w.get(f"{module}.bias", 0)

    x = w["embed_tokens.weight"][list(ids)]
    for i in range(g["num_layers"]):
        p = f"layers.{i}"
        key_scale, value_scale = manifest["kv_scales"][i] if int8_cache else (1.0, 1.0)
        y = rms(x, w[f"{p}.input_layernorm.weight"], eps)
        q, k, v = (
            linear(y, f"{p}.self_attn.{part}_proj").reshape(len(ids), -1, width).swapaxes(0, 1) for part in "qkv"
        )
        k = through_cache(np.stack([turn(head, angles) for head in k]), f"past_key_{i}", key_scale)
        v = through_cache(v, f"past_value_{i}", value_scale)
        mixed = [attend(turn(q[h], angles), k[h * kv_heads // heads], v[h * kv_heads // heads]) for h in range(heads)]
        x = x + linear(np.concatenate(mixed, 1), f"{p}.self_attn.o_proj")
        y = rms(x, w[f"{p}.post_attention_layernorm.weight"], eps)
        gate = linear(y, f"{p}.mlp.gate_proj")
        gate = gate / (1 + np.exp(-gate))
        x = x + linear(gate * linear(y, f"{p}.mlp.up_proj"), f"{p}.mlp.down_proj")
    table = w["embed_tokens.weight" if g["tied_head"] else "lm_head.weight"]
    return Forward(rms(x, w["norm.weight"], eps) @ table.T, caches)


def _block(bundle: Path, weight: str) -> int:
    rules = json.loads((bundle / "headrace.json").read_text())["recipe"]["rules"]
    return int(next(rule["block"] for rule in rules if re.search(rule["match"], weight)))


def _columns(bundle: Path, weight: str) -> int:
    g = json.loads((bundle / "headrace.json").read_text())["geometry"]
    if weight.endswith("down_proj.weight"):
        return int(g["intermediate_size"])
    if weight.endswith("o_proj.weight"):
        return int(g["num_heads"] * g["head_dim"])
    return int(g["hidden_size"])


def is_kept(name: str, made: NDArray[np.float32], weight: NDArray[np.float32]) -> bool:
    """Bit for bit; rows of q_proj and k_proj are scaled against each other by powers of two."""
    power = np.ones(len(weight), np.float32)
    if name.endswith(("q_proj.weight", "k_proj.weight")):
        power = np.abs(made).max(1) / np.abs(weight).max(1)
        if not (np.frexp(power)[0] == 0.5).all():
            return False
    return np.array_equal(made, weight * power[:, None])
