"""Who gets 8 bits: the greedy choice, its limits and its rules."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from headrace.bundle.grid import Grid
from headrace.bundle.recipe import Recipe, Rule
from headrace.config import ModelConfig
from headrace.errors import RecipeError
from headrace.model.weights import linears, quantized_weights, weight_table
from headrace.plan import plan_parts
from headrace.quantize.budget import average_bits, grids_to_try, weight_bytes, within_budget

CONFIG = ModelConfig("llama", 160, 64, 96, 12, 4, 2, 16, 1e-5, 1e4, 512, True)
RECIPE = Recipe("plain", (Rule("embed_tokens|lm_head", 8, None, "nearest"), Rule("_proj", 4, 32, "gptq")))
B64, B32, B16 = (Grid(4, block) for block in (64, 32, 16))
COSTS = {name: {B32: 1.0 / (i + 1)} for i, name in enumerate(linears(CONFIG))}
# As rounding errors go: a larger block has a larger peak. Rows of 96 are no blocks of 64.
BY_BLOCK = {
    name: {
        grid: more * COSTS[name][B32]
        for grid, more in ((B64, 1.4), (B32, 1.0), (B16, 0.8))
        if weight_table(CONFIG)[name].matrix[1] % (grid.block or 1) == 0
    }
    for name in COSTS
}


def test_bits_are_spent_and_not_passed() -> None:
    spent = within_budget(RECIPE, CONFIG, COSTS, bits=5.0)
    smallest = min(r * c for r, c in (weight_table(CONFIG)[n].matrix for n in COSTS)) * 4
    total = sum(r * c for r, c in (weight_table(CONFIG)[n].matrix for n in COSTS))
    assert 5.0 - smallest / total < spent.bits <= 5.0 + 1e-9
    rules = spent.recipe.resolve(quantized_weights(CONFIG))
    assert {n for n in COSTS if rules[n].bits == 8} == set(spent.eight_bit)
    assert average_bits(CONFIG, rules) == spent.bits
    assert spent.cost == pytest.approx(sum(COSTS[n][B32] for n in COSTS if rules[n].bits == 4))


def test_bytes_are_spent_and_not_passed() -> None:
    parts = plan_parts(CONFIG, 5)
    plain = weight_bytes(CONFIG, RECIPE.resolve(quantized_weights(CONFIG)), parts)
    for size in (plain, plain + 20_000):
        spent = within_budget(RECIPE, CONFIG, BY_BLOCK, size=size, parts=parts)
        assert size - 1_000 < spent.nbytes <= size
        rules = spent.recipe.resolve(quantized_weights(CONFIG))
        assert weight_bytes(CONFIG, rules, parts) == spent.nbytes
        found = [rules[name].grid for name in COSTS]
        assert {Grid(8), Grid(4, 16)} & set(found) and len(set(found)) > 2
        assert spent.cost == pytest.approx(sum(BY_BLOCK[n].get(rules[n].grid, 0.0) for n in COSTS))


def test_the_most_gain_for_a_byte_comes_first() -> None:
    costs = {name: {B32: 0.001} for name in COSTS}
    costs["layers.11.self_attn.k_proj.weight"] = {B32: 0.1}  # small and dear
    costs["layers.1.mlp.down_proj.weight"] = {B32: 0.2}
    spent = within_budget(RECIPE, CONFIG, costs, bits=4.2)
    assert spent.eight_bit[:2] == ("layers.11.self_attn.k_proj.weight", "layers.1.mlp.down_proj.weight")


def test_layer_1_is_not_layer_11() -> None:
    costs = {name: {B32: 0.0} for name in COSTS}
    costs["layers.1.mlp.down_proj.weight"] = {B32: 1.0}
    elements = sum(r * c for r, c in (weight_table(CONFIG)[n].matrix for n in COSTS))
    one = 64 * 96 * 4 / elements
    rules = within_budget(RECIPE, CONFIG, costs, bits=4 + one).recipe.resolve(quantized_weights(CONFIG))
    assert [n for n in COSTS if rules[n].bits == 8] == ["layers.1.mlp.down_proj.weight"]


def test_everything_may_become_eight_bits() -> None:
    spent = within_budget(RECIPE, CONFIG, COSTS, bits=8)
    assert len(spent.eight_bit) == len(COSTS) and spent.bits == 8 and spent.cost == 0


def test_what_cannot_be_met_says_what_can() -> None:
    with pytest.raises(RecipeError, match=r"--bits 3.5 cannot be met: recipe 'plain' needs 4 at least"):
        within_budget(RECIPE, CONFIG, COSTS, bits=3.5)
    widest = RECIPE.with_linears(block=64, lpbq=False).resolve(quantized_weights(CONFIG))
    down = {n: replace(r, block=32) for n, r in widest.items() if weight_table(CONFIG)[n].matrix[1] == 96}
    least = weight_bytes(CONFIG, widest | down)
    with pytest.raises(RecipeError, match=rf"--size 1000 bytes cannot be met: recipe 'plain' needs {least} bytes"):
        within_budget(RECIPE, CONFIG, None, size=1000)
    for both in ({}, {"bits": 5.0, "size": 10**9}):
        with pytest.raises(RecipeError, match="either --bits or --size"):
            within_budget(RECIPE, CONFIG, None, **both)  # type: ignore[arg-type]


@pytest.mark.parametrize("extra", [0, 3_000, 9_000, 30_000])
def test_no_choice_of_grids_for_as_many_bytes_costs_less(extra: int) -> None:
    """Against every combination of grids for a few linears, the others being free of cost."""
    rng = np.random.default_rng(extra)
    few = [name for name in COSTS if name.startswith("layers.3.")]
    free = {name: dict.fromkeys(grids, 0.0) for name, grids in BY_BLOCK.items()}
    costs = dict(free)
    for name in few:
        costs[name] = dict(zip(free[name], sorted(rng.uniform(0.1, 2, len(free[name])), reverse=True), strict=True))
    least = within_budget(RECIPE, CONFIG, free, size=10**9).nbytes
    spent = within_budget(RECIPE, CONFIG, costs, size=least + extra)
    used, table = spent.nbytes - least, weight_table(CONFIG)

    def ways(name: str) -> list[tuple[float, int]]:
        grids = {**costs[name], Grid(8): 0.0}
        sizes = [grid.nbytes(*table[name].matrix) for grid in grids]
        return [(kl, size - min(sizes)) for kl, size in zip(grids.values(), sizes, strict=True)]

    within = [
        sum(kl for kl, _ in choice)
        for choice in itertools.product(*map(ways, few))
        if sum(more for _, more in choice) <= used
    ]
    assert spent.cost == pytest.approx(min(within))


def test_blocks_are_chosen_for_bytes_alone() -> None:
    rules = RECIPE.resolve(quantized_weights(CONFIG))
    name = "layers.0.self_attn.q_proj.weight"
    assert grids_to_try(CONFIG, rules, size=True)[name] == (B64, B32, B16)
    assert grids_to_try(CONFIG, rules, size=False)[name] == (B32,)
    rows = RECIPE.with_linears(block=None).resolve(quantized_weights(CONFIG))
    assert grids_to_try(CONFIG, rows, size=True)[name] == (Grid(4),)
