"""The I/O contract: how a decoder is split into parts, and every port of every graph.

Names, dtypes and shapes of all graphs are derived here and nowhere else. This file does not know how graphs are
made or run.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from headrace.config import ModelConfig
from headrace.errors import ConfigError

__all__ = ["GraphStyle", "Part", "Port", "graph_name", "host_head_dim", "plan_parts", "ports"]


class GraphStyle(Enum):
    """HOST: dynamic batch and length, float I/O, fused operators. DEVICE: static, quantized I/O."""

    HOST = "host"
    DEVICE = "device"


class Port(NamedTuple):
    """An input or output of a graph. A string in `shape` is a dynamic axis; `dtype` is a NumPy name."""

    name: str
    shape: tuple[int | str, ...]
    dtype: str


@dataclass(frozen=True)
class Part:
    """One of `count` parts: layers start … stop−1, with the embedding if `embeds`, the head if `heads`."""

    number: int
    count: int
    start: int
    stop: int
    embeds: bool
    heads: bool

    @property
    def name(self) -> str:
        """`part_2_of_5`."""
        return f"part_{self.number}_of_{self.count}"

    @property
    def layers(self) -> range:
        """Absolute layer numbers."""
        return range(self.start, self.stop)


def plan_parts(config: ModelConfig, count: int = 5) -> tuple[Part, ...]:
    """The decoder in `count` parts: the embedding alone, then the layers as evenly as they go.

    Earlier parts take the extra layers (30 over 4: 8, 8, 7, 7); the last part has the final norm and the head;
    one part is everything.

    Raises:
        ConfigError: count is below 1 or leaves a part without a layer.
    """
    if count < 1 or count > config.num_layers + 1:
        raise ConfigError(f"--parts {count} is not possible; expected 1 to {config.num_layers + 1} for this model")
    if count == 1:
        return (Part(1, 1, 0, config.num_layers, embeds=True, heads=True),)
    parts = [Part(1, count, 0, 0, embeds=True, heads=False)]
    share, extra = divmod(config.num_layers, count - 1)
    start = 0
    for number in range(2, count + 1):
        stop = start + share + (1 if number - 2 < extra else 0)
        parts.append(Part(number, count, start, stop, embeds=False, heads=number == count))
        start = stop
    return tuple(parts)


def graph_name(part: Part, length: int, context: int) -> str:
    """A device graph's name, as Genie parses it: `ar128_cl4096_2_of_5`."""
    return f"ar{length}_cl{context}_{part.number}_of_{part.count}"


def host_head_dim(config: ModelConfig) -> int:
    """Channels of a head in the host's cache: GroupQueryAttention takes multiples of 16, so others are padded."""
    return -(-config.head_dim // 16) * 16


def ports(
    config: ModelConfig,
    part: Part,
    style: GraphStyle,
    *,
    length: int = 1,
    context: int = 4096,
    kv_dtype: str = "int8",
) -> tuple[tuple[Port, ...], tuple[Port, ...]]:
    """Inputs and outputs of a part's graph.

    Args:
        config: the geometry.
        part: which part.
        style: host or device.
        length: tokens a step S (device only).
        context: context C (device only).
        kv_dtype: the host cache's element type, "int8" or "float32".
    """
    if style is GraphStyle.HOST:
        return _host_ports(config, part, kv_dtype)
    return _device_ports(config, part, length, context)


def _host_ports(config: ModelConfig, part: Part, kv_dtype: str) -> tuple[tuple[Port, ...], tuple[Port, ...]]:
    ids = Port("input_ids", ("batch", "length"), "int64")
    inputs, outputs = [], []
    inputs.append(
        ids if part.embeds else Port(f"hidden_{part.number - 1}", ("batch", "length", config.hidden_size), "float32")
    )
    if part.layers:
        tables = ("max_positions", config.head_dim // 2)
        inputs += [
            Port("last_position", ("batch",), "int32"),
            Port("total_length", (), "int32"),
            Port("cos", tables, "float32"),
            Port("sin", tables, "float32"),
        ]
    cache = ("batch", config.num_kv_heads, "capacity", host_head_dim(config))
    for i in part.layers:
        inputs += [Port(f"past_key_{i}_in", cache, kv_dtype), Port(f"past_value_{i}_in", cache, kv_dtype)]
        outputs += [Port(f"past_key_{i}_out", cache, kv_dtype), Port(f"past_value_{i}_out", cache, kv_dtype)]
    if part.heads:
        inputs.append(Port("rows", ("rows",), "int64"))
        outputs.append(Port("logits", ("batch", "rows", config.vocab_size), "float32"))
    else:
        outputs.append(Port(f"hidden_{part.number}", ("batch", "length", config.hidden_size), "float32"))
    return tuple(inputs), tuple(outputs)


def _device_ports(config: ModelConfig, part: Part, s: int, c: int) -> tuple[tuple[Port, ...], tuple[Port, ...]]:
    h, d, kv = config.hidden_size, config.head_dim, config.num_kv_heads
    inputs, outputs = [], []
    inputs.append(
        Port("input_ids", (1, s), "int32") if part.embeds else Port(f"hidden_{part.number - 1}", (1, s, h), "uint16")
    )
    if part.layers:
        inputs += [
            Port("position_ids_cos", (1, 1, s, d // 2), "uint16"),
            Port("position_ids_sin", (1, 1, s, d // 2), "uint16"),
            Port("attention_mask", (1, 1, s, c), "uint16"),
        ]
    for i in part.layers:
        inputs.append(Port(f"past_key_{i}_in", (kv, 1, d, c - s), "uint8"))
        inputs.append(Port(f"past_value_{i}_in", (kv, 1, c - s, d), "uint8"))
        outputs.append(Port(f"past_key_{i}_out", (kv, 1, d, s), "uint8"))
        outputs.append(Port(f"past_value_{i}_out", (kv, 1, s, d), "uint8"))
    if part.heads:
        outputs.append(Port("logits", (1, s, config.vocab_size), "uint16"))
    else:
        outputs.append(Port(f"hidden_{part.number}", (1, s, h), "uint16"))
    return tuple(inputs), tuple(outputs)
