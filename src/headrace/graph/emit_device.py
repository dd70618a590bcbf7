"""Device graphs: the decoder as static QDQ ONNX, quantized from port to port.

One graph for each part, step length S and context C. Every result is brought to its encoding's grid by a pair of
QuantizeLinear and DequantizeLinear; moving data keeps the grid of what is moved.

    port ─ DQ ─► op ─ Q ─ DQ ─► op ─ Q ─ DQ ─► … ─ Q ─► port
                  ▲
      int4 codes ─ DQ (a scale a channel, an explicit zero point)

The attention is the decoder's default; where the keys of all heads in one tensor would be too large for the compiler,
it is taken apart into heads. Knows nothing about compilers' options or sessions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import ml_dtypes
import numpy as np

from headrace.bundle.encodings import GATED_OUTLIERS, Encoding, port_encodings
from headrace.config import ModelConfig
from headrace.errors import CalibrationError
from headrace.graph.build import GraphBuilder, Value, element_type
from headrace.graph.check import check_graph
from headrace.graph.device_weights import DeviceWeights, EmbeddingForm, ReadWeight, derive_weights
from headrace.graph.record import Recorder
from headrace.model import decoder
from headrace.model.decoder import Residual, residual_names
from headrace.model.ops import Positions, attention_name, mlp_name
from headrace.model.weights import Role, find_weight, weight_table
from headrace.plan import GraphStyle, Part, graph_name, ports

__all__ = ["FUSED_KV_LIMIT", "DeviceGraph", "emit_device", "write_device_graphs"]

OPSET = 23  # the first with RMSNormalization

FUSED_KV_LIMIT = 8 << 20  # bytes of keys of one layer: the HTP compiler does not finalize a larger tensor


class _DeviceOps(Recorder):
    """Records every operator between DequantizeLinear and QuantizeLinear."""

    def __init__(
        self, config: ModelConfig, graph: GraphBuilder, weights: DeviceWeights, encodings: Mapping[str, Encoding]
    ) -> None:
        super().__init__(config, graph)
        self.weights = weights
        self.encodings = encodings
        self.split_heads = False
        self._grids: dict[str, Encoding] = {}
        self._apart: dict[str, Value] = {}  # outliers of a gated product, by its name

    # Grids.

    def dequantized(self, codes: Value, encoding: Encoding) -> Value:
        """The real value of a quantized tensor."""
        name = f"{codes.name}.real"
        value = self.graph.one("DequantizeLinear", [codes, *self._scale_and_zero(encoding)], name=name)
        assert value.name is not None
        self._grids[value.name] = encoding
        return value

    def quantized(self, x: Value, encoding: Encoding, name: str) -> Value:
        """The codes of a real value, named `name`."""
        return self.graph.one("QuantizeLinear", [x, *self._scale_and_zero(encoding)], name=name)

    def _on_grid(self, raw: Value, name: str) -> Value:
        """A named result on its own grid."""
        if name not in self.encodings:
            raise CalibrationError(f"the encodings lack {name!r}; calibrate and export again")
        encoding = self.encodings[name]
        return self.dequantized(self.quantized(raw, encoding, name), encoding)

    def _moved(self, op: str, x: Value, inputs: Sequence[Value], suffix: str, **attributes: object) -> Value:
        """The same values elsewhere, on the same grid."""
        assert x.name is not None
        encoding = self._grids[x.name]
        name = f"{x.name.removesuffix('.real')}.{suffix}"
        raw = self.graph.one(op, [x, *inputs], name=f"{name}.raw", **attributes)
        return self.dequantized(self.quantized(raw, encoding, name), encoding)

    def _scale_and_zero(self, e: Encoding) -> tuple[Value, Value]:
        return (
            self.graph.constant(f"scale_{e.scale!r}", np.array(e.scale, np.float32)),
            self.graph.constant(f"zero_{e.dtype}_{e.zero_point}", np.array(e.zero_point, e.dtype)),
        )

    def _constant(self, name: str, value: float) -> Value:
        """A positive number as the top of a uint16 grid."""
        e = Encoding(float(np.float32(value / 65535)), 0)
        codes = self.graph.constant("top_uint16", np.array([65535], np.uint16))
        return self.graph.one("DequantizeLinear", [codes, *self._scale_and_zero(e)], name=name)

    # Weights.

    def _external(self, name: str) -> Value:
        t = self.weights.tensors[name]
        return self.graph.external(name, t.file, t.offset, t.nbytes, element_type(t.dtype), t.shape)

    def _table(self, name: str) -> Value:
        """The real values of a stored tensor that has one scale."""
        encoding = self.weights.tensors[name].encoding
        assert encoding is not None
        return self.dequantized(self._external(name), encoding)

    def embed(self, ids: Value, weight: str) -> Value:
        name = weight_table(self.config)[weight].module
        table = self._table(f"{weight}.codes")
        assert table.name is not None
        grid = self._grids[table.name]
        raw = self.graph.one("Gather", [table, ids], axis=0, name=f"{name}.picked.raw")
        picked = self.dequantized(self.quantized(raw, grid, f"{name}.picked"), grid)
        if self.weights.embedding is not EmbeddingForm.ROWS:
            return picked if grid == self.encodings[name] else self._on_grid(picked, name)
        # Every uint8 code is a uint16 code of a grid 256 times as fine, so the change of width is exact.
        wide = Encoding(grid.scale / 256, grid.zero_point * 256)
        picked = self.dequantized(self.quantized(picked, wide, f"{name}.picked_wide"), wide)
        steps = self._table(f"{weight}.scale")
        assert steps.name is not None
        raw = self.graph.one("Gather", [steps, ids], axis=0, name=f"{name}.steps.raw")
        grid = self._grids[steps.name]
        step = self.dequantized(self.quantized(raw, grid, f"{name}.steps"), grid)  # (1, S, blocks)
        columns = self.weights.tensors[f"{weight}.codes"].shape[1]
        blocks = self.weights.tensors[f"{weight}.scale"].shape[1]
        if blocks == 1:
            return self._on_grid(self.graph.one("Mul", [picked, step], name=f"{name}.raw"), name)
        picked = self.reshape(picked, (0, 0, blocks, columns // blocks))
        raw = self.graph.one("Mul", [picked, self.reshape(step, (0, 0, blocks, 1))], name=f"{name}.raw")
        return self.reshape(self._on_grid(raw, name), (0, 0, columns))

    def bias(self, weight: str) -> Value:
        return self._table(f"{weight}.codes")

    def product(self, x: Value, weight: str, name: str) -> Value:
        few = self._apart.get(x.name or "")
        if few is None:
            return self._product(x, weight, name)
        # The outliers' columns of this weight are zero, so it does not matter that the fine grid clips these channels.
        inliers = self._product(x, weight, f"{name}.inliers")
        return self.add(inliers, self._product(few, f"{weight}.outliers", f"{name}.outliers"), name)

    def _product(self, x: Value, weight: str, name: str) -> Value:
        codes, scale = self._external(f"{weight}.codes"), self._external(f"{weight}.scale")
        bits, scales = self.weights.bits[weight], self.weights.tensors[f"{weight}.scale"].shape
        # Without a zero point of its own the compiler reads int4 codes as 0 … 15, silently.
        dtype = ml_dtypes.int4 if bits == 4 else np.int8
        zero = self.graph.constant(f"zero_int{bits}_{'_'.join(map(str, scales))}", np.zeros(scales, dtype))
        form = {"axis": 1}
        if len(scales) == 2:
            form = {"axis": 0, "block_size": self.weights.tensors[f"{weight}.codes"].shape[0] // scales[0]}
        real = self.graph.one("DequantizeLinear", [codes, scale, zero], name=f"{weight}.real", **form)
        return self._on_grid(self.graph.one("MatMul", [x, real], name=f"{name}.raw"), name)

    def gated(self, gate: Value, up: Value, layer: int) -> Value:
        """As `Ops.gated`; the outlier channels are kept apart for the linear that follows."""
        name = mlp_name(layer)
        apart = self.encodings.get(f"{name}.{GATED_OUTLIERS}")
        if apart is None:
            return super().gated(gate, up, layer)
        silu = self.silu(gate, f"{name}.silu")
        gated = self.multiply(silu, up, f"{name}.gated")
        assert gated.name is not None
        few = self._channels(silu, apart.channels), self._channels(up, apart.channels)
        self._apart[gated.name] = self.multiply(*few, name=f"{name}.{GATED_OUTLIERS}")
        return gated

    def _channels(self, x: Value, channels: Sequence[int]) -> Value:
        """Some channels, those of the last axis."""
        wanted = self.graph.constant(f"channels_{'_'.join(map(str, channels))}", np.array(channels, np.int32))
        return self._moved("Gather", x, [wanted], "outliers", axis=2)

    def rms_norm(self, x: Value, weight: str) -> Value:
        name = weight_table(self.config)[weight].module
        gain = self._table(f"{weight}.codes")
        eps = self.config.rms_norm_eps
        raw = self.graph.one("RMSNormalization", [x, gain], axis=-1, epsilon=eps, stash_type=1, name=f"{name}.raw")
        return self._on_grid(raw, name)

    # Arithmetic.

    def matmul(self, a: Value, b: Value, name: str) -> Value:
        return self._on_grid(super().matmul(a, b, f"{name}.raw"), name)

    def softmax(self, x: Value, name: str) -> Value:
        return self._on_grid(super().softmax(x, f"{name}.raw"), name)

    def sigmoid(self, x: Value, name: str) -> Value:
        return self._on_grid(super().sigmoid(x, f"{name}.raw"), name)

    def add(self, a: Value, b: Value, name: str) -> Value:
        return self._on_grid(super().add(a, b, f"{name}.raw"), name)

    def subtract(self, a: Value, b: Value, name: str) -> Value:
        return self._on_grid(super().subtract(a, b, f"{name}.raw"), name)

    def multiply(self, a: Value, b: Value, name: str) -> Value:
        return self._on_grid(super().multiply(a, b, f"{name}.raw"), name)

    def scale(self, x: Value, factor: float, name: str) -> Value:
        return self._on_grid(super().multiply(x, self._constant(f"{name}.factor", factor), f"{name}.raw"), name)

    def concat(self, parts: Sequence[Value], axis: int, name: str) -> Value:
        return self._on_grid(super().concat(parts, axis, f"{name}.joined"), name)

    def to_cache(self, x: Value, name: str) -> Value:
        return self._on_grid(x, name)

    # Movement.

    def slice(self, x: Value, axis: int, start: int, stop: int) -> Value:
        bounds = [self.graph.constant(f"int_{n}", np.array([n], np.int64)) for n in (start, stop, axis)]
        return self._moved("Slice", x, bounds, f"{start}_{stop}")

    def reshape(self, x: Value, shape: Sequence[int]) -> Value:
        target = self.graph.constant(f"shape_{'_'.join(map(str, shape))}", np.array(shape, np.int64))
        return self._moved("Reshape", x, [target], "reshaped")

    def transpose(self, x: Value, order: Sequence[int]) -> Value:
        return self._moved("Transpose", x, [], "turned", perm=list(order))

    def rows(self, x: Value, wanted: Value) -> Value:
        raise NotImplementedError("device graphs give the logits of every token")

    # Attention: the cache comes and goes as (kvH, 1, …).

    def attention(
        self,
        q: Value,
        k: Value,
        v: Value,
        at: Positions[Value],
        past: tuple[Value, Value] | None,
        layer: int,
    ) -> tuple[Value, tuple[Value, Value]]:
        assert past is not None
        if self.split_heads:
            return self._attention_by_head(q, k, v, at, past, attention_name(layer))
        turned = self.transpose(past[0], (1, 0, 2, 3)), self.transpose(past[1], (1, 0, 2, 3))
        mixed, (new_k, new_v) = super().attention(q, k, v, at, turned, layer)
        return mixed, (self.transpose(new_k, (1, 0, 2, 3)), self.transpose(new_v, (1, 0, 2, 3)))

    def _attention_by_head(
        self,
        q: Value,
        k: Value,
        v: Value,
        at: Positions[Value],
        past: tuple[Value, Value],
        name: str,
    ) -> tuple[Value, tuple[Value, Value]]:
        """The same, KV head by KV head: past heads are cut out of the ports, no tensor holds all heads' keys."""
        group = self.config.group_size
        one = _DeviceOps(
            replace(self.config, num_heads=group, num_kv_heads=1), self.graph, self.weights, self.encodings
        )
        one._grids = self._grids
        q, new_k, new_v = self.rotated(q, k, v, at, name)
        mixed = []
        for h in range(self.config.num_kv_heads):
            key = [self.slice(past[0], 0, h, h + 1), self.slice(new_k, 1, h, h + 1)]
            value = [self.slice(past[1], 0, h, h + 1), self.slice(new_v, 1, h, h + 1)]
            keys, values = self.concat(key, 3, f"{name}.k_cache"), self.concat(value, 2, f"{name}.v_cache")
            queries = self.slice(q, 1, h * group, (h + 1) * group)
            mixed.append(one.weighted_values(queries, keys, values, at.mask, name))  # (1, S, group·D)
        turned = self.transpose(new_k, (1, 0, 2, 3)), self.transpose(new_v, (1, 0, 2, 3))
        return self.concat(mixed, 2, f"{name}.mixed"), turned


