"""Holds a context binary's own metadata against the plan: nothing the compiler did is taken on trust.

The compiler accepts options it does not know, chips it does not know, and weights it then does not share, all without
a word; what it made is read back and compared. This file does not know how binaries are made or read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from headrace.bundle.encodings import Encoding
from headrace.config import ModelConfig
from headrace.errors import TargetError
from headrace.plan import GraphStyle, Part, Port, graph_name, ports
from headrace.targets.qualcomm.context_binary import BinaryInfo, GraphInfo, TensorInfo
from headrace.targets.qualcomm.soc import Soc, soc_of_model

__all__ = ["check_binary", "check_graph", "check_sharing", "compiled_graph"]

SHARED_LIMIT = 1.1  # a shared binary against one of its graphs alone; two graphs apart would be about 2
PAGES = 65536  # of padding and tables a graph; matters for tiny models only


def check_binary(
    path: Path,
    info: BinaryInfo,
    soc: Soc,
    config: ModelConfig,
    part: Part,
    steps: Sequence[tuple[int, int]],
    encodings: Mapping[str, Encoding],
    *,
    shared: bool = True,
) -> None:
    """Compare a part's binary with the plan.

    Args:
        path: the binary, for messages.
        info: what it says about itself.
        soc: the chip it should be for.
        config, part: the geometry and the part.
        steps: (length S, context C) of every graph it should hold.
        encodings: of every quantized port, by port name.
        shared: whether its graphs should share weights.

    Raises:
        TargetError: the first difference.
    """
    if info.soc_model != soc.model or info.arch != soc.arch:
        known = soc_of_model(info.soc_model)
        was = known.name if known else f"soc_model {info.soc_model}, v{info.arch}"
        raise TargetError(f"{path} was compiled for {was}; expected {soc.name} (soc_model {soc.model}, {soc.dsp_arch})")
    if len(info.graphs) != len(steps):
        names = ", ".join(graph.name for graph in info.graphs)
        raise TargetError(f"{path} holds {len(info.graphs)} graphs ({names}); expected {len(steps)}")
    for length, context in steps:
        graph = compiled_graph(path, info, graph_name(part, length, context))
        if graph.vtcm_bytes != soc.vtcm_mb << 20:
            raise TargetError(
                f"{path}: {graph.name} was planned for {graph.vtcm_bytes} bytes of VTCM; "
                f"{soc.name} has {soc.vtcm_mb} MB"
            )
        check_graph(path, graph, ports(config, part, GraphStyle.DEVICE, length=length, context=context), encodings)
    if shared and len(steps) > 1:
        check_sharing(path, info)


def compiled_graph(path: Path, info: BinaryInfo, name: str) -> GraphInfo:
    """The graph compiled under `name`: the compiler appends to it.

    Raises:
        TargetError: there is none.
    """
    found = [graph for graph in info.graphs if graph.name == name or graph.name.startswith(f"{name}_")]
    if len(found) != 1:
        names = ", ".join(graph.name for graph in info.graphs)
        raise TargetError(f"{path} has no graph named {name}, but {names}; compile it again")
    return found[0]


def check_graph(
    path: Path,
    graph: GraphInfo,
    planned: tuple[tuple[Port, ...], tuple[Port, ...]],
    encodings: Mapping[str, Encoding] | None,
) -> None:
    """Compare a graph's tensors with its ports: names, shapes, types and, where encodings are given, quantization.

    Raises:
        TargetError: the first difference.
    """
    for kind, expected, found in (("input", planned[0], graph.inputs), ("output", planned[1], graph.outputs)):
        where = f"{path}: {graph.name}"
        by_name = {tensor.name: tensor for tensor in found}
        missing = [port.name for port in expected if port.name not in by_name]
        extra = sorted(set(by_name) - {port.name for port in expected})
        if missing or extra:
            raise TargetError(f"{where} has {kind}s {sorted(by_name)}; lacking {missing}, not expected {extra}")
        for port in expected:
            _check_tensor(where, kind, port, by_name[port.name], encodings)


def _check_tensor(
    where: str, kind: str, port: Port, tensor: TensorInfo, encodings: Mapping[str, Encoding] | None
) -> None:
    if tensor.shape != port.shape or tensor.dtype != port.dtype:
        found, planned = f"{tensor.dtype}{list(tensor.shape)}", f"{port.dtype}{list(port.shape)}"
        raise TargetError(f"{where}: {kind} {port.name} is {found}; expected {planned}")
    if encodings is None:
        return
    expected = None if port.dtype == "int32" else encodings[port.name]
    if expected is None:
        same = tensor.scale is None
    else:
        same = (
            tensor.scale is not None
            and np.float32(tensor.scale) == np.float32(expected.scale)
            and tensor.zero_point == expected.zero_point
        )
    if not same:
        wanted = "none" if expected is None else f"scale {expected.scale:.9g}, zero point {expected.zero_point}"
        raise TargetError(
            f"{where}: {kind} {port.name} has scale {tensor.scale}, zero point {tensor.zero_point}; expected {wanted}"
        )


def check_sharing(path: Path, info: BinaryInfo) -> None:
    """See that a binary of several graphs holds their weights once.

    Its size may be 1.1 × that of its largest graph alone, plus the instructions of the other graphs (which is less
    than the 0.1 unless the model is tiny).

    Raises:
        TargetError: it does not.
    """
    kept = {graph.shared_bytes for graph in info.graphs}
    if kept == {0}:
        raise TargetError(f"{path} holds the weights of its {len(info.graphs)} graphs apart; expected them shared")
    if len(kept) != 1:
        raise TargetError(f"{path}: its graphs share {sorted(kept)} bytes of weights; expected one number")
    own = sorted(graph.own_bytes for graph in info.graphs)
    alone = kept.pop() + own[-1]
    limit = SHARED_LIMIT * alone + sum(own[:-1]) + PAGES * len(own)
    if info.size > limit:
        raise TargetError(
            f"{path} has {info.size} bytes, one of its graphs alone {alone}; expected at most {limit:.0f}: the weights "
            "are not shared"
        )
