"""The float model's gradients at the outputs of its linears, from one walk back through its layers.

What is carried back is v·logits for random v with covariance diag(p) − p pᵀ, the Fisher information of the prediction
p, which is the Hessian of KL at its minimum. To second order an error e_t of an output at token t costs

    KL ≈ ½ · mean over tokens of (g_t · e_t)²,   g_t: the gradient at that output.

Layers are walked back one at a time: one layer's weights are in memory, and every layer's input for a few windows.
This file does not know what gradients are for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from headrace.model.decoder import Residual, block, head
from headrace.model.ops import Array
from headrace.model.weights import EMBEDDING, FINAL_NORM, HEAD, linears
from headrace.quantize.parallel import parallel_map
from headrace.quantize.source import Source, load_layer
from headrace.quantize.tape import Node, Tape
from headrace.quantize.windows import LayerWalk, causal_positions, embed_windows, evenly_spaced

__all__ = ["GRADIENT_TOKENS", "TOGETHER", "AtLinear", "fisher_gradient", "gradient_energy", "walk_back"]

AtLinear = Callable[[int, str, Array, Array], None]
"""Called with a window's number, a linear's name, its input (S, K) and the gradient at its output (S, N)."""

GRADIENT_TOKENS = 8192  # by its operations half an hour at 7 billion weights on two cores; not timed
TOGETHER = 2048  # tokens whose layers' inputs are in memory at once


def gradient_energy(
    source: Source, windows: NDArray[np.int64], *, seed: int = 0, progress: Callable[[int, int], Any] | None = None
) -> dict[str, Array]:
    """How much an error of a linear's output costs at each token: canonical name → the mean of the squared gradient
    over the output's channels, (W, S) float32.

    Args:
        source: the checkpoint.
        windows: token ids, int64 (W, S); of more than `GRADIENT_TOKENS` tokens so many are walked, and the energy of
            the others is NaN.
        seed: of the random factor.
        progress: called with (layers walked, all); forward and back count one each.
    """
    config = source.config
    energy = {name: np.full(windows.shape, np.nan, np.float32) for name in linears(config)}
    walked = evenly_spaced(np.arange(len(windows)), max(1, GRADIENT_TOKENS // windows.shape[1]))
    few = max(1, TOGETHER // windows.shape[1])
    groups = [walked[start : start + few] for start in range(0, len(walked), few)]
    for turn, group in enumerate(groups):

        def at_layer(number: int, weights: Mapping[str, Array], x: Array, group: NDArray[np.intp] = group) -> AtLinear:
            def at_linear(window: int, name: str, inputs: Array, g: Array) -> None:
                energy[name][group[window]] = np.einsum("sn,sn->s", g, g) / np.float32(g.shape[1])

            return at_linear

        def report(done: int, total: int, turn: int = turn) -> None:
            if progress is not None:
                progress(turn * total + done, len(groups) * total)

        walk_back(source, windows[group], np.random.default_rng((seed, turn)), at_layer, report)
    return energy


def walk_back(
    source: Source,
    windows: NDArray[np.int64],
    generator: np.random.Generator,
    at_layer: Callable[[int, Mapping[str, Array], Array], AtLinear],
    progress: Callable[[int, int], Any] | None = None,
    *,
    at_head: Callable[[Array], AtLinear] | None = None,
) -> Array:
    """Forward through the float model, and back.

    Args:
        source: the checkpoint.
        windows: token ids, int64 (W, S).
        generator: of the random factor.
        at_layer: called with each layer's number, weights and input (W, S, H), the last layer first; what it returns is
            called for each of its linears and each window, from several threads.
        progress: called with (layers walked, all); forward and back count one each.
        at_head: called with the hidden states after the last layer (W, S, H), before the way back; what it returns is
            called for the head and each window.

    Returns:
        The gradients at the embedding's output, (W, S, H) float32.
    """
    config = source.config
    report = progress or (lambda done, total: None)
    at = causal_positions(config, windows.shape[1])
    positions = Tape.positions(at)
    inputs = [embed_windows(config, source.tensor(EMBEDDING).load(), windows)]
    for number in range(config.num_layers):
        report(number, 2 * config.num_layers)
        inputs.append(inputs[-1].copy())
        LayerWalk(config, load_layer(source, number), number, inputs[-1], at).finish()
    states = inputs.pop()
    grads = fisher_gradient(source, states, generator, None if at_head is None else at_head(states))
    for number in range(config.num_layers - 1, -1, -1):
        report(2 * config.num_layers - 1 - number, 2 * config.num_layers)
        weights, x = load_layer(source, number), inputs.pop()
        observe = at_layer(number, weights, x)

        def back(
            window: int,
            number: int = number,
            weights: Mapping[str, Array] = weights,
            x: Array = x,
            observe: AtLinear = observe,
        ) -> None:
            def at_linear(name: str, inputs: Array, g: Array) -> None:
                observe(window, name, inputs[0], g[0])

            tape, node = Tape(config, weights.__getitem__, at_linear), Node(x[window][None])
            stream, _ = block(tape, number, Residual(node), positions, None)
            tape.backward(stream.settle(tape), grads[window][None])
            grads[window] = cast(Array, node.grad)[0]

        parallel_map(back, range(len(windows)))
    report(2 * config.num_layers, 2 * config.num_layers)
    return grads


def fisher_gradient(
    source: Source, stream: Array, generator: np.random.Generator, at_head: AtLinear | None = None
) -> Array:
    """The gradient of v·logits at the last hidden states (W, S, H), with v of covariance diag(p) − p pᵀ.

    v = √p ∘ r − p (√p · r) for normal r. `at_head` is called for each window, with v as the gradient of its output.
    """
    weights = {FINAL_NORM: source.tensor(FINAL_NORM).load(), HEAD: source.tensor(HEAD).load()}

    def gradient(window: tuple[int, Array, np.random.Generator]) -> Array:
        number, x, draws = window

        def at_linear(name: str, inputs: Array, g: Array) -> None:
            if at_head is not None:
                at_head(number, name, inputs[0], g[0])

        tape, node = Tape(source.config, weights.__getitem__, at_linear), Node(x[None])
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

    windows = zip(range(len(stream)), stream, generator.spawn(len(stream)), strict=True)
    return np.stack(parallel_map(gradient, windows))
