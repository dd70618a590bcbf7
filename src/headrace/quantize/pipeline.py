"""Layer after layer: calibrate on the outputs of the layers quantized before, quantize, emit, go on.

    windows ─ embed ─► layer 0 ─► layer 1 ─► … ─► the final norm's input
                         │ at each group of linears: second moments ─► codes ─► the group is computed with them

Every linear is calibrated on what the quantized linears before it give, also those of its own layer. A layer that an
interrupted export has finished is computed again with its codes, which gives bit-identical inputs to the rest.
This file does not know where layers go, nor how one is quantized (layer.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from headrace.bundle.grid import QuantizedTensor
from headrace.bundle.recipe import Rule
from headrace.model.ops import Array
from headrace.model.weights import EMBEDDING, linears
from headrace.quantize.layer import QuantizedLayer, quantize_layer
from headrace.quantize.methods import find_method
from headrace.quantize.parallel import cores
from headrace.quantize.source import Source, load_layer
from headrace.quantize.windows import LayerWalk, causal_positions, embed_windows

__all__ = ["LayerStage", "quantize_layers"]


class LayerStage(Protocol):
    """Where hidden states wait between two runs: those of the calibration windows after some layers."""

    def read(self, states: Sequence[Array]) -> int:
        """How many layers the kept states have been through, having filled `states` with them; 0 without any."""

    def write(self, layers: int, states: Sequence[Array]) -> None:
        """Keep the states after so many layers, in place of those kept before."""


def quantize_layers(
    source: Source,
    rules: Mapping[str, Rule],
    windows: NDArray[np.int64],
    emit: Callable[[QuantizedLayer], None],
    *,
    embedding: QuantizedTensor | None = None,
    finished: Callable[[int], QuantizedLayer | None] | None = None,
    stage: LayerStage | None = None,
    energy: Mapping[str, Array] | None = None,
    jobs: int = 2,
    keep: bool = False,
    progress: Callable[[int, int], Any] | None = None,
) -> None:
    """Quantize every layer's linears.

    Args:
        source: the checkpoint.
        rules: canonical name → rule, as `Recipe.resolve` gives.
        windows: token ids of the calibration text, int64 (windows, length).
        emit: called with each layer that this call quantized, in order.
        embedding: the embedding's table as it will be used; the float one when None.
        finished: gives a layer that an interrupted run already emitted, or None.
        stage: keeps the hidden states after each layer, so that a resumed run need not compute them again.
        energy: what `gradients.gradient_energy` gives for these windows, for methods that use it.
        jobs: cores to use; the result does not depend on it.
        keep: a linear that already lies on its rule's grid is kept as it is.
        progress: called with (layers done, layers) before each layer and at the end.

    Raises:
        RecipeError: a rule names an unknown method or a block that does not divide a row.
    """
    with cores(jobs):
        known = finished or (lambda number: None)
        _quantize_layers(source, rules, windows, emit, embedding, known, stage, energy or {}, keep, progress)


def _quantize_layers(
    source: Source,
    rules: Mapping[str, Rule],
    windows: NDArray[np.int64],
    emit: Callable[[QuantizedLayer], None],
    embedding: QuantizedTensor | None,
    finished: Callable[[int], QuantizedLayer | None],
    stage: LayerStage | None,
    energy: Mapping[str, Array],
    keep: bool,
    progress: Callable[[int, int], Any] | None,
) -> None:
    config = source.config
    at = causal_positions(config, windows.shape[1])
    table = source.tensor(EMBEDDING)
    states = embed_windows(config, table if embedding is None else embedding, windows)
    float_states: Array | None = None
    if any(find_method(rules[name].method).uses_reference for name in linears(config)):
        float_states = embed_windows(config, table, windows)
    walked = [states] if float_states is None else [states, float_states]
    for number in range(0 if stage is None else stage.read(walked), config.num_layers):
        if progress is not None:
            progress(number, config.num_layers)
        reference: LayerWalk | None = None
        if float_states is not None:
            weights = load_layer(source, number)
            reference = LayerWalk(config, weights, number, float_states, at)
            del weights
        known = finished(number)
        if known is None:
            layer = quantize_layer(source, rules, number, states, at, reference, energy=energy, keep=keep)
            emit(layer)
        else:
            LayerWalk(config, known.weights(config), number, states, at).finish()
            if reference is not None:
                reference.finish()
        if stage is not None:
            stage.write(number + 1, walked)
    if progress is not None:
        progress(config.num_layers, config.num_layers)
