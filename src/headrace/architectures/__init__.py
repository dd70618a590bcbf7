"""The models headrace knows, by Hugging Face model_type: a new one is one file here and one line below.

An architecture turns a config.json into a geometry, and says which tensor each canonical weight is cut from. It knows
nothing about files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from headrace.architectures import baichuan, llama, mistral, qwen2
from headrace.architectures.source import Source
from headrace.config import ModelConfig
from headrace.errors import ConfigError, did_you_mean, shown
from headrace.model.weights import Role

__all__ = ["ARCHITECTURES", "Architecture", "Source", "architecture_for"]


class Architecture(Protocol):
    """What a module of this package offers.

    Attributes:
        FUSED: modules of a layer that hold several linears, one after the other: name → roles. None for most.
    """

    FUSED: Mapping[str, tuple[Role, ...]]

    def config(self, raw: Mapping[str, Any]) -> ModelConfig:
        """The geometry a config.json states."""

    def sources(self, config: ModelConfig, raw: Mapping[str, Any]) -> dict[str, Source]:
        """Canonical name → where it is."""


ARCHITECTURES: dict[str, Architecture] = {
    "baichuan": baichuan,
    "llama": llama,
    "mistral": mistral,
    "qwen2": qwen2,
}


def architecture_for(model_type: object) -> Architecture:
    """The architecture of a config.json's model_type.

    Raises:
        ConfigError: nobody registered it.
    """
    if isinstance(model_type, str) and model_type in ARCHITECTURES:
        return ARCHITECTURES[model_type]
    raise ConfigError(
        f"model_type {shown(model_type)} is not known; known are {', '.join(sorted(ARCHITECTURES))}"
        f"{did_you_mean(str(model_type)[:80], ARCHITECTURES)}"
    )
