"""Who gets 8 bits: the greedy choice, its limits and its rules."""

from __future__ import annotations

import pytest

from headrace.bundle.recipe import Recipe, Rule
from headrace.config import ModelConfig
from headrace.errors import RecipeError
from headrace.model.weights import linears, quantized_weights, weight_table
from headrace.plan import plan_parts
from headrace.quantize.budget import average_bits, weight_bytes, within_budget

CONFIG = ModelConfig("llama", 160, 64, 96, 12, 4, 2, 16, 1e-5, 1e4, 512, True)
RECIPE = Recipe("plain", (Rule("embed_tokens|lm_head", 8, None, "nearest"), Rule("_proj", 4, 32, "gptq")))
COSTS = {name: 1.0 / (i + 1) for i, name in enumerate(linears(CONFIG))}


def test_bits_are_spent_and_not_passed() -> None:
    spent = within_budget(RECIPE, CONFIG, COSTS, bits=5.0)
    smallest = min(r * c for r, c in (weight_table(CONFIG)[n].matrix for n in COSTS)) * 4
    total = sum(r * c for r, c in (weight_table(CONFIG)[n].matrix for n in COSTS))
    assert 5.0 - smallest / total < spent.bits <= 5.0 + 1e-9
    rules = spent.recipe.resolve(quantized_weights(CONFIG))
    assert {n for n in COSTS if rules[n].bits == 8} == set(spent.eight_bit)
    assert average_bits(CONFIG, rules) == spent.bits
    assert spent.cost == pytest.approx(sum(COSTS[n] for n in COSTS if rules[n].bits == 4))


def test_bytes_are_spent_and_not_passed() -> None:
    parts = plan_parts(CONFIG, 5)
    least = weight_bytes(CONFIG, RECIPE.resolve(quantized_weights(CONFIG)), parts)
    spent = within_budget(RECIPE, CONFIG, COSTS, size=least + 20_000, parts=parts)
    assert least + 15_000 < spent.nbytes <= least + 20_000
    assert weight_bytes(CONFIG, spent.recipe.resolve(quantized_weights(CONFIG)), parts) == spent.nbytes


def test_the_most_gain_for_a_byte_comes_first() -> None:
    costs = dict.fromkeys(COSTS, 0.001)
    costs["layers.11.self_attn.k_proj.weight"] = 0.1  # small and dear
    costs["layers.1.mlp.down_proj.weight"] = 0.2
    spent = within_budget(RECIPE, CONFIG, costs, bits=4.2)
    assert spent.eight_bit[:2] == ("layers.11.self_attn.k_proj.weight", "layers.1.mlp.down_proj.weight")


def test_layer_1_is_not_layer_11() -> None:
    costs = dict.fromkeys(COSTS, 0.0)
    costs["layers.1.mlp.down_proj.weight"] = 1.0
    elements = sum(r * c for r, c in (weight_table(CONFIG)[n].matrix for n in COSTS))
    one = 64 * 96 * 4 / elements
    rules = within_budget(RECIPE, CONFIG, costs, bits=4 + one).recipe.resolve(quantized_weights(CONFIG))
    assert [n for n in COSTS if rules[n].bits == 8] == ["layers.1.mlp.down_proj.weight"]


def test_everything_may_become_eight_bits() -> None:
    spent = within_budget(RECIPE, CONFIG, COSTS, bits=8)
    assert len(spent.eight_bit) == len(COSTS) and spent.bits == 8 and spent.cost == 0


def test_what_cannot_be_met_says_what_can() -> None:
    with pytest.raises(RecipeError, match=r"--bits 3.5 cannot be met: recipe 'plain' needs 4 without"):
        within_budget(RECIPE, CONFIG, COSTS, bits=3.5)
    least = weight_bytes(CONFIG, RECIPE.resolve(quantized_weights(CONFIG)))
    with pytest.raises(RecipeError, match=rf"--size 1000 bytes cannot be met: recipe 'plain' needs {least} bytes"):
        within_budget(RECIPE, CONFIG, COSTS, size=1000)
    for both in ({}, {"bits": 5.0, "size": 10**9}):
        with pytest.raises(RecipeError, match="either --bits or --size"):
            within_budget(RECIPE, CONFIG, COSTS, **both)  # type: ignore[arg-type]
