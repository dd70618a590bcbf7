"""The decoder, once: what a Llama-family model computes, over whatever `Ops` interprets it.

Canonical weight names are Hugging Face's without the leading "model.". This file does not know which
interpretation runs it, how layers are split into parts, nor where the cache lives.

    ids ─ embed ─► block 0 ─► … ─► block L−1 ─► head ─► logits
                     │ ▲
               new k,v past k,v

A block can also be walked, pausing before each group of linears: whoever calibrates looks at their input there, and
may change their weights.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar, cast

from headrace.model.ops import Ops, Positions

__all__ = [
    "EMBEDDING",
    "FINAL_NORM",
    "HEAD",
    "Residual",
    "block",
    "embed",
    "head",
    "layer_linears",
    "layer_weights",
    "walk",
]

T = TypeVar("T")

EMBEDDING = "embed_tokens.weight"
FINAL_NORM = "norm.weight"
HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Residual(Generic[T]):
    """The residual stream: `x`, and the last update that is not added yet, so that the sum and the norm
    that follows can be one operator."""

    x: T
    update: T | None = None
    name: str = ""

    def settle(self, ops: Ops[T]) -> T:
        """The stream as one value (B, S, H)."""
        return self.x if self.update is None else ops.add(self.x, self.update, self.name)

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
    """One layer: the stream after it, and its new keys and values (see `Ops.attention`); of the wanted tokens alone,
    which is enough after the last layer: the others' keys and values are all that later tokens see of them."""
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

    What is not needed after a pause is let go before it: many may wait there at once.
    """
    p = f"layers.{layer}"
    projections, output, gate_up, down = layer_linears(layer)
    normed, x = stream.norm(ops, f"{p}.input_layernorm.weight")
    yield projections, normed
    q, k, v = ops.linears(normed, projections)
    mixed, new = ops.attention(q, k, v, at, past, f"{p}.self_attn")
    if wanted is not None:
        mixed, x = ops.rows(mixed, wanted), ops.rows(x, wanted)
    del stream, normed, q, k, v
    yield output, mixed
    update = ops.linear(mixed, output[0])
    normed, x = ops.add_norm(x, update, f"{p}.post_attention_layernorm.weight", f"{p}.attn_residual")
    del mixed, update
    yield gate_up, normed
    gate, up = ops.linears(normed, gate_up)
    gated = ops.gated(gate, up, f"{p}.mlp")
    del normed, gate, up
    yield down, gated
    return Residual(x, ops.linear(gated, down[0]), f"{p}.residual"), new


def head(ops: Ops[T], stream: Residual[T], wanted: T | None = None) -> T:
    """Final norm and head → logits (B, S, V), or (B, R, V) for the wanted tokens."""
    normed, _ = stream.norm(ops, FINAL_NORM)
    if wanted is not None:
        normed = ops.rows(normed, wanted)
    return ops.linear(normed, HEAD)


def layer_linears(layer: int) -> tuple[tuple[str, ...], ...]:
    """A layer's linears, those that share an input together, in the order they are computed."""
    p = f"layers.{layer}"
    return (
        (f"{p}.self_attn.q_proj.weight", f"{p}.self_attn.k_proj.weight", f"{p}.self_attn.v_proj.weight"),
        (f"{p}.self_attn.o_proj.weight",),
        (f"{p}.mlp.gate_proj.weight", f"{p}.mlp.up_proj.weight"),
        (f"{p}.mlp.down_proj.weight",),
    )


def layer_weights(layer: int) -> Sequence[str]:
    """All weights of a layer."""
    norms = (f"layers.{layer}.input_layernorm.weight", f"layers.{layer}.post_attention_layernorm.weight")
    return [*norms, *(name for group in layer_linears(layer) for name in group)]
