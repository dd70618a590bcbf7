"""OpenVINO as a contestant, on a decoder of the same shape with random int4 weights.

usage: run_openvino.py GEOMETRY_JSON THREADS [group=0] [CONFIG=VALUE …]

GEOMETRY_JSON: {"layers", "hidden", "heads", "ffn", "vocab"}. group: columns that share a scale, 0 for a channel; other
options go to the CPU plugin. int4 linears, an int8 head, attention over a stateful cache of the plugin's own choice.
Rotary positions and the causal mask are left out, which can only help it.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import openvino as ov
from contestant import ids_of, serve
from openvino import opset13 as op
from openvino.op.util import Variable, VariableInfo

NOISE = np.random.default_rng(0).integers(0, 256, 1 << 24, np.uint8)
KEPT: list[Any] = []  # constants of packed types point into the arrays they were made of, also once compiled


def noise(count: int) -> Any:
    """So many random bytes."""
    KEPT.append(np.resize(NOISE, count))
    return KEPT[-1]


def floats(*values: float) -> Any:
    return op.constant(np.array(values, np.float32))


def weight(rows: int, columns: int, bits: int, group: int) -> Any:
    """A compressed constant (rows, columns), as weight compression of OpenVINO's own tools writes it."""
    size = group if group and columns % group == 0 else columns
    blocks = columns // size
    rng = np.random.default_rng(1)
    scales = op.constant((rng.random((rows, blocks, 1)) * 0.002 + 0.001).astype(np.float16))
    if bits == 4:
        codes = ov.Tensor(noise(rows * columns // 2), ov.Shape([rows, blocks, size]), ov.Type.u4)
        KEPT.append(np.full((rows * blocks + 1) // 2, 0x88, np.uint8))
        zeros = ov.Tensor(KEPT[-1], ov.Shape([rows, blocks, 1]), ov.Type.u4)
        centred = op.subtract(op.convert(op.constant(codes), "f16"), op.convert(op.constant(zeros), "f16"))
    else:
        codes = noise(rows * columns).reshape(rows, blocks, size).view(np.int8)
        centred = op.convert(op.constant(codes), "f16")
    whole = op.reshape(op.multiply(centred, scales), op.constant(np.array([rows, columns])), False)
    return op.convert(whole, "f32")


class OpenVino:
    """A compiled model and its infer request."""

    def __init__(self, geometry: dict[str, int], threads: int, options: dict[str, str]) -> None:
        self.geometry = geometry
        self.group = int(options.pop("group", "0"))
        self.sinks: list[Any] = []
        config = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32", **options}
        compiled = ov.Core().compile_model(self._model(), "CPU", config)
        self.request = compiled.create_infer_request()
        self.beam = np.zeros(1, np.int32)
        self.ids = ids_of(8192, geometry["vocab"])
        self.held = 0
        self.next = 0
        label = " ".join(["openvino", f"group={self.group}", *(f"{k}={v}" for k, v in options.items())])
        h, f = geometry["hidden"], geometry["ffn"]
        size = geometry["layers"] * (4 * h * h + 3 * h * f) // 2 + 2 * geometry["vocab"] * h
        self.about = {"name": label, "isa": str(ov.__version__), "weight_bytes": size}

    def prompt(self, tokens: int) -> None:
        self.request.reset_state()
        self.held = 0
        self._infer(self.ids[:tokens])

    def rewind(self, tokens: int) -> None:
        if self.held != tokens:  # its state cannot be cut
            self.prompt(tokens)

    def token(self) -> None:
        self._infer([self.next])

    def _infer(self, ids: list[int]) -> None:
        out = self.request.infer({0: np.array([ids], np.int64), 1: self.beam})
        self.next = int(out[0][0, -1].argmax())
        self.held += len(ids)

    def _model(self) -> Any:
        g = self.geometry
        ids = op.parameter([1, -1], ov.Type.i64, name="input_ids")
        beam = op.parameter([1], ov.Type.i32, name="beam_idx")
        table = noise(g["vocab"] * g["hidden"]).view(np.int8).reshape(g["vocab"], g["hidden"])
        rows = op.gather(op.constant(table), ids, op.constant(0))
        x = op.multiply(op.convert(rows, "f32"), floats(0.001))
        for layer in range(g["layers"]):
            x = self._layer(x, beam, layer)
        last = op.gather(self._norm(x), op.constant(np.array([-1])), op.constant(1))
        head = op.matmul(last, weight(g["vocab"], g["hidden"], 8, 0), False, True)
        return ov.Model([op.result(head, name="logits")], self.sinks, [ids, beam], "decoder")

    def _layer(self, x: Any, beam: Any, layer: int) -> Any:
        g = self.geometry
        h, f = g["hidden"], g["ffn"]
        normed = self._norm(x)
        q, k, v = (self._heads(self._linear(normed, h, h)) for _ in range(3))
        k, v = self._cache(k, beam, f"k{layer}"), self._cache(v, beam, f"v{layer}")
        mixed = op.transpose(op.scaled_dot_product_attention(q, k, v), op.constant(np.array([0, 2, 1, 3])))
        mixed = op.reshape(mixed, op.constant(np.array([1, -1, h])), False)
        x = op.add(x, self._linear(mixed, h, h))
        normed = self._norm(x)
        gated = op.multiply(op.swish(self._linear(normed, f, h)), self._linear(normed, f, h))
        return op.add(x, self._linear(gated, h, f))

    def _linear(self, x: Any, rows: int, columns: int) -> Any:
        return op.matmul(x, weight(rows, columns, 4, self.group), False, True)

    def _norm(self, x: Any) -> Any:
        mean = op.reduce_mean(op.power(x, floats(2)), op.constant(np.array([-1])), True)
        scale = op.divide(floats(1), op.sqrt(op.add(mean, floats(1e-6))))
        return op.multiply(op.constant(np.ones((1, 1, self.geometry["hidden"]), np.float32)), op.multiply(x, scale))

    def _heads(self, x: Any) -> Any:
        heads = self.geometry["heads"]
        shape = op.constant(np.array([1, -1, heads, self.geometry["hidden"] // heads]))
        return op.transpose(op.reshape(x, shape, False), op.constant(np.array([0, 2, 1, 3])))

    def _cache(self, x: Any, beam: Any, name: str) -> Any:
        heads = self.geometry["heads"]
        width = self.geometry["hidden"] // heads
        info = VariableInfo()
        info.data_shape, info.data_type, info.variable_id = ov.PartialShape([1, heads, -1, width]), ov.Type.f32, name
        variable = Variable(info)
        past = op.read_value(op.constant(np.zeros((1, heads, 0, width), np.float32)), variable)
        whole = op.concat([op.gather(past, beam, op.constant(0)), x], 2)
        self.sinks.append(op.assign(whole, variable))
        return whole


if __name__ == "__main__":
    geometry, threads, *options = sys.argv[1:]
    serve(OpenVino(json.loads(geometry), int(threads), dict(option.split("=") for option in options)))
