"""GraphBuilder: records nodes into an ONNX graph. Knows ports and stored weights, not the decoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto

from headrace.bundle.weights import StoredTensor
from headrace.files import write_file
from headrace.plan import Port

__all__ = ["FLOAT", "INT32", "UINT8", "GraphBuilder", "Node", "Value", "element_type"]

FLOAT, INT32, UINT8 = (int(kind) for kind in (TensorProto.FLOAT, TensorProto.INT32, TensorProto.UINT8))  # Cast's
_STORED = {"U8": TensorProto.UINT8, "F16": TensorProto.FLOAT16, "F32": TensorProto.FLOAT}
IR_VERSION = 11  # opset 23's; the newest that onnxruntime 1.31 reads is above it


def element_type(dtype: str) -> int:
    """The ONNX element type of a NumPy (or ml_dtypes) name."""
    if dtype == "int4":
        return int(TensorProto.INT4)
    return int(onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))


@dataclass(eq=False)
class Value:
    """A tensor of a graph in the making: its name, and the node whose result it is, None for inputs and weights."""

    name: str
    producer: Node | None = None


@dataclass(eq=False)
class Node:
    """An operator in a graph in the making; an input that is left out is None."""

    op_type: str
    inputs: tuple[Value | None, ...]
    attributes: Mapping[str, Any]
    domain: str
    name: str
    outputs: tuple[Value, ...] = ()

    def to_proto(self) -> onnx.NodeProto:
        """As ONNX's own NodeProto."""
        return onnx.helper.make_node(
            self.op_type,
            ["" if value is None else value.name for value in self.inputs],
            [value.name for value in self.outputs],
            name=self.name,
            domain=self.domain,
            **self.attributes,
        )


class GraphBuilder:
    """One graph in the making.

    Args:
        name: the graph's name.
        opsets: version by domain.
    """

    def __init__(self, name: str, opsets: Mapping[str, int]) -> None:
        self.name = name
        self.opsets = dict(opsets)
        self.inputs: list[tuple[Value, Port]] = []
        self.outputs: list[tuple[Value, Port]] = []
        self.nodes: list[Node] = []
        self._constants: dict[str, tuple[Value, TensorProto]] = {}
        self._names: set[str] = set()

    def input(self, port: Port) -> Value:
        """Declare an input."""
        value = Value(port.name)
        self.inputs.append((value, port))
        return value

    def output(self, value: Value, port: Port) -> None:
        """Declare an output: the value takes the port's name, type and shape."""
        value.name = port.name
        self.outputs.append((value, port))

    def node(
        self,
        op_type: str,
        inputs: Sequence[Value | None],
        attributes: Mapping[str, Any] | None = None,
        *,
        domain: str = "",
        name: str,
        outputs: int = 1,
    ) -> list[Value]:
        """Record a node; its results are named after it."""
        name = self._unique(name)
        names = [name] + [f"{name}#{i}" for i in range(1, outputs)]
        made = Node(op_type, tuple(inputs), attributes or {}, domain, f"{name}/{op_type}")
        made.outputs = tuple(Value(n, made) for n in names)
        self.nodes.append(made)
        return list(made.outputs)

    def one(self, op_type: str, inputs: Sequence[Value | None], *, name: str, **attributes: Any) -> Value:
        """A node of the standard domain with one result."""
        return self.node(op_type, inputs, attributes, name=name)[0]

    def constant(self, name: str, array: NDArray[Any]) -> Value:
        """A small initializer inside the graph, interned by name."""
        if name not in self._constants:
            self._add(onnx.numpy_helper.from_array(np.asarray(array), name))
        return self._constants[name][0]

    def external(self, name: str, file: str, offset: int, nbytes: int, dtype: int, shape: Sequence[int]) -> Value:
        """An initializer whose bytes are in a file beside the graph, interned by name.

        Args:
            name: its name.
            file: relative to the graph.
            offset, nbytes: where in the file.
            dtype: the ONNX element type.
            shape: of the tensor.
        """
        if name not in self._constants:
            tensor = TensorProto(name=name, data_type=dtype, dims=shape, data_location=TensorProto.EXTERNAL)
            for key, value in (("location", file), ("offset", offset), ("length", nbytes)):
                tensor.external_data.add(key=key, value=str(value))
            self._add(tensor)
        return self._constants[name][0]

    def stored(self, name: str, tensor: StoredTensor, shape: Sequence[int] | None = None, *, bits: int = 8) -> Value:
        """An initializer whose bytes are in a weights file, interned by name; `shape`: another view of the bytes, as
        unsigned integers of 4 bits where `bits` says so."""
        dtype = TensorProto.UINT4 if bits == 4 else _STORED[tensor.dtype]
        return self.external(
            name, tensor.file, tensor.offset, tensor.nbytes, dtype, tensor.shape if shape is None else tuple(shape)
        )

    def model(self) -> onnx.ModelProto:
        """The finished graph: only what its outputs need."""
        needed = {value for value, _ in self.outputs}
        nodes = []
        for node in reversed(self.nodes):
            if not needed.isdisjoint(node.outputs):
                nodes.append(node.to_proto())
                needed.update(value for value in node.inputs if value is not None)
        graph = onnx.helper.make_graph(
            nodes[::-1],
            self.name,
            [_described(*each) for each in self.inputs],
            [_described(*each) for each in self.outputs],
            [tensor for value, tensor in self._constants.values() if value in needed],
        )
        opsets = [onnx.helper.make_operatorsetid(domain, version) for domain, version in self.opsets.items()]
        return onnx.helper.make_model(graph, ir_version=IR_VERSION, producer_name="headrace", opset_imports=opsets)

    def save(self, path: Path) -> None:
        """Write the graph to `path`; stored initializers stay where they are."""
        write_file(path, self.model().SerializeToString(deterministic=True))

    def _add(self, tensor: TensorProto) -> None:
        self._constants[tensor.name] = Value(tensor.name), tensor
        self._names.add(tensor.name)

    def _unique(self, name: str) -> str:
        candidate, number = name, 1
        while candidate in self._names:
            number += 1
            candidate = f"{name}~{number}"
        self._names.add(candidate)
        return candidate


def _described(value: Value, port: Port) -> onnx.ValueInfoProto:
    return onnx.helper.make_tensor_value_info(value.name, element_type(port.dtype), port.shape)
