"""The I/O contract: how layers are split, and ports as DESIGN lists them."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.config import ModelConfig
from headrace.errors import ConfigError
from headrace.plan import GraphStyle, Port, graph_name, plan_parts, ports

CONFIG = ModelConfig("llama", 160, 64, 96, 30, 4, 2, 16, 1e-5, 10000.0, 512, False)


def test_thirty_layers_over_five_parts() -> None:
    parts = plan_parts(CONFIG)
    assert [len(p.layers) for p in parts] == [0, 8, 8, 7, 7]
    assert [p.name for p in parts] == [f"part_{i}_of_5" for i in range(1, 6)]
    assert [(p.embeds, p.heads) for p in parts] == [(True, False)] + [(False, False)] * 3 + [(False, True)]
    assert graph_name(parts[1], 128, 4096) == "ar128_cl4096_2_of_5"


def test_one_part_is_everything() -> None:
    (part,) = plan_parts(CONFIG, 1)
    assert (part.embeds, part.heads, part.layers) == (True, True, range(30))


@given(layers=st.integers(1, 60), count=st.integers(1, 61))
def test_every_split_covers_every_layer_once_and_evenly(layers: int, count: int) -> None:
    config = replace(CONFIG, num_layers=layers)
    if count > layers + 1:
        with pytest.raises(ConfigError, match=f"--parts {count} is not possible; expected 1 to {layers + 1}"):
            plan_parts(config, count)
        return
    parts = plan_parts(config, count)
    assert [i for p in parts for i in p.layers] == list(range(layers))
    assert [p.number for p in parts] == list(range(1, count + 1))
    assert {p.count for p in parts} == {count}
    assert sum(p.embeds for p in parts) == sum(p.heads for p in parts) == 1
    assert parts[0].embeds
    assert parts[-1].heads
    sizes = [len(p.layers) for p in parts if p.layers]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True), "earlier parts take the extra"
    if count > 1:
        assert not parts[0].layers


@pytest.mark.parametrize("count", [0, -1, 32])
def test_impossible_counts(count: int) -> None:
    with pytest.raises(ConfigError, match=f"--parts {count} is not possible; expected 1 to 31"):
        plan_parts(CONFIG, count)


def test_device_ports_are_the_contract() -> None:
    first, second, *_, last = plan_parts(CONFIG)
    s, c = 128, 4096
    assert ports(CONFIG, first, GraphStyle.DEVICE, length=s, context=c) == (
        (Port("input_ids", (1, s), "int32"),), (Port("hidden_1", (1, s, 64), "uint16"),)
    )  # fmt: skip
    inputs, outputs = ports(CONFIG, second, GraphStyle.DEVICE, length=s, context=c)
    assert inputs[:4] == (
        Port("hidden_1", (1, s, 64), "uint16"),
        Port("position_ids_cos", (1, 1, s, 8), "uint16"),
        Port("position_ids_sin", (1, 1, s, 8), "uint16"),
        Port("attention_mask", (1, 1, s, c), "uint16"),
    )
    assert inputs[4:6] == (
        Port("past_key_0_in", (2, 1, 16, c - s), "uint8"),
        Port("past_value_0_in", (2, 1, c - s, 16), "uint8"),
    )
    assert outputs[:2] == (
        Port("past_key_0_out", (2, 1, 16, s), "uint8"),
        Port("past_value_0_out", (2, 1, s, 16), "uint8"),
    )
    assert len(inputs) == 4 + 16
    assert outputs[-1] == Port("hidden_2", (1, s, 64), "uint16")
    inputs, outputs = ports(CONFIG, last, GraphStyle.DEVICE, length=1, context=c)
    assert inputs[0].name == "hidden_4"
    assert inputs[4].name == "past_key_23_in", "layer numbers are absolute"
    assert outputs[-1] == Port("logits", (1, 1, 160), "uint16")


@pytest.mark.parametrize("kv", ["int8", "float32"])
def test_host_ports(kv: str) -> None:
    first, second, *_, last = plan_parts(CONFIG)
    inputs, outputs = ports(CONFIG, first, GraphStyle.HOST)
    assert inputs == (Port("input_ids", ("batch", "length"), "int64"),)
    assert outputs == (Port("hidden_1", ("batch", "length", 64), "float32"),)
    inputs, outputs = ports(CONFIG, second, GraphStyle.HOST, kv_dtype=kv)
    caches = [p for p in inputs if p.name.startswith("past_")]
    assert {p.dtype for p in caches} == {kv}
    assert {p.shape for p in caches} == {("batch", 2, "capacity", 16)}
    assert [p.name.replace("_in", "_out") for p in caches] == [p.name for p in outputs[:-1]]
    inputs, outputs = ports(CONFIG, last, GraphStyle.HOST)
    assert inputs[-1] == Port("rows", ("rows",), "int64")
    assert outputs[-1] == Port("logits", ("batch", "rows", 160), "float32")


@pytest.mark.parametrize("style", list(GraphStyle))
@pytest.mark.parametrize("count", [1, 2, 5, 31])
def test_what_a_part_writes_the_next_reads(style: GraphStyle, count: int) -> None:
    parts = plan_parts(CONFIG, count)
    for one, next_one in itertools.pairwise(parts):
        written, read = ports(CONFIG, one, style)[1][-1], ports(CONFIG, next_one, style)[0][0]
        assert written == read
