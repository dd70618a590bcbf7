"""Checks a written graph: its ports are the plan's, and the ONNX checker accepts it. Knows no decoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx

from headrace.errors import VerificationFailed
from headrace.plan import Port

__all__ = ["check_graph"]


def check_graph(path: Path, inputs: Sequence[Port], outputs: Sequence[Port]) -> None:
    """Compare a graph file with its planned ports: names, order, element types and shapes; then run ONNX's checker
    when it knows all operators (it does not know some of ONNX Runtime's).

    Raises:
        VerificationFailed: the file is no graph, a port differs, or the checker refuses.
    """
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's own exceptions, and OSError
        raise VerificationFailed(f"{path} cannot be read as ONNX ({error}); export the bundle again") from None
    for kind, values, planned in (("input", model.graph.input, inputs), ("output", model.graph.output, outputs)):
        found = [_port(value) for value in values]
        for number, (have, want) in enumerate(zip(found, planned)):
            if have != want:
                raise VerificationFailed(
                    f"{path}: {kind} {number} is {_show(have)}; the plan says {_show(want)}: export the bundle again"
                )
        if len(found) != len(planned):
            odd = found[len(planned) :] or planned[len(found) :]
            raise VerificationFailed(
                f"{path} has {len(found)} {kind}s; the plan says {len(planned)} "
                f"({'extra' if len(found) > len(planned) else 'missing'}: {', '.join(p.name for p in odd)}): "
                "export the bundle again"
            )
    if _known(model):
        try:
            onnx.checker.check_model(str(path))
        except onnx.checker.ValidationError as error:
            reason = str(error).strip().splitlines()[0]
            raise VerificationFailed(f"{path}: the ONNX checker refuses it: {reason}") from None


def _port(value: onnx.ValueInfoProto) -> Port:
    kind = value.type.tensor_type
    shape = tuple(d.dim_param or d.dim_value for d in kind.shape.dim)
    return Port(value.name, shape, onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).name)


def _show(port: Port) -> str:
    return f"{port.name} {port.dtype} [{', '.join(map(str, port.shape))}]"


def _known(model: onnx.ModelProto) -> bool:
    """Whether the checker has a schema for every operator of the standard domain."""
    version = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
    return all(onnx.defs.has(node.op_type, version, "") for node in model.graph.node if node.domain in ("", "ai.onnx"))
