"""Llama: grouped-query attention, tied or untied head, linear or llama3 rope scaling, biases where the config has them.

Source: Touvron et al. 2023 (LLaMA), and Hugging Face's LlamaConfig for the names. Knows nothing about files; a GGUF
arrives here translated to the same keys and names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from headrace.architectures.fields import boolean
from headrace.architectures.geometry import llama_geometry
from headrace.architectures.source import Source, llama_sources
from headrace.config import ModelConfig
from headrace.model.weights import Role

__all__ = ["FUSED", "config", "sources"]

FUSED: Mapping[str, tuple[Role, ...]] = {}


def config(raw: Mapping[str, Any]) -> ModelConfig:
    """The geometry a config.json states.

    Raises:
        ConfigError: a key is missing or out of range, or asks for something the decoder does not have.
    """
    attention, mlp = boolean(raw, "attention_bias", False), boolean(raw, "mlp_bias", False)
    return llama_geometry(raw, "llama", qkv_bias=attention, output_bias=attention, mlp_bias=mlp)


def sources(config: ModelConfig, raw: Mapping[str, Any]) -> dict[str, Source]:
    """Canonical name → where it is: one tensor per weight."""
    return llama_sources(config)
