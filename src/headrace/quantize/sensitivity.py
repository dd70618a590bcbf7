"""How much each linear's rounding costs in KL: its errors against the float model's gradients (see gradients.py).

Costs of different linears add up, to second order. Source: second-order pruning and quantization (LeCun et al. 1990;
Dong et al. 2019, HAWQ), with a randomised Fisher factor. This file does not know how a rule's method works, nor how a
recipe is stored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrace.bundle.grid import Grid, dequantize
from headrace.bundle.recipe import Rule
from headrace.model.ops import Array
from headrace.model.weights import linears
from headrace.quantize.gradients import AtLinear, walk_back
from headrace.quantize.pipeline import Source, try_grids
from headrace.quantize.windows import causal_positions, evenly_spaced

__all__ = ["RANKING_WINDOWS", "measure_sensitivity"]

RANKING_WINDOWS = 4  # 2,048 tokens are enough to rank linears
_RANKING = {"descent": "gptq", "best": "gptq", "awq": "gptq"}  # a longer search ranks no better


def measure_sensitivity(
    source: Source,
    rules: Mapping[str, Rule],
    windows: NDArray[np.int64],
    *,
    grids: Mapping[str, Sequence[Grid]] | None = None,
    keep: bool = False,
    seed: int = 0,
    progress: Callable[[int, int], Any] | None = None,
) -> dict[str, dict[Grid, float]]:
    """The KL, in nats, that quantizing each linear alone costs: canonical name → grid → KL.

    Args:
        source: the checkpoint.
        rules: canonical name → rule, whose method is used.
        grids: canonical name → grids that are tried; None: of every linear its rule's.
        windows: token ids of the calibration text, int64 (windows, length); a few are enough, and no more are used.
        keep: a linear that already lies on its rule's grid is kept as it is, and costs nothing.
        seed: of the random factor.
        progress: called with (layers walked, all): forward and back count one each.
    """
    config = source.config
    windows = evenly_spaced(windows, RANKING_WINDOWS)
    rules = {name: replace(rule, method=_RANKING.get(rule.method, rule.method)) for name, rule in rules.items()}
    tried = {name: (rules[name].grid,) for name in linears(config)} if grids is None else grids
    at = causal_positions(config, windows.shape[1])
    found = [dict[tuple[str, Grid], float]() for _ in windows]  # by window: these come from several threads

    def at_layer(number: int, weights: Mapping[str, Array], x: Array) -> AtLinear:
        # Codes, not the errors: these are four times as many bytes, and a layer has several of each linear.
        trials = try_grids(source, rules, tried, number, x.copy(), at, keep=keep)

        def at_linear(window: int, name: str, inputs: Array, g: Array) -> None:
            for grid, linear in trials.get(name, {}).items():
                effect = np.einsum("sn,sn->s", inputs @ (weights[name] - dequantize(linear)).T, g)
                found[window][name, grid] = 0.5 * float(np.square(effect, dtype=np.float64).sum())

        return at_linear

    walk_back(source, windows, np.random.default_rng(seed), at_layer, progress)
    return {
        name: {grid: sum(own[name, grid] for own in found) / windows.size for grid in own_grids}
        for name, own_grids in tried.items()
    }
