"""A written graph that differs from the plan is told apart, port by port."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from headrace.errors import VerificationFailed
from headrace.graph.check import check_graph
from headrace.plan import Port

INPUTS = (Port("x", (1, 4), "uint16"), Port("past", ("batch", 4), "uint8"))
OUTPUTS = (Port("y", (1, 4), "uint16"),)


def graph(operator: str = "Identity") -> onnx.ModelProto:
    info = helper.make_tensor_value_info
    return helper.make_model(
        helper.make_graph(
            [helper.make_node(operator, ["x"], ["y"])],
            "g",
            [info("x", TensorProto.UINT16, [1, 4]), info("past", TensorProto.UINT8, ["batch", 4])],
            [info("y", TensorProto.UINT16, [1, 4])],
        ),
        opset_imports=[helper.make_opsetid("", 23)],
        ir_version=10,
    )


def saved(folder: Path, model: onnx.ModelProto) -> Path:
    path = folder / "g.onnx"
    onnx.save(model, str(path))
    return path


def test_equal_ports_pass(tmp_path: Path) -> None:
    check_graph(saved(tmp_path, graph()), INPUTS, OUTPUTS)


def _rename(model: onnx.ModelProto) -> None:
    model.graph.input[1].name = "passed"


def _swap(model: onnx.ModelProto) -> None:
    first, second = model.graph.input[0], model.graph.input[1]
    swapped = [onnx.ValueInfoProto.FromString(v.SerializeToString()) for v in (second, first)]
    del model.graph.input[:]
    model.graph.input.extend(swapped)


def _retype(model: onnx.ModelProto) -> None:
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.UINT8


def _reshape(model: onnx.ModelProto) -> None:
    model.graph.output[0].type.tensor_type.shape.dim[0].dim_value = 2


def _fix_axis(model: onnx.ModelProto) -> None:
    model.graph.input[1].type.tensor_type.shape.dim[0].dim_value = 7


def _drop(model: onnx.ModelProto) -> None:
    del model.graph.input[1]


def _add(model: onnx.ModelProto) -> None:
    model.graph.output.append(helper.make_tensor_value_info("more", TensorProto.FLOAT, [1]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_rename, r"input 1 is passed uint8 \[batch, 4\]; the plan says past uint8 \[batch, 4\]"),
        (_swap, "input 0 is past"),
        (_retype, r"output 0 is y uint8 \[1, 4\]; the plan says y uint16"),
        (_reshape, r"output 0 is y uint16 \[2, 4\]; the plan says y uint16 \[1, 4\]"),
        (_fix_axis, r"input 1 is past uint8 \[7, 4\]"),
        (_drop, r"has 1 inputs; the plan says 2 \(missing: past\)"),
        (_add, r"has 2 outputs; the plan says 1 \(extra: more\)"),
    ],
)
def test_a_difference_is_named(tmp_path: Path, change: Callable[[onnx.ModelProto], None], message: str) -> None:
    model = graph()
    change(model)
    with pytest.raises(VerificationFailed, match=message):
        check_graph(saved(tmp_path, model), INPUTS, OUTPUTS)


def test_what_the_checker_refuses_is_refused(tmp_path: Path) -> None:
    model = graph("Add")  # with one input
    with pytest.raises(VerificationFailed, match="ONNX checker"):
        check_graph(saved(tmp_path, model), INPUTS, OUTPUTS)


def test_operators_the_checker_does_not_know_are_left_to_the_runtime(tmp_path: Path) -> None:
    check_graph(saved(tmp_path, graph("SimplifiedLayerNormalization")), INPUTS, OUTPUTS)


def test_another_file_is_no_graph(tmp_path: Path) -> None:
    path = tmp_path / "g.onnx"
    path.write_bytes(b"\xff\xffnot a graph")
    with pytest.raises(VerificationFailed, match="cannot be read as ONNX"):
        check_graph(path, INPUTS, OUTPUTS)
    with pytest.raises(VerificationFailed, match="cannot be read"):
        check_graph(tmp_path / "none.onnx", INPUTS, OUTPUTS)
