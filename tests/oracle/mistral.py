"""Mistral's forward pass in float64, from its paper and Hugging Face's names; imports nothing of headrace.

A token sees itself and the window − 1 tokens before it; null means that it sees all. Query heads are grouped as an axis
of their own.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

Matrix = NDArray[np.float64]


def logits(folder: Path, ids: Sequence[int]) -> Matrix:
    """Logits (len(ids), V) of a Hugging Face folder."""
    config = json.loads((folder / "config.json").read_text())
    weights = {n: t.astype(np.float64) for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}
    length, kv_heads = len(ids), config["num_key_value_heads"]
    groups, width = config["num_attention_heads"] // kv_heads, config["head_dim"]
    distance = np.subtract.outer(np.arange(length), np.arange(length))
    seen = (distance >= 0) & (distance < (config["sliding_window"] or length))
    # One complex number a pair and position, of length 1.
    turn = np.exp(1j * np.arange(length)[:, None] * config["rope_theta"] ** -(np.arange(width // 2) * 2 / width))

    def normed(x: Matrix, name: str) -> Matrix:
        return x * weights[name] / np.sqrt((x * x).mean(1, keepdims=True) + config["rms_norm_eps"])

    def turned(x: Matrix) -> Matrix:
        """(S, …, D), D the real halves before the imaginary ones."""
        pairs = (x[..., : width // 2] + 1j * x[..., width // 2 :]) * turn.reshape(length, *[1] * (x.ndim - 2), -1)
        return np.concatenate([pairs.real, pairs.imag], -1)

    x = weights["model.embed_tokens.weight"][list(ids)]
    for number in range(config["num_hidden_layers"]):
        w = {n.removeprefix(f"model.layers.{number}."): t for n, t in weights.items()}
        y = normed(x, f"model.layers.{number}.input_layernorm.weight")
        q = turned((y @ w["self_attn.q_proj.weight"].T).reshape(length, kv_heads, groups, width))
        k = turned((y @ w["self_attn.k_proj.weight"].T).reshape(length, kv_heads, width))
        v = (y @ w["self_attn.v_proj.weight"].T).reshape(length, kv_heads, width)
        scores = np.einsum("tkgd,skd->kgts", q, k) / np.sqrt(width)
        share = np.where(seen, np.exp(scores - scores.max(-1, keepdims=True)), 0)
        mixed = np.einsum("kgts,skd->tkgd", share / share.sum(-1, keepdims=True), v)
        x = x + mixed.reshape(length, -1) @ w["self_attn.o_proj.weight"].T
        y = normed(x, f"model.layers.{number}.post_attention_layernorm.weight")
        gate = y @ w["mlp.gate_proj.weight"].T
        x = x + (gate * (y @ w["mlp.up_proj.weight"].T) / (1 + np.exp(-gate))) @ w["mlp.down_proj.weight"].T
    head = "model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"
    return normed(x, "model.norm.weight") @ weights[head].T
