"""Qwen2's forward pass in float64, from its technical report and Hugging Face's names; imports nothing of headrace.

What sets it apart from Llama: q, k and v have biases. A KV head is spread to its query heads before anything is turned,
and scores are masked by a loop over positions, so that nothing is shared with the other oracles.
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
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    width = config["hidden_size"] // heads
    states = tensors["model.embed_tokens.weight"].astype(np.float64)[np.asarray(ids)]

    def affine(x: Matrix, module: str) -> Matrix:
        y = np.tensordot(x, tensors[f"{module}.weight"].astype(np.float64), axes=(1, 1))
        return y + tensors[f"{module}.bias"] if f"{module}.bias" in tensors else y

    def norm(x: Matrix, module: str) -> Matrix:
        size = np.sqrt((x**2).sum(1) / x.shape[1] + config["rms_norm_eps"])
        return (x / size[:, None]) * tensors[f"{module}.weight"]

    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        x = norm(states, f"{at}.input_layernorm")
        q, k, v = (affine(x, f"{at}.self_attn.{kind}_proj") for kind in "qkv")
        k, v = (np.repeat(y.reshape(len(ids), kv_heads, width), heads // kv_heads, axis=1) for y in (k, v))
        mixed = attention(q.reshape(k.shape), k, v, config["rope_theta"])
        states = states + affine(mixed.reshape(len(ids), -1), f"{at}.self_attn.o_proj")
        x = norm(states, f"{at}.post_attention_layernorm")
        gate, up = affine(x, f"{at}.mlp.gate_proj"), affine(x, f"{at}.mlp.up_proj")
        states = states + affine(gate * up / (1 + np.exp(-gate)), f"{at}.mlp.down_proj")
    head = "model.embed_tokens" if config["tie_word_embeddings"] else "lm_head"
    return affine(norm(states, "model.norm"), head)


def attention(q: Matrix, k: Matrix, v: Matrix, base: float) -> Matrix:
    """Causal attention of (S, heads, D) with rotary positions: a pair is turned by its 2 × 2 matrix."""
    length, _, width = q.shape
    half = width // 2
    mixed = np.empty_like(q)
    turned = [np.empty_like(q), np.empty_like(q)]
    for t in range(length):
        turn = np.zeros((width, width))
        for pair in range(half):
            angle = t / base ** (2 * pair / width)
            turn[pair, pair] = turn[pair + half, pair + half] = np.cos(angle)
            turn[pair + half, pair], turn[pair, pair + half] = np.sin(angle), -np.sin(angle)
        turned[0][t], turned[1][t] = q[t] @ turn.T, k[t] @ turn.T
        scores = np.einsum("hd,shd->hs", turned[0][t], turned[1][: t + 1]) / np.sqrt(width)
        share = np.exp(scores - scores.max(1)[:, None])
        mixed[t] = np.einsum("hs,shd->hd", share / share.sum(1)[:, None], v[: t + 1])
    return mixed
