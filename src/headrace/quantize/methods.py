"""The registry of methods: name → how a linear is quantized. A new method is one file and one line here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from headrace.bundle.grid import Grid, QuantizedTensor
from headrace.errors import RecipeError, did_you_mean
from headrace.quantize import corrected, descent, gptq, nearest
from headrace.quantize.statistics import InputStatistics

__all__ = ["METHODS", "Method", "find_method"]


@dataclass(frozen=True)
class Method:
    """How a linear is quantized.

    Attributes:
        quantize: (weight (N, K) float32, statistics of its input, grid) → codes and scales.
        calibrated: it uses the statistics.
        scaled: input channels are scaled beforehand as AWQ finds best; all linears of that input must use the method.
        uses_reference: the statistics also hold the shift from the float model's inputs, so the float model is
            computed on the same windows.
        uses_gradients: tokens are weighted by the gradients of the float model's predictions too.
    """

    quantize: Callable[[NDArray[np.float32], InputStatistics, Grid], QuantizedTensor]
    calibrated: bool
    scaled: bool = False
    uses_reference: bool = False
    uses_gradients: bool = False


METHODS: Mapping[str, Method] = {
    "nearest": Method(nearest.quantize, calibrated=False),
    "awq": Method(nearest.quantize, calibrated=True, scaled=True),
    "gptq": Method(gptq.quantize, calibrated=True),
    "descent": Method(descent.quantize, calibrated=True),
    "best": Method(corrected.quantize, calibrated=True, uses_reference=True, uses_gradients=True),
}


def find_method(name: str) -> Method:
    """A method by name.

    Raises:
        RecipeError: there is none.
    """
    if name not in METHODS:
        raise RecipeError(f"method {name!r} is unknown{did_you_mean(name, METHODS)}; expected {', '.join(METHODS)}")
    return METHODS[name]
