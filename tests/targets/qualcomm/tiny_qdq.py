"""A test double: a small random decoder as static QDQ graphs, in the forms the HTP compiler accepts.

It walks the package's own decoder with a small interpretation of `Ops` that records ONNX nodes, so the ports are the
plan's; it is kept apart from the product's emitter, so that targets can be tested alone. It knows nothing about
checkpoints, recipes or calibration text: weights and ranges come from a seed.

    float value  ─ QuantizeLinear ─ DequantizeLinear ─►  every named result
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from headrace.bundle.encodings import ANGLE, Encoding, mask_encoding
from headrace.config import ModelConfig
from headrace.model import decoder
from headrace.model.ops import Array, Eager, Positions, PrimitiveOps
from headrace.model.rope import rope_tables
from headrace.model.weights import EMBEDDING, FINAL_NORM, HEAD
from headrace.plan import GraphStyle, Part, graph_name, plan_parts, ports

__all__ = [
    "TinyModel",
    "emit",
    "graph_name",
    "make",
    "plan_parts",
    "port_encodings",
    "tiny_config",
    "write",
]

OPSET = 23
MASK_DEPTH = 100.0
DTYPES = {
    "int32": TensorProto.INT32,
    "uint8": TensorProto.UINT8,
    "uint16": TensorProto.UINT16,
    "int4": TensorProto.INT4,
    "int8": TensorProto.INT8,
}


@dataclass(frozen=True)
class TinyModel:
    """A decoder with random weights and the encodings of every result."""

    config: ModelConfig
    weights: dict[str, Array]
    encodings: dict[str, Encoding]
    linear_form: str = "matmul"
    options: frozenset[str] = field(default_factory=frozenset)

    def port_encoding(self, port: str) -> Encoding | None:
        """The encoding of a device port; None for ids."""
        if port == "input_ids":
            return None
        if port == "attention_mask":
            return mask_encoding(MASK_DEPTH)
        if port.startswith("position_ids"):
            return ANGLE
        return self.encodings[port.removesuffix("_in").removesuffix("_out")]


def tiny_config(**changes: object) -> ModelConfig:
    """Two layers, grouped queries; `changes` replace fields."""
    values: dict[str, object] = {
        "architecture": "llama",
        "vocab_size": 320,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 64,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_context": 4096,
        "tied_head": False,
    }
    return ModelConfig(**(values | changes))  # type: ignore[arg-type]


def make(config: ModelConfig, parts: int, seed: int = 0, **options: object) -> TinyModel:
    """Random weights; ranges from eager runs over random tokens."""
    rng = np.random.default_rng(seed)
    c = config

    def matrix(rows: int, columns: int) -> Array:
        return rng.normal(0, columns**-0.5, (rows, columns)).astype(np.float32)

    weights = {EMBEDDING: matrix(c.vocab_size, c.hidden_size) * np.float32(c.hidden_size**0.5)}
    for i in range(c.num_layers):
        p = f"layers.{i}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{p}.{norm}.weight"] = rng.uniform(0.5, 1.5, c.hidden_size).astype(np.float32)
        weights[f"{p}.self_attn.q_proj.weight"] = matrix(c.query_size, c.hidden_size) * 3
        weights[f"{p}.self_attn.k_proj.weight"] = matrix(c.kv_size, c.hidden_size)
        weights[f"{p}.self_attn.v_proj.weight"] = matrix(c.kv_size, c.hidden_size)
        weights[f"{p}.self_attn.o_proj.weight"] = matrix(c.hidden_size, c.query_size)
        weights[f"{p}.mlp.gate_proj.weight"] = matrix(c.intermediate_size, c.hidden_size)
        weights[f"{p}.mlp.up_proj.weight"] = matrix(c.intermediate_size, c.hidden_size)
        weights[f"{p}.mlp.down_proj.weight"] = matrix(c.hidden_size, c.intermediate_size)
    weights[FINAL_NORM] = rng.uniform(0.5, 1.5, c.hidden_size).astype(np.float32)
    weights[HEAD] = matrix(c.vocab_size, c.hidden_size) * 2
    return TinyModel(c, weights, _encodings(c, weights, plan_parts(c, parts), rng), **options)  # type: ignore[arg-type]


class _Ranges(Eager):
    """Eager, noting each result's range."""

    def __init__(self, config: ModelConfig, weights: dict[str, Array]) -> None:
        super().__init__(config, weights.__getitem__)
        self.seen: dict[str, tuple[float, float]] = {}

    def tap(self, name: str, value: Array) -> Array:
        low, high = self.seen.get(name, (0.0, 0.0))
        self.seen[name] = (min(low, float(value.min())), max(high, float(value.max())))
        return value


