"""The grid of each linear under a budget: greedily by KL gained per byte. The choice is written as recipe rules.

A linear can have 8 bits instead of 4. Under a budget of bytes one whose scales are for blocks can also have 4 bits in
other blocks: smaller ones are truer and take more scales. Of a linear's choices only those on the lower convex hull of
KL over bytes can be part of a best choice; steps along all hulls are taken in the order of KL gained per byte.

Knows no weights and no text: only geometry, a recipe, and what each linear's 4 bits cost.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from headrace.bundle.grid import Grid
from headrace.bundle.recipe import Recipe, Rule
from headrace.bundle.weights import layouts
from headrace.config import ModelConfig
from headrace.errors import RecipeError
from headrace.model.weights import Role, linears, quantized_weights, weight_table
from headrace.plan import Part, plan_parts

__all__ = ["BudgetedRecipe", "Costs", "average_bits", "grids_to_try", "weight_bytes", "within_budget"]

Costs = Mapping[str, Mapping[Grid, float]]
"""Canonical name → grid → the KL that the linear costs on it, from `measure_sensitivity`; 8 bits cost none."""

_EIGHT = Grid(8)
_BLOCKS = (128, 64, 32, 16)
_ROUNDING = 1e-3  # bytes: a budget that fits exactly must not fail by float arithmetic


@dataclass(frozen=True)
class BudgetedRecipe:
    """A recipe that keeps within a budget, and what it comes to.

    Attributes:
        recipe: the recipe with rules in front for the linears that got other grids.
        eight_bit: names of the linears that got 8 bits, in the order they were chosen.
        bits: code bits averaged over the linears.
        nbytes: of all weights files.
        cost: the KL that the linears left at 4 bits are predicted to cost together.
    """

    recipe: Recipe
    eight_bit: tuple[str, ...]
    bits: float
    nbytes: int
    cost: float


def average_bits(config: ModelConfig, rules: Mapping[str, Rule]) -> float:
    """Code bits averaged over the weights of the linears, embedding and head not counted."""
    total = weights = 0
    for name, linear in linears(config).items():
        total += linear.size * rules[name].bits
        weights += linear.size
    return total / weights


def weight_bytes(config: ModelConfig, rules: Mapping[str, Rule], parts: Sequence[Part] | None = None) -> int:
    """Bytes of all weights files, headers and norms included."""
    grids = {name: rule.grid for name, rule in rules.items()}
    return sum(layout.nbytes for layout in layouts(config, parts or plan_parts(config, 1), grids))


def grids_to_try(config: ModelConfig, rules: Mapping[str, Rule], *, size: bool) -> dict[str, tuple[Grid, ...]]:
    """For each linear with 4 bits, the grids beside 8 bits that a budget can give it: its rule's alone, or, where that
    has blocks and the budget is one of bytes (`size`), those with all blocks that divide its rows."""
    found: dict[str, tuple[Grid, ...]] = {}
    for name, linear in linears(config).items():
        grid = rules[name].grid
        if grid.bits == 4:
            fitting = tuple(replace(grid, block=block) for block in _BLOCKS if linear.matrix[1] % block == 0)
            found[name] = fitting if size and grid.block is not None else (grid,)
    return found


def within_budget(
    recipe: Recipe,
    config: ModelConfig,
    costs: Costs | None,
    *,
    bits: float | None = None,
    size: int | None = None,
    parts: Sequence[Part] | None = None,
) -> BudgetedRecipe:
    """Give each linear the grid that is worth its bytes.

    Args:
        recipe: what every weight gets otherwise; linears it already gives 8 bits keep them.
        config: the geometry.
        costs: what was measured, of the linears that `grids_to_try` names: a linear gets one of these grids or 8 bits;
            None before anything is: all alike.
        bits: most code bits averaged over the linears.
        size: most bytes of all weights files; either this or `bits`.
        parts: how files are split, for their headers.

    Raises:
        RecipeError: the budget cannot be met, or not exactly one of them is given.
    """
    if (bits is None) == (size is None):
        raise RecipeError("give either --bits or --size, not both and not neither")
    rules = recipe.resolve(quantized_weights(config))
    table = weight_table(config)
    tried = grids_to_try(config, rules, size=size is not None)
    if costs is not None:
        tried = {name: tuple(costs[name]) for name in tried}

    def nbytes(name: str, grid: Grid) -> int:
        rows, columns = table[name].matrix
        return grid.nbytes(rows, columns) if size is not None else rows * columns * grid.bits // 8

    def kl(name: str, grid: Grid) -> float:
        if grid.bits == 8:
            return 0.0
        return costs[name][grid] if costs is not None else 1.0

    chosen: dict[str, Grid] = {}
    steps: list[tuple[float, int, str, Grid]] = []  # KL gained per byte, bytes, and what becomes of which linear
    for name, grids in tried.items():
        hull = _hull([*grids, _EIGHT], name, nbytes, kl)
        chosen[name] = hull[0]
        for before, after in pairwise(hull):
            more = nbytes(name, after) - nbytes(name, before)
            steps.append(((kl(name, before) - kl(name, after)) / more, more, name, after))
    least = _with_grids(recipe, config, rules, chosen)
    at_least = least.resolve(quantized_weights(config))
    least_bits, least_bytes = average_bits(config, at_least), weight_bytes(config, at_least, parts)
    if bits is not None and bits < least_bits:
        raise RecipeError(f"--bits {bits:g} cannot be met: recipe {recipe.name!r} needs {least_bits:.4g} at least")
    if size is not None and size < least_bytes:
        raise RecipeError(
            f"--size {size} bytes cannot be met: recipe {recipe.name!r} needs {least_bytes} bytes "
            f"({least_bytes / 1e6:.1f} MB) at least; give more or use larger blocks"
        )
    if bits is not None:
        elements = sum(linear.size for linear in linears(config).values())
        left = (bits - least_bits) * elements / 8 + _ROUNDING
    else:
        left = float((size or 0) - least_bytes)
    eight_bit, full = [], set()
    for _, more, name, grid in sorted(steps, key=lambda step: -step[0]):
        if name in full or more > left:
            full.add(name)  # a later step of a linear stands on the earlier ones
            continue
        left -= more
        chosen[name] = grid
        if grid.bits == 8:
            eight_bit.append(name)
    mixed = _with_grids(recipe, config, rules, chosen)
    final = mixed.resolve(quantized_weights(config))
    return BudgetedRecipe(
        mixed,
        tuple(eight_bit),
        average_bits(config, final),
        weight_bytes(config, final, parts),
        sum(kl(name, grid) for name, grid in chosen.items()),
    )


def _hull(
    grids: Sequence[Grid], name: str, nbytes: Callable[[str, Grid], int], kl: Callable[[str, Grid], float]
) -> list[Grid]:
    """The grids on the lower convex hull of KL over bytes, from the fewest bytes on; each costs less KL than the one
    before, and gains less per byte."""
    hull: list[Grid] = []

    def gain(a: Grid, b: Grid) -> float:
        return (kl(name, a) - kl(name, b)) / (nbytes(name, b) - nbytes(name, a))

    for grid in sorted(grids, key=lambda grid: (nbytes(name, grid), kl(name, grid))):
        if hull and (kl(name, grid) >= kl(name, hull[-1]) or nbytes(name, grid) == nbytes(name, hull[-1])):
            continue
        while len(hull) > 1 and gain(hull[-2], hull[-1]) <= gain(hull[-1], grid):
            hull.pop()
        hull.append(grid)
    return hull


def _with_grids(recipe: Recipe, config: ModelConfig, rules: Mapping[str, Rule], grids: Mapping[str, Grid]) -> Recipe:
    """Rules in front of the recipe's for linears that get another grid, one for each kind and grid; rules that then
    match no weight are dropped, since a recipe refuses them."""
    table = weight_table(config)
    changed = {name: grid for name, grid in grids.items() if grid != rules[name].grid}
    kinds: dict[tuple[Role, Grid, str], list[int]] = defaultdict(list)
    for name, grid in changed.items():
        # Rounding to 8 bits costs so little that a longer search does not pay, but the correction of `best` still does.
        method = rules[name].method if grid.bits == 4 or rules[name].method == "best" else "gptq"
        kinds[table[name].role, grid, method].append(table[name].layer or 0)
    front = [
        Rule(rf"layers\.({'|'.join(map(str, sorted(layers)))})\.{re.escape(role.value)}", 8, None, method).on(grid)
        for (role, grid, method), layers in kinds.items()
    ]
    left = {rule for name, rule in rules.items() if name not in changed}
    return replace(recipe, rules=(*front, *(rule for rule in recipe.rules if rule in left)))
