"""Which linears get 8 bits under a budget: greedily by KL gained per byte. The choice is written as recipe rules.

Knows no weights and no text: only geometry, a recipe, and what each linear's 4 bits cost.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from headrace.bundle.grid import Grid
from headrace.bundle.recipe import Recipe, Rule
from headrace.bundle.weights import layouts
from headrace.config import ModelConfig
from headrace.errors import RecipeError
from headrace.model.weights import Role, Weight, linears, quantized_weights, weight_table
from headrace.plan import Part, plan_parts

__all__ = ["BudgetedRecipe", "average_bits", "weight_bytes", "within_budget"]

_EIGHT = Grid(8)
_ROUNDING = 1e-3  # bytes: a budget that fits exactly must not fail by float arithmetic


@dataclass(frozen=True)
class BudgetedRecipe:
    """A recipe that keeps within a budget, and what it comes to.

    Attributes:
        recipe: the recipe with rules for the 8-bit linears in front.
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


def within_budget(
    recipe: Recipe,
    config: ModelConfig,
    costs: Mapping[str, float],
    *,
    bits: float | None = None,
    size: int | None = None,
    parts: Sequence[Part] | None = None,
) -> BudgetedRecipe:
    """Give 8 bits per channel to the linears where that gains most KL per byte.

    Args:
        recipe: what every weight gets otherwise; linears it already gives 8 bits keep them.
        config: the geometry.
        costs: canonical name → KL that the linear's 4 bits cost, from `measure_sensitivity`.
        bits: most code bits averaged over the linears.
        size: most bytes of all weights files; either this or `bits`.
        parts: how files are split, for their headers.

    Raises:
        RecipeError: the budget cannot be met, or not exactly one of them is given.
    """
    if (bits is None) == (size is None):
        raise RecipeError("give either --bits or --size, not both and not neither")
    rules = recipe.resolve(quantized_weights(config))
    candidates = [name for name in linears(config) if rules[name].bits == 4 and costs[name] > 0]
    least_bits, least_bytes = average_bits(config, rules), weight_bytes(config, rules, parts)
    if bits is not None and bits < least_bits:
        raise RecipeError(
            f"--bits {bits:g} cannot be met: recipe {recipe.name!r} needs {least_bits:.4g} without any 8-bit layer"
        )
    if size is not None and size < least_bytes:
        raise RecipeError(
            f"--size {size} bytes cannot be met: recipe {recipe.name!r} needs {least_bytes} bytes "
            f"({least_bytes / 1e6:.1f} MB) without any 8-bit layer; give more or use larger blocks"
        )
    table = weight_table(config)
    extra = {name: _extra_bytes(table[name], rules[name].grid, count_scales=size is not None) for name in candidates}
    if bits is not None:
        elements = sum(linear.size for linear in linears(config).values())
        left = (bits - least_bits) * elements / 8 + _ROUNDING
    else:
        left = float((size or 0) - least_bytes)
    chosen = []
    for name in sorted(candidates, key=lambda n: -costs[n] / max(extra[n], 1)):
        if extra[name] <= left:
            chosen.append(name)
            left -= extra[name]
    mixed = _with_eight_bit_rules(recipe, rules, [table[name] for name in chosen])
    final = mixed.resolve(quantized_weights(config))
    return BudgetedRecipe(
        mixed,
        tuple(chosen),
        average_bits(config, final),
        weight_bytes(config, final, parts),
        sum(costs[name] for name in candidates if name not in set(chosen)),
    )


def _extra_bytes(weight: Weight, grid: Grid, *, count_scales: bool) -> int:
    """Bytes that a weight takes at 8 bits, less what it takes now; with `count_scales`, its scales too."""
    rows, columns = weight.matrix
    if count_scales:
        return _EIGHT.nbytes(rows, columns) - grid.nbytes(rows, columns)
    return weight.size * (8 - grid.bits) // 8


def _with_eight_bit_rules(recipe: Recipe, rules: Mapping[str, Rule], chosen: Sequence[Weight]) -> Recipe:
    """Rules for the chosen linears, one for each kind, in front of the recipe's; rules that then match no weight are
    dropped, since a recipe refuses them."""
    kinds: dict[Role, list[int]] = defaultdict(list)
    for weight in chosen:
        kinds[weight.role].append(weight.layer or 0)
    # Rounding to 8 bits costs so little that a longer search does not pay, but the correction of `best` still does.
    names = {weight.name for weight in chosen}
    methods = {rules[name].method for name in names}
    method = "best" if methods == {"best"} else "gptq"
    front = [
        Rule(rf"layers\.({'|'.join(map(str, sorted(layers)))})\.{re.escape(role.value)}", 8, None, method)
        for role, layers in kinds.items()
    ]
    left = {rule for name, rule in rules.items() if name not in names}
    return replace(recipe, rules=(*front, *(rule for rule in recipe.rules if rule in left)))
