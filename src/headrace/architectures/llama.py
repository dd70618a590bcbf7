"""Llama: grouped-query attention, tied or untied head, linear or llama3 rope scaling.

Source: Touvron et al. 2023 (LLaMA), and Hugging Face's LlamaConfig for the names. Knows nothing about files; a GGUF
arrives here translated to the same keys and names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from headrace.architectures.fields import boolean, context, integer, number, require_silu, rope
from headrace.architectures.source import Source, llama_sources
from headrace.config import ModelConfig
from headrace.errors import ConfigError

__all__ = ["config", "sources"]

DEFAULT_RMS_NORM_EPS = 1e-6  # LlamaConfig's


def config(raw: Mapping[str, Any]) -> ModelConfig:
    """The geometry a config.json states.

    Raises:
        ConfigError: a key is missing or out of range, or asks for something the decoder does not have.
    """
    require_silu(raw)
    for key in ("attention_bias", "mlp_bias"):
        if boolean(raw, key, False):
            raise ConfigError(f"{key} is true, which is not supported; expected linears without bias")
    hidden, heads = integer(raw, "hidden_size"), integer(raw, "num_attention_heads")
    if raw.get("head_dim") is None and hidden % heads:
        raise ConfigError(
            f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}, and there is no head_dim"
        )
    theta, scaling = rope(raw)
    return ModelConfig(
        architecture="llama",
        vocab_size=integer(raw, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=integer(raw, "intermediate_size"),
        num_layers=integer(raw, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=integer(raw, "num_key_value_heads", default=heads),
        head_dim=integer(raw, "head_dim", default=max(hidden // heads, 1)),
        rms_norm_eps=number(raw, "rms_norm_eps", DEFAULT_RMS_NORM_EPS),
        rope_theta=theta,
        max_context=context(raw),
        tied_head=boolean(raw, "tie_word_embeddings", False),
        rope_scaling=scaling,
    )


def sources(config: ModelConfig, raw: Mapping[str, Any]) -> dict[str, Source]:
    """Canonical name → where it is: one tensor per weight."""
    return llama_sources(config)
