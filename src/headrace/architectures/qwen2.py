"""Qwen2 and Qwen2.5: a Llama decoder with biases on q, k and v, and a tied or untied head.

Source: Qwen2 technical report (2407.10671), and Hugging Face's Qwen2Config for the names. Knows nothing about files; a
GGUF arrives here translated to the same keys and names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from headrace.architectures.fields import boolean, integer, number, sliding_window
from headrace.architectures.geometry import llama_geometry
from headrace.architectures.source import Source, llama_sources
from headrace.config import ModelConfig
from headrace.errors import ConfigError, shown
from headrace.model.weights import Role

__all__ = ["FUSED", "config", "sources"]

FUSED: Mapping[str, tuple[Role, ...]] = {}
DEFAULT_SLIDING_WINDOW = 4096  # Qwen2Config's; it is used only where use_sliding_window says so
DEFAULT_MAX_WINDOW_LAYERS = 28  # Qwen2Config's
DEFAULT_CONTEXT = 32_768  # Qwen2Config's max_position_embeddings


def config(raw: Mapping[str, Any]) -> ModelConfig:
    """The geometry a config.json states; where some layers have a sliding window, no more context than that.

    Raises:
        ConfigError: a key is missing or out of range, or asks for something the decoder does not have.
    """
    window = sliding_window(raw, DEFAULT_SLIDING_WINDOW) if _slides(raw) else None
    return llama_geometry(raw, "qwen2", default_context=DEFAULT_CONTEXT, window=window, qkv_bias=True)


def _slides(raw: Mapping[str, Any]) -> bool:
    """Whether any layer has the window: layer_types says which, else it is those from max_window_layers on."""
    if not boolean(raw, "use_sliding_window", False):
        return False
    kinds = raw.get("layer_types")
    if kinds is not None:
        if not isinstance(kinds, list):
            raise ConfigError(f"layer_types is {shown(kinds)}; expected a list of one kind for each layer")
        return any(kind != "full_attention" for kind in kinds)
    return number(raw, "max_window_layers", DEFAULT_MAX_WINDOW_LAYERS) < integer(raw, "num_hidden_layers")


def sources(config: ModelConfig, raw: Mapping[str, Any]) -> dict[str, Source]:
    """Canonical name → where it is: one tensor per weight and bias."""
    return llama_sources(config)
