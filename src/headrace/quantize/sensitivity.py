"""How much each weight's rounding costs in KL: its errors against the float model's gradients (see gradients.py).

The head's errors are those of the logits themselves; the embedding's are held against the gradients at the first
layer's input. Costs of different weights add up, to second order. Source: second-order pruning and quantization (LeCun
et al. 1990; Dong et al. 2019, HAWQ), with a randomised Fisher factor. This file does not know how a rule's method
works, nor how a recipe is stored.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrace.bundle.grid import Grid, QuantizedTensor, dequantize
from headrace.bundle.recipe import Rule
from headrace.model.ops import Array
from headrace.model.weights import EMBEDDING, HEAD, linears, weight_table
from headrace.quantize.gradients import AtLinear, walk_back
from headrace.quantize.layer import try_grids
from headrace.quantize.source import Source
from headrace.quantize.tables import HEAD_METHOD, head_statistics, quantize_table
from headrace.quantize.windows import causal_positions, evenly_spaced

__all__ = ["RANKING_WINDOWS", "measure_sensitivity"]

RANKING_WINDOWS = 4  # 2,048 tokens are enough to rank linears
_ROWS = 8192  # of a head's table whose errors are in memory at once, for each window
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
    """The KL, in nats, that quantizing each weight alone costs: canonical name → grid → KL.

    Args:
        source: the checkpoint.
        rules: canonical name → rule, whose method is used.
        grids: canonical name → grids that are tried; None: of every linear its rule's.
        windows: token ids of the calibration text, int64 (windows, length); a few are enough, and no more are used.
        keep: a weight that already lies on a grid is kept as it is, and costs nothing.
        seed: of the random factor.
        progress: called with (layers walked, all): forward and back count one each.
    """
    config = source.config
    windows = evenly_spaced(windows, RANKING_WINDOWS)
    rules = {name: replace(rule, method=_RANKING.get(rule.method, rule.method)) for name, rule in rules.items()}
    tried = {name: (rules[name].grid,) for name in linears(config)} if grids is None else grids
    head = weight_table(config)[HEAD].stored_as
    at = causal_positions(config, windows.shape[1])
    tokens, places = np.unique(windows, return_inverse=True)
    # By window, since these come from several threads. A tied head has costs in two places, which add up.
    found = [defaultdict[tuple[str, Grid], float](float) for _ in windows]

    embedding: dict[Grid, QuantizedTensor] = {}  # only the rows of these tokens

    def at_head(states: Array) -> AtLinear:
        trials: dict[Grid, QuantizedTensor] = {}
        if head in tried:
            statistics, rule = head_statistics(source, states), replace(rules[head], method=HEAD_METHOD)
            for grid in tried[head]:
                trials[grid] = quantize_table(source, head, rule.on(grid), statistics=statistics, keep=keep)
                if head == EMBEDDING:
                    embedding[grid] = trials[grid].rows(tokens)

        def at_linear(window: int, name: str, inputs: Array, g: Array) -> None:
            effects = {grid: np.zeros(len(inputs), np.float32) for grid in trials}
            for start in range(0, config.vocab_size if trials else 0, _ROWS):
                rows = slice(start, min(start + _ROWS, config.vocab_size))
                exact = source.tensor(head).read(rows.start, rows.stop)
                for grid, table in trials.items():
                    error = exact - dequantize(table.rows(rows))
                    effects[grid] += np.einsum("sn,sn->s", inputs @ error.T, g[:, rows])
            for grid, effect in effects.items():
                found[window][head, grid] += _half_square(effect)

        return at_linear

    def at_layer(number: int, weights: Mapping[str, Array], x: Array) -> AtLinear:
        # Codes, not the errors: these are four times as many bytes, and a layer has several of each linear.
        trials = try_grids(source, rules, tried, number, x.copy(), at, keep=keep)

        def at_linear(window: int, name: str, inputs: Array, g: Array) -> None:
            for grid, linear in trials.get(name, {}).items():
                effect = np.einsum("sn,sn->s", inputs @ (weights[name] - dequantize(linear)).T, g)
                found[window][name, grid] += _half_square(effect)

        return at_linear

    at_embedding = walk_back(source, windows, np.random.default_rng(seed), at_layer, progress, at_head=at_head)
    for grid in tried.get(EMBEDDING, ()):
        if head != EMBEDDING:
            rule = rules[EMBEDDING].on(grid)
            embedding[grid] = quantize_table(source, EMBEDDING, rule, keep=keep).rows(tokens)
        error = source.tensor(EMBEDDING).select(tokens) - dequantize(embedding[grid])
        for own, at_window, g in zip(found, places.reshape(windows.shape), at_embedding, strict=True):
            own[EMBEDDING, grid] += _half_square(np.einsum("sh,sh->s", error[at_window], g))
    return {
        name: {grid: sum(own[name, grid] for own in found) / windows.size for grid in own_grids}
        for name, own_grids in tried.items()
    }


def _half_square(effect: Array) -> float:
    """Half the sum of squares, in float64."""
    return 0.5 * float(np.square(effect, dtype=np.float64).sum())
