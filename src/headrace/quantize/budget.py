"""The grid of each weight under a budget: greedily by KL gained per byte. The choice is written as recipe rules.

A linear can have 8 bits instead of 4. Under a budget of bytes one whose scales are for blocks can also have 5 or 6
bits, and other blocks: smaller ones are truer and take more scales; the embedding and the head can then have less than
8 bits. Of a weight's choices only those on the lower convex hull of KL over bytes can be part of a best choice; steps
along all hulls are taken in the order of KL gained per byte.

Knows no weights and no text: only geometry, a recipe, and what each weight costs on each grid.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from headrace.bundle.grid import Grid
from headrace.bundle.recipe import Recipe, Rule
from headrace.bundle.weights import layouts
from headrace.config import ModelConfig
from headrace.errors import RecipeError
from headrace.model.weights import HEAD, Role, linears, quantized_weights, weight_table
from headrace.plan import Part, plan_parts
from headrace.quantize.tables import HEAD_METHOD

__all__ = ["BudgetedRecipe", "Costs", "average_bits", "grids_to_try", "guessed_costs", "weight_bytes", "within_budget"]

Costs = Mapping[str, Mapping[Grid, float]]
"""Canonical name → grid → the KL that the weight costs on it, from `measure_sensitivity`."""

_EIGHT = Grid(8)
# By bits: the blocks that are tried beside the rule's own. Larger ones were never worth choosing (docs/LOG.md).
_BLOCKS = {4: (64, 32, 16), 5: (32, 16), 6: (32, 16)}
_Step = tuple[float, int, str, Grid]  # KL gained per byte, bytes, and what becomes of which weight
_HEADER = 76  # bytes that a file's header has of each tensor beside its weight's name
_ROUNDING = 1e-3  # bytes: a budget that fits exactly must not fail by float arithmetic


@dataclass(frozen=True)
class BudgetedRecipe:
    """A recipe that keeps within a budget, and what it comes to.

    Attributes:
        recipe: the recipe with rules in front for the weights that got other grids.
        bits: code bits averaged over the linears.
        nbytes: of all weights files.
        cost: the KL that the weights are predicted to cost together, those without a choice left out.
    """

    recipe: Recipe
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


def grids_to_try(
    config: ModelConfig, rules: Mapping[str, Rule], *, size: bool, keep: bool = False, device: bool = False
) -> dict[str, tuple[Grid, ...]]:
    """The grids that a budget can give each weight: a linear of less than 8 bits its rule's and 8 bits.

    Args:
        config: the geometry.
        rules: canonical name → rule.
        size: the budget is one of bytes: a linear whose rule has blocks can get others, and more bits in blocks, with
            the same kind of scales. Where linears have blocks, the embedding and the head can have 5 or 6 bits.
        keep: weights that lie on a grid are kept: 8 bits in blocks as well, since checkpoints have them (GGUF's Q8_0).
        device: the bundle is for a device, where 5 and 6 bits take as many bytes as 8.
    """
    in_blocks = [rules[name].lpbq for name in linears(config) if rules[name].block is not None]
    found: dict[str, tuple[Grid, ...]] = {}
    for name, weight in quantized_weights(config).items():
        grid, columns = rules[name].grid, weight.matrix[1]
        if weight.layer is None:
            if not (size and in_blocks) or device:
                continue
            more, least, lpbq = True, 5, in_blocks[0]
        else:
            if grid.bits == 8:
                continue
            more, least, lpbq = size and grid.block is not None, grid.bits, grid.lpbq
        tried = [grid, _EIGHT]
        if more:
            tried += [
                Grid(bits, block, lpbq)
                for bits, blocks in _BLOCKS.items()
                for block in blocks
                if bits >= least and columns % block == 0 and not (device and bits > 4)
            ]
            if keep and columns % 32 == 0:
                tried.append(Grid(8, 32))
        found[name] = tuple(dict.fromkeys(tried))
    return found


def guessed_costs(grids: Mapping[str, Sequence[Grid]]) -> Costs:
    """Costs before any are measured, for a budget that is only looked at: a bit more halves the error."""
    return {name: {grid: 4.0**-grid.bits for grid in tried} for name, tried in grids.items()}


def within_budget(
    recipe: Recipe,
    config: ModelConfig,
    costs: Costs,
    *,
    bits: float | None = None,
    size: int | None = None,
    parts: Sequence[Part] | None = None,
) -> BudgetedRecipe:
    """Give each weight the grid that is worth its bytes.

    Args:
        recipe: what every weight gets otherwise; linears it already gives 8 bits keep them.
        config: the geometry.
        costs: what was measured, or guessed: a weight that is named gets one of these grids.
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

    def nbytes(name: str, grid: Grid) -> int:
        rows, columns = table[name].matrix
        if size is None:
            return rows * columns * grid.bits // 8
        tensors = 2 + (grid.high_bits > 0) + grid.lpbq  # codes and scales, high bits, factors
        return grid.nbytes(rows, columns) + tensors * (len(name) + _HEADER)

    def kl(name: str, grid: Grid) -> float:
        return costs[name][grid]

    least: dict[str, Grid] = {}
    steps: list[_Step] = []
    for name, tried in costs.items():
        hull = _hull(tried, name, nbytes, kl)
        least[name] = hull[0]
        for before, after in pairwise(hull):
            more = nbytes(name, after) - nbytes(name, before)
            steps.append(((kl(name, before) - kl(name, after)) / more, more, name, after))
    at_least = _with_grids(recipe, config, rules, least).resolve(quantized_weights(config))
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
    while True:
        chosen = _spent(least, sorted(steps, key=lambda step: -step[0]), left)
        mixed = _with_grids(recipe, config, rules, chosen)
        final = mixed.resolve(quantized_weights(config))
        total = weight_bytes(config, final, parts)
        if size is None or total <= size:
            break
        left -= total - size  # numbers in a header were longer
    return BudgetedRecipe(
        mixed, average_bits(config, final), total, sum(kl(name, grid) for name, grid in chosen.items())
    )


def _spent(least: Mapping[str, Grid], steps: Iterable[_Step], left: float) -> dict[str, Grid]:
    """The grids of weights after those steps, taken in their order, for which so many bytes are enough."""
    chosen = dict(least)
    full: set[str] = set()
    for _, more, name, grid in steps:
        if name in full or more > left:
            full.add(name)  # a later step of a weight stands on the earlier ones
            continue
        left -= more
        chosen[name] = grid
    return chosen


def _hull(
    grids: Iterable[Grid], name: str, nbytes: Callable[[str, Grid], int], kl: Callable[[str, Grid], float]
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
    """Rules in front of the recipe's for weights that get another grid, one for each kind and grid; rules that then
    match no weight are dropped, since a recipe refuses them."""
    table = weight_table(config)
    head = table[HEAD].stored_as
    changed = {name: grid for name, grid in grids.items() if grid != rules[name].grid or name == head}
    kinds: dict[tuple[Role, Grid, str], list[int]] = defaultdict(list)
    for name, grid in changed.items():
        # Rounding to 8 bits costs so little that a longer search does not pay, but the correction of `best` still does.
        layer, method = table[name].layer, rules[name].method
        if name == head:
            method = HEAD_METHOD
        elif layer is not None and grid.bits == 8 and method != "best":
            method = "gptq"
        kinds[table[name].role, grid, method] += [] if layer is None else [layer]
    front = [
        Rule(
            (rf"layers\.({'|'.join(map(str, sorted(layers)))})\." if layers else "^") + re.escape(role.value),
            8,
            None,
            method,
        ).on(grid)
        for (role, grid, method), layers in kinds.items()
    ]
    left = {rule for name, rule in rules.items() if name not in changed}
    return replace(recipe, rules=(*front, *(rule for rule in recipe.rules if rule in left)))
