"""inspect: what compiled context binaries say about themselves, ours or another's, one alone or a Genie folder's.

Inside a bundle's folder the whole is also held against the plan, as export did when it made it. Runs nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from headrace.bundle.folder import is_bundle, open_bundle
from headrace.errors import BundleError, TargetError
from headrace.files import read_json
from headrace.targets.qualcomm.context_binary import BinaryInfo, TensorInfo, read_context_binaries
from headrace.targets.qualcomm.genie import CONFIG_FILE
from headrace.targets.qualcomm.genie_bundle import genie_plan
from headrace.targets.qualcomm.genie_check import check_genie_folder, listed_binaries, planned_name
from headrace.targets.qualcomm.soc import soc_of_model

__all__ = ["inspect_binaries", "is_compiled"]

_PYTORCH = (b"PK", b"\x80")  # how .bin files of checkpoints begin: a zip archive, or a bare pickle


def is_compiled(path: Path) -> bool:
    """Whether `path` is a Genie folder, or a .bin file that is no checkpoint's."""
    if path.is_dir():
        return (path / CONFIG_FILE).is_file()
    if not path.is_file() or path.suffix != ".bin":
        return False
    with path.open("rb") as file:
        return not file.read(2).startswith(_PYTORCH)


def inspect_binaries(path: Path) -> dict[str, Any]:
    """A report: `summary` (name → value), `graphs` [{binary, name, inputs, outputs, weight_bytes, own_bytes,
    vtcm_bytes}] and `tensors` [{name, precision, shape}], the latter named "graph: tensor". Graphs are named as they
    were planned, without what the compiler appends.

    Args:
        path: a context binary, or a folder with genie_config.json.

    Raises:
        TargetError: a binary is missing, unreadable or not in the folder, or the toolchain is not installed.
    """
    paths = [path]
    if path.is_dir():
        content = read_json(path / CONFIG_FILE, error=TargetError, advice="name a Genie folder")
        paths = [path / name for name in listed_binaries(path / CONFIG_FILE, content)]
    infos = read_context_binaries(paths)
    graphs = [(file.name, graph) for file, info in zip(paths, infos, strict=True) for graph in info.graphs]
    summary = {
        "kind": "context binary" if path.is_file() else "Genie folder",
        "path": str(path),
        "chip": _same(_chip(info) for info in infos),
        "built with": _same(f"QAIRT {info.build}" for info in infos),
        "binaries": len(infos),
        "bytes": sum(info.size for info in infos),
        "weights": "held once for all graphs of a binary" if any(i.shared for i in infos) else "a graph's own",
    }
    if path.is_dir() and is_bundle(path.resolve().parent):
        summary["plan"] = _against_plan(path.resolve(), infos[0])
    return {
        "summary": summary,
        "graphs": [
            {
                "binary": binary,
                "name": planned_name(graph.name) or graph.name,
                "inputs": len(graph.inputs),
                "outputs": len(graph.outputs),
                "weight_bytes": graph.shared_bytes,
                "own_bytes": graph.own_bytes,
                "vtcm_bytes": graph.vtcm_bytes,
            }
            for binary, graph in graphs
        ],
        "tensors": [
            {
                "name": f"{planned_name(graph.name) or graph.name}: {tensor.name}",
                "precision": _precision(tensor),
                "shape": list(tensor.shape),
            }
            for _, graph in graphs
            for tensor in (*graph.inputs, *graph.outputs)
        ],
    }


def _same(values: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(values))


def _chip(info: BinaryInfo) -> str:
    known = soc_of_model(info.soc_model)
    return f"{known.name if known else 'unknown'} (soc_model {info.soc_model}, v{info.arch})"


def _against_plan(folder: Path, info: BinaryInfo) -> str:
    """ "as planned", or the first difference."""
    soc = soc_of_model(info.soc_model)
    if soc is None:
        return f"differs: soc_model {info.soc_model} is no chip that headrace knows"
    try:
        check_genie_folder(folder, genie_plan(open_bundle(folder.parent), soc))
    except (BundleError, TargetError) as error:
        return f"differs: {error}"
    return "as planned: every graph, tensor, scale, zero point and shared weight"


def _precision(tensor: TensorInfo) -> str:
    if tensor.scale is None:
        return tensor.dtype
    return f"{tensor.dtype}, scale {tensor.scale:.6g}, zero point {tensor.zero_point}"
