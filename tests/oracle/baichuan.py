"""Baichuan's 7B forward pass in float64, from the Baichuan2 report and modeling_baichuan.py's description.

Imports nothing of headrace, nor of the Llama oracle: q, k and v come out of one product with W_pack, rotary positions
are the rotate-half formula, attention is one masked matrix per head.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

Matrix = NDArray[np.float64]


def logits(folder: Path, ids: Sequence[int], tensors: Mapping[str, NDArray[Any]] | None = None) -> Matrix:
    """Logits (len(ids), V) of a Hugging Face folder; `tensors` instead of its safetensors files when given."""
    config = json.loads((folder / "config.json").read_text())
    if tensors is None:
        tensors = {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}
    length, hidden, heads = len(ids), config["hidden_size"], config["num_attention_heads"]
    width, eps = hidden // heads, config["rms_norm_eps"]

    inverse = 1.0 / config.get("rope_theta", 10000.0) ** (np.arange(0, width, 2) / width)
    angles = np.concatenate([np.outer(np.arange(length), inverse)] * 2, axis=1)  # (S, D)
    cos, sin = np.cos(angles), np.sin(angles)
    blocked = np.triu(np.full((length, length), -np.inf), 1)

    def rotated(x: Matrix) -> Matrix:  # (heads, S, D)
        swapped = np.concatenate([-x[..., width // 2 :], x[..., : width // 2]], -1)
        return x * cos + swapped * sin

    def norm(x: Matrix, name: str) -> Matrix:
        return tensors[name].astype(np.float64) * (x / np.sqrt(np.square(x).mean(-1, keepdims=True) + eps))

    def linear(x: Matrix, name: str) -> Matrix:
        return np.einsum("sk,nk->sn", x, tensors[name].astype(np.float64), optimize=True)

    x = tensors["model.embed_tokens.weight"][np.asarray(ids)].astype(np.float64)
    for layer in range(config["num_hidden_layers"]):
        p = f"model.layers.{layer}"
        packed = linear(norm(x, f"{p}.input_layernorm.weight"), f"{p}.self_attn.W_pack.weight")
        q, k, v = packed.reshape(length, 3, heads, width).transpose(1, 2, 0, 3)
        scores = rotated(q) @ rotated(k).swapaxes(1, 2) / np.sqrt(width) + blocked
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        mixed = (weights @ v).transpose(1, 0, 2).reshape(length, hidden)
        x = x + linear(mixed, f"{p}.self_attn.o_proj.weight")
        y = norm(x, f"{p}.post_attention_layernorm.weight")
        gate = linear(y, f"{p}.mlp.gate_proj.weight")
        gated = gate / (1 + np.exp(-gate)) * linear(y, f"{p}.mlp.up_proj.weight")
        x = x + linear(gated, f"{p}.mlp.down_proj.weight")
    head = tensors["lm_head.weight"].astype(np.float64)
    if config["architectures"] == ["BaichuanForCausalLM"]:  # v2: NormHead
        head = head / np.linalg.norm(head, axis=1, keepdims=True)
    return norm(x, "model.norm.weight") @ head.T
