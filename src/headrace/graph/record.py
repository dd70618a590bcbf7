"""Recorder: the plain primitives of the Ops seam as ONNX nodes, shared by both emitters. Knows no quantization."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from headrace.config import ModelConfig
from headrace.graph.build import GraphBuilder, Value
from headrace.model.ops import PrimitiveOps

__all__ = ["Recorder"]


class Recorder(PrimitiveOps[Value]):
    """Records float ONNX operators into a graph; `embed`, `product`, `bias` and `rms_norm` are the emitters' own."""

    def __init__(self, config: ModelConfig, graph: GraphBuilder) -> None:
        super().__init__(config)
        self.graph = graph

    def matmul(self, a: Value, b: Value, name: str) -> Value:
        return self.graph.one("MatMul", [a, b], name=name)

    def softmax(self, x: Value, name: str) -> Value:
        return self.graph.one("Softmax", [x], axis=-1, name=name)

    def sigmoid(self, x: Value, name: str) -> Value:
        return self.graph.one("Sigmoid", [x], name=name)

    def add(self, a: Value, b: Value, name: str) -> Value:
        return self.graph.one("Add", [a, b], name=name)

    def subtract(self, a: Value, b: Value, name: str) -> Value:
        return self.graph.one("Sub", [a, b], name=name)

    def multiply(self, a: Value, b: Value, name: str) -> Value:
        return self.graph.one("Mul", [a, b], name=name)

    def scale(self, x: Value, factor: float, name: str) -> Value:
        return self.graph.one(
            "Mul", [x, self.graph.constant(f"{name}.factor", np.array(factor, np.float32))], name=name
        )

    def concat(self, parts: Sequence[Value], axis: int, name: str) -> Value:
        return self.graph.one("Concat", parts, axis=axis, name=name)

    def slice(self, x: Value, axis: int, start: int, stop: int) -> Value:
        bounds = [self.graph.constant(f"int_{n}", np.array([n], np.int64)) for n in (start, stop, axis)]
        return self.graph.one("Slice", [x, *bounds], name=f"{x.name}.slice")

    def reshape(self, x: Value, shape: Sequence[int]) -> Value:
        target = self.graph.constant(f"shape_{'_'.join(map(str, shape))}", np.array(shape, np.int64))
        return self.graph.one("Reshape", [x, target], name=f"{x.name}.reshaped")

    def transpose(self, x: Value, order: Sequence[int]) -> Value:
        return self.graph.one("Transpose", [x], perm=list(order), name=f"{x.name}.transposed")

    def rows(self, x: Value, wanted: Value) -> Value:
        return self.graph.one("Gather", [x, wanted], axis=1, name=f"{x.name}.rows")

    def to_cache(self, x: Value, name: str) -> Value:
        return x
