"""Layer after layer: calibrate on the layers quantized before, quantize, hand the layer over, go on.

    windows ─ embed ─► layer 0 ─► layer 1 ─► … ─► the final norm's input
                         │ at each group of linears: second moments ─► codes ─► the group computes with them

Every linear is calibrated on what the quantized linears before it give, also those of its own layer. A layer that
was finished earlier (a resumed export) is replayed with its codes, which gives bit-identical inputs to the rest.
This file does not know where layers go, nor how a method works.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from headrace.checkpoint.tensor import LazyTensor
from headrace.config import ModelConfig
from headrace.model.decoder import EMBEDDING, Residual, block, embed, layer_linears, layer_weights
from headrace.model.ops import Array, Positions
from headrace.quantize.awq import find_scale
from headrace.quantize.calibrate import Follower, attention_energy, causal_positions
from headrace.quantize.exact import keep_grid
from headrace.quantize.grid import QuantizedTensor, dequantize, storable
from headrace.quantize.methods import find_method
from headrace.quantize.recipe import Rule
from headrace.quantize.statistics import InputStatistics

__all__ = ["QuantizedLayer", "Source", "linear_names", "quantize_layer", "quantize_layers", "quantize_table"]


NORMS = ("input_layernorm", "post_attention_layernorm")
PRODUCERS = {"q_proj": NORMS[0], "o_proj": "self_attn.v_proj", "gate_proj": NORMS[1], "down_proj": "mlp.up_proj"}
"""First linear of a group → the operation whose result, channel by channel, is proportional to the group's input."""


class Source(Protocol):
    """A checkpoint: geometry, and lazily read tensors under canonical names."""

    @property
    def config(self) -> ModelConfig: ...

    def tensor(self, name: str) -> LazyTensor: ...


@dataclass(frozen=True)
class QuantizedLayer:
    """One finished layer.

    Attributes:
        number: the layer.
        linears: canonical name → codes and scales.
        norms: canonical name → float32 gain.
        key_peak: the largest |key|, after rope, over the calibration windows; 0 without calibration.
        value_peak: the largest |value|.
    """

    number: int
    linears: Mapping[str, QuantizedTensor]
    norms: Mapping[str, NDArray[np.float32]]
    key_peak: float = 0.0
    value_peak: float = 0.0

    def weights(self) -> dict[str, Array]:
        """What the layer computes with, float32."""
        return {**{name: dequantize(q) for name, q in self.linears.items()}, **self.norms}


@dataclass
class _Pass:
    """The layer in work: its weights, float until their group's turn has come; what it becomes; its channel scales.

    A group whose methods scale channels is stored as W·s, and 1/s goes into the operation before: a norm's gain, or
    a linear's rows. What the layer computes with stays W·s / s, since its input was computed before s was known.
    """

    config: ModelConfig
    rules: Mapping[str, Rule]
    weights: dict[str, Array]
    done: dict[str, QuantizedTensor] = field(default_factory=dict)
    gains: dict[str, Array] = field(default_factory=dict)
    value_scale: Array | None = None  # of v_proj's rows, (kv_heads·D,)
    looked_at: Array | None = None  # attention energy of each token, (tokens,), mean 1
    reference: Mapping[str, Array] = field(default_factory=dict)  # first name of a group → the float model's input
    ops: Follower = field(init=False)  # that computes the layer
    jobs: int = 2
    keeps: bool = False

    def arrive(self, names: tuple[str, ...], x: Array) -> None:
        methods = {name: find_method(self.rules[name].method) for name in names}
        inputs = x.reshape(-1, x.shape[-1])
        scale: Array | None = None
        if all(method.scaled for method in methods.values()) and not self.keeps:
            scale = self._scale(names, InputStatistics.of(inputs))
        seen: dict[str, InputStatistics | None] = dict.fromkeys(names)
        latest: tuple[Array, InputStatistics] | None = None
        reference = self.reference.get(names[0]) if any(method.follows for method in methods.values()) else None
        if reference is not None:
            reference = reference.reshape(inputs.shape)
        token_weights: Mapping[str, Array] = {}
        if any(method.calibrated for method in methods.values()):
            token_weights = self._token_weights(names, inputs)
        for name in names:
            if methods[name].calibrated:
                counts = token_weights[name]
                if latest is None or latest[0] is not counts:
                    latest = counts, InputStatistics.of(inputs, counts, reference)
                seen[name] = latest[1] if scale is None else latest[1].scaled(scale)

        def bring(name: str) -> QuantizedTensor:
            if self.keeps and (kept := keep_grid(self.weights[name], self.rules[name].grid, name)) is not None:
                return kept
            weight = self.weights[name] if scale is None else self.weights[name] * scale
            return methods[name].quantize(weight, seen[name], self.rules[name].grid)  # type: ignore[arg-type]

        # Column loops leave the other core idle; linears of one input do not depend on each other.
        with ThreadPoolExecutor(self.jobs) as pool:
            for name, quantized in zip(names, pool.map(bring, names), strict=True):
                self.done[name] = quantized
                self.weights[name] = dequantize(quantized) if scale is None else dequantize(quantized) / scale

    def _token_weights(self, names: tuple[str, ...], inputs: Array) -> dict[str, Array]:
        """How much each token's error in a linear's output counts, (tokens,), mean 1.

        What reaches the residual stream counts in proportion to the stream there, since a norm follows: SmolLM2's
        first token is a thousand times larger than the others. Keys and values count as often as they are looked at.
        """
        stream = cast(Array, self.ops.residual).reshape(len(inputs), -1)
        if names[0].endswith(("o_proj.weight", "down_proj.weight")):
            stream = stream + inputs @ self.weights[names[0]].T
        share = 1 / np.maximum(np.einsum("tk,tk->t", stream, stream), np.finfo(np.float32).tiny)
        share /= share.mean()
        found = dict.fromkeys(names, share)
        if self.looked_at is not None:
            found.update({name: self.looked_at for name in names if name.endswith(("k_proj.weight", "v_proj.weight"))})
        return found

    def _scale(self, names: tuple[str, ...], statistics: InputStatistics) -> Array:
        """The scale of a group's input channels, folded into the operation before."""
        before = PRODUCERS[names[0].rsplit(".", 2)[1]]
        prefix = ".".join(names[0].split(".")[:2])
        c = self.config
        heads = (
            None
            if before in NORMS
            else (c.group_size, c.head_dim)
            if before.endswith("v_proj")
            else (1, c.intermediate_size)
        )
        scale = find_scale([self.weights[n] for n in names], [self.rules[n].grid for n in names], statistics, heads)
        producer = f"{prefix}.{before}.weight"
        if heads is None:
            self.gains[producer] = self.weights[producer] / scale
            return scale
        rows = scale.reshape(-1, *heads)[:, 0].reshape(-1)
        linear = self.done[producer]
        self.done[producer] = replace(linear, scales=storable(linear.scales.astype(np.float32) / rows[:, None]))
        if before.endswith("v_proj"):
            self.value_scale = rows
        return scale


