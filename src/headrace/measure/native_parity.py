"""verify's native links: the engine against ONNX Runtime and against float, on every instruction set of this machine.

float ─► native, token by token (fine activations, the cache)
ONNX Runtime as shipped ─► native, prompts (coarse activations in both), on each instruction set
native, few tokens ─► each other instruction set
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.util import find_spec

import numpy as np
from numpy.typing import NDArray

from headrace.bundle.folder import Bundle
from headrace.measure.link import Link, divergence
from headrace.native.runner import FINE_TOKENS, NativeRunner
from headrace.runtime.engine import Engine

__all__ = ["instruction_sets", "native_links"]

Logits = NDArray[np.float32]

# Activations rounded to int8 in two ways, by the operator's blocks and by the engine's, each 0.004 … 0.03 from float.
SHIPPED_KL = 0.05
# Token by token the 8-bit cache costs most: measured 0.001 … 0.005 on trained models.
DECODE_KL = 0.05
# Instruction sets sum the same integers; float sums in another order at times move a code of the cache. Held in
# the finer arithmetic of few tokens: in a prompt's, one activation that falls the other way moves many.
ISA_KL = 0.01
EMULATED = "amx-emulated"  # for the engine's own tests; never chosen by itself


def instruction_sets() -> tuple[str, ...]:
    """Those that this machine can run, best first; none where headrace-kernels is not installed."""
    if find_spec("headrace_kernels") is None:
        return ()
    import headrace_kernels

    return tuple(isa for isa in headrace_kernels.available_isas() if isa != EMULATED)


def native_links(bundle: Bundle, ids: Sequence[int], eager: Logits, shipped: Logits) -> Iterator[Link]:
    """Two links an instruction set. Without headrace-kernels, one that says so.

    Args:
        bundle: an opened bundle.
        ids: the tokens that are scored.
        eager: their logits in float arithmetic.
        shipped: the same of ONNX Runtime with the bundle's own graphs.
    """
    if not instruction_sets():
        yield Link("as shipped → native", "not run: headrace-kernels is not installed", f"KL ≤ {SHIPPED_KL:g}", True)
        return
    best, *others = instruction_sets()
    yield divergence(f"as shipped → native, {best}", shipped, _score(bundle, ids, best), SHIPPED_KL)
    fine = _score(bundle, ids, best, 1)
    yield divergence("float → native, token by token", eager, fine, DECODE_KL)
    for isa in others:
        yield divergence(f"as shipped → native, {isa}", shipped, _score(bundle, ids, isa), SHIPPED_KL)
        yield divergence(f"native, {best} → {isa}, few tokens", fine, _score(bundle, ids, isa, FINE_TOKENS), ISA_KL)


def _score(bundle: Bundle, ids: Sequence[int], isa: str, chunk: int | None = None) -> Logits:
    engine = Engine(NativeRunner(bundle, isa=isa))
    try:
        return engine.score(ids, chunk)
    finally:
        engine.close()
