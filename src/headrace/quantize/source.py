"""What is quantized: a checkpoint's geometry and weights, checked as they are read. Knows no method and no grid."""

from __future__ import annotations

from typing import Protocol

from headrace.checkpoint.tensor import LazyTensor
from headrace.config import ModelConfig
from headrace.errors import CheckpointError
from headrace.model.ops import Array
from headrace.model.weights import layer_weights

__all__ = ["Source", "load_layer", "load_rows", "load_weight"]

_LARGEST = 65504.0  # of a weight: scales are float16


class Source(Protocol):
    """A checkpoint: geometry, and lazily read tensors under canonical names."""

    @property
    def config(self) -> ModelConfig: ...

    def tensor(self, name: str) -> LazyTensor: ...


def load_weight(source: Source, name: str) -> Array:
    """A weight of the checkpoint, float32.

    Raises:
        CheckpointError: a value is not finite, or no scale could hold it.
    """
    return _finite(name, source.tensor(name).load())


def load_rows(source: Source, name: str, start: int, stop: int) -> Array:
    """Rows start … stop−1 of a table of the checkpoint, as far as it has them, float32.

    Raises:
        CheckpointError: as `load_weight`.
    """
    table = source.tensor(name)
    return _finite(name, table.read(start, min(stop, table.shape[0])))


def load_layer(source: Source, number: int) -> dict[str, Array]:
    """All weights of a layer of the checkpoint by canonical name, float32.

    Raises:
        CheckpointError: as `load_weight`.
    """
    return {name: load_weight(source, name) for name in layer_weights(source.config, number)}


def _finite(name: str, weight: Array) -> Array:
    """The weight, if every value of it can be held."""
    if not max(weight.max(), -weight.min()) <= _LARGEST:  # also when there is a NaN
        raise CheckpointError(
            f"{name} has a value that is no number or beyond {_LARGEST:g}; expected finite weights: fetch it again"
        )
    return weight
