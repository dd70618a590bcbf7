"""The one table of a decoder's weights: canonical name → role, shape, input and bias.

Canonical names are Hugging Face's without the leading "model.": `layers.0.self_attn.q_proj.weight`. Whoever must know
what a weight is (a checkpoint's reader, the layout on disk, rotation, budget, an emitter) looks it up here; nobody
reads it out of the name. This file knows neither arrays nor files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from enum import Enum
from functools import lru_cache
from itertools import groupby
from typing import NamedTuple

from headrace.config import ModelConfig

__all__ = [
    "EMBEDDING",
    "FINAL_NORM",
    "HEAD",
    "Role",
    "Weight",
    "find_weight",
    "input_groups",
    "layer_weights",
    "linears",
    "quantized_weights",
    "weight_table",
]

EMBEDDING = "embed_tokens.weight"
FINAL_NORM = "norm.weight"
HEAD = "lm_head.weight"


class Role(Enum):
    """What a weight does in the decoder; the value is its module's name, within a layer where it belongs to one."""

    EMBEDDING = "embed_tokens"
    ATTENTION_NORM = "input_layernorm"
    QUERY = "self_attn.q_proj"
    KEY = "self_attn.k_proj"
    VALUE = "self_attn.v_proj"
    OUTPUT = "self_attn.o_proj"
    FEED_FORWARD_NORM = "post_attention_layernorm"
    GATE = "mlp.gate_proj"
    UP = "mlp.up_proj"
    DOWN = "mlp.down_proj"
    FINAL_NORM = "norm"
    HEAD = "lm_head"

    @property
    def is_norm(self) -> bool:
        """The gain of an RMSNorm."""
        return self in (Role.ATTENTION_NORM, Role.FEED_FORWARD_NORM, Role.FINAL_NORM)

    @property
    def writes_stream(self) -> bool:
        """Its result is added to the residual stream."""
        return self in (Role.OUTPUT, Role.DOWN)


class Weight(NamedTuple):
    """A row of the table.

    Attributes:
        name: canonical name.
        module: what its result is called: the name without ".weight" or ".bias".
        role: what it does; a bias has its linear's role.
        layer: its layer, or None.
        shape: (N, K) of a table or a linear, which gives N values from K; (N,) of a norm or a bias.
        quantized: it is brought to a grid; norms and biases stay float32.
        stored_as: the weight whose bytes are used: its own name, but the embedding's for a tied head.
        producer: of a linear, the weight whose result its input is proportional to, channel by channel. Linears of a
            layer that have the same producer share one input.
        bias: canonical name of what is added to a linear's result, or None.
    """

    name: str
    module: str
    role: Role
    layer: int | None
    shape: tuple[int, ...]
    quantized: bool
    stored_as: str
    producer: str | None = None
    bias: str | None = None

    @property
    def size(self) -> int:
        """How many values."""
        return math.prod(self.shape)

    @property
    def matrix(self) -> tuple[int, int]:
        """(N, K) of a table or a linear."""
        rows, columns = self.shape
        return rows, columns


@lru_cache(maxsize=16)
def weight_table(config: ModelConfig) -> Mapping[str, Weight]:
    """Every weight of a decoder by canonical name, in the order of computation, a bias behind its linear.

    What the other functions select has the same form and order.
    """
    rows = [_row(config, Role.EMBEDDING, None, (config.vocab_size, config.hidden_size))]
    for layer in range(config.num_layers):
        rows += _layer(config, layer)
    rows.append(_row(config, Role.FINAL_NORM, None, (config.hidden_size,)))
    rows.append(_row(config, Role.HEAD, None, (config.vocab_size, config.hidden_size), Role.FINAL_NORM))
    return {row.name: row for row in rows}


def layer_weights(config: ModelConfig, layer: int) -> Mapping[str, Weight]:
    """The rows of a layer."""
    return _by_layer(config)[layer]


@lru_cache(maxsize=16)
def _by_layer(config: ModelConfig) -> Sequence[Mapping[str, Weight]]:
    layers: list[dict[str, Weight]] = [{} for _ in range(config.num_layers)]
    for name, row in weight_table(config).items():
        if row.layer is not None:
            layers[row.layer][name] = row
    return layers


def find_weight(config: ModelConfig, role: Role, layer: int | None = None) -> Weight:
    """The table, linear or norm of a role; `layer` where there is one in every layer."""
    return weight_table(config)[_name(role, layer, "weight")]


def linears(config: ModelConfig, layer: int | None = None) -> Mapping[str, Weight]:
    """The rows of a layer's linears, or of all layers'; the head is not one of them."""
    rows = weight_table(config) if layer is None else layer_weights(config, layer)
    return {name: row for name, row in rows.items() if row.layer is not None and row.quantized}


def input_groups(config: ModelConfig, layer: int) -> tuple[tuple[Weight, ...], ...]:
    """A layer's linears, those that share an input together: (q, k, v), (o), (gate, up), (down)."""
    return tuple(tuple(group) for _, group in groupby(linears(config, layer).values(), lambda row: row.producer))


def quantized_weights(config: ModelConfig) -> Mapping[str, Weight]:
    """The rows of all that is brought to a grid, each once: a tied head is not among them, the embedding is."""
    return {name: row for name, row in weight_table(config).items() if row.quantized and row.stored_as == name}


def _layer(config: ModelConfig, layer: int) -> list[Weight]:
    h, f, q, kv = config.hidden_size, config.intermediate_size, config.query_size, config.kv_size
    rows = [_row(config, Role.ATTENTION_NORM, layer, (h,))]
    for role, width in ((Role.QUERY, q), (Role.KEY, kv), (Role.VALUE, kv)):
        rows += _linear(config, role, layer, (width, h), Role.ATTENTION_NORM, config.qkv_bias)
    rows += _linear(config, Role.OUTPUT, layer, (h, q), Role.VALUE, config.output_bias)
    rows.append(_row(config, Role.FEED_FORWARD_NORM, layer, (h,)))
    for role in (Role.GATE, Role.UP):
        rows += _linear(config, role, layer, (f, h), Role.FEED_FORWARD_NORM, config.mlp_bias)
    rows += _linear(config, Role.DOWN, layer, (h, f), Role.UP, config.mlp_bias)
    return rows


def _linear(
    config: ModelConfig, role: Role, layer: int, shape: tuple[int, int], producer: Role, bias: bool
) -> list[Weight]:
    if not bias:
        return [_row(config, role, layer, shape, producer)]
    name = _name(role, layer, "bias")
    added = Weight(name, _name(role, layer), role, layer, shape[:1], quantized=False, stored_as=name)
    return [_row(config, role, layer, shape, producer, name), added]


def _row(
    config: ModelConfig,
    role: Role,
    layer: int | None,
    shape: tuple[int, ...],
    producer: Role | None = None,
    bias: str | None = None,
) -> Weight:
    name = _name(role, layer, "weight")
    before = None if producer is None else _name(producer, layer, "weight")
    stored_as = EMBEDDING if role is Role.HEAD and config.tied_head else name
    return Weight(name, _name(role, layer), role, layer, shape, not role.is_norm, stored_as, before, bias)


def _name(role: Role, layer: int | None, *last: str) -> str:
    return ".".join((*(() if layer is None else ("layers", str(layer))), role.value, *last))
