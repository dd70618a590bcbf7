"""The table of weights: names, shapes, inputs and biases, and that old geometries still have one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from headrace.config import ModelConfig
from headrace.errors import ConfigError
from headrace.model.weights import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    Role,
    find_weight,
    input_groups,
    layer_weights,
    linears,
    quantized_weights,
    weight_table,
)

PLAIN = ModelConfig("llama", 31, 64, 96, 3, 4, 2, 16, 1e-5, 10000.0, 512, False)
TIED = replace(PLAIN, tied_head=True)
QWEN = replace(PLAIN, qkv_bias=True)
BIASED = replace(PLAIN, qkv_bias=True, output_bias=True, mlp_bias=True)


def test_a_layer_as_written_out() -> None:
    p = "layers.1"
    assert {name: row.shape for name, row in layer_weights(QWEN, 1).items()} == {
        f"{p}.input_layernorm.weight": (64,),
        f"{p}.self_attn.q_proj.weight": (64, 64),
        f"{p}.self_attn.q_proj.bias": (64,),
        f"{p}.self_attn.k_proj.weight": (32, 64),
        f"{p}.self_attn.k_proj.bias": (32,),
        f"{p}.self_attn.v_proj.weight": (32, 64),
        f"{p}.self_attn.v_proj.bias": (32,),
        f"{p}.self_attn.o_proj.weight": (64, 64),
        f"{p}.post_attention_layernorm.weight": (64,),
        f"{p}.mlp.gate_proj.weight": (96, 64),
        f"{p}.mlp.up_proj.weight": (96, 64),
        f"{p}.mlp.down_proj.weight": (64, 96),
    }


@pytest.mark.parametrize("config", [PLAIN, TIED, QWEN, BIASED])
def test_rows_agree_with_each_other(config: ModelConfig) -> None:
    table = weight_table(config)
    for name, row in table.items():
        assert row.name == name and name.rsplit(".", 1)[0] == row.module
        assert table[row.stored_as].shape == row.shape
        assert (row.layer is None) == (not name.startswith("layers."))
        if row.bias is not None:
            added = table[row.bias]
            assert (added.role, added.layer, added.module) == (row.role, row.layer, row.module)
            assert added.shape == row.shape[:1] and not added.quantized
        if row.quantized and row.role is not Role.EMBEDDING:
            assert row.producer is not None
            # A query head reads the values of the KV head it belongs to: there are fewer values than inputs.
            assert row.matrix[1] % table[row.producer].shape[0] == 0
    biases = [name for name, row in table.items() if not row.quantized and not row.role.is_norm]
    assert sorted(biases) == sorted(row.bias for row in table.values() if row.bias is not None)


def test_groups_share_an_input() -> None:
    kinds = [[row.role for row in group] for group in input_groups(BIASED, 2)]
    assert kinds == [[Role.QUERY, Role.KEY, Role.VALUE], [Role.OUTPUT], [Role.GATE, Role.UP], [Role.DOWN]]
    assert {row.layer for group in input_groups(BIASED, 2) for row in group} == {2}


def test_selections() -> None:
    assert list(linears(PLAIN)) == [name for name in weight_table(PLAIN) if "_proj" in name]
    assert list(linears(BIASED, 1)) == [name for name in layer_weights(PLAIN, 1) if "_proj" in name]
    assert list(quantized_weights(PLAIN)) == [EMBEDDING, *linears(PLAIN), HEAD]
    assert list(quantized_weights(TIED)) == [EMBEDDING, *linears(TIED)]
    assert weight_table(TIED)[HEAD].stored_as == EMBEDDING
    assert find_weight(PLAIN, Role.FINAL_NORM).name == FINAL_NORM
    assert find_weight(PLAIN, Role.DOWN, 2).name == "layers.2.mlp.down_proj.weight"


def test_a_geometry_without_the_newer_fields_has_no_bias_and_no_window() -> None:
    """Manifests of older bundles lack them."""
    newer = ("qkv_bias", "output_bias", "mlp_bias", "sliding_window")
    old = {key: value for key, value in PLAIN.to_dict().items() if key not in newer}
    assert ModelConfig.from_dict(old) == PLAIN
    assert ModelConfig.from_dict(BIASED.to_dict()) == BIASED
    with pytest.raises(ConfigError, match="geometry lacks vocab_size"):
        ModelConfig.from_dict({key: value for key, value in old.items() if key != "vocab_size"})
