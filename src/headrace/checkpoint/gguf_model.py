"""A llama GGUF under Hugging Face's keys and names, so that architectures/ see one kind of model.

llama.cpp's converter interleaves the two halves of each q and k head (its rotary pairs are neighbours); the rows are
put back here. Source: llama.cpp's convert_hf_to_gguf.py (`LlamaModel.permute`) and gguf-py's constants.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrace.checkpoint.gguf_file import GgufFile, GgufTensor, read_gguf
from headrace.checkpoint.raw import RawModel
from headrace.checkpoint.tensor import LazyTensor
from headrace.errors import CheckpointError, ConfigError, did_you_mean

__all__ = ["read_gguf_model"]

KNOWN = ("llama",)

OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER = re.compile(r"blk\.(\d{1,9})\.(.+)")
INNER = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
ROPE_FACTORS = "rope_freqs.weight"


def read_gguf_model(path: Path) -> RawModel:
    """Open a GGUF of a llama model; only its header is read.

    Raises:
        CheckpointError: the file is damaged, or has no tensors.
        ConfigError: it is another architecture, or asks for something the decoder does not have.
    """
    file = read_gguf(path)
    name = file.metadata.get("general.architecture")
    if name not in KNOWN:
        raise ConfigError(
            f"{path} is of GGUF architecture {name!r}, which is not known; known is {', '.join(KNOWN)}"
            f"{did_you_mean(str(name), KNOWN)}"
        )
    if not file.tensors:
        raise CheckpointError(f"{path} has no tensors (a vocabulary alone); expected a whole model")
    config = _config(path, file)
    tensors = {}
    for ours, tensor in file.tensors.items():
        if ours == ROPE_FACTORS:
            continue
        theirs = _hugging_face_name(ours)
        tensors[theirs] = _in_order(path, theirs, tensor, config)
    return RawModel(config, tensors, file.files, metadata=file.metadata)


def _config(path: Path, file: GgufFile) -> dict[str, Any]:
    """The header's llama.* keys as a config.json."""
    meta: Mapping[str, Any] = file.metadata
    if meta.get("llama.expert_count"):
        raise ConfigError(f"{path} is a mixture of {meta['llama.expert_count']} experts, which is not supported")
    for key in ("embedding_length", "attention.head_count"):
        if f"llama.{key}" not in meta:
            raise ConfigError(f"{path} has no llama.{key}; expected a whole llama model's header")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise CheckpointError(f"{path} lacks tensor 'token_embd.weight'; expected a whole model")
    config = {
        "model_type": "llama",
        "hidden_size": meta["llama.embedding_length"],
        "intermediate_size": meta.get("llama.feed_forward_length"),
        "num_hidden_layers": meta.get("llama.block_count"),
        "num_attention_heads": meta["llama.attention.head_count"],
        "num_key_value_heads": meta.get("llama.attention.head_count_kv"),
        "head_dim": meta.get("llama.attention.key_length"),
        "rms_norm_eps": meta.get("llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": meta.get("llama.rope.freq_base"),
        "max_position_embeddings": meta.get("llama.context_length"),
        "vocab_size": meta.get("llama.vocab_size", embedding.shape[0]),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "rope_scaling": _rope_scaling(path, file),
    }
    missing = [key for key in ("intermediate_size", "num_hidden_layers", "max_position_embeddings") if not config[key]]
    if missing:
        raise ConfigError(f"{path} does not state {', '.join(missing)}; expected a whole llama model's header")
    config["rms_norm_eps"] = _shortest(config["rms_norm_eps"])
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    if not isinstance(heads, int) or not isinstance(hidden, int) or heads < 1:
        raise ConfigError(f"{path}: head_count {heads!r} and embedding_length {hidden!r} are not whole numbers above 0")
    head_dim = config["head_dim"] or hidden // heads
    turned = meta.get("llama.rope.dimension_count", head_dim)
    if turned != head_dim or meta.get("llama.attention.value_length", head_dim) != head_dim:
        raise ConfigError(
            f"{path} turns {turned} of {head_dim} dimensions of a head; expected all, and values as wide as keys"
        )
    return config


def _rope_scaling(path: Path, file: GgufFile) -> dict[str, Any] | None:
    """Hugging Face's rope_scaling, from the header or from the table of frequency divisors.

    The table is how llama.cpp stores llama3's scaling; its parameters are the published ones, and the table must agree
    with them.
    """
    meta: Mapping[str, Any] = file.metadata
    kind = meta.get("llama.rope.scaling.type", "none")
    if kind == "linear":
        return {"rope_type": "linear", "factor": meta.get("llama.rope.scaling.factor", 0.0)}
    if kind != "none":
        raise ConfigError(
            f"{path}: rope scaling {kind!r} is not supported; expected 'none', 'linear' or llama3's table"
        )
    if "llama.rope.scale_linear" in meta:
        return {"rope_type": "linear", "factor": meta["llama.rope.scale_linear"]}
    if ROPE_FACTORS not in file.tensors:
        return None
    base = meta.get("llama.rope.freq_base", 10000.0)
    factors = file.tensors[ROPE_FACTORS].lazy().load()
    if not isinstance(base, float) or base <= 1 or factors.ndim != 1 or not np.isfinite(factors).all():
        raise ConfigError(
            f"{path}: {ROPE_FACTORS} {list(factors.shape)} with base {base!r} is no table of finite numbers"
        )
    guess = {
        "rope_type": "llama3", "factor": float(factors.max()), "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    if not np.allclose(factors, _llama3_factors(base, len(factors), guess), rtol=1e-4):
        raise ConfigError(f"{path}: {ROPE_FACTORS} is not llama3's table for factor {guess['factor']:g}; expected that")
    return guess


def _llama3_factors(base: float, half: int, scaling: Mapping[str, Any]) -> NDArray[np.float64]:
    """What llama3's scaling divides each frequency by."""
    frequencies = base ** (-np.arange(half) / half)
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * np.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    share = np.clip((turns - low) / (high - low), 0.0, 1.0)
    divisors: NDArray[np.float64] = 1 / (share + (1 - share) / scaling["factor"])
    return divisors


def _hugging_face_name(name: str) -> str:
    """The name in a Hugging Face checkpoint; an unknown one stays, for the architecture's table to refuse."""
    layer = LAYER.fullmatch(name)
    if layer is None:
        return OUTER.get(name, name)
    return f"model.layers.{layer[1]}.{INNER.get(layer[2], layer[2])}"


def _in_order(path: Path, name: str, tensor: GgufTensor, config: Mapping[str, Any]) -> LazyTensor:
    """The tensor with Hugging Face's order of rows."""
    if name.endswith("q_proj.weight"):
        heads = config["num_attention_heads"]
    elif name.endswith("k_proj.weight"):
        heads = config["num_key_value_heads"] or config["num_attention_heads"]
    else:
        return tensor.lazy()
    rows = tensor.shape[0]
    if not isinstance(heads, int) or heads < 1 or rows % (2 * heads):
        raise CheckpointError(f"{path}: {name!r} has {rows} rows; expected a multiple of twice its {heads} heads")
    # The file's row (head, pair, half) is Hugging Face's row (head, half, pair).
    order = np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(-1)
    return tensor.lazy(order)


def _shortest(value: Any) -> Any:
    """A float32 of the header as the shortest decimal that means it: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value
