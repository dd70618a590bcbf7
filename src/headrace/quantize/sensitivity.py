"""How much each linear's rounding costs in KL, from one backward pass through the float model.

Rounding a linear changes its output at token t by e_t. To second order that costs

    KL ≈ ½ · mean over tokens of (g_t · e_t)²,

where g_t is the gradient at that output of v·logits for random v with covariance diag(p) − p pᵀ, the Fisher
information of the prediction p: the Hessian of KL. Costs of different linears add up. The backward pass takes one layer
at a time, so memory holds one layer's weights and the hidden states of a few windows.

Source: second-order pruning and quantization (LeCun et al. 1990; Dong et al. 2019, HAWQ), with a randomised Fisher
factor. This file does not know how a rule's method works, nor how a recipe is stored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from headrace.bundle.grid import dequantize
from headrace.bundle.recipe import Rule
from headrace.config import ModelConfig
from headrace.model.decoder import Residual, block, head
from headrace.model.ops import Array, Positions
from headrace.model.weights import EMBEDDING, FINAL_NORM, HEAD
from headrace.quantize.parallel import parallel_map
from headrace.quantize.pipeline import Source, load_layer, quantize_layer
from headrace.quantize.tape import Node, Tape
from headrace.quantize.windows import LayerWalk, causal_positions, embed_windows, evenly_spaced

__all__ = ["RANKING_WINDOWS", "fisher_gradient", "measure_sensitivity"]

RANKING_WINDOWS = 4  # 2,048 tokens are enough to rank linears
_RANKING = {"descent": "gptq", "best": "gptq", "awq": "gptq"}  # a longer search ranks no better


def measure_sensitivity(
    source: Source,
    rules: Mapping[str, Rule],
    windows: NDArray[np.int64],
    *,
    keep: bool = False,
    seed: int = 0,
    progress: Callable[[int, int], Any] | None = None,
) -> dict[str, float]:
    """The KL, in nats, that quantizing each linear alone by its rule costs.

    Args:
        source: the checkpoint.
        rules: canonical name → the rule that is tried.
        windows: token ids of the calibration text, int64 (windows, length); a few are enough, and no more are used.
        keep: a linear that already lies on its rule's grid is kept as it is, and costs nothing.
        seed: of the random factor.
        progress: called with (layers walked, all): forward and back count one each.
    """
    config = source.config
    windows = evenly_spaced(windows, RANKING_WINDOWS)
    rules = {name: replace(rule, method=_RANKING.get(rule.method, rule.method)) for name, rule in rules.items()}
    at = causal_positions(config, windows.shape[1])
    inputs = _forward(source, windows, at, progress)
    grads = fisher_gradient(source, inputs.pop(), np.random.default_rng(seed))
    costs: dict[str, float] = {}
    for number in range(config.num_layers - 1, -1, -1):
        if progress is not None:
            progress(2 * config.num_layers - 1 - number, 2 * config.num_layers)
        weights = load_layer(source, number)
        x = inputs.pop()
        layer = quantize_layer(source, rules, number, x.copy(), at, keep=keep)
        errors = {name: weights[name] - dequantize(linear) for name, linear in layer.linears.items()}
        found = _backward_through_layer(config, number, weights, errors, x, grads, at)
        costs.update({name: found[name] for name in errors})
    if progress is not None:
        progress(2 * config.num_layers, 2 * config.num_layers)
    return dict(reversed(costs.items()))


def fisher_gradient(source: Source, stream: Array, generator: np.random.Generator) -> Array:
    """The gradient of v·logits at the last hidden states (W, S, H), with v of covariance diag(p) − p pᵀ.

    v = √p ∘ r − p (√p · r) for normal r.
    """
    weights = {FINAL_NORM: source.tensor(FINAL_NORM).load(), HEAD: source.tensor(HEAD).load()}

    def gradient(window: tuple[Array, np.random.Generator]) -> Array:
        x, draws = window
        tape, node = Tape(source.config, weights.__getitem__), Node(x[None])
        logits = head(tape, Residual(node))
        share = logits.value
        share = share - share.max(-1, keepdims=True)
        np.exp(share, out=share)
        share /= share.sum(-1, keepdims=True)
        root = np.sqrt(share)
        v = draws.standard_normal(share.shape, np.float32)
        along = np.einsum("bsv,bsv->bs", root, v)
        v *= root
        v -= share * along[..., None]
        tape.backward(logits, v)
        return np.asarray(cast(Array, node.grad)[0])

    return np.stack(parallel_map(gradient, zip(stream, generator.spawn(len(stream)), strict=True)))


def _forward(
    source: Source,
    windows: NDArray[np.int64],
    at: Positions[Array],
    progress: Callable[[int, int], Any] | None,
) -> list[Array]:
    """Every layer's input, and the last one's output, each (W, S, H)."""
    config = source.config
    inputs = [embed_windows(config, source.tensor(EMBEDDING), windows)]
    for number in range(config.num_layers):
        if progress is not None:
            progress(number, 2 * config.num_layers)
        inputs.append(inputs[-1].copy())
        weights = load_layer(source, number)
        LayerWalk(config, weights, number, inputs[-1], at).finish()
    return inputs


def _backward_through_layer(
    config: ModelConfig,
    number: int,
    weights: Mapping[str, Array],
    errors: Mapping[str, Array],
    x: Array,
    grads: Array,
    at: Positions[Array],
) -> dict[str, float]:
    """Costs of a layer's errors; `grads` at its output become those at its input."""
    positions = Tape.positions(at)

    def window_back(window: tuple[Array, Array]) -> dict[str, float]:
        states, grad = window
        costs = dict.fromkeys(errors, 0.0)

        def at_linear(name: str, inputs: Array, g: Array) -> None:
            effect = np.einsum("bsn,bsn->bs", inputs @ errors[name].T, g)
            costs[name] += 0.5 * float(np.square(effect, dtype=np.float64).sum())

        tape, node = Tape(config, weights.__getitem__, at_linear), Node(states[None])
        stream, _ = block(tape, number, Residual(node), positions, None)
        tape.backward(stream.settle(tape), grad[None])
        grad[:] = cast(Array, node.grad)[0]
        return costs

    found = parallel_map(window_back, zip(x, grads, strict=True))
    return {name: sum(costs[name] for costs in found) / (x.shape[0] * x.shape[1]) for name in errors}
