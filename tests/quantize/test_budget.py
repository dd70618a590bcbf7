"""Who gets which bits and blocks: the choice within a budget, its limits and its rules."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from headrace.bundle.grid import Grid
from headrace.bundle.recipe import Recipe, Rule
from headrace.config import ModelConfig
from headrace.errors import RecipeError
from headrace.model.weights import EMBEDDING, HEAD, linears, quantized_weights, weight_table
from headrace.plan import plan_parts
from headrace.quantize.budget import Costs, average_bits, grids_to_try, guessed_costs, weight_bytes, within_budget
from headrace.quantize.tables import HEAD_METHOD

CONFIG = ModelConfig("llama", 160, 64, 96, 12, 4, 2, 16, 1e-5, 1e4, 512, True)
RECIPE = Recipe("plain", (Rule("embed_tokens|lm_head", 8, None, "nearest"), Rule("_proj", 4, 32, "gptq")))
RULES = RECIPE.resolve(quantized_weights(CONFIG))
TABLE = weight_table(CONFIG)
ROWS_OF_64, ROWS_OF_96 = "layers.3.self_attn.q_proj.weight", "layers.3.mlp.down_proj.weight"
EIGHT = Grid(8)
# As rounding errors go: a bit more halves them, a larger block has a larger peak. The first linears cost most.
COSTS: Costs = {
    name: {grid: 256 * 4.0**-grid.bits * (grid.block or 512) ** 0.4 / (number + 1) for grid in grids}
    for number, (name, grids) in enumerate(grids_to_try(CONFIG, RULES, size=True).items())
    if TABLE[name].layer is not None
}
TWO: Costs = {name: {grid: COSTS[name][grid] for grid in (Grid(4, 32), EIGHT)} for name in COSTS}
HEADER = 512  # bytes: of four linears' sizes and of the file's, each to the next multiple of 64, and of longer numbers
NOISE = 1e-12  # of float64 sums in another order


def chosen(recipe: Recipe) -> dict[str, Grid]:
    """The grid of each linear."""
    rules = recipe.resolve(quantized_weights(CONFIG))
    return {name: rules[name].grid for name in COSTS}


def cost(grids: dict[str, Grid], costs: Costs) -> float:
    """What a choice of grids costs."""
    return sum(costs[name][grid] for name, grid in grids.items())


def test_bits_are_spent_and_not_passed() -> None:
    spent = within_budget(RECIPE, CONFIG, TWO, bits=5.0)
    sizes = [linear.size for linear in linears(CONFIG).values()]
    assert 5.0 - 4 * min(sizes) / sum(sizes) < spent.bits <= 5.0 + 1e-9
    grids = chosen(spent.recipe)
    assert set(grids.values()) == {Grid(4, 32), EIGHT}
    assert average_bits(CONFIG, spent.recipe.resolve(quantized_weights(CONFIG))) == spent.bits
    assert spent.cost == pytest.approx(cost(grids, TWO))


@pytest.mark.parametrize("lpbq", [False, True])
def test_bytes_are_spent_and_not_passed(lpbq: bool) -> None:
    parts, recipe = plan_parts(CONFIG, 5), RECIPE.with_linears(linears(CONFIG), lpbq=lpbq)
    rules = recipe.resolve(quantized_weights(CONFIG))
    tried = grids_to_try(CONFIG, rules, size=True)
    costs = {name: dict(zip(tried[name], COSTS[name].values(), strict=True)) for name in COSTS}
    plain = weight_bytes(CONFIG, rules, parts)
    kinds = set()
    for size in (plain, plain + 20_000, plain + 60_000, plain + 100_000):
        spent = within_budget(recipe, CONFIG, costs, size=size, parts=parts)
        assert size - 1_000 < spent.nbytes <= size
        assert weight_bytes(CONFIG, spent.recipe.resolve(quantized_weights(CONFIG)), parts) == spent.nbytes
        grids = chosen(spent.recipe)
        assert spent.cost == pytest.approx(cost(grids, costs))
        kinds |= set(grids.values())
    assert {grid.bits for grid in kinds} == {4, 5, 6, 8} and {grid.lpbq for grid in kinds} == {lpbq, False}
    assert len({grid.block for grid in kinds}) > 2


def test_the_most_gain_for_a_byte_comes_first() -> None:
    costs = {name: {Grid(4, 32): 0.001, EIGHT: 0.0} for name in COSTS}
    small, large = "layers.11.self_attn.k_proj.weight", "layers.1.mlp.down_proj.weight"
    costs[small][Grid(4, 32)] = 0.1  # small and dear
    costs[large][Grid(4, 32)] = 0.2
    elements = sum(linear.size for linear in linears(CONFIG).values())
    for names in ([small], [small, large]):
        bits = 4 + 4 * sum(TABLE[name].size for name in names) / elements
        grids = chosen(within_budget(RECIPE, CONFIG, costs, bits=bits).recipe)
        assert sorted(names) == sorted(name for name, grid in grids.items() if grid == EIGHT)


def test_layer_1_is_not_layer_11() -> None:
    costs = {name: {Grid(4, 32): 0.0, EIGHT: 0.0} for name in COSTS}
    one = "layers.1.mlp.down_proj.weight"
    costs[one][Grid(4, 32)] = 1.0
    bits = 4 + 4 * TABLE[one].size / sum(linear.size for linear in linears(CONFIG).values())
    grids = chosen(within_budget(RECIPE, CONFIG, costs, bits=bits).recipe)
    assert [name for name, grid in grids.items() if grid == EIGHT] == [one]


def test_everything_may_become_eight_bits() -> None:
    spent = within_budget(RECIPE, CONFIG, TWO, bits=8)
    assert set(chosen(spent.recipe).values()) == {EIGHT} and spent.bits == 8
    assert spent.cost == pytest.approx(sum(by_grid[EIGHT] for by_grid in TWO.values()))


def test_more_bits_that_cost_more_are_not_bought() -> None:
    costs = {name: {Grid(4, 32): 0.01, EIGHT: 0.02} for name in COSTS}
    assert set(chosen(within_budget(RECIPE, CONFIG, costs, bits=8).recipe).values()) == {Grid(4, 32)}


def test_what_cannot_be_met_says_what_can() -> None:
    with pytest.raises(RecipeError, match=r"--bits 3.5 cannot be met: recipe 'plain' needs 4 at least"):
        within_budget(RECIPE, CONFIG, TWO, bits=3.5)
    widest = RECIPE.with_linears(linears(CONFIG), block=64, lpbq=False).resolve(quantized_weights(CONFIG))
    down = {name: replace(rule, block=32) for name, rule in widest.items() if TABLE[name].matrix[1] == 96}
    least = weight_bytes(CONFIG, widest | down)
    with pytest.raises(RecipeError, match=rf"--size 1000 bytes cannot be met: recipe 'plain' needs {least} bytes"):
        within_budget(RECIPE, CONFIG, guessed_costs(COSTS), size=1000)
    for both in ({}, {"bits": 5.0, "size": 10**9}):
        with pytest.raises(RecipeError, match="either --bits or --size"):
            within_budget(RECIPE, CONFIG, COSTS, **both)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(4))
def test_no_choice_of_grids_for_as_many_bytes_costs_less(seed: int) -> None:
    """Against every combination of grids for a few linears, the others free of cost.

    Where a budget is used up by what gains most for a byte, which are the corners of the lower hull of all
    combinations' costs over bytes, nothing is better; there is room for what rounds a file's header up.
    """
    # So large that the header's rounding does not decide between grids.
    config = replace(CONFIG, hidden_size=256, intermediate_size=384, head_dim=64, num_layers=2)
    rules = RECIPE.resolve(quantized_weights(config))
    rng = np.random.default_rng(seed)
    costs, few = {}, [name for name in linears(config) if name.startswith("layers.1.")][::2]
    for name, grids in grids_to_try(config, rules, size=True).items():
        noise = rng.uniform(0.3, 3, len(grids)) if name in few else np.zeros(len(grids))
        costs[name] = {
            grid: float(4.0**-grid.bits * (grid.block or 512) ** 0.4 * more)
            for grid, more in zip(grids, noise, strict=True)
        }
    free: Costs = {name: dict.fromkeys(grids, 0.0) for name, grids in costs.items()}
    least = within_budget(RECIPE, config, free, size=10**9).nbytes
    ways = [
        [(weight_bytes(config, rules | {name: rules[name].on(grid)}), kl) for grid, kl in costs[name].items()]
        for name in few
    ]
    smallest = sum(min(size for size, _ in way) for way in ways)
    best: dict[int, float] = {}
    for choice in itertools.product(*ways):
        more = sum(size for size, _ in choice) - smallest
        best[more] = min(best.get(more, np.inf), sum(kl for _, kl in choice))
    corners = [min(best)]
    while best[corners[-1]] > min(best.values()):
        at = corners[-1]
        corners.append(
            max((size for size in best if size > at), key=lambda size: ((best[at] - best[size]) / (size - at), size))
        )
    assert len(corners) > 8
    for corner in corners:
        spent = within_budget(RECIPE, config, costs, size=least + corner + HEADER)
        within = min(kl for size, kl in best.items() if size <= corner + HEADER)
        assert within - NOISE <= spent.cost <= best[corner] + NOISE


def test_bytes_buy_bits_and_blocks_and_bits_buy_eight() -> None:
    def tried(recipe: Recipe, name: str, **budget: bool) -> tuple[Grid, ...]:
        return grids_to_try(CONFIG, recipe.resolve(quantized_weights(CONFIG)), **budget)[name]

    more = {Grid(bits, block) for bits in (5, 6) for block in (32, 16)} | {EIGHT}
    of_96 = {Grid(4, 32), Grid(4, 16)} | more
    of_64 = of_96 | {Grid(4, 64)}
    assert set(tried(RECIPE, ROWS_OF_64, size=True)) == of_64
    assert set(tried(RECIPE, ROWS_OF_96, size=True)) == of_96
    assert set(tried(RECIPE, ROWS_OF_64, size=True, keep=True)) == of_64 | {Grid(8, 32)}
    assert tried(RECIPE, ROWS_OF_64, size=False, keep=True) == (Grid(4, 32), EIGHT)
    factors = RECIPE.with_linears(linears(CONFIG), block=16)
    assert set(tried(factors, ROWS_OF_64, size=True)) == {replace(g, lpbq=g != EIGHT) for g in of_64}
    phone = {Grid(4, block, lpbq=True) for block in (64, 32, 16)} | {EIGHT}
    assert set(tried(factors, ROWS_OF_64, size=True, device=True)) == phone
    rows = RECIPE.with_linears(linears(CONFIG), block=None)
    assert tried(rows, ROWS_OF_64, size=True) == (Grid(4), EIGHT)
    five = replace(RECIPE, rules=(RECIPE.rules[0], Rule("q_proj", 5, 32, "gptq"), RECIPE.rules[1]))
    assert set(tried(five, ROWS_OF_64, size=True)) == more
    assert tried(five, ROWS_OF_64, size=False) == (Grid(5, 32), EIGHT)


def test_the_embedding_and_the_head_have_fewer_bits_where_that_gains_most() -> None:
    """Bytes to the last one, and rules that give every weight what was chosen."""
    untied = replace(CONFIG, tied_head=False)
    for config in (CONFIG, untied):
        tables = [name for name, weight in quantized_weights(config).items() if weight.layer is None]
        rules = RECIPE.with_linears(linears(CONFIG), lpbq=True).resolve(quantized_weights(config))
        recipe = RECIPE.with_linears(linears(CONFIG), lpbq=True)
        tried = grids_to_try(config, rules, size=True)
        assert set(tables) < set(tried)
        assert all({grid.bits for grid in tried[name]} == {5, 6, 8} for name in tables)
        costs = {name: {grid: 4.0**-grid.bits for grid in grids} for name, grids in tried.items()}
        least = within_budget(recipe, config, costs, size=10**9).nbytes - 1_500
        kinds = set()
        for cheap in tables:
            others = {name: {grid: 1e3 * kl for grid, kl in costs[name].items()} for name in costs if name != cheap}
            spent = within_budget(recipe, config, {**others, cheap: costs[cheap]}, size=least)
            resolved = spent.recipe.resolve(quantized_weights(config))
            assert spent.nbytes == weight_bytes(config, resolved) <= least
            assert {name for name, rule in resolved.items() if rule.bits < 8} == {cheap}
            is_head = cheap == weight_table(config)[HEAD].stored_as
            assert resolved[cheap].method == (HEAD_METHOD if is_head else "nearest")
            kinds.add(resolved[cheap].grid)
        assert all(grid.bits in (5, 6) and grid.lpbq for grid in kinds)
    for nothing in ({"size": False}, {"size": True, "device": True}):
        assert not {EMBEDDING, HEAD} & set(grids_to_try(untied, rules, **nothing))
    rows = RECIPE.with_linears(linears(CONFIG), block=None).resolve(quantized_weights(untied))
    assert not {EMBEDDING, HEAD} & set(grids_to_try(untied, rows, size=True))
    kept = grids_to_try(untied, rules, size=True, keep=True)
    assert {Grid(8, 32), Grid(5, 32, lpbq=True)} <= set(kept[HEAD])


def test_what_is_planned_has_the_size_of_what_is_chosen() -> None:
    size = weight_bytes(CONFIG, RULES) + 60_000
    planned = within_budget(RECIPE, CONFIG, guessed_costs(grids_to_try(CONFIG, RULES, size=True)), size=size)
    assert size - 1_000 < planned.nbytes <= size


def test_a_longer_search_is_kept_for_less_than_eight_bits() -> None:
    recipe = RECIPE.with_linears(linears(CONFIG), method="descent")
    size = weight_bytes(CONFIG, recipe.resolve(quantized_weights(CONFIG))) + 60_000
    rules = within_budget(recipe, CONFIG, COSTS, size=size).recipe.resolve(quantized_weights(CONFIG))
    assert {(rules[name].bits == 8, rules[name].method) for name in COSTS} == {(False, "descent"), (True, "gptq")}
