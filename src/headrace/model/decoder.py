"""The decoder, once: what a Llama-family model computes, over whatever `Ops` interprets it.

weights.py lists the weights. This file does not know which interpretation runs it, how layers are split into
parts, nor where the cache lives.

    ids ─ embed ─► block 0 ─► … ─► block L−1 ─► head ─► logits
                     │ ▲
               new k,v past k,v

A block can also be computed in steps (`walk`), pausing before each group of linears, so that calibration can look at
their input there and change their weights.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Generic, NamedTuple, TypeVar, cast

from headrace.model.ops import Ops, Positions
from headrace.model.weights import EMBEDDING, FINAL_NORM, HEAD, Role, find_weight, input_groups

__all__ = ["Residual", "block", "embed", "head", "residual_names", "walk"]

T = TypeVar("T")


class Residual(NamedTuple, Generic[T]):
    """The residual stream: `x`, and the last update that is not added yet, so that the sum and the norm
    that follows can be one operator."""

    x: T
    update: T | None = None
    name: str = ""

    def settle(self, ops: Ops[T]) -> T:
        """The stream as one value (B, S, H)."""
        return self.x if self.update is None else ops.add_update(self.x, self.update, self.name)

    def norm(self, ops: Ops[T], weight: str) -> tuple[T, T]:
        """(normed, settled)."""
        if self.update is None:
            return ops.rms_norm(self.x, weight), self.x
        return ops.add_norm(self.x, self.update, weight, self.name)


def embed(ops: Ops[T], ids: T) -> Residual[T]:
    """ids (B, S) → stream (B, S, H)."""
    return Residual(ops.embed(ids, EMBEDDING))


def block(
    ops: Ops[T],
    layer: int,
    stream: Residual[T],
    at: Positions[T],
    past: tuple[T, T] | None,
    wanted: T | None = None,
) -> tuple[Residual[T], tuple[T, T]]:
    """One layer: the stream after it, and its new keys and values (see `Ops.attention`).

    With `wanted`, the stream of the wanted tokens alone: enough after the last layer, where later tokens need only
    the keys and values of the others.
    """
    steps = walk(ops, layer, stream, at, past, wanted)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return cast(tuple[Residual[T], tuple[T, T]], end.value)


def walk(
    ops: Ops[T],
    layer: int,
    stream: Residual[T],
    at: Positions[T],
    past: tuple[T, T] | None,
    wanted: T | None = None,
) -> Generator[tuple[tuple[str, ...], T], None, tuple[Residual[T], tuple[T, T]]]:
    """`block`, a step at a time: yields each group of linears and their input, before they are computed.

    Arrays that are not needed after a pause are released before it, since many blocks may be paused at once.
    """
    groups = input_groups(ops.config, layer)
    projections, output, gate_up, down = (tuple(weight.name for weight in group) for group in groups)
    before, after = (find_weight(ops.config, r, layer).name for r in (Role.ATTENTION_NORM, Role.FEED_FORWARD_NORM))
    middle, end = residual_names(layer)
    normed, x = stream.norm(ops, before)
    yield projections, normed
    q, k, v = ops.linears(normed, projections)
    mixed, new = ops.attention(q, k, v, at, past, layer)
    if wanted is not None:
        mixed, x = ops.rows(mixed, wanted), ops.rows(x, wanted)
    del stream, normed, q, k, v
    yield output, mixed
    update = ops.linear(mixed, output[0])
    normed, x = ops.add_norm(x, update, after, middle)
    del mixed, update
    yield gate_up, normed
    gate, up = ops.linears(normed, gate_up)
    gated = ops.gated(gate, up, layer)
    del normed, gate, up
    yield down, gated
    return Residual(x, ops.linear(gated, down[0]), end), new


def head(ops: Ops[T], stream: Residual[T], wanted: T | None = None) -> T:
    """Final norm and head → logits (B, S, V), or (B, R, V) for the wanted tokens."""
    normed, _ = stream.norm(ops, FINAL_NORM)
    if wanted is not None:
        normed = ops.rows(normed, wanted)
    return ops.linear(normed, HEAD)


def residual_names(layer: int) -> tuple[str, str]:
    """What the residual stream is called after a layer's attention, and after the layer."""
    return f"layers.{layer}.attn_residual", f"layers.{layer}.residual"