def _encodings(
    c: ModelConfig, weights: dict[str, Array], parts: Sequence[Part], rng: np.random.Generator
) -> dict[str, Encoding]:
    length, windows = 96, 6
    ranges = _Ranges(c, weights)
    cos, sin = rope_tables(c, length)
    mask = np.where(np.tri(length, dtype=bool), 0, -MASK_DEPTH).astype(np.float32)
    at = Positions(cos[None, None], sin[None, None], mask[None, None])
    boundary: dict[int, list[Array]] = {}
    for _ in range(windows):
        stream = decoder.embed(ranges, rng.integers(0, c.vocab_size, (1, length)))
        for part in parts:
            for i in part.layers:
                stream, _ = decoder.block(ranges, i, stream, at, None)
            if not part.heads:
                settled = stream.settle(ranges)
                stream = decoder.Residual(settled)
                boundary.setdefault(part.number, []).append(settled)
        decoder.head(ranges, stream)
    found = {name: Encoding.of_range(1.1 * low, 1.1 * high) for name, (low, high) in ranges.seen.items()}
    for i in range(c.num_layers):
        for kind, name in (("key", "k_cache"), ("value", "v_cache")):
            low, high = ranges.seen[f"layers.{i}.self_attn.{name}"]
            scale = float(np.float32(1.05 * max(-low, high) / 127))
            found[f"past_{kind}_{i}"] = found[f"layers.{i}.self_attn.{name}"] = Encoding(scale, 128, 8)
        for turned in ("q_rope", "k_rope"):  # the concat of both halves keeps one encoding
            p = f"layers.{i}.self_attn.{turned}"
            low = min(ranges.seen[f"{p}.low"][0], ranges.seen[f"{p}.high"][0])
            high = max(ranges.seen[f"{p}.low"][1], ranges.seen[f"{p}.high"][1])
            found[f"{p}.low"] = found[f"{p}.high"] = found[p] = Encoding.of_range(1.1 * low, 1.1 * high)
        found[f"layers.{i}.self_attn.weights"] = Encoding.of_range(0.0, 1.0)
        found[f"layers.{i}.mlp.silu.sigmoid"] = Encoding.of_range(0.0, 1.0)
    for number, values in boundary.items():
        found[f"hidden_{number}"] = Encoding.of_range(
            1.1 * float(min(v.min() for v in values)), 1.1 * float(max(v.max() for v in values))
        )
    found["logits"] = found["lm_head"]
    return found


@dataclass(frozen=True)
class Value:
    """A float value of the graph being recorded: its name, static shape and encoding."""

    name: str
    shape: tuple[int, ...]
    encoding: Encoding | None


