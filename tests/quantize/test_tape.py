"""Tape: gradients of the whole decoder against finite differences."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from headrace.checkpoint import open_checkpoint
from headrace.model.decoder import Residual, block, head
from headrace.model.ops import Array, Eager
from headrace.model.weights import EMBEDDING, FINAL_NORM, HEAD, layer_weights
from headrace.quantize.tape import Node, Tape
from headrace.quantize.windows import causal_positions
from tests.tiny import write_llama

# Central differences in float64 with a step of 1e-5 are good to about 1e-9 of the result's curvature.
DIFFERENCE_NOISE = 1e-6
STEP = 1e-5


def test_gradient_is_the_slope(tmp_path: Path) -> None:
    source = open_checkpoint(write_llama(tmp_path / "m", layers=2))
    names = [EMBEDDING, FINAL_NORM, HEAD, *(n for layer in range(2) for n in layer_weights(source.config, layer))]
    weights = {name: source.tensor(name).load().astype(np.float64) for name in names}
    rng = np.random.default_rng(5)
    x = weights[EMBEDDING][rng.integers(0, 160, (2, 9))]
    at = causal_positions(source.config, 9)
    wanted = np.array([3, 8])

    def logits(start: Array) -> Array:
        ops, stream = Eager(source.config, weights.__getitem__), Residual(start)  # type: ignore[arg-type]
        for layer in range(2):
            stream, _ = block(ops, layer, stream, at, None)
        return head(ops, stream, wanted)  # type: ignore[arg-type]

    seen: dict[str, tuple[Array, Array]] = {}
    tape = Tape(source.config, weights.__getitem__, lambda name, i, g: seen.update({name: (i, g)}))  # type: ignore[arg-type]
    node = Node(x)  # type: ignore[arg-type]
    stream = Residual(node)
    for layer in range(2):
        stream, _ = block(tape, layer, stream, Tape.positions(at), None)
    out = head(tape, stream, Node(wanted))  # type: ignore[arg-type]
    pull = rng.normal(size=out.value.shape)
    tape.backward(out, pull)  # type: ignore[arg-type]

    way = rng.normal(size=x.shape)
    slope = np.sum((logits(x + STEP * way) - logits(x - STEP * way)) * pull) / (2 * STEP)
    assert node.grad is not None
    assert abs(np.sum(node.grad * way) - slope) < DIFFERENCE_NOISE * max(1, abs(slope))

    # The gradient reported at a linear gives the weight's own: gᵀ x.
    name = "layers.0.mlp.down_proj.weight"
    inputs, g = seen[name]
    change = rng.normal(size=weights[name].shape)
    weights[name] += STEP * change
    above = logits(x)
    weights[name] -= 2 * STEP * change
    slope = np.sum((above - logits(x)) * pull) / (2 * STEP)
    assert abs(np.einsum("bsn,bsk,nk->", g, inputs, change) - slope) < DIFFERENCE_NOISE * max(1, abs(slope))
    assert set(seen) == {n for n in names if n.endswith("_proj.weight") or n == HEAD}
