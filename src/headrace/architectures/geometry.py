"""The geometry of a Llama-like config.json: the keys that llama, qwen2 and mistral share. Knows no tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from headrace.architectures.fields import DEFAULT_CONTEXT, boolean, context, integer, number, require_silu, rope
from headrace.config import ModelConfig
from headrace.errors import ConfigError

__all__ = ["llama_geometry"]

DEFAULT_RMS_NORM_EPS = 1e-6  # LlamaConfig's, Qwen2Config's and MistralConfig's


def llama_geometry(
    raw: Mapping[str, Any],
    architecture: str,
    *,
    default_context: int = DEFAULT_CONTEXT,
    default_kv_heads: int | None = None,
    window: int | None = None,
    **more: Any,
) -> ModelConfig:
    """What the shared keys say.

    Args:
        raw: a config.json.
        architecture: its model_type.
        default_context: the longest context when it does not say.
        default_kv_heads: how many KV heads there are when it does not say; None for as many as query heads.
        window: tokens that the model's attention reaches back, or None for all. Attention here has no window, so the
            context is no longer than that.
        more: further fields of the geometry.

    Raises:
        ConfigError: a key is missing or out of range.
    """
    require_silu(raw)
    hidden, heads = integer(raw, "hidden_size"), integer(raw, "num_attention_heads")
    if raw.get("head_dim") is None and hidden % heads:
        raise ConfigError(
            f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}, and there is no head_dim"
        )
    theta, scaling = rope(raw)
    longest = context(raw, default_context)
    acts = window is not None and window < longest
    return ModelConfig(
        architecture=architecture,
        vocab_size=integer(raw, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=integer(raw, "intermediate_size"),
        num_layers=integer(raw, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=integer(raw, "num_key_value_heads", default=default_kv_heads or heads),
        head_dim=integer(raw, "head_dim", default=max(hidden // heads, 1)),
        rms_norm_eps=number(raw, "rms_norm_eps", DEFAULT_RMS_NORM_EPS),
        rope_theta=theta,
        max_context=window if window is not None and acts else longest,
        tied_head=boolean(raw, "tie_word_embeddings", False),
        rope_scaling=scaling,
        sliding_window=window if acts else None,
        **more,
    )
