"""Test doubles for device graphs: a quantized tiny model, and the eager decoder on the device's own grids."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from headrace.bundle.encodings import ANGLE, ATTENTION_MASK, GATED_OUTLIERS, Encoding
from headrace.bundle.grid import Grid, QuantizedTensor, dequantize, quantize_nearest, round_codes, storable
from headrace.bundle.weights import part_weights
from headrace.checkpoint import open_checkpoint
from headrace.config import ModelConfig
from headrace.model.decoder import Residual, block, embed, head
from headrace.model.fidelity import FidelityMeter, no_target
from headrace.model.ops import Array, Eager, Positions
from headrace.model.rope import rope_angles
from headrace.model.weights import EMBEDDING, HEAD
from headrace.plan import plan_parts
from headrace.quantize.device_encodings import device_encodings
from headrace.quantize.outliers import SplitEager
from headrace.quantize.ranges import collect_ranges
from headrace.targets.host.sessions import default_threads, make_session
from tests.tiny import write_baichuan, write_llama

OUTLIERS = {1: (5, 60), 2: (33,)}  # layer → channels
DEEP = 14.0  # 2 · 14² / √16 is a score of 98
HUGE = 200  # times; their columns of down_proj are as much smaller, so that the model is the same


@dataclass(frozen=True)
class QuantizedModel:
    """Weights on their grids, encodings from calibration windows."""

    config: ModelConfig
    weights: Mapping[str, QuantizedTensor | Array]
    encodings: Mapping[str, Encoding]
    kv_scales: tuple[tuple[float, float], ...]

    def read(self, name: str) -> QuantizedTensor | Array:
        return self.weights[name]

    def real(self, name: str) -> Array:
        """A weight as the float decoder uses it."""
        value = self.weights[EMBEDDING if name == HEAD and self.config.tied_head else name]
        return dequantize(value) if isinstance(value, QuantizedTensor) else value


FOUR_BITS, EIGHT_BITS = Grid(4), Grid(8)


def quantized_model(
    config: ModelConfig,
    load: Callable[[str], Array],
    windows: NDArray[np.int64],
    *,
    eight_bits: str = "down_proj",
    grid: Grid = FOUR_BITS,
    tables: Grid = EIGHT_BITS,
) -> QuantizedModel:
    """`grid` for linears, int8 for those named `eight_bits`, `tables` for embedding and head; ranges from `windows`."""
    weights: dict[str, QuantizedTensor | Array] = {}
    for name in part_weights(config, plan_parts(config, 1)[0]):
        value = load(name)
        if value.ndim == 1:
            weights[name] = value
        else:
            own = tables if name in (EMBEDDING, HEAD) else EIGHT_BITS if eight_bits in name else grid
            weights[name] = eight_bit(value) if own == EIGHT_BITS else quantize_nearest(value, own)
    bare = QuantizedModel(config, weights, {}, ())
    ranges = collect_ranges(config, bare.real, windows)
    scales = []
    for layer in range(config.num_layers):
        p = f"layers.{layer}.self_attn"
        scales.append(tuple(max(map(abs, ranges.seen[f"{p}.{cache}"])) / 127 for cache in ("k_cache", "v_cache")))
    kv_scales = tuple((float(k), float(v)) for k, v in scales)
    return QuantizedModel(config, weights, device_encodings(config, ranges, kv_scales), kv_scales)


def eight_bit(weight: Array) -> QuantizedTensor:
    """int8 a channel, no clipping: quick."""
    scales = storable(np.abs(weight).max(1, keepdims=True) / np.float32(127))
    return QuantizedTensor(round_codes(weight, scales, Grid(8)), scales, Grid(8))


class SimulatedDevice(SplitEager):
    """Eager with every named result on its grid, and norm gains on theirs."""

    def __init__(self, model: QuantizedModel) -> None:
        super().__init__(model.config, self._weight)
        self.model = model
        self.seen: dict[str, list[Array]] = {}

    def _weight(self, name: str) -> Array:
        value = self.model.real(name)
        if value.ndim == 1:
            value = Encoding.of_range(float(value.min()), float(value.max())).simulate(value)
        return value

    def outliers(self, name: str, gated: Array) -> Sequence[int]:
        return apart(self.model, name)

    def tap(self, name: str, value: Array) -> Array:
        value = self.model.encodings[name].simulate(value)
        self.seen.setdefault(name, []).append(value)
        return value


def apart(model: QuantizedModel, name: str) -> tuple[int, ...]:
    """Outlier channels of a feed-forward's gated product."""
    encoding = model.encodings.get(f"{name}.{GATED_OUTLIERS}")
    return encoding.channels if encoding else ()


