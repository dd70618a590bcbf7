"""Graphs that no emitter writes do not reach ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from headrace.bundle.folder import open_bundle
from headrace.errors import BundleError
from headrace.targets import graph_check
from headrace.targets.graph_check import check_graph_file
from headrace.targets.host.sessions import make_session
from tests.exports import Exports

PART = "part_2_of_5.onnx"


@pytest.fixture
def path(exports: Exports, tmp_path: Path) -> Path:
    return exports.copy(tmp_path / "bundle") / PART


@pytest.mark.parametrize("kind", ["gqa", "tied", "mha", "qwen2"])
def test_what_headrace_writes_passes(exports: Exports, kind: str) -> None:
    bundle = open_bundle(exports.bundle(kind, keep_onnx=True))
    graphs = [bundle.graph(part) for part in bundle.parts] + list((bundle.root / "device").glob("*.onnx"))
    assert len(graphs) > 5
    for graph in graphs:
        check_graph_file(graph)


def _external(model: Any) -> Any:
    return next(t for t in model.graph.initializer if t.external_data)


def _place(key: str, value: str) -> Callable[[Any], Any]:
    def change(model: Any) -> None:
        next(entry for entry in _external(model).external_data if entry.key == key).value = value

    return change


def _branch(model: Any) -> None:
    inner = helper.make_graph([], "g", [], [])
    model.graph.node.append(helper.make_node("If", ["a"], ["b"], then_branch=inner, else_branch=inner))


def _sizes(model: Any, operator: str, numbers: tuple[int, ...]) -> None:
    """Other numbers in the constant that says how much an operator makes."""
    node = next(node for node in model.graph.node if node.op_type == operator)
    old = next(tensor for tensor in model.graph.initializer if tensor.name == node.input[1])
    old.CopyFrom(numpy_helper.from_array(np.array(numbers, np.int64), old.name))


def _computed_size(model: Any) -> None:
    node = next(node for node in model.graph.node if node.op_type == "Expand")
    node.input[1] = node.input[0]


def _pad(model: Any, width: int) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.array([0, width], np.int64), "wide"))
    model.graph.node.append(helper.make_node("Pad", [model.graph.initializer[0].name, "wide"], ["padded"]))


ODD: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a graph in a graph": (_branch, "field 6 in a message 'attribute'"),
    "another operator": (lambda m: setattr(m.graph.node[0], "op_type", "Loop"), "an operator 'Loop'"),
    "another domain": (lambda m: setattr(m.graph.node[0], "domain", "evil"), "an operator 'evil::"),
    "a function": (lambda m: m.functions.add(name="f", domain="d"), "field 25 in a message 'model'"),
    "a place outside": (_place("location", "../secret"), "in '../secret', which is no weights file"),
    "a place anywhere": (_place("location", "/etc/passwd"), "in '/etc/passwd', which is no weights file"),
    "a place by a detour": (_place("location", "weights/../headrace.json"), "which is no weights file"),
    "another file of the bundle": (_place("location", "headrace.json"), "in 'headrace.json', which is no weights file"),
    "beyond the end": (_place("offset", "99999999"), "which has "),
    "before the beginning": (_place("offset", "-1"), "a place '-1'"),
    "a length of its own": (_place("length", "1"), "a weight "),
    "a huge shape": (lambda m: _external(m).dims.append(1 << 62), " and shape "),
    "a shape that is not the length": (lambda m: _external(m).dims.append(2), "a weight "),
    "an expansion to much": (
        lambda m: _sizes(m, "Expand", (1, 1 << 20, 1 << 20)),
        "expansions to 1099511627776 numbers",
    ),
    "an expansion by less than nothing": (lambda m: _sizes(m, "Expand", (-1, -1, 1 << 40)), "Expand of a size "),
    "an expansion to what is computed": (_computed_size, "Expand of a size "),
    "a wide border": (lambda m: _pad(m, 1 << 20), "a border of 1048576"),
    "an unknown type": (lambda m: setattr(_external(m), "data_type", 99), "of type 99"),
}


@pytest.mark.parametrize("what", ODD)
def test_what_is_odd_is_named(path: Path, what: str) -> None:
    change, message = ODD[what]
    (path.parent.parent / "secret").write_text("x")
    model = onnx.load(str(path), load_external_data=False)
    change(model)
    path.write_bytes(model.SerializeToString())
    with pytest.raises(BundleError) as error:
        make_session(str(path), 1)
    assert "is no graph that headrace writes: it has " in str(error.value)
    assert message in str(error.value)


def test_a_link_in_the_weights_leads_nowhere(path: Path) -> None:
    """It has another name than the weights, and ONNX Runtime would refuse it too."""
    (path.parent / "weights" / "x").symlink_to("/etc/passwd")
    model = onnx.load(str(path), load_external_data=False)
    _place("location", "weights/x")(model)
    path.write_bytes(model.SerializeToString())
    with pytest.raises(BundleError, match="which is no weights file beside it"):
        check_graph_file(path)


@pytest.mark.parametrize("content", [b"\xff" * 9, b"\x3a\xff\xff\xff\x0f", b"\x3f", b"\x38\x01", b"\x08"])
def test_what_is_no_graph(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(BundleError, match="is no graph that headrace writes: it has"):
        check_graph_file(path)


def test_a_graph_of_absurd_length(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_check, "GRAPH_LIMIT", 1000)
    with pytest.raises(BundleError, match="expected at most 1000"):
        check_graph_file(path)
