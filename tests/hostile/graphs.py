"""Hostile graphs in a bundle, as ONNX Runtime would get them: what passes headrace's check must not end the process."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx

from headrace.bundle.folder import open_bundle
from headrace.errors import BundleError
from headrace.plan import GraphStyle, ports
from headrace.targets.graph_check import OPERATORS
from headrace.targets.host.sessions import make_session
from tests.exports import Exports
from tests.hostile.chance import NAMES, NUMBERS, Good, Rng, damaged
from tests.hostile.format import Format

PART = "part_2_of_5.onnx"
LOCATIONS = (
    "../bundle/weights/part_2_of_5.safetensors", "/etc/passwd", "weights/../headrace.json",
    "weights/part_1_of_5.safetensors",
    "weights", "", ".", "headrace.json", "weights/link", "file:///etc/passwd",
)  # fmt: skip


def prepare(folder: Path) -> Good:
    """A tiny bundle, with a link in its weights that leads out of it."""
    (folder / "exports").mkdir(parents=True)
    exports = Exports(folder / "exports")
    root = Path(shutil.copytree(exports.bundle("gqa"), folder / "bundle"))
    (root / "weights" / "link").symlink_to("/etc/passwd")
    return {PART: (root / PART).read_bytes()}


def graph(rng: Rng, good: Good) -> bytes:
    """The second part's graph with wrong nodes, numbers, shapes and places."""
    if rng.randrange(4) == 0:
        return damaged(rng, good[PART])
    model = onnx.load_from_string(good[PART])
    nodes, tensors = model.graph.node, model.graph.initializer
    for _ in range(rng.randint(1, 3)):
        node, tensor = rng.choice(nodes), rng.choice(tensors)
        kind = rng.randrange(11)
        if kind == 0 and node.attribute:
            attribute = rng.choice(node.attribute)
            attribute.i = (
                rng.choice((0, 1, -1, 2, 3, 4, 8, 16, 255, *NUMBERS[:13])) if attribute.type == 2 else attribute.i
            )
            attribute.f = rng.choice((0.0, -1.0, 1e38, float("nan")))
        elif kind == 1 and node.input:
            node.input[rng.randrange(len(node.input))] = rng.choice(
                (rng.choice(tensors).name, "", "input", rng.choice(nodes).output[0])
            )
        elif kind == 2:
            domain, operator = rng.choice((*OPERATORS, ("", "If"), ("", "Loop"), ("com.microsoft", "NGramRepeatBlock")))
            node.op_type, node.domain = operator, domain
        elif kind == 3 and tensor.dims:
            tensor.dims[rng.randrange(len(tensor.dims))] = rng.choice((0, 1, 2, 3, 7, 16, 64, 1 << 20, 1 << 31, -1))
        elif kind == 4:
            tensor.data_type = rng.choice((1, 2, 3, 6, 7, 8, 9, 10, 16, 21, 22, 99))
        elif kind == 5 and tensor.external_data:
            entry = rng.choice(tensor.external_data)
            if entry.key == "location":
                entry.value = rng.choice(LOCATIONS)
            else:
                entry.value = rng.choice(
                    (str(_place(entry.value) + rng.choice((-64, 1, 2, 4, 64))), "-1", "0", "99999999999", "x", "")
                )
        elif kind == 6 and tensor.raw_data:
            values = np.frombuffer(tensor.raw_data, np.uint8).copy()
            values[rng.randrange(len(values))] = rng.choice((0, 1, 2, 127, 128, 255))
            tensor.raw_data = values.tobytes()
        elif kind == 7:
            del node.input[rng.randrange(len(node.input) + 1) :]
        elif kind == 8:
            nodes.insert(rng.randrange(len(nodes)), node)
        elif kind == 9:
            del nodes[rng.randrange(len(nodes))]
        else:
            port = rng.choice([*model.graph.input, *model.graph.output])
            port.name = rng.choice((port.name, *NAMES[:3]))
            port.type.tensor_type.elem_type = rng.choice((1, 2, 3, 6, 7, 10))
    return model.SerializeToString()


def _place(text: str) -> int:
    """A place in a file, as it stands there; 0 where it was changed already to what is no number."""
    return int(text) if text.isdecimal() else 0


def _open(path: Path) -> None:
    session = make_session(str(path), 1)
    bundle = open_bundle(path.parents[1] / "exports" / "gqa-0.bundle")
    sizes = {"batch": 1, "length": 3, "max_positions": bundle.context, "capacity": 8}
    feeds = {}
    for port in ports(bundle.config, bundle.parts[1], GraphStyle.HOST, kv_dtype=bundle.kv_dtype)[0]:
        shape = tuple(sizes[n] if isinstance(n, str) else n for n in port.shape)
        feeds[port.name] = np.zeros(shape, port.dtype)
    feeds["last_position"] = np.full(1, 2, np.int32)
    feeds["total_length"] = np.array(3, np.int32)
    try:
        session.run(None, feeds)
    except Exception as error:
        raise BundleError(f"{path} cannot run: {error}") from None


# ONNX Runtime keeps some address space, though hardly any memory, of each session that fails.
FORMATS = {"graph": Format(prepare, graph, f"bundle/{PART}", _open, memory=64 << 30)}