def simulated_logits(model: QuantizedModel, ids: NDArray[np.int64], ops: Eager | None = None) -> Array:
    """Logits (S, V) of one sequence of ids (S,): one step without a past, the mask and angles on their grids."""
    run = ops or SimulatedDevice(model)
    length = len(ids)
    angles = rope_angles(model.config, length)
    cos, sin = (ANGLE.dequantize(ANGLE.floor(table)) for table in (np.cos(angles), np.sin(angles)))
    mask = model.encodings[ATTENTION_MASK].dequantize(np.tri(length, dtype=np.uint16) * np.uint16(65535))
    at = Positions(cos[None, None], sin[None, None], mask[None, None])
    stream: Residual[Array] = embed(run, ids[None])  # type: ignore[arg-type]
    for layer in range(model.config.num_layers):
        stream, _ = block(run, layer, stream, at, None)
        stream = Residual(stream.settle(run))
    logits: Array = head(run, stream)[0]
    return logits


def tiny_model(folder: Path, kind: str, **shape: int) -> QuantizedModel:
    """A random decoder: "gqa", "mha" (Baichuan2: W_pack, NormHead), "tied" (GQA, the head is the embedding), "outliers"
    (gqa with two huge channels in the gated product of the second layer, one in the third's), "biased" (the same, and
    every linear has a bias), "deep" (biases of queries and keys make every score about −100, as Qwen2's do), "blocks"
    (as outliers, every linear in LPBQ blocks of 16), "widths" (the same with 5 bits, and tables of 6)."""
    if kind == "mha":
        written = write_baichuan(folder, **shape)
    elif kind in ("biased", "deep"):
        written = write_llama(folder, attention_bias=True, mlp_bias=kind == "biased", **shape)
    else:
        written = write_llama(folder, tied=kind == "tied", **shape)
    checkpoint = open_checkpoint(written)
    windows = np.random.default_rng(7).integers(0, checkpoint.config.vocab_size, (6, 96))

    def load(name: str) -> Array:
        value = checkpoint.tensor(name).load()
        if kind == "deep" and name.endswith(("q_proj.bias", "k_proj.bias")):
            slowest = value.reshape(-1, 2, checkpoint.config.head_dim // 2)[:, :, -1]  # hardly turns in a window
            slowest[:] = DEEP if "q_proj" in name else -DEEP
        if kind in ("outliers", "biased", "blocks", "widths"):
            for layer, channels in OUTLIERS.items():
                if name in (f"layers.{layer}.mlp.up_proj.weight", f"layers.{layer}.mlp.up_proj.bias"):
                    value[list(channels)] *= HUGE
                if name == f"layers.{layer}.mlp.down_proj.weight":
                    value[:, list(channels)] /= HUGE
        return value

    if kind == "blocks":
        return quantized_model(checkpoint.config, load, windows, eight_bits=EMBEDDING, grid=Grid(4, 16, lpbq=True))
    if kind == "widths":
        linears, tables = Grid(5, 16, lpbq=True), Grid(6, 16, lpbq=True)
        return quantized_model(checkpoint.config, load, windows, eight_bits=EMBEDDING, grid=linears, tables=tables)
    return quantized_model(checkpoint.config, load, windows)


def divergence(reference: Array, logits: Array) -> float:
    """Mean KL(reference ‖ logits) over rows, nats."""
    meter = FidelityMeter()
    meter.add(reference, logits, np.full(len(reference), no_target))
    return meter.result().kl


def reference_session(path: Path) -> Any:
    """A session that runs every node as written."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return make_session(str(path), default_threads(), options)


def run_session(session: Any, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """All outputs by name; of `feeds`, what the graph has inputs for."""
    names = [o.name for o in session.get_outputs()]
    wanted = {i.name: np.ascontiguousarray(feeds[i.name]) for i in session.get_inputs()}
    return dict(zip(names, session.run(names, wanted)))
