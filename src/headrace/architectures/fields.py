"""Typed access to a config.json: each value is checked where it is read. Knows no architecture."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from headrace.config import RopeScaling, positive_int
from headrace.errors import ConfigError, shown

__all__ = ["DEFAULT_CONTEXT", "boolean", "context", "integer", "number", "require_silu", "rope", "sliding_window"]

DEFAULT_ROPE_THETA = 10000.0  # RoFormer's base, what every model that names none was trained with
DEFAULT_CONTEXT = 2048  # LlamaConfig's max_position_embeddings
CONTEXT_KEYS = ("max_position_embeddings", "max_sequence_length", "model_max_length", "n_positions", "seq_length")


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
    try:
        found = math.nan if isinstance(value, bool) or not isinstance(value, int | float) else float(value)
    except OverflowError:  # a whole number of hundreds of digits
        found = math.nan
    if not math.isfinite(found):
        raise ConfigError(f"{key} is {shown(value)}; expected a finite number")
    return found


def boolean(raw: Mapping[str, Any], key: str, default: bool) -> bool:
    """true or false, or the default when the key is absent.

    Raises:
        ConfigError: the value is something else.
    """
    value = raw.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise ConfigError(f"{key} is {shown(value)}; expected true or false")
    return value


def context(raw: Mapping[str, Any], default: int = DEFAULT_CONTEXT) -> int:
    """The longest context a config states, under any of the names it has had; the default when it states none.

    Raises:
        ConfigError: the value is out of range.
    """
    return integer(raw, *CONTEXT_KEYS, default=default)


def sliding_window(raw: Mapping[str, Any], default: int) -> int | None:
    """sliding_window, tokens; null says that there is none, and a config without the key has the default.

    Raises:
        ConfigError: the value is out of range.
    """
    none = "sliding_window" in raw and raw["sliding_window"] is None
    return None if none else integer(raw, "sliding_window", default=default)


def require_silu(raw: Mapping[str, Any]) -> None:
    """Refuse a feed-forward whose gate is not SiLU.

    Raises:
        ConfigError: hidden_act is something else.
    """
    act = raw.get("hidden_act")
    if act not in (None, "silu", "swish"):
        raise ConfigError(f"hidden_act {shown(act)} is not supported; expected 'silu'")


def rope(raw: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Rotary base and scaling, from rope_theta and rope_scaling, or from the newer rope_parameters.

    Raises:
        ConfigError: the scaling is neither linear nor llama3, only a part of a head is turned, a number is missing, or
            two places differ.
    """
    sections = {key: raw[key] for key in ("rope_parameters", "rope_scaling") if raw.get(key)}
    for key, section in sections.items():
        if not isinstance(section, Mapping):
            raise ConfigError(f"{key} is {shown(section)}; expected an object or null")
        if any(isinstance(value, Mapping) for value in section.values()):
            raise ConfigError(f"{key} differ by layer ({shown(list(section))}); expected one kind for all layers")
    places = {"config.json": raw, **sections}
    thetas = {key: number(at, "rope_theta", 0.0) for key, at in places.items() if at.get("rope_theta") is not None}
    if len(set(thetas.values())) > 1:
        told = " and ".join(f"{theta:g} in {key}" for key, theta in thetas.items())
        raise ConfigError(f"rope_theta is {told}; expected one value; keep in config.json what the model has")
    for place in places.values():
        if (turned := number(place, "partial_rotary_factor", 1.0)) != 1.0:
            raise ConfigError(
                f"partial_rotary_factor is {turned}, which is not supported; expected 1: whole heads turned"
            )
    scalings = {_scaling(raw, section) for section in sections.values()} or {None}
    if len(scalings) > 1:  # transformers takes the older one, others the newer
        raise ConfigError(
            "rope_parameters and rope_scaling state different scalings; expected one; keep in config.json the section "
            "that the model has"
        )
    return next(iter(thetas.values()), DEFAULT_ROPE_THETA), scalings.pop()


def _scaling(raw: Mapping[str, Any], section: Mapping[str, Any]) -> RopeScaling | None:
    """What one section says of the scaling."""
    # Some configs have both keys, and the older one tells mrope where the newer one says default.
    kinds = [section[key] for key in ("type", "rope_type") if section.get(key) not in (None, "default")]
    if not kinds:
        if "mrope_section" not in section:
            return None
        kinds = ["mrope"]
    kind = kinds[0]
    if kind == "linear":
        return RopeScaling("linear", number(section, "factor", 0.0))
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
        return scaling
    advice = _without(raw, section, kind)
    raise ConfigError(f"rope_scaling {shown(kind)} is not supported; expected 'default', 'linear' or 'llama3'{advice}")


def _without(raw: Mapping[str, Any], section: Mapping[str, Any], kind: object) -> str:
    """How far a model goes without a scaling that headrace does not have."""
    if kind in ("dynamic", "ntk"):  # begins where the trained context ends
        return f"; it changes nothing up to {context(raw)} tokens: to use those, remove rope_scaling from config.json"
    if kind == "yarn":
        length = integer(section, "original_max_position_embeddings", default=context(raw))
        return (
            f"; a model that was not trained with it is right without it up to {length} tokens: for those, remove "
            "rope_scaling from config.json"
        )
    return "; fetch a model without it"
