"""Baichuan and Baichuan2, 7B design: a Llama decoder whose q, k and v are one tensor, W_pack.

`BaiChuanForCausalLM` (v1) has a plain head; `BaichuanForCausalLM` (v2) has NormHead, a head whose rows are divided by
their L2 norm, folded here so that nobody after the checkpoint knows of it. The 13B models replace rotary positions by
ALiBi and are refused. A GGUF has q, k and v apart and its head as it was, which its reader says with the key w_pack:
false. Source: Baichuan2 technical report (2309.10305) and its modeling_baichuan.py. Knows nothing about files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from headrace.architectures.fields import boolean, context, integer, number, require_silu, rope
from headrace.architectures.source import Source, llama_sources
from headrace.config import ModelConfig
from headrace.errors import ConfigError, did_you_mean
from headrace.model.weights import HEAD, Role, find_weight

__all__ = ["FUSED", "config", "sources"]

FUSED: Mapping[str, tuple[Role, ...]] = {"self_attn.W_pack": (Role.QUERY, Role.KEY, Role.VALUE)}
DEFAULT_RMS_NORM_EPS = 1e-6  # BaichuanConfig's
DEFAULT_CONTEXT = 4096  # BaichuanConfig's max_position_embeddings
ALIBI_HIDDEN_SIZE = 5120  # the 13B models: some of their configs say nothing else about ALiBi
NORM_HEAD = {"BaiChuanForCausalLM": False, "BaichuanForCausalLM": True}  # v1, v2: they differ by one capital letter


def config(raw: Mapping[str, Any]) -> ModelConfig:
    """The geometry a config.json states.

    Raises:
        ConfigError: a key is missing or out of range, the class is unknown, or the model uses ALiBi.
    """
    _norm_head(raw)
    require_silu(raw)
    hidden, heads = integer(raw, "hidden_size"), integer(raw, "num_attention_heads")
    alibi = str(raw.get("position_embedding", "")).upper() == "ALIBI" or raw.get("alibi") is True
    if alibi or hidden == ALIBI_HIDDEN_SIZE:
        raise ConfigError(
            f"this Baichuan model (hidden_size {hidden}) is a 13B design with ALiBi positions, which are not "
            "supported; expected a 7B design with rotary positions; use Baichuan2-7B"
        )
    if hidden % heads:
        raise ConfigError(f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
    theta, scaling = rope(raw)
    return ModelConfig(
        architecture="baichuan",
        vocab_size=integer(raw, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=integer(raw, "intermediate_size"),
        num_layers=integer(raw, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        rms_norm_eps=number(raw, "rms_norm_eps", DEFAULT_RMS_NORM_EPS),
        rope_theta=theta,
        max_context=context(raw, DEFAULT_CONTEXT),
        tied_head=boolean(raw, "tie_word_embeddings", False),
        rope_scaling=scaling,
    )


def sources(config: ModelConfig, raw: Mapping[str, Any]) -> dict[str, Source]:
    """Canonical name → where it is: q, k and v are thirds of W_pack; a v2 head has unit rows.

    Raises:
        ConfigError: the class is unknown, or a NormHead is tied to the embedding.
    """
    norm_head = _norm_head(raw)
    if norm_head and config.tied_head:
        raise ConfigError("tie_word_embeddings is true, but NormHead is never the embedding; expected false")
    table = llama_sources(config)
    table[HEAD] = replace(table[HEAD], unit_rows=norm_head)
    if not boolean(raw, "w_pack", True):
        return table
    h = config.hidden_size
    for layer in range(config.num_layers):
        for module, roles in FUSED.items():
            for third, role in enumerate(roles):
                rows = (third * h, (third + 1) * h)
                packed = Source(f"model.layers.{layer}.{module}.weight", (3 * h, h), rows)
                table[find_weight(config, role, layer).name] = packed
    return table


def _norm_head(raw: Mapping[str, Any]) -> bool:
    """Whether the model's class has NormHead."""
    classes = raw.get("architectures")
    name = classes[0] if isinstance(classes, list) and classes else None
    if not isinstance(name, str) or name not in NORM_HEAD:
        raise ConfigError(
            f"architectures is {classes!r}; expected ['BaichuanForCausalLM'] (Baichuan2) or ['BaiChuanForCausalLM'] "
            f"(Baichuan), which tells whether the head is normalised{did_you_mean(str(name), NORM_HEAD)}"
        )
    return NORM_HEAD[name]
