"""Llama's forward pass in float64, from its paper and Hugging Face's names; imports nothing of headrace."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

Matrix = NDArray[np.float64]


def raw_tensors(folder: Path) -> dict[str, NDArray[Any]]:
    """Every safetensors tensor of a folder, as stored."""
    tensors: dict[str, NDArray[Any]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(file))
    return tensors


def logits(folder: Path, ids: Sequence[int], tensors: Mapping[str, NDArray[Any]] | None = None) -> Matrix:
    """Logits (len(ids), V) of a Hugging Face folder; `tensors` instead of its safetensors files when given."""
    config = json.loads((folder / "config.json").read_text())
    stored = raw_tensors(folder) if tensors is None else tensors
    heads = config["num_attention_heads"]
    groups = config.get("num_key_value_heads", heads)
    width = config.get("head_dim") or config["hidden_size"] // heads
    eps = config.get("rms_norm_eps", 1e-6)
    angles = np.outer(np.arange(len(ids)), frequencies(config, width))

    def w(name: str) -> Matrix:
        return stored[name].astype(np.float64)

    def linear(y: Matrix, module: str) -> Matrix:
        return y @ w(f"{module}.weight").T + (w(f"{module}.bias") if f"{module}.bias" in stored else 0)

    x = w("model.embed_tokens.weight")[list(ids)]
    for i in range(config["num_hidden_layers"]):
        p = f"model.layers.{i}"
        y = rms(x, w(f"{p}.input_layernorm.weight"), eps)
        q, k, v = (linear(y, f"{p}.self_attn.{part}_proj") for part in "qkv")
        outputs = []
        for head in range(heads):
            group = head * groups // heads
            mine = slice(head * width, (head + 1) * width)
            theirs = slice(group * width, (group + 1) * width)
            outputs.append(attend(turn(q[:, mine], angles), turn(k[:, theirs], angles), v[:, theirs]))
        x = x + linear(np.concatenate(outputs, 1), f"{p}.self_attn.o_proj")
        y = rms(x, w(f"{p}.post_attention_layernorm.weight"), eps)
        gate = linear(y, f"{p}.mlp.gate_proj")
        gate = gate / (1 + np.exp(-gate))
        x = x + linear(gate * linear(y, f"{p}.mlp.up_proj"), f"{p}.mlp.down_proj")
    tied = config.get("tie_word_embeddings", False)
    table = w("model.embed_tokens.weight") if tied else w("lm_head.weight")
    return rms(x, w("model.norm.weight"), eps) @ table.T


def frequencies(config: Mapping[str, Any], width: int) -> Matrix:
    """Rotary frequencies, one for each pair; llama3's scaling as in Hugging Face's `_compute_llama3_parameters`."""
    base = config.get("rope_theta", 10000.0)
    plain = [base ** (-2 * pair / width) for pair in range(width // 2)]
    scaling = config.get("rope_scaling")
    if not scaling:
        return np.array(plain)
    if scaling.get("rope_type", scaling.get("type")) == "linear":
        return np.array(plain) / scaling["factor"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    original = scaling["original_max_position_embeddings"]
    scaled = []
    for frequency in plain:
        wavelength = 2 * math.pi / frequency
        if wavelength < original / high:
            scaled.append(frequency)
        elif wavelength > original / low:
            scaled.append(frequency / scaling["factor"])
        else:
            smooth = (original / wavelength - low) / (high - low)
            scaled.append((1 - smooth) * frequency / scaling["factor"] + smooth * frequency)
    return np.array(scaled)


def rms(x: Matrix, weight: Matrix, eps: float) -> Matrix:
    """RMSNorm over the last axis."""
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def turn(x: Matrix, angles: Matrix) -> Matrix:
    """Rotary positions: element j and j + D/2 of a head are one complex number, turned by its angle."""
    half = x.shape[1] // 2
    turned = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angles)
    return np.concatenate([turned.real, turned.imag], 1)


def attend(q: Matrix, k: Matrix, v: Matrix) -> Matrix:
    """One head's causal attention, token by token."""
    rows = []
    for t in range(len(q)):
        scores = k[: t + 1] @ q[t] / math.sqrt(q.shape[1])
        weights = np.exp(scores - scores.max())
        rows.append(weights @ v[: t + 1] / weights.sum())
    return np.array(rows)