class QdqOps(PrimitiveOps[Value]):
    """Records the decoder as QDQ nodes."""

    def __init__(self, model: TinyModel) -> None:
        super().__init__(model.config)
        self.model = model
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}
        self.count = 0

    # Recording.

    def node(self, op: str, inputs: Sequence[str], **attributes: object) -> str:
        self.count += 1
        output = f"{op}_{self.count}"
        self.nodes.append(helper.make_node(op, list(inputs), [output], name=output, **attributes))
        return output

    def constant(self, name: str, value: NDArray[np.generic]) -> str:
        self.initializers[name] = numpy_helper.from_array(np.asarray(value), name)
        return name

    def code(self, name: str, codes: NDArray[np.generic], dtype: str) -> str:
        """Integer codes; int4 packed low nibble first."""
        if dtype == "int4":
            flat = codes.reshape(-1).astype(np.uint8) & 15
            flat = np.append(flat, np.zeros(flat.size % 2, np.uint8))
            packed = (flat[::2] | (flat[1::2] << 4)).tobytes()
            self.initializers[name] = helper.make_tensor(name, DTYPES[dtype], codes.shape, packed, raw=True)
        else:
            self.constant(name, codes.astype(dtype))
        return name

    def scale_and_zero(self, e: Encoding) -> tuple[str, str]:
        tag = f"{e.dtype}_{e.scale!r}_{e.zero_point}"
        return (
            self.constant(f"scale_{tag}", np.float32(e.scale)),
            self.constant(f"zero_{tag}", np.array(e.zero_point, e.dtype)),
        )

    def quantize(self, name: str, e: Encoding, output: str | None = None) -> str:
        codes = self.node("QuantizeLinear", [name, *self.scale_and_zero(e)])
        if output is not None:
            self.nodes[-1].output[0] = output
        return output or codes

    def named(self, name: str, raw: str, shape: Sequence[int]) -> Value:
        """A result of the decoder: quantized on its own grid."""
        return self.on_grid(raw, shape, self.model.encodings[name])

    def on_grid(self, raw: str, shape: Sequence[int], e: Encoding) -> Value:
        codes = self.quantize(raw, e)
        return Value(self.node("DequantizeLinear", [codes, *self.scale_and_zero(e)]), tuple(shape), e)

    def moved(self, op: str, x: Value, shape: Sequence[int], inputs: Sequence[str] = (), **attributes: object) -> Value:
        """A data movement keeps the grid."""
        assert x.encoding is not None
        return self.on_grid(self.node(op, [x.name, *inputs], **attributes), shape, x.encoding)

    def weight(self, name: str, transposed: bool) -> str:
        """A linear's weight on a symmetric per-channel grid: int8 for the head, else int4."""
        bits = 8 if name == HEAD else 4
        value = self.model.weights[name]  # (N, K)
        top = 2 ** (bits - 1) - 1
        scale = (np.abs(value).max(axis=1) / top).astype(np.float32)
        codes = np.clip(np.rint(value / scale[:, None]), -top, top).astype(np.int8)
        axis = 1 if transposed else 0
        if transposed:
            codes = np.ascontiguousarray(codes.T)
        if self.model.linear_form == "conv":
            codes = codes[:, :, None, None]
        dtype = f"int{bits}"
        parts = [
            self.code(f"{name}.codes", codes, dtype),
            self.constant(f"{name}.scale", scale),
            # Without an explicit zero point the compiler reads int4 codes as 0..15.
            self.code(f"{name}.zero", np.zeros(scale.shape, np.int8), dtype),
        ]
        return self.node("DequantizeLinear", parts, axis=axis)

    # Primitives.

    def embed(self, ids: Value, weight: str) -> Value:
        table = self.model.weights[weight]
        e = Encoding(float(np.float32(np.abs(table).max() / 127)), 128, 8)
        codes = np.clip(np.rint(table / e.scale) + 128, 0, 255).astype(np.uint8)
        rows = self.node("DequantizeLinear", [self.constant(f"{weight}.codes", codes), *self.scale_and_zero(e)])
        shape = (*ids.shape, table.shape[1])
        picked = self.on_grid(self.node("Gather", [rows, ids.name], axis=0), shape, e)
        return self.named("embed_tokens", picked.name, shape)

    def bias(self, weight: str) -> Value:
        raise NotImplementedError("this decoder has no biases")

    def product(self, x: Value, weight: str, name: str) -> Value:
        outputs = self.model.weights[weight].shape[0]
        shape = (*x.shape[:-1], outputs)
        form = self.model.linear_form
        if form == "matmul":
            return self.named(name, self.node("MatMul", [x.name, self.weight(weight, transposed=True)]), shape)
        if form == "gemm":
            flat = self.reshape(x, (x.shape[1], x.shape[2]))
            raw = self.node("Gemm", [flat.name, self.weight(weight, transposed=False)], transB=1)
            return self.reshape(self.named(name, raw, (x.shape[1], outputs)), shape)
        square = self.transpose(self.reshape(x, (1, 1, x.shape[1], x.shape[2])), (0, 3, 1, 2))  # (1, K, 1, S)
        raw = self.node("Conv", [square.name, self.weight(weight, transposed=False)], kernel_shape=[1, 1])
        wide = self.named(name, raw, (1, outputs, 1, x.shape[1]))
        return self.reshape(self.transpose(wide, (0, 2, 3, 1)), shape)

    def rms_norm(self, x: Value, weight: str) -> Value:
        gamma = self.model.weights[weight]
        e = Encoding.of_range(float(gamma.min()), float(gamma.max()))
        codes = np.clip(np.rint(gamma / e.scale) + e.zero_point, 0, 65535).astype(np.uint16)
        g = self.node("DequantizeLinear", [self.constant(f"{weight}.codes", codes), *self.scale_and_zero(e)])
        raw = self.node("RMSNormalization", [x.name, g], axis=-1, epsilon=self.config.rms_norm_eps)
        return self.named(weight.removesuffix(".weight"), raw, x.shape)

    def matmul(self, a: Value, b: Value, name: str) -> Value:
        return self.named(name, self.node("MatMul", [a.name, b.name]), (*a.shape[:-1], b.shape[-1]))

    def softmax(self, x: Value, name: str) -> Value:
        return self.named(name, self.node("Softmax", [x.name], axis=-1), x.shape)

    def sigmoid(self, x: Value, name: str) -> Value:
        return self.named(name, self.node("Sigmoid", [x.name]), x.shape)

    def add(self, a: Value, b: Value, name: str) -> Value:
        return self._binary("Add", a, b, name)

    def subtract(self, a: Value, b: Value, name: str) -> Value:
        return self._binary("Sub", a, b, name)

    def multiply(self, a: Value, b: Value, name: str) -> Value:
        return self._binary("Mul", a, b, name)

    def _binary(self, op: str, a: Value, b: Value, name: str) -> Value:
        return self.named(name, self.node(op, [a.name, b.name]), np.broadcast_shapes(a.shape, b.shape))

    def scale(self, x: Value, factor: float, name: str) -> Value:
        e = Encoding(float(np.float32(factor / 65535)), 0)
        one = self.node(
            "DequantizeLinear",
            [self.constant(f"factor_{factor!r}", np.array([65535], np.uint16)), *self.scale_and_zero(e)],
        )
        return self.named(name, self.node("Mul", [x.name, one]), x.shape)

    def concat(self, parts: Sequence[Value], axis: int, name: str) -> Value:
        shape = list(parts[0].shape)
        shape[axis] = sum(p.shape[axis] for p in parts)
        return self.named(name, self.node("Concat", [p.name for p in parts], axis=axis), shape)

    def slice(self, x: Value, axis: int, start: int, stop: int) -> Value:
        shape = list(x.shape)
        shape[axis] = stop - start
        numbers = [self.constant(f"int_{n}", np.array([n], np.int64)) for n in (start, stop, axis)]
        return self.moved("Slice", x, shape, numbers)

    def reshape(self, x: Value, shape: Sequence[int]) -> Value:
        full = [x.shape[i] if n == 0 else n for i, n in enumerate(shape)]
        if -1 in full:
            full[full.index(-1)] = int(np.prod(x.shape) // -np.prod(full))
        if tuple(full) == x.shape:
            return x
        name = "shape_" + "_".join(map(str, full))
        return self.moved("Reshape", x, full, [self.constant(name, np.array(full, np.int64))])

    def transpose(self, x: Value, order: Sequence[int]) -> Value:
        return self.moved("Transpose", x, [x.shape[i] for i in order], perm=list(order))

    def rows(self, x: Value, wanted: Value) -> Value:
        raise NotImplementedError("device graphs give the logits of every token")

    def to_cache(self, x: Value, name: str) -> Value:
        return self.named(name, x.name, x.shape)


def emit(model: TinyModel, part: Part, length: int, context: int) -> onnx.ModelProto:
    """One part's graph for S = length, C = context."""
    c = model.config
    ops = QdqOps(model)
    inputs, outputs = ports(c, part, GraphStyle.DEVICE, length=length, context=context)
    values: dict[str, Value] = {}
    for port in inputs:
        shape = tuple(int(n) for n in port.shape)
        e = model.port_encoding(port.name)
        name = port.name if e is None else ops.node("DequantizeLinear", [port.name, *ops.scale_and_zero(e)])
        values[port.name] = Value(name, shape, e)
    made: dict[str, Value] = {}
    if part.embeds:
        stream = decoder.embed(ops, values["input_ids"])
    else:
        stream = decoder.Residual(values[f"hidden_{part.number - 1}"])
    for i in part.layers:
        at = Positions(*(values[n] for n in ("position_ids_cos", "position_ids_sin", "attention_mask")))
        # The cache comes as (kvH, 1, …) and the decoder batches over the first axis.
        past = [ops.transpose(values[f"past_{kind}_{i}_in"], (1, 0, 2, 3)) for kind in ("key", "value")]
        stream, (key, value) = decoder.block(ops, i, stream, at, (past[0], past[1]))
        made[f"past_key_{i}_out"] = ops.transpose(key, (1, 0, 2, 3))
        made[f"past_value_{i}_out"] = ops.transpose(value, (1, 0, 2, 3))
    if part.heads:
        made["logits"] = decoder.head(ops, stream)
    else:
        made[f"hidden_{part.number}"] = stream.settle(ops)
    for port in outputs:
        e = model.port_encoding(port.name)
        assert e is not None
        ops.quantize(made[port.name].name, e, port.name)
    graph = helper.make_graph(
        ops.nodes,
        graph_name(part, length, context),
        [helper.make_tensor_value_info(p.name, DTYPES[p.dtype], p.shape) for p in inputs],
        [helper.make_tensor_value_info(p.name, DTYPES[p.dtype], p.shape) for p in outputs],
        list(ops.initializers.values()),
    )
    made_model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
    onnx.checker.check_model(made_model)
    return made_model


def write(
    model: TinyModel, parts: Sequence[Part], lengths: Sequence[int], contexts: Sequence[int], folder: Path
) -> dict[str, Path]:
    """Every graph, by its name, as a file."""
    written = {}
    for part in parts:
        for context in contexts:
            for length in lengths:
                name = graph_name(part, length, context)
                written[name] = folder / f"{name}.onnx"
                onnx.save(emit(model, part, length, context), written[name])
    return written


def port_encodings(model: TinyModel, parts: Sequence[Part]) -> dict[str, Encoding]:
    """The encoding of every quantized device port, by port name."""
    found = {}
    for part in parts:
        for port in sum(ports(model.config, part, GraphStyle.DEVICE), ()):
            e = model.port_encoding(port.name)
            if e is not None:
                found[port.name] = e
    return found
