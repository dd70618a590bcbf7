"""A layer's linears on their grids, a group of them at a time.

Every linear is calibrated on what the quantized linears before it in the layer give; where grids are only tried, on
what the float ones give. This file does not know what comes before the layer, nor how a method works.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from headrace.bundle.grid import Grid, QuantizedTensor, dequantize
from headrace.bundle.recipe import Rule
from headrace.config import ModelConfig
from headrace.model.ops import Array, Positions
from headrace.model.weights import Role, find_weight, layer_weights, weight_table
from headrace.quantize.awq import find_scale
from headrace.quantize.equalize import equalize_keys
from headrace.quantize.exact import keep_grid
from headrace.quantize.methods import find_method
from headrace.quantize.parallel import parallel_map
from headrace.quantize.source import Source, load_layer
from headrace.quantize.statistics import InputStatistics
from headrace.quantize.token_weights import token_weights, with_gradients
from headrace.quantize.windows import LayerWalk, attention_energy

__all__ = ["QuantizedLayer", "quantize_layer", "try_grids"]

T = TypeVar("T")
R = TypeVar("R")

_SMALL = 1 << 22  # elements of a linear too small to keep several cores busy


@dataclass(frozen=True)
class QuantizedLayer:
    """One finished layer.

    Attributes:
        number: the layer.
        linears: canonical name → codes and scales, and the bias.
        norms: canonical name → float32 gain.
        key_peak: the largest |key|, after rope, over the calibration windows; 0 without calibration.
        value_peak: the largest |value|.
    """

    number: int
    linears: Mapping[str, QuantizedTensor]
    norms: Mapping[str, NDArray[np.float32]]
    key_peak: float = 0.0
    value_peak: float = 0.0

    def weights(self, config: ModelConfig) -> dict[str, Array]:
        """What the layer computes with, float32, by canonical name."""
        found = dict(self.norms)
        for name, linear in self.linears.items():
            found[name] = dequantize(linear)
            if (bias := weight_table(config)[name].bias) is not None and linear.bias is not None:
                found[bias] = linear.bias
        return found


@dataclass
class _LayerQuantizer:
    """One layer, quantized a group of linears at a time.

    A group whose methods scale channels is stored as W·s, and 1/s goes into the operation before: a norm's gain, or
    a linear's rows. The layer itself goes on with W·s / s, since its input was computed before s was known.

    Attributes:
        config: the geometry.
        rules: canonical name → rule.
        weights: what the layer computes with, float32: the checkpoint's until their group is quantized.
        quantized: codes and scales of the linears quantized so far.
        gains: norms that took up channel scales.
        value_scale: channel scale of v_proj's rows, (kv_heads·D,), or None.
        attention_weights: how much each token's error in keys and values counts, (tokens,), mean 1; None: equally.
        energy: canonical name → squared gradient at each token of the linear's output (see gradients.py), or empty.
        keep: a linear that lies on its rule's grid is kept as it is.
    """

    config: ModelConfig
    rules: Mapping[str, Rule]
    weights: dict[str, Array]
    quantized: dict[str, QuantizedTensor] = field(default_factory=dict)
    gains: dict[str, Array] = field(default_factory=dict)
    value_scale: Array | None = None
    attention_weights: Array | None = None
    energy: Mapping[str, Array] = field(default_factory=dict)
    keep: bool = False

    def quantize_group(
        self, names: tuple[str, ...], x: Sequence[Array], states: Sequence[Array], reference: Sequence[Array] | None
    ) -> None:
        """Quantize a group of linears.

        Args:
            names: of the weights.
            x: their input, in batches of windows (W', S, K).
            states: the residual stream at the same tokens, in the same batches, (W', S, H).
            reference: the input that the float model has there, or None.
        """
        scale: Array | None = None
        if all(find_method(self.rules[name].method).scaled for name in names) and not self.keep:
            scale = self._scale(names, InputStatistics.of([_flat(batch) for batch in x]))
        statistics = self.statistics(names, x, states, reference)

        def quantize_linear(name: str) -> QuantizedTensor:
            bias = weight_table(self.config)[name].bias
            linear = self.on_grid(name, self.rules[name].grid, statistics[name], scale)
            return linear._replace(bias=None if bias is None else self.weights[bias])

        for name, quantized in zip(names, self.map_linears(quantize_linear, names, names), strict=True):
            self.quantized[name] = quantized
            self.weights[name] = dequantize(quantized) if scale is None else dequantize(quantized) / scale

    def statistics(
        self, names: tuple[str, ...], x: Sequence[Array], states: Sequence[Array], reference: Sequence[Array] | None
    ) -> dict[str, InputStatistics | None]:
        """What the methods of a group's linears look at, for arguments as `quantize_group` has them."""
        methods = {name: find_method(self.rules[name].method) for name in names}
        found: dict[str, InputStatistics | None] = dict.fromkeys(names)
        if not any(method.calibrated for method in methods.values()):
            return found
        inputs = [_flat(batch) for batch in x]
        float_inputs = None
        if reference is not None and any(method.uses_reference for method in methods.values()):
            float_inputs = [_flat(batch) for batch in reference]
        stream = [_flat(batch) for batch in states]
        counts_of = token_weights(self.config, self.weights, names, inputs, stream, self.attention_weights)
        latest: tuple[Array, InputStatistics] | None = None
        for name in names:
            if methods[name].uses_gradients and name in self.energy:
                counts_of[name] = with_gradients(counts_of[name], self.energy[name].reshape(-1))
            if methods[name].calibrated:
                counts = counts_of[name]
                if latest is None or latest[0] is not counts:
                    latest = counts, InputStatistics.of(inputs, counts, float_inputs)
                found[name] = latest[1]
        return found

    def on_grid(
        self, name: str, grid: Grid, statistics: InputStatistics | None, scale: Array | None = None
    ) -> QuantizedTensor:
        """A linear's codes and scales without its bias, for channels scaled by `scale` (K,)."""
        weight = self.weights[name]
        if self.keep and (kept := keep_grid(weight, grid, name)) is not None:
            return kept
        if scale is not None:
            weight, statistics = weight * scale, None if statistics is None else statistics.scaled(scale)
        return find_method(self.rules[name].method).quantize(weight, statistics, grid)  # type: ignore[arg-type]

    def map_linears(self, function: Callable[[T], R], items: Sequence[T], names: Sequence[str]) -> list[R]:
        """The function's results, side by side where the linears are small, since one alone leaves cores idle. A large
        one keeps all cores busy by itself, and needs the memory."""
        small = max(self.weights[name].size for name in names) <= _SMALL
        return parallel_map(function, items) if small else list(map(function, items))

    def _scale(self, names: tuple[str, ...], statistics: InputStatistics) -> Array:
        """The scale (K,) of a group's input channels; its inverse is folded into the operation before."""
        c, table = self.config, weight_table(self.config)
        before = table[names[0]].producer
        assert before is not None, "every linear of a layer has one"
        producer = table[before]
        heads = None
        if not producer.role.is_norm:
            heads = (c.group_size, c.head_dim) if producer.role is Role.VALUE else (1, c.intermediate_size)
        scale = find_scale([self.weights[n] for n in names], [self.rules[n].grid for n in names], statistics, heads)
        if heads is None:
            self.gains[producer.name] = self.weights[producer.name] / scale
            return scale
        rows = scale.reshape(-1, *heads)[:, 0].reshape(-1)
        self.quantized[producer.name] = self.quantized[producer.name].scaled(1 / rows)
        if producer.role is Role.VALUE:
            self.value_scale = rows
        return scale


def quantize_layer(
    source: Source,
    rules: Mapping[str, Rule],
    number: int,
    states: Array,
    at: Positions[Array],
    reference: LayerWalk | None = None,
    *,
    energy: Mapping[str, Array] | None = None,
    keep: bool = False,
) -> QuantizedLayer:
    """Quantize one layer for its input `states` (W, S, H), which is overwritten by the layer's output.

    `reference` is the float model at the same layer; it is computed to the end of it. At the end q_proj and k_proj are
    scaled against each other, so they no longer approximate the checkpoint's one by one; their codes stay.
    """
    config = source.config
    work = _layer_quantizer(source, rules, number, states, at, energy, keep)
    steps = LayerWalk(config, work.weights, number, states, at)
    while names := steps.advance():
        if reference is not None:
            reference.advance()
        work.quantize_group(names, steps.inputs, steps.states, None if reference is None else reference.inputs)
    if reference is not None:
        reference.advance()
    gains = (name for name, row in layer_weights(config, number).items() if row.role.is_norm)
    norms = {name: work.gains.get(name, work.weights[name]) for name in gains}
    query, key = (find_weight(config, role, number).name for role in (Role.QUERY, Role.KEY))
    values = steps.value_peaks
    if work.value_scale is not None:
        values = values / work.value_scale.reshape(values.shape)
    work.quantized[query], work.quantized[key], key_peak = equalize_keys(
        work.quantized[query], work.quantized[key], steps.key_peaks
    )
    return QuantizedLayer(number, work.quantized, norms, key_peak, float(values.max()))


def try_grids(
    source: Source,
    rules: Mapping[str, Rule],
    grids: Mapping[str, Sequence[Grid]],
    number: int,
    states: Array,
    at: Positions[Array],
    *,
    keep: bool = False,
) -> dict[str, dict[Grid, QuantizedTensor]]:
    """Each linear of a layer that `grids` names, on each of these grids, by its rule's method.

    Unlike in `quantize_layer` a linear's input is what the float linears before it give, so that all grids share one
    walk through the layer and one set of statistics. Biases are left out.

    Args:
        states: the layer's input (W, S, H), which is overwritten by the layer's output.
    """
    config = source.config
    work = _layer_quantizer(source, rules, number, states, at, None, keep)
    steps = LayerWalk(config, work.weights, number, states, at)
    found: dict[str, dict[Grid, QuantizedTensor]] = {}
    while names := steps.advance():
        statistics = work.statistics(names, steps.inputs, steps.states, None)

        def quantize(
            trial: tuple[str, Grid], statistics: Mapping[str, InputStatistics | None] = statistics
        ) -> QuantizedTensor:
            return work.on_grid(*trial, statistics[trial[0]])

        trials = [(name, grid) for name in names for grid in grids.get(name, ())]
        for (name, grid), tried in zip(trials, work.map_linears(quantize, trials, names), strict=True):
            found.setdefault(name, {})[grid] = tried
    return found


def _layer_quantizer(
    source: Source,
    rules: Mapping[str, Rule],
    number: int,
    states: Array,
    at: Positions[Array],
    energy: Mapping[str, Array] | None,
    keep: bool,
) -> _LayerQuantizer:
    """A layer of the checkpoint, with the attention that its tokens get where keys or values ask for it."""
    config = source.config
    work = _LayerQuantizer(config, rules, load_layer(source, number), energy=energy or {}, keep=keep)
    key, value = (rules[find_weight(config, role, number).name] for role in (Role.KEY, Role.VALUE))
    if any(find_method(rule.method).calibrated for rule in (key, value)):
        attention = attention_energy(config, work.weights, number, states, at).reshape(-1)
        work.attention_weights = (attention / attention.mean() + 1) / 2
    return work


def _flat(batch: Array) -> Array:
    """(W, S, K) → (tokens, K)."""
    return batch.reshape(-1, batch.shape[-1])
