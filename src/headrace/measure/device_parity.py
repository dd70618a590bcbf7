"""verify beyond the host: eager → the device's grids → device graphs on this CPU → HTP emulation → Genie's tokens.

Each link compares with the one before it, in steps of the logits' 16-bit grid (LSB). With `layers`, the device graphs
are cut after every layer and each layer's output is held against the simulation: the first that breaks its limit is
where a model went wrong. Compares; makes nothing that is kept but the emulation binaries.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrace.bundle.derived import derived_folder
from headrace.bundle.encodings import ATTENTION_MASK, Encoding, port_encodings, read_encodings
from headrace.bundle.folder import Bundle
from headrace.bundle.weights import WeightStore
from headrace.config import ModelConfig
from headrace.graph.device_folder import kept_device_graphs
from headrace.graph.emit_device import write_device_graphs
from headrace.measure.link import Link
from headrace.model.fidelity import Fidelity, FidelityMeter, no_target
from headrace.model.ops import Array
from headrace.model.reference import eager_logits
from headrace.plan import graph_name, plan_parts
from headrace.quantize.ranges import mask_gap
from headrace.quantize.simulate import Simulated, simulated_logits
from headrace.runtime.runner import Span
from headrace.targets.device import DeviceRunner, exact_session, run_session
from headrace.targets.device_loop import DeviceLoop
from headrace.targets.host.sessions import default_threads
from headrace.targets.qualcomm.compiler import EmulationGraph, Emulator
from headrace.targets.qualcomm.emulation import Emulated, emulate
from headrace.targets.qualcomm.genie_dialog import GenieRunner

__all__ = ["Depth", "device_links", "emulated_loop"]

# What rounding every result to 16 bits may cost; the residual of some models spans four orders of magnitude.
GRID_KL = 0.1
# Device graphs round in other places than the simulation (fused kernels, floored rotary tables, a finite mask), and the
# emulator, which computes as the chip does, in others again. One code that falls the other way in the first layer makes
# all after it independent roundings of one model: SmolLM2's then differ by half of what its 8-bit cache costs. So what
# rounding costs is allowed, and in a calm model this much.
ROUNDING_KL = 1e-3
ROUNDING_TOP1 = 0.9  # near ties fall either way: 0.944 was seen on a sound model of random weights
LAYER_SQNR = 20.0  # decibel of a layer's output over its error; a wrong scale or nibble order gives 0 and less
BLOCKED_SHARE = 1e-3  # of a token's attention, for all positions together that the mask blocks
TOKENS = 8


class Depth(Enum):
    """How far `verify` goes."""

    HOST = "host"
    DEVICE = "device"
    EMULATION = "emulation"
    GENIE = "genie"

    @property
    def rank(self) -> int:
        """Links are checked up to here."""
        return list(Depth).index(self)


def device_links(bundle: Bundle, ids: Sequence[int], depth: Depth, *, layers: bool = False) -> Iterator[Link]:
    """The links beyond the host graphs, in order.

    Args:
        bundle: an opened bundle whose linears have a scale a channel.
        ids: tokens that are compared; at least a prompt step and a few more.
        depth: the last link.
        layers: also each layer of the device graphs.

    Raises:
        BundleError: there are no encodings.
        RecipeError: linears are in blocks, which no device takes.
        TargetError: the compiler, the emulator or Genie failed.
    """
    config = bundle.config
    store = bundle.weights()
    encodings = read_encodings(bundle.root / "encodings.json")
    step = port_encodings(bundle.parts, encodings)["logits"].scale
    folder = kept_device_graphs(bundle)

    eager = eager_logits(config, store.read, np.array([ids]))[0]
    watched = _Watched(config, store.read, encodings)
    simulated = simulated_logits(watched, np.asarray(ids), np.arange(len(ids)))
    grids = _fidelity(eager, simulated)
    yield _link("eager → the device's grids", eager, simulated, step, GRID_KL, 0.0)
    yield _mask_link(-encodings[ATTENTION_MASK].low, watched.mask_gap, bundle.context)
    rounding = min(max(grids.kl, ROUNDING_KL), GRID_KL)
    # Attention sees only how far tokens are apart, so the eager logits are those of any place.
    far = Simulated(config, store.read, encodings)
    at_end = simulated_logits(far, np.asarray(ids), np.arange(len(ids)), bundle.context - len(ids))
    yield _link("the same at the end of the context", eager, at_end, step, min(2 * rounding, GRID_KL), 0.0)
    if layers:
        yield from _layers(bundle, store, encodings, ids, watched.seen)
    runner = DeviceRunner.open(bundle, folder)
    try:
        on_cpu = runner.run([Span(0, 0, tuple(ids), tuple(range(len(ids))))])
    finally:
        runner.close()
    yield _link("the device's grids → device graphs on this CPU", simulated, on_cpu, step, rounding, ROUNDING_TOP1)
    if depth.rank < Depth.EMULATION.rank:
        return
    emulated = emulate(bundle, derived_folder(bundle, "emulation"))
    prompt = list(ids[:-TOKENS])
    with emulated_loop(emulated) as loop:
        in_emulation = np.concatenate([loop.feed(prompt), *(loop.feed([token]) for token in ids[-TOKENS:])])
        yield _link("device graphs → HTP emulation", on_cpu, in_emulation, step, rounding, ROUNDING_TOP1)
        if depth is Depth.GENIE:
            loop.rewind(0)
            yield _genie(emulated, loop, prompt)


class _Watched(Simulated):
    """The simulation, with the residual stream after each sum, by name, and the largest `mask_gap`."""

    def __init__(self, config: ModelConfig, weights: Callable[[str], Array], encodings: Mapping[str, Encoding]) -> None:
        super().__init__(config, weights, encodings)
        self.seen: dict[str, Array] = {}
        self.mask_gap = 0.0

    def add_update(self, x: Array, update: Array, name: str) -> Array:
        self.seen[name] = super().add_update(x, update, name)
        return self.seen[name]

    def masked(self, scores: Array, mask: Array, name: str) -> Array:
        self.mask_gap = max(self.mask_gap, mask_gap(scores, mask))
        return super().masked(scores, mask, name)


def _mask_link(depth: float, gap: float, context: int) -> Link:
    """Whether the mask is deep enough for these tokens, were all of the context but one position blocked."""
    share = context * math.exp(min(gap - depth, 0.0))
    told = f"best scores at most {gap:.1f} below blocked ones, mask {depth:g} deep: share ≤ {share:.1e}"
    return Link("blocked positions' share of attention", told, f"≤ {BLOCKED_SHARE:g}", share <= BLOCKED_SHARE)


def _layers(
    bundle: Bundle,
    store: WeightStore,
    encodings: Mapping[str, Encoding],
    ids: Sequence[int],
    seen: Mapping[str, Array],
) -> Iterator[Link]:
    """Device graphs with one layer a part: each part's output beside the simulation's."""
    config, length = bundle.config, bundle.prompt_length
    parts = plan_parts(config, config.num_layers + 1)
    context = bundle.contexts[0]
    with tempfile.TemporaryDirectory(prefix="headrace-layers-") as name:
        graphs = write_device_graphs(
            config, parts, store.read_stored, encodings, Path(name), lengths=(length,), contexts=(context,)
        )
        paths = {graph.name: graph.path for graph in graphs}
        found: dict[str, NDArray[Any]] = {}

        def run(graph: str, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
            made = run_session(exact_session(paths[graph], default_threads(), fold=False), feeds)
            found.update({n: v for n, v in made.items() if n.startswith("hidden_")})
            return made

        used = list(ids[: min(length, context - length - 1)])
        ports = port_encodings(parts, encodings)
        DeviceLoop(config, parts, (length,), (context,), ports, run).feed(used)
        assert graph_name(parts[0], length, context) in paths
        for part in parts[1:-1]:
            layer = part.stop - 1
            grid = ports[f"hidden_{part.number}"]
            expected = seen[f"layers.{layer}.residual"][0, : len(used)]
            real = (found[f"hidden_{part.number}"][0, : len(used)].astype(np.float32) - grid.zero_point) * grid.scale
            sqnr = _sqnr(expected, real)
            lsb = np.abs(expected - real).max() / grid.scale
            told = f"SQNR {sqnr:.1f} dB, at most {lsb:.0f} LSB"
            yield Link(f"  layer {layer}", told, f"SQNR ≥ {LAYER_SQNR:g} dB", sqnr >= LAYER_SQNR)


@contextmanager
def emulated_loop(emulated: Emulated) -> Iterator[DeviceLoop]:
    """headrace's own loop over the binaries that Genie runs on this computer.

    Raises:
        TargetError: a binary cannot be loaded.
    """
    plan = emulated.plan
    graphs = [
        EmulationGraph(path.stem, path, path.with_name(f"{path.stem}_qnn.bin"))
        for path in sorted(emulated.folder.glob("ar*.onnx"))
    ]
    with Emulator(graphs) as emulator:
        yield DeviceLoop(
            plan.config, plan.parts, plan.lengths, plan.contexts, plan.encodings, emulator.run, pad=plan.pad
        )


def _genie(emulated: Emulated, loop: DeviceLoop, prompt: Sequence[int]) -> Link:
    plan = emulated.plan
    with GenieRunner(
        emulated.config, emulated.folder, lengths=plan.lengths, contexts=plan.contexts, own_sampler=True
    ) as genie:
        said = [token.id for token in genie.query_tokens(prompt, TOKENS)]
    own = [int(loop.feed([plan.bos, *prompt] if plan.bos is not None else prompt)[-1].argmax())]
    while len(own) < len(said):
        own.append(int(loop.feed([own[-1]])[-1].argmax()))
    equal = sum(a == b for a, b in zip(said, own))
    return Link("HTP emulation → Genie's tokens", f"{equal} of {len(said)} equal", "all equal", said == own)


def _sqnr(expected: Array, found: Array) -> float:
    """Decibel of the signal's power over the difference's."""
    noise = float(np.square(expected - found, dtype=np.float64).sum())
    signal = float(np.square(expected, dtype=np.float64).sum())
    return float(10 * np.log10(signal / noise)) if noise else float("inf")


def _fidelity(expected: Array, found: Array) -> Fidelity:
    meter = FidelityMeter()
    meter.add(expected, found, np.full(len(expected), no_target, np.int64))
    return meter.result()


def _link(name: str, expected: Array, found: Array, step: float, kl: float, top1: float) -> Link:
    result = _fidelity(expected, found)
    difference = np.abs(expected - found) / step
    correlation = float(np.corrcoef(expected.ravel(), found.ravel())[0, 1])
    told = (
        f"KL {result.kl:.1e}, top-1 {result.top1:.3f}, LSB mean {difference.mean():.1f} max {difference.max():.0f}, "
        f"SQNR {_sqnr(expected, found):.1f} dB, correlation {correlation:.6f}"
    )
    limit = f"KL ≤ {kl:.2g}" + (f", top-1 ≥ {top1:g}" if top1 else "")
    return Link(name, told, limit, result.kl <= kl and result.top1 >= top1)
