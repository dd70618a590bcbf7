"""The embedding's and the head's tables on their grids, a stretch of rows at a time.

The embedding is rounded to nearest. The head is a linear whose input is the final norm's: where its rule's method looks
at that, it is what the float model gives there, since the embedding, which may be the same table, comes before all
layers. This file does not know how a method works.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

import numpy as np
from numpy.typing import NDArray

from headrace.bundle.grid import QuantizedTensor, quantize_nearest, stacked
from headrace.bundle.recipe import Rule
from headrace.model.decoder import Residual
from headrace.model.ops import Array, Eager
from headrace.model.weights import EMBEDDING, FINAL_NORM
from headrace.quantize.exact import keep_grid
from headrace.quantize.methods import find_method
from headrace.quantize.parallel import parallel_map
from headrace.quantize.source import Source, load_layer, load_rows, load_weight
from headrace.quantize.statistics import InputStatistics
from headrace.quantize.windows import LayerWalk, causal_positions, embed_windows, evenly_spaced

__all__ = ["HEAD_METHOD", "HEAD_WINDOWS", "final_states", "head_statistics", "quantize_table"]

HEAD_METHOD = "gptq"  # of a head whose grid a budget chooses: a longer search gains nothing there
HEAD_WINDOWS = 8  # whose hidden states the head is calibrated on
_ROWS = 8192  # of a table that are in memory at once


def quantize_table(
    source: Source, name: str, rule: Rule, *, statistics: InputStatistics | None = None, keep: bool = False
) -> QuantizedTensor:
    """A table by its rule's method for an input with these statistics; to nearest without any.

    Args:
        statistics: of the head's input.
        keep: a table that lies on the rule's grid stays as it is.
    """

    def read(start: int) -> Array:
        return load_rows(source, name, start, start + _ROWS)

    def quantize(start: int) -> QuantizedTensor:
        if statistics is None:
            return quantize_nearest(read(start), rule.grid)
        return find_method(rule.method).quantize(read(start), statistics, rule.grid)

    # The table in float32, twice for a while, would be most of the memory that an export takes.
    starts = range(0, source.tensor(name).shape[0], _ROWS)
    if keep:
        kept = list(takewhile(lambda strip: strip is not None, (keep_grid(read(at), rule.grid, name) for at in starts)))
        if len(kept) == len(starts):
            return stacked([strip for strip in kept if strip is not None])
    return stacked(parallel_map(quantize, starts))


def final_states(source: Source, windows: NDArray[np.int64]) -> Array:
    """The float model's hidden states after its last layer for at most `HEAD_WINDOWS` windows (W, S), (W, S, H)."""
    config = source.config
    windows = evenly_spaced(windows, HEAD_WINDOWS)
    states = embed_windows(config, source.tensor(EMBEDDING), windows)
    at = causal_positions(config, windows.shape[1])
    for number in range(config.num_layers):
        LayerWalk(config, load_layer(source, number), number, states, at).finish()
    return states


def head_statistics(source: Source, states: Sequence[Array] | Array) -> InputStatistics:
    """Of the head's input, from the hidden states (S, H) of windows after the last layer."""
    ops = Eager(source.config, {FINAL_NORM: load_weight(source, FINAL_NORM)}.__getitem__)
    return InputStatistics.of([Residual(window).norm(ops, FINAL_NORM)[0] for window in states])
