"""The search for a recipe: sensitivities from a few calibration windows, spent under a budget.

    measure_sensitivity ─► KL of each linear at 4 bits ─► spend ─► a recipe with its 8-bit linears as rules

A found recipe can be saved and used again: it is data, and names no text. Knows no file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrace.plan import Part
from headrace.quantize.budget import Spending, spend
from headrace.quantize.pipeline import Source, linear_names
from headrace.quantize.recipe import Recipe
from headrace.quantize.sensitivity import measure_sensitivity
from headrace.quantize.storage import quantized_names

__all__ = ["SEARCH_WINDOWS", "search_recipe"]

SEARCH_WINDOWS = 4
"""Windows that are enough to rank linears: 2,048 tokens."""

_RANKING = {"descent": "gptq", "best": "gptq"}


def search_recipe(
    source: Source,
    recipe: Recipe,
    windows: NDArray[np.int64],
    *,
    bits: float | None = None,
    size: int | None = None,
    parts: Sequence[Part] | None = None,
    seed: int = 0,
    progress: Callable[[int, int], Any] | None = None,
) -> Spending:
    """Give 8 bits to the linears that need them most.

    Args:
        source: the checkpoint.
        recipe: what every weight gets otherwise.
        windows: calibration windows, int64 (windows, length); a few of them are used, spread evenly.
        bits: most code bits averaged over the linears.
        size: most bytes of all weights files; either this or `bits`.
        parts: how files are split, for their headers.
        seed: of the sensitivities' random factor.
        progress: called with (layers walked, all).

    Raises:
        RecipeError: the budget cannot be met; said before anything is measured.
    """
    config = source.config
    rules = recipe.resolve(quantized_names(config))
    names = linear_names(config)
    spend(recipe, config, dict.fromkeys(names, 1.0), bits=bits, size=size, parts=parts)  # refuses what cannot be met
    few = windows[np.linspace(0, len(windows) - 1, min(SEARCH_WINDOWS, len(windows))).round().astype(int)]
    # A longer search than GPTQ's ranks no better.
    tried = {name: replace(rules[name], method=_RANKING.get(rules[name].method, rules[name].method)) for name in names}
    costs = measure_sensitivity(source, tried, few, seed=seed, progress=progress)
    return spend(recipe, config, costs, bits=bits, size=size, parts=parts)
