"""GraphBuilder: records nodes into an ONNX graph. Knows ports and stored weights, not the decoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from headrace.bundle.weights import StoredTensor
from headrace.files import write_file
from headrace.plan import Port

__all__ = ["GraphBuilder", "ir_type"]

_STORED = {"U8": ir.DataType.UINT8, "F16": ir.DataType.FLOAT16, "F32": ir.DataType.FLOAT}
IR_VERSION = 11  # opset 23's; the newest that onnxruntime 1.31 reads is above it


def ir_type(dtype: str) -> ir.DataType:
    """The ONNX element type of a NumPy (or ml_dtypes) name."""
    if dtype == "int4":
        return ir.DataType.INT4
    return ir.DataType.from_numpy(np.dtype(dtype))


class GraphBuilder:
    """One graph in the making.

    Args:
        name: the graph's name.
        opsets: version by domain.
    """

    def __init__(self, name: str, opsets: Mapping[str, int]) -> None:
        self.name = name
        self.opsets = dict(opsets)
        self.inputs: list[ir.Value] = []
        self.outputs: list[ir.Value] = []
        self.nodes: list[ir.Node] = []
        self._constants: dict[str, ir.Value] = {}
        self._names: set[str] = set()

    def input(self, port: Port) -> ir.Value:
        """Declare an input."""
        value = ir.Value(name=port.name, shape=ir.Shape(port.shape), type=ir.TensorType(ir_type(port.dtype)))
        self.inputs.append(value)
        return value

    def output(self, value: ir.Value, port: Port) -> None:
        """Declare an output: the value takes the port's name, type and shape."""
        value.name = port.name
        value.shape = ir.Shape(port.shape)
        value.type = ir.TensorType(ir_type(port.dtype))
        self.outputs.append(value)

    def node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Any] | None = None,
        *,
        domain: str = "",
        name: str,
        outputs: int = 1,
    ) -> list[ir.Value]:
        """Record a node; its results are named after it."""
        name = self._unique(name)
        names = [name] + [f"{name}#{i}" for i in range(1, outputs)]
        values = [ir.Value(name=n) for n in names]
        self.nodes.append(
            ir.node(op_type, list(inputs), attributes or {}, domain=domain, outputs=values, name=f"{name}/{op_type}")
        )
        return values

    def one(self, op_type: str, inputs: Sequence[ir.Value | None], *, name: str, **attributes: Any) -> ir.Value:
        """A node of the standard domain with one result."""
        return self.node(op_type, inputs, attributes, name=name)[0]

    def constant(self, name: str, array: NDArray[Any]) -> ir.Value:
        """A small initializer inside the graph, interned by name."""
        if name not in self._constants:
            self._add(name, ir.tensor(array, name=name))
        return self._constants[name]

    def tensor(self, tensor: ir.TensorProtocol) -> ir.Value:
        """Any other initializer, interned by its name."""
        assert tensor.name is not None
        if tensor.name not in self._constants:
            self._add(tensor.name, tensor)
        return self._constants[tensor.name]

    def stored(self, name: str, tensor: StoredTensor, shape: Sequence[int] | None = None, *, bits: int = 8) -> ir.Value:
        """An initializer whose bytes are in a weights file, interned by name; `shape`: another view of the bytes, as
        unsigned integers of 4 bits where `bits` says so."""
        if name not in self._constants:
            dims = ir.Shape(tuple(shape) if shape is not None else tensor.shape)
            dtype = ir.DataType.UINT4 if bits == 4 else _STORED[tensor.dtype]
            self._add(name, ir.ExternalTensor(tensor.file, tensor.offset, tensor.nbytes, dtype, shape=dims, name=name))
        return self._constants[name]

    def model(self) -> ir.Model:
        """The finished graph: only what its outputs need."""
        needed = set(self.outputs)
        nodes = []
        for node in reversed(self.nodes):
            if not needed.isdisjoint(node.outputs):
                nodes.append(node)
                needed.update(value for value in node.inputs if value is not None)
        graph = ir.Graph(
            self.inputs,
            self.outputs,
            nodes=reversed(nodes),
            initializers=[value for value in self._constants.values() if value in needed],
            opset_imports=self.opsets,
            name=self.name,
        )
        return ir.Model(graph, ir_version=IR_VERSION, producer_name="headrace")

    def save(self, path: Path) -> None:
        """Write the graph to `path`; stored initializers stay where they are."""
        write_file(path, ir.to_proto(self.model()).SerializeToString(deterministic=True))

    def _add(self, name: str, tensor: ir.TensorProtocol) -> None:
        value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)  # type: ignore[arg-type]
        self._constants[name] = value
        self._names.add(name)

    def _unique(self, name: str) -> str:
        candidate, number = name, 1
        while candidate in self._names:
            number += 1
            candidate = f"{name}~{number}"
        self._names.add(candidate)
        return candidate
