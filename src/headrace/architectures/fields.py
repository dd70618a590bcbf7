"""Typed access to a config.json: each value is checked where it is read. Knows no architecture."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from headrace.config import RopeScaling, positive_int
from headrace.errors import ConfigError

__all__ = ["boolean", "integer", "number", "require_silu", "rope"]

DEFAULT_ROPE_THETA = 10000.0  # RoFormer's base, what every model that names none was trained with


def integer(raw: Mapping[str, Any], *keys: str, default: int | None = None) -> int:
    """The first of `keys` that is there, a whole number ≥ 1.

    Raises:
        ConfigError: none is there and there is no default, or the value is out of range.
    """
    for key in keys:
        if raw.get(key) is not None:
            return positive_int(key, raw[key])
    if default is None:
        raise ConfigError(f"config.json has no {' or '.join(keys)}; expected a whole number")
    return default


def number(raw: Mapping[str, Any], key: str, default: float) -> float:
    """A finite number, or the default when the key is absent.

    Raises:
        ConfigError: the value is no finite number.
    """
    value = raw.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"{key} is {value!r}; expected a finite number")
    return float(value)


def boolean(raw: Mapping[str, Any], key: str, default: bool) -> bool:
    """true or false, or the default when the key is absent.

    Raises:
        ConfigError: the value is something else.
    """
    value = raw.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise ConfigError(f"{key} is {value!r}; expected true or false")
    return value


def require_silu(raw: Mapping[str, Any]) -> None:
    """Refuse a feed-forward whose gate is not SiLU.

    Raises:
        ConfigError: hidden_act is something else.
    """
    act = raw.get("hidden_act", "silu")
    if act not in ("silu", "swish"):
        raise ConfigError(f"hidden_act {act!r} is not supported; expected 'silu'")


def rope(raw: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Rotary base and scaling, from rope_theta and rope_scaling, or from the newer rope_parameters.

    Raises:
        ConfigError: the scaling is neither linear nor llama3, or a number is missing.
    """
    section = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(section, Mapping):
        raise ConfigError(f"rope_scaling is {section!r}; expected an object or null")
    theta = number(section, "rope_theta", number(raw, "rope_theta", DEFAULT_ROPE_THETA))
    kind = section.get("rope_type", section.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling("linear", number(section, "factor", 0.0))
    if kind == "llama3":
        scaling = RopeScaling(
            "llama3",
            number(section, "factor", 0.0),
            number(section, "low_freq_factor", 1.0),
            number(section, "high_freq_factor", 4.0),
            integer(section, "original_max_position_embeddings", default=8192),
        )
        if scaling.high_freq_factor <= scaling.low_freq_factor:
            raise ConfigError(
                f"rope_scaling high_freq_factor {scaling.high_freq_factor} is not above "
                f"low_freq_factor {scaling.low_freq_factor}"
            )
        return theta, scaling
    raise ConfigError(f"rope_scaling {kind!r} is not supported; expected 'default', 'linear' or 'llama3'")