def emit_device(
    config: ModelConfig,
    part: Part,
    *,
    length: int,
    context: int,
    weights: DeviceWeights,
    encodings: Mapping[str, Encoding],
) -> GraphBuilder:
    """One part's device graph, with exactly the ports of `plan.ports`.

    Args:
        config: the geometry.
        part: which part.
        length: tokens a step S.
        context: context C, tokens; the cache holds C − S of them.
        weights: the part's derived file.
        encodings: of every named result, as `device_encodings` gives.

    Raises:
        CalibrationError: a result has no encoding.
    """
    inputs, outputs = ports(config, part, GraphStyle.DEVICE, length=length, context=context)
    grids = port_encodings([part], encodings)
    if not part.embeds:
        grids[f"hidden_{part.number - 1}"] = _incoming(config, part, encodings)
    graph = GraphBuilder(graph_name(part, length, context), {"": OPSET})
    ops = _DeviceOps(config, graph, weights, encodings)
    ops.split_heads = config.num_kv_heads * context * config.head_dim > FUSED_KV_LIMIT
    given = {port.name: graph.input(port) for port in inputs}
    real = {name: ops.dequantized(value, grids[name]) for name, value in given.items() if name in grids}
    stream = decoder.embed(ops, given["input_ids"]) if part.embeds else Residual(real[f"hidden_{part.number - 1}"])
    made: dict[str, Value] = {}
    for layer in part.layers:
        at = Positions(real["position_ids_cos"], real["position_ids_sin"], real["attention_mask"])
        past = real[f"past_key_{layer}_in"], real[f"past_value_{layer}_in"]
        stream, new = decoder.block(ops, layer, stream, at, past)
        made[f"past_key_{layer}_out"], made[f"past_value_{layer}_out"] = new
    if part.heads:
        made["logits"] = decoder.head(ops, stream)
    else:
        made[f"hidden_{part.number}"] = stream.settle(ops)
    for port in outputs:
        graph.output(ops.quantized(made[port.name], grids[port.name], port.name), port)
    return graph


