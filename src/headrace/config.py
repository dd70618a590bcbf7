"""ModelConfig: a decoder's geometry, validated once at the border.

Knows nothing about files, tensors or graphs; architectures/ fill it in from what a checkpoint says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

from headrace.errors import ConfigError, did_you_mean, shown

__all__ = ["ModelConfig", "RopeScaling", "positive_int"]

LARGEST = 3.4e38  # float32, in which frequencies are computed
_KINDS: Mapping[str, Any] = {
    "architecture": str, "rms_norm_eps": int | float, "rope_theta": int | float, "tied_head": bool, "qkv_bias": bool,
    "output_bias": bool, "mlp_bias": bool,
}  # fmt: skip
_SPOKEN = {str: "text", bool: "true or false", int | float: "a number"}


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched: `linear` divides all by `factor`; `llama3` only the slow ones.

    Source: Llama 3.1 model card and reference code (meta-llama/llama-models, `apply_scaling`).
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192

    def __post_init__(self) -> None:
        if self.kind not in ("linear", "llama3"):
            raise ConfigError(f"rope_scaling {shown(self.kind)} is not supported; expected 'linear' or 'llama3'")
        for name in ("factor", "low_freq_factor", "high_freq_factor"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < LARGEST:
                raise ConfigError(f"rope_scaling's {name} is {shown(value)}; expected a number above 0")
        if self.factor < 1:
            raise ConfigError(f"rope_scaling factor {self.factor} is below 1")
        if self.kind == "llama3" and not self.low_freq_factor < self.high_freq_factor:
            raise ConfigError(f"rope_scaling's low_freq_factor {self.low_freq_factor} is not below high_freq_factor")
        positive_int("rope_scaling's original_context", self.original_context)


@dataclass(frozen=True)
class ModelConfig:
    """A pre-norm decoder: RMSNorm, rotate-half RoPE, grouped-query attention, gated SiLU feed-forward.

    Attributes:
        architecture: HF model_type of the source ("baichuan", "llama").
        vocab_size: rows V of the embedding and of the head.
        hidden_size: width H of the residual stream.
        intermediate_size: width F of the feed-forward.
        num_layers: decoder layers.
        num_heads: query heads.
        num_kv_heads: key and value heads (equal to num_heads for MHA).
        head_dim: width D of a head.
        rms_norm_eps: epsilon of every RMSNorm.
        rope_theta: rotary base.
        max_context: longest context the model was made for, tokens.
        tied_head: the head is the embedding's table.
        rope_scaling: stretched frequencies, or None.
        qkv_bias: q, k and v have a bias.
        output_bias: the attention's output has one.
        mlp_bias: gate, up and down have one.
        sliding_window: how far back the model's attention was made to see, tokens, where that is less than what
            max_context would be otherwise; attention here sees everything, so max_context is no more than this.

    Raises:
        ConfigError: a number is out of range or two contradict each other.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_context: int
    tied_head: bool
    rope_scaling: RopeScaling | None = None
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None

    def __post_init__(self) -> None:
        for name, kind in _KINDS.items():
            if not isinstance(value := getattr(self, name), kind) or (isinstance(value, bool) and kind is not bool):
                raise ConfigError(f"{name} is {shown(value)}; expected {_SPOKEN[kind]}")
        for name in (
            "vocab_size", "hidden_size", "intermediate_size", "num_layers",
            "num_heads", "num_kv_heads", "head_dim", "max_context",
        ):  # fmt: skip
            positive_int(name, getattr(self, name))
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_attention_heads {self.num_heads} is not a multiple of num_key_value_heads {self.num_kv_heads}"
            )
        if self.sliding_window is not None and positive_int("sliding_window", self.sliding_window) < self.max_context:
            raise ConfigError(
                f"sliding_window {self.sliding_window} is less than the context of {self.max_context}; expected no less"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim {self.head_dim} is odd; rotary embedding needs pairs")
        if not 0 < self.rms_norm_eps < 1:
            raise ConfigError(f"rms_norm_eps {shown(self.rms_norm_eps)} is not between 0 and 1")
        if not 1 < self.rope_theta < LARGEST:
            raise ConfigError(f"rope_theta {shown(self.rope_theta)} is not above 1 and finite")

    @property
    def group_size(self) -> int:
        """Query heads that share one KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def query_size(self) -> int:
        """Width of q before it is split to heads."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of k (and of v) before it is split to heads."""
        return self.num_kv_heads * self.head_dim

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """The inverse of `to_dict`.

        Raises:
            ConfigError: a key is unknown or missing. Those with a default may be: older bundles lack them.
        """
        known = {f.name: f.default is MISSING for f in fields(cls)}  # and whether it must be there
        for key in raw:
            if key not in known:
                raise ConfigError(f"unknown geometry key {key!r}{did_you_mean(key, known)}")
        missing = [key for key, needed in known.items() if needed and key not in raw]
        if missing:
            raise ConfigError(f"geometry lacks {', '.join(missing)}")
        values = dict(raw)
        if values.get("rope_scaling") is not None:
            values["rope_scaling"] = RopeScaling(**values["rope_scaling"])
        return cls(**values)


def positive_int(name: str, value: object, limit: int = 1 << 31) -> int:
    """`value` as an int in 1 … limit.

    Raises:
        ConfigError: it is anything else.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= limit:
        raise ConfigError(f"{name} is {shown(value)}; expected a whole number from 1 to {limit}")
    return value
