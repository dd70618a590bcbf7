"""Mistral: a Llama decoder whose attention may have a sliding window.

Attention here sees the whole context. Up to the window's length that is the same, so the context is no longer than it.
Source: Jiang et al. 2023 (Mistral 7B), and Hugging Face's MistralConfig for the names. Knows nothing about files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from headrace.architectures.fields import sliding_window
from headrace.architectures.geometry import llama_geometry
from headrace.architectures.source import Source, llama_sources
from headrace.config import ModelConfig
from headrace.model.weights import Role

__all__ = ["FUSED", "config", "sources"]

FUSED: Mapping[str, tuple[Role, ...]] = {}
# MistralConfig's. A config.json without sliding_window has this window; null means that there is none.
DEFAULT_SLIDING_WINDOW = 4096
DEFAULT_KV_HEADS = 8  # MistralConfig's
DEFAULT_CONTEXT = 131_072  # MistralConfig's max_position_embeddings


def config(raw: Mapping[str, Any]) -> ModelConfig:
    """The geometry a config.json states, with no more context than its sliding window.

    Raises:
        ConfigError: a key is missing or out of range, or asks for something the decoder does not have.
    """
    return llama_geometry(
        raw,
        "mistral",
        default_context=DEFAULT_CONTEXT,
        default_kv_heads=DEFAULT_KV_HEADS,
        window=sliding_window(raw, DEFAULT_SLIDING_WINDOW),
    )


def sources(config: ModelConfig, raw: Mapping[str, Any]) -> dict[str, Source]:
    """Canonical name → where it is: one tensor per weight."""
    return llama_sources(config)