def _incoming(config: ModelConfig, part: Part, encodings: Mapping[str, Encoding]) -> Encoding:
    """The grid of the hidden state a part reads: its predecessor's last result."""
    name = residual_names(part.start - 1)[1] if part.start else find_weight(config, Role.EMBEDDING).module
    if name not in encodings:
        raise CalibrationError(f"the encodings lack {name!r}; calibrate and export again")
    return encodings[name]


@dataclass(frozen=True)
class DeviceGraph:
    """A written graph."""

    part: Part
    length: int
    context: int
    path: Path

    @property
    def name(self) -> str:
        """`ar128_cl4096_2_of_5`."""
        return graph_name(self.part, self.length, self.context)


def write_device_graphs(
    config: ModelConfig,
    parts: Sequence[Part],
    read: ReadWeight,
    encodings: Mapping[str, Encoding],
    folder: Path,
    *,
    lengths: Sequence[int],
    contexts: Sequence[int],
    embedding: EmbeddingForm = EmbeddingForm.ROWS,
) -> list[DeviceGraph]:
    """Write every part's weights and its graphs for all lengths × contexts into `folder`.

    Args:
        config: the geometry.
        parts: the plan.
        read: gives the bundle's weights.
        encodings: of every named result.
        folder: made when missing.
        lengths: tokens a step of each graph, such as 128 and 1.
        contexts: context lengths.
        embedding: the table's form.

    Returns:
        The graphs, part by part, each checked against the plan.

    Raises:
        RecipeError: a linear is in blocks whose scales are not LPBQ.
        CalibrationError: a result has no encoding.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for part in parts:
        weights = derive_weights(config, part, read, encodings, folder, embedding)
        for context in contexts:
            for length in lengths:
                graph = emit_device(config, part, length=length, context=context, weights=weights, encodings=encodings)
                made = DeviceGraph(part, length, context, folder / f"{graph.name}.onnx")
                graph.save(made.path)
                check_graph(made.path, *ports(config, part, GraphStyle.DEVICE, length=length, context=context))
                written.append(made)
    return written
