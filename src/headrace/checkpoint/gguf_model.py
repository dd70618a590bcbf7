"""A GGUF under Hugging Face's keys and names, so that architectures/ see one kind of model.

llama.cpp's converter interleaves the two halves of each q and k head of some architectures (their rotary pairs become
neighbours); the rows are put back here. It takes Baichuan's W_pack apart and stores the head as it was.
Source: llama.cpp's convert_hf_to_gguf.py (`LlamaModel.permute`, `BaichuanModel`) and gguf-py's constants.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrace.architectures.fields import integer
from headrace.baichuan import is_second_generation
from headrace.checkpoint.gguf_file import GgufFile, GgufTensor, read_gguf
from headrace.checkpoint.raw import RawModel
from headrace.errors import CheckpointError, ConfigError, did_you_mean, shown

__all__ = ["read_gguf_model"]

# Architectures, and whether the converter interleaves the halves of their q and k heads.
INTERLEAVED = {"llama": True, "baichuan": True, "qwen2": False}

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
    "attn_q.bias": "self_attn.q_proj.bias",
    "attn_k.bias": "self_attn.k_proj.bias",
    "attn_v.bias": "self_attn.v_proj.bias",
    "attn_output.weight": "self_attn.o_proj.weight",
    "attn_output.bias": "self_attn.o_proj.bias",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_gate.bias": "mlp.gate_proj.bias",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_up.bias": "mlp.up_proj.bias",
    "ffn_down.weight": "mlp.down_proj.weight",
    "ffn_down.bias": "mlp.down_proj.bias",
}
# Tensors of a layer whose rows come in heads, and the key that says how many.
BY_HEAD = {
    "attn_q.weight": "num_attention_heads",
    "attn_q.bias": "num_attention_heads",
    "attn_k.weight": "num_key_value_heads",
    "attn_k.bias": "num_key_value_heads",
}
ROPE_FACTORS = "rope_freqs.weight"
# config.json's keys and the header's, without the architecture in front.
KEYS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "max_position_embeddings": "context_length",
}


def read_gguf_model(path: Path) -> RawModel:
    """Open a GGUF of a known architecture; only its header is read.

    Raises:
        CheckpointError: the file is damaged, or has no tensors.
        ConfigError: it is another architecture, or asks for something the decoder does not have.
    """
    file = read_gguf(path)
    kind = file.metadata.get("general.type", "model")
    if kind != "model":  # an adapter, a projector of images, an importance matrix
        raise CheckpointError(f"{path} is of GGUF type {shown(kind)}; expected a model; name the model's own file")
    name = file.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in INTERLEAVED:
        raise ConfigError(
            f"{path} is of GGUF architecture {shown(name)}, which is not known; known are {', '.join(INTERLEAVED)}"
            f"{did_you_mean(str(name)[:80], INTERLEAVED)}"
        )
    if not file.tensors:
        raise CheckpointError(f"{path} has no tensors (a vocabulary alone); expected a whole model")
    config = _config(path, file, name)
    tensors = {}
    for ours, tensor in file.tensors.items():
        if ours == ROPE_FACTORS:
            continue
        layer = LAYER.fullmatch(ours)
        heads = BY_HEAD.get(layer[2]) if layer is not None and INTERLEAVED[name] else None
        order = None if heads is None else _order(path, ours, tensor, config, heads)
        tensors[_hugging_face_name(ours)] = tensor.lazy(order)
    return RawModel(config, tensors, file.files, metadata=file.metadata)


def _config(path: Path, file: GgufFile, architecture: str) -> dict[str, Any]:
    """The header's keys, which begin with the architecture's name, as a config.json."""
    meta: Mapping[str, Any] = file.metadata
    if meta.get(f"{architecture}.expert_count"):
        experts = meta[f"{architecture}.expert_count"]
        raise ConfigError(f"{path} is a mixture of {shown(experts)} experts, which is not supported")
    for key in ("embedding_length", "attention.head_count"):
        if f"{architecture}.{key}" not in meta:
            raise ConfigError(f"{path} has no {architecture}.{key}; expected a whole model's header")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise CheckpointError(f"{path} lacks tensor 'token_embd.weight'; expected a whole model")
    said = {theirs: meta.get(f"{architecture}.{ours}") for theirs, ours in KEYS.items()}
    config = {
        **said,
        "model_type": architecture,
        "vocab_size": meta.get(f"{architecture}.vocab_size", embedding.shape[0]),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "rope_scaling": _rope_scaling(path, file, architecture),
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
        "w_pack": False,
    }
    if architecture == "baichuan":
        second = is_second_generation(integer(config, "vocab_size"))
        config["architectures"] = ["BaichuanForCausalLM" if second else "BaiChuanForCausalLM"]
    missing = [key for key in ("intermediate_size", "num_hidden_layers", "max_position_embeddings") if not config[key]]
    if missing:
        raise ConfigError(f"{path} does not state {', '.join(missing)}; expected a whole model's header")
    config["rms_norm_eps"] = _shortest(config["rms_norm_eps"])
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    if not isinstance(heads, int) or not isinstance(hidden, int) or heads < 1:
        raise ConfigError(
            f"{path}: head_count {shown(heads)} and embedding_length {shown(hidden)} are not whole numbers above 0"
        )
    head_dim = config["head_dim"] or hidden // heads
    turned = meta.get(f"{architecture}.rope.dimension_count", head_dim)
    if turned != head_dim or meta.get(f"{architecture}.attention.value_length", head_dim) != head_dim:
        raise ConfigError(
            f"{path} turns {turned} of {head_dim} dimensions of a head; expected all, and values as wide as keys"
        )
    return config


def _rope_scaling(path: Path, file: GgufFile, architecture: str) -> dict[str, Any] | None:
    """Hugging Face's rope_scaling, from the header or from the table of frequency divisors.

    The table is how llama.cpp stores llama3's scaling; its parameters are the published ones, and the table must agree
    with them.
    """
    meta: Mapping[str, Any] = file.metadata
    kind = meta.get(f"{architecture}.rope.scaling.type", "none")
    if kind == "linear":
        return {"rope_type": "linear", "factor": meta.get(f"{architecture}.rope.scaling.factor", 0.0)}
    if kind != "none":
        raise ConfigError(
            f"{path}: rope scaling {kind!r} is not supported; expected 'none', 'linear' or llama3's table"
        )
    if (stretched := meta.get(f"{architecture}.rope.scale_linear")) is not None:
        return {"rope_type": "linear", "factor": stretched}
    if ROPE_FACTORS not in file.tensors:
        return None
    base = meta.get(f"{architecture}.rope.freq_base", 10000.0)
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


def _order(path: Path, name: str, tensor: GgufTensor, config: Mapping[str, Any], key: str) -> NDArray[np.intp]:
    """Hugging Face's order of the rows of a tensor that has as many heads as `key` of the config says."""
    heads, rows = config[key] or config["num_attention_heads"], tensor.shape[0]
    if not isinstance(heads, int) or heads < 1 or rows % (2 * heads):
        raise CheckpointError(f"{path}: {name!r} has {rows} rows; expected a multiple of twice its {heads} heads")
    # The file's row (head, pair, half) is Hugging Face's row (head, half, pair).
    return np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(-1)


def _shortest(value: Any) -> Any:
    """A float32 of the header as the shortest decimal that means it: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value
