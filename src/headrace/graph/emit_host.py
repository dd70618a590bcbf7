"""Host graphs: the decoder over ONNX Runtime's fused operators, any batch and length.

One graph a part, for both roles. Weights are pointers into the parts' safetensors; the KV cache is one buffer a
tensor, which the caller binds as past and as present, so that a step writes in place.

    hidden ─► RMSNorm ─► MatMulNBits q,k,v ─► GroupQueryAttention(rope, int8 cache) ─► MatMulNBits o ─┐
       └────────────────────────────────────────────────► SkipRMSNorm ◄──────────────────────────────┘
                                                             └─► gate,up ─► silu·up ─► down ─► SkipRMSNorm …

Knows nothing about sessions or threads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

import numpy as np
from numpy.typing import NDArray

from headrace.bundle.grid import UNIT, Grid
from headrace.bundle.weights import StoredTensor
from headrace.config import ModelConfig
from headrace.errors import RecipeError
from headrace.graph.build import FLOAT, INT32, UINT8, GraphBuilder, Value
from headrace.graph.record import Recorder
from headrace.model import decoder
from headrace.model.decoder import Residual
from headrace.model.ops import Positions, attention_name
from headrace.model.weights import Weight, weight_table
from headrace.plan import GraphStyle, Part, Port, host_head_dim, ports

__all__ = ["HostWeights", "emit_host", "kernel_block"]

MICROSOFT = "com.microsoft"
SMALLEST_BLOCK = 16  # of MatMulNBits
NIBBLES = np.stack([np.arange(256) & 15, np.arange(256) >> 4], axis=1).astype(np.uint8)  # of a byte, the low one first
INT8_ACTIVATIONS = 4  # MatMulNBits accuracy_level: activations rounded to int8 a block, int32 sums


@dataclass(frozen=True)
class HostWeights:
    """What a graph must know of the weights.

    Attributes:
        tensors: every stored tensor of all parts.
        grids: the grid of each quantized weight.
        kv_scales: (key, value) scale of each layer's int8 cache; empty for a float32 cache.
    """

    tensors: Mapping[str, StoredTensor]
    grids: Mapping[str, Grid]
    kv_scales: Sequence[tuple[float, float]] = ()


def kernel_block(columns: int, stored_block: int | None) -> int:
    """The block MatMulNBits works with: the largest power of two ≤ 256 that divides the row and the stored block.

    The kernel takes powers of two from 16 on, and would pad a row that is no multiple.
    """
    block = 256
    while block > SMALLEST_BLOCK and (columns % block or (stored_block is not None and stored_block % block)):
        block //= 2
    return block


class _HostOps(Recorder):
    """Records ONNX Runtime's operators; attention, rope and add_norm are fused."""

    def __init__(self, config: ModelConfig, graph: GraphBuilder, weights: HostWeights, accuracy_level: int) -> None:
        super().__init__(config, graph)
        self.weights = weights
        self.accuracy_level = accuracy_level
        self.last_position: Value | None = None
        self.total_length: Value | None = None

    def embed(self, ids: Value, weight: str) -> Value:
        """(codes[ids] − 128) · scales[ids], in blocks when the table has any. Of 5 or 6 bits only the rows that are
        picked become bytes, in each step."""
        g = self.graph
        grid = self.weights.grids[weight]
        row = weight_table(self.config)[weight]
        _, columns = row.matrix
        blocks = grid.blocks(columns, weight)
        if grid.bits == 4:
            raise RecipeError(f"{weight} has 4 bits; the embedding takes 5, 6 or 8, change its rule")
        picked = self._picked(f"{weight}_packed", ids)
        if grid.high_bits:
            low = self.reshape(self._looked_up(picked, "nibbles", NIBBLES), (0, 0, columns))
            high = self.reshape(self._picked(f"{weight}_high", ids), (0, 0, -1, 8 * grid.high_bits))
            picked = self._with_high(low, high, (0, 0), columns, grid.bits)
        values = g.one("Cast", [picked], to=FLOAT, name=f"{weight}.float")
        centre = g.constant("zero_point_8", np.array(128, np.float32))
        values = g.one("Sub", [values, centre], name=f"{weight}.centred")
        step = g.one("Cast", [self._picked(f"{weight}_scale", ids)], to=FLOAT, name=f"{weight}.steps_float")
        if grid.lpbq:
            factors = self._looked_up(self._picked(f"{weight}_factors", ids), "nibbles", NIBBLES)
            factors = self.reshape(g.one("Cast", [factors], to=FLOAT, name=f"{weight}.factors"), (0, 0, -1))
            step = self._times_factors(step, factors, 2, blocks, f"{weight}.steps")
        if blocks > 1:
            values = self.reshape(values, (0, 0, blocks, columns // blocks))
            step = self.reshape(step, (0, 0, blocks, 1))
            return self.reshape(g.one("Mul", [values, step], name=f"{weight}.scaled"), (0, 0, columns))
        return g.one("Mul", [values, step], name=row.module)

    def linear(self, x: Value, weight: str) -> Value:
        row = weight_table(self.config)[weight]
        return self._matmul(x, (row,), row.module)

    def product(self, x: Value, weight: str, name: str) -> Value:
        return self._matmul(x, (weight_table(self.config)[weight]._replace(bias=None),), name)

    def bias(self, weight: str) -> Value:
        return self._stored(weight)

    def linears(self, x: Value, weights: Sequence[str]) -> tuple[Value, ...]:
        """One MatMulNBits for linears of one input and one grid, whose rows follow each other in the file: threads
        synchronise after each product, which takes most of a small model's time a token."""
        made: list[Value] = []
        rows = (weight_table(self.config)[weight] for weight in weights)
        for _, run in groupby(rows, lambda row: (self.weights.grids[row.name], row.bias is None)):
            made += self._joined_linears(x, list(run))
        return tuple(made)

    def _joined_linears(self, x: Value, weights: Sequence[Weight]) -> list[Value]:
        if len(weights) == 1:
            return [self.linear(x, weights[0].name)]
        joined = self._matmul(x, weights, "+".join(weight.module for weight in weights))
        rows = np.array([weight.shape[0] for weight in weights], np.int64)
        sizes = self.graph.constant("sizes_" + "_".join(map(str, rows)), rows)
        return self.graph.node("Split", [joined, sizes], {"axis": -1}, name=f"{joined.name}.split", outputs=len(rows))

    def _matmul(self, x: Value, weights: Sequence[Weight], name: str) -> Value:
        """MatMulNBits, with a bias where the weights have one. Stored scales are float16, a channel's or a block's; the
        kernel wants float32 for each of its blocks: Cast and Expand are folded when the session is made, so neither
        disk nor steps pay for it."""
        sources = [weight.stored_as for weight in weights]
        source, columns = sources[0], weights[0].matrix[1]
        grid, rows = self.weights.grids[source], sum(weight.shape[0] for weight in weights)
        if columns % SMALLEST_BLOCK:
            return self._float_matmul(x, weights, name)
        block = kernel_block(columns, grid.block)
        blocks = columns // block
        stored_blocks = grid.blocks(columns, source)
        packed = _behind(self.weights.tensors, [f"{s}_packed" for s in sources])
        if grid.high_bits:
            data, bits = self._bytes(name, sources, grid.bits, (rows, blocks, block)), 8
        else:
            data = self.graph.stored(f"{name}_packed.blocks", packed, (rows, blocks, block * grid.bits // 8))
            bits = grid.bits
        scales = self._scales(name, sources, grid.lpbq, stored_blocks)
        if stored_blocks != blocks:
            scales = self._expand(scales, rows, stored_blocks, blocks // stored_blocks, name)
        attributes = {
            "K": columns,
            "N": rows,
            "bits": bits,
            "block_size": block,
            "accuracy_level": self.accuracy_level,
        }
        inputs: list[Value | None] = [x, data, scales]
        biases = [weight.bias for weight in weights if weight.bias is not None]
        if biases:
            inputs += [None, None, self.graph.stored(f"{name}.bias", _behind(self.weights.tensors, biases))]
        return self.graph.node("MatMulNBits", inputs, attributes, domain=MICROSOFT, name=name)[0]

    def _scales(self, name: str, sources: Sequence[str], lpbq: bool, blocks: int) -> Value:
        """Scales (N, blocks) of linears that follow each other, float32; LPBQ ones are multiplied out."""
        g, tensors = self.graph, self.weights.tensors
        scales = g.stored(f"{name}_scale", _behind(tensors, [f"{s}_scale" for s in sources]))
        scales = g.one("Cast", [scales], to=FLOAT, name=f"{name}_scale.float")
        if not lpbq:
            return scales
        stored = _behind(tensors, [f"{s}_factors" for s in sources])
        rows, width = stored.shape
        factors = g.stored(f"{name}_factors", stored, (rows, 2 * width), bits=4)
        factors = g.one("Cast", [factors], to=FLOAT, name=f"{name}_factors.float")
        return self._times_factors(scales, factors, 1, blocks, f"{name}_scale")

    def _times_factors(self, scales: Value, factors: Value, axis: int, blocks: int, name: str) -> Value:
        """LPBQ scales (…, 1), multiplied out by stored factors (…, 2·⌈blocks/2⌉), which are one less than they are."""
        g = self.graph
        if blocks % 2:
            factors = self.slice(factors, axis, 0, blocks)
        factors = g.one("Add", [factors, g.constant("one", np.array(1, np.float32))], name=f"{name}.factors")
        return g.one("Mul", [scales, factors], name=f"{name}.blocks")

    def _bytes(self, name: str, sources: Sequence[str], bits: int, shape: tuple[int, int, int]) -> Value:
        """Codes of 5 or 6 bits + 128, which is what MatMulNBits reads of 8: bytes that ONNX Runtime computes from the
        stored bits when the session is made, so that steps do not pay."""
        rows, blocks, block = shape
        columns = blocks * block
        packed, high = (_behind(self.weights.tensors, [f"{s}_{kind}" for s in sources]) for kind in ("packed", "high"))
        low = self.graph.stored(f"{name}_packed.nibbles", packed, (rows, columns), bits=4)
        low = self.graph.one("Cast", [low], to=UINT8, name=f"{name}_packed.low")
        units = self.graph.stored(f"{name}_high", high, (rows, -(-columns // UNIT), 8 * (bits - 4)))
        codes = self._with_high(low, units, (rows,), columns, bits)
        return self.reshape(codes, shape)

    def _with_high(self, low: Value, high: Value, rows: Sequence[int], columns: int, bits: int) -> Value:
        """Low four bits (*rows, K) and units of the bits above (*rows, ⌈K/64⌉, n) as codes + 128, uint8 (*rows, K).

        The high bits of the unsigned code and 128 − 2^(bits−1) make 128 + those of the signed code, above the low four.
        A byte has them for columns that lie far apart (see `pack_high`): its fields become the places of columns.
        """
        above, zero_point = bits - 4, 1 << (bits - 1)
        of_bytes = np.arange(256)[:, None] >> np.arange(0, 8, above) & ((1 << above) - 1)
        table = (128 - zero_point + 16 * of_bytes).astype(np.uint8).reshape(256, 2, -1)  # of even columns, of odd ones
        found = self._looked_up(high, f"high_{above}", table)  # (*rows, ⌈K/64⌉, n, 2, fields)
        axis = len(rows)
        found = self.transpose(found, (*range(axis + 1), axis + 3, axis + 1, axis + 2))
        found = self.reshape(found, (*rows, -1))
        if columns % UNIT:
            found = self.slice(found, axis, 0, columns)
        return self.graph.one("BitwiseOr", [low, found], name=f"{high.name}.codes")

    def _looked_up(self, stored: Value, name: str, table: NDArray[np.uint8]) -> Value:
        """The row of a table (256, …) for each byte."""
        index = self.graph.one("Cast", [stored], to=INT32, name=f"{stored.name}.index")
        return self.graph.one("Gather", [self.graph.constant(name, table), index], name=f"{stored.name}.{name}")

    def _picked(self, name: str, ids: Value) -> Value:
        """The rows of a stored tensor."""
        return self.graph.one("Gather", [self._stored(name), ids], name=f"{name}.picked")

    def _float_matmul(self, x: Value, weights: Sequence[Weight], name: str) -> Value:
        """The same for a row that no block of MatMulNBits divides, which has one scale (blocks that do not divide are
        refused): float32 weights, which ONNX Runtime computes from the stored ones when the session is made."""
        sources = [weight.stored_as for weight in weights]
        grid, columns = self.weights.grids[sources[0]], weights[0].matrix[1]
        rows = sum(weight.shape[0] for weight in weights)
        packed = _behind(self.weights.tensors, [f"{s}_packed" for s in sources])
        scales = self._scales(name, sources, lpbq=False, blocks=1)
        codes = self.graph.stored(f"{name}_packed", packed, (rows, columns), bits=grid.bits)
        codes = self.graph.one("Cast", [codes], to=FLOAT, name=f"{name}.float")
        centre = self.graph.constant(f"zero_point_{grid.bits}", np.array(grid.zero_point, np.float32))
        values = self.graph.one("Sub", [codes, centre], name=f"{name}.centred")
        values = self.graph.one("Mul", [values, scales], name=f"{name}.weight")
        values = self.transpose(values, (1, 0))
        biases = [weight.bias for weight in weights if weight.bias is not None]
        if not biases:
            return self.graph.one("MatMul", [x, values], name=name)
        product = self.graph.one("MatMul", [x, values], name=f"{name}.product")
        bias = self.graph.stored(f"{name}.bias", _behind(self.weights.tensors, biases))
        return self.graph.one("Add", [product, bias], name=name)

    def rms_norm(self, x: Value, weight: str) -> Value:
        attributes = {"epsilon": self.config.rms_norm_eps, "axis": -1, "stash_type": 1}
        inputs, name = [x, self._stored(weight)], weight_table(self.config)[weight].module
        return self.graph.one("SimplifiedLayerNormalization", inputs, name=name, **attributes)

    def add_norm(self, x: Value, update: Value, weight: str, name: str) -> tuple[Value, Value]:
        normed, _, _, total = self.graph.node(
            "SkipSimplifiedLayerNormalization",
            [x, update, self._stored(weight)],
            {"epsilon": self.config.rms_norm_eps},
            domain=MICROSOFT,
            name=weight_table(self.config)[weight].module,
            outputs=4,
        )
        return normed, total

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
        c = self.config
        attributes: dict[str, int | float | str] = {
            "num_heads": c.num_heads,
            "kv_num_heads": c.num_kv_heads,
            "do_rotary": 1,
            "rotary_interleaved": 0,
        }
        # The operator splits a joined product itself.
        heads: list[Value | None] = [q, k, v]
        split, name = q.producer, attention_name(layer)
        cos, sin = at.cos, at.sin
        if (padded := host_head_dim(c)) != c.head_dim:
            attributes |= {"scale": c.head_dim**-0.5}
            heads = [self._padded(x, padded) for x in (q, k, v)]
            cos, sin = (self._pad_last(table, (padded - c.head_dim) // 2, 2) for table in (cos, sin))
        elif split is not None and split.op_type == "Split" and split.outputs == (q, k, v):
            heads = [split.inputs[0], None, None]
        inputs = [*heads, *past, self.last_position, self.total_length, cos, sin]
        if self.weights.kv_scales:
            key_scale, value_scale = self.weights.kv_scales[layer]
            inputs += [None, None, None]
            inputs.append(self.graph.constant(f"{name}.key_scale", np.array([key_scale], np.float32)))
            inputs.append(self.graph.constant(f"{name}.value_scale", np.array([value_scale], np.float32)))
            attributes |= {"k_quant_type": "PER_TENSOR", "v_quant_type": "PER_TENSOR", "kv_cache_bit_width": 8}
        mixed, key, value = self.graph.node(
            "GroupQueryAttention", inputs, attributes, domain=MICROSOFT, name=name, outputs=3
        )
        if padded != c.head_dim:
            half = self.reshape(mixed, (0, 0, 2 * c.num_heads, padded // 2))
            mixed = self.reshape(self.slice(half, 3, 0, c.head_dim // 2), (0, 0, c.query_size))
        return mixed, (key, value)

    def _padded(self, x: Value, width: int) -> Value:
        """Heads (B, S, heads·D) with zeros behind each half, which rotary pairs with the same place of the other."""
        half = self.config.head_dim // 2
        halves = self.reshape(x, (0, 0, -1, half))
        return self.reshape(self._pad_last(halves, width // 2 - half, 4), (0, 0, -1))

    def _pad_last(self, x: Value, zeros: int, rank: int) -> Value:
        """Zeros behind the last axis."""
        pads = self.graph.constant(f"pad_{rank}_{zeros}", np.array([0] * (2 * rank - 1) + [zeros], np.int64))
        return self.graph.one("Pad", [x, pads], name=f"{x.name}.padded")

    def _stored(self, name: str) -> Value:
        return self.graph.stored(name, self.weights.tensors[name])

    def _expand(self, scales: Value, rows: int, blocks: int, times: int, source: str) -> Value:
        """(N, blocks) → (N, blocks · times): each scale repeated."""
        scales = self.reshape(scales, (rows, blocks, 1))
        target = self.graph.constant(f"shape_{rows}_{blocks}_{times}", np.array((rows, blocks, times), np.int64))
        scales = self.graph.one("Expand", [scales, target], name=f"{source}_scale.repeated")
        return self.reshape(scales, (rows, blocks * times))


def _behind(tensors: Mapping[str, StoredTensor], names: Sequence[str]) -> StoredTensor:
    """Tensors that stand behind each other in one file, as one with all their rows."""
    parts = [tensors[name] for name in names]
    for before, after in pairwise(parts):
        if (before.file, before.offset + before.nbytes) != (after.file, after.offset):
            raise ValueError(f"{names} are not behind each other in one file")
    return parts[0]._replace(shape=(sum(part.shape[0] for part in parts), *parts[0].shape[1:]))


def emit_host(
    config: ModelConfig, part: Part, weights: HostWeights, *, accuracy_level: int = INT8_ACTIVATIONS
) -> GraphBuilder:
    """One part's host graph, with exactly the ports of `plan.ports`."""
    kv_dtype = "int8" if weights.kv_scales else "float32"
    inputs, outputs = ports(config, part, GraphStyle.HOST, kv_dtype=kv_dtype)
    graph = GraphBuilder(part.name, {"": 21, MICROSOFT: 1})
    ops = _HostOps(config, graph, weights, accuracy_level)
    given = {port.name: graph.input(port) for port in inputs}
    wanted: dict[str, Port] = {port.name: port for port in outputs}
    stream = decoder.embed(ops, given["input_ids"]) if part.embeds else Residual(given[f"hidden_{part.number - 1}"])
    if part.layers:
        ops.last_position, ops.total_length = given["last_position"], given["total_length"]
        at = Positions(given["cos"], given["sin"], given["cos"])  # the fused operator masks by itself
    for layer in part.layers:
        past = given[f"past_key_{layer}_in"], given[f"past_value_{layer}_in"]
        stream, (key, value) = decoder.block(ops, layer, stream, at, past)
        graph.output(key, wanted[f"past_key_{layer}_out"])
        graph.output(value, wanted[f"past_value_{layer}_out"])
    if part.heads:
        graph.output(decoder.head(ops, stream, given["rows"]), wanted["logits"])
    else:
        graph.output(stream.settle(ops), wanted[f"hidden_{part.number}"])
    return graph