def linear_names(config: ModelConfig) -> list[str]:
    """Canonical names of all linears of all layers, in the order they are computed."""
    return [name for layer in range(config.num_layers) for group in layer_linears(layer) for name in group]


def quantize_table(source: Source, name: str, rule: Rule, *, keep: bool = False) -> QuantizedTensor:
    """The embedding's or the head's table, rounded to nearest; `keep`: as it is, if it lies on the rule's grid."""
    table = source.tensor(name).load()
    kept = keep_grid(table, rule.grid, name) if keep else None
    return kept or find_method("nearest").quantize(table, None, rule.grid)  # type: ignore[arg-type]


def quantize_layers(
    source: Source,
    rules: Mapping[str, Rule],
    windows: NDArray[np.int64],
    emit: Callable[[QuantizedLayer], None],
    *,
    embedding: QuantizedTensor | None = None,
    finished: Callable[[int], QuantizedLayer | None] | None = None,
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
        jobs: linears of one input that are quantized at the same time; the result does not depend on it.
        keep: a linear that already lies on its rule's grid is kept as it is.
        progress: called with (layers done, layers) before each layer and at the end.

    Raises:
        RecipeError: a rule names an unknown method or a block that does not divide a row.
    """
    config = source.config
    at = causal_positions(config, windows.shape[1])
    table = source.tensor(EMBEDDING).load() if embedding is None else dequantize(embedding)
    stream: Residual[Array] = embed(Follower(config, {EMBEDDING: table}), cast(Array, windows))
    reference: Residual[Array] | None = None
    if any(find_method(rules[name].method).follows for name in linear_names(config)):
        table = source.tensor(EMBEDDING).load()
        reference = embed(Follower(config, {EMBEDDING: table}), cast(Array, windows))
    del table
    for number in range(config.num_layers):
        if progress is not None:
            progress(number, config.num_layers)
        inputs: dict[str, Array] = {}
        if reference is not None:
            inputs, reference = _follow(source, number, reference, at)
        known = finished(number) if finished is not None else None
        if known is not None:
            stream, _ = block(Follower(config, known.weights()), number, stream, at, None)
        else:
            layer, stream = quantize_layer(source, rules, number, stream, at, inputs, jobs=jobs, keep=keep)
            emit(layer)
        stream = Residual(stream.settle(Follower(config, {})))
    if progress is not None:
        progress(config.num_layers, config.num_layers)


def quantize_layer(
    source: Source,
    rules: Mapping[str, Rule],
    number: int,
    stream: Residual[Array],
    at: Positions[Array],
    reference: Mapping[str, Array] | None = None,
    *,
    jobs: int = 2,
    keep: bool = False,
) -> tuple[QuantizedLayer, Residual[Array]]:
    """One layer, for its input `stream`: what it became, and the stream after it.

    `reference` has the float model's input of each group of linears, by the group's first name.
    """
    work = _Pass(source.config, rules, {name: source.tensor(name).load() for name in layer_weights(number)})
    work.reference, work.jobs, work.keeps = reference or {}, jobs, keep
    looking = (rules[name] for name in layer_linears(number)[0] if not name.endswith("q_proj.weight"))
    if any(rule.bits == 4 and find_method(rule.method).calibrated for rule in looking):
        energy = attention_energy(source.config, work.weights, number, stream, at).reshape(-1)
        work.looked_at = (energy / energy.mean() + 1) / 2
    work.ops = Follower(source.config, work.weights, work.arrive)
    work.ops.residual = stream.x
    stream, (keys, values) = block(work.ops, number, stream, at, None)
    norms = {name: work.gains.get(name, value) for name, value in work.weights.items() if name not in work.done}
    if work.value_scale is not None:
        values = values / work.value_scale.reshape(1, values.shape[1], 1, -1)  # (B, kvH, S, D)
    layer = QuantizedLayer(number, work.done, norms, float(np.abs(keys).max()), float(np.abs(values).max()))
    return layer, stream


def _follow(
    source: Source, number: int, stream: Residual[Array], at: Positions[Array]
) -> tuple[dict[str, Array], Residual[Array]]:
    """The float layer: the input of each group of linears by the group's first name, and the stream after it."""
    inputs: dict[str, Array] = {}
    weights = {name: source.tensor(name).load() for name in layer_weights(number)}
    ops = Follower(source.config, weights, lambda names, x: inputs.update({names[0]: x}))
    stream, _ = block(ops, number, stream, at, None)
    return inputs, Residual(stream.settle(ops))
