"""Holds a Genie folder against the plan, before Genie is started.

Genie refuses some mistakes with a status and a path, takes others and answers with token 0, and crashes on a few.
All of them are one clear line here. This file does not know how Genie is run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from headrace.errors import TargetError, did_you_mean, shown
from headrace.files import read_json
from headrace.plan import GraphStyle, Part, graph_name, ports
from headrace.targets.qualcomm.binary_check import check_graph, check_sharing
from headrace.targets.qualcomm.compiler import refuse_shared
from headrace.targets.qualcomm.context_binary import BinaryInfo, GraphInfo, TensorInfo, read_context_binaries
from headrace.targets.qualcomm.genie import (
    BACKEND_FILE,
    CONFIG_FILE,
    TOKENIZER_FILE,
    GeniePlan,
    backend_config,
    genie_config,
)
from headrace.targets.qualcomm.soc import SOCS

__all__ = ["check_genie_config", "check_genie_folder", "listed_binaries", "planned_name"]

# Keys that Genie knows and that a person may add, by block; those that headrace writes are always known.
_OPTIONAL = {
    "dialog": ("stop-sequence", "max-num-tokens"),
    "dialog.context": ("eot-token",),
    "dialog.sampler": ("type", "seed", "temp", "top-k", "top-p", "callback-name", "token-penalty"),
    "dialog.sampler.token-penalty": (
        "version", "penalize-last-n", "repetition-penalty", "presence-penalty", "frequency-penalty",
    ),
    "dialog.engine.backend.QnnHtp": ("allow-async-enqueue", "enable-graph-switching", "data-alignment-size"),
}  # fmt: skip
# Values that follow from the model; all others are a matter of taste.
_FIXED = (
    "dialog.version",
    "dialog.type",
    "dialog.context.",
    "dialog.engine.version",
    "dialog.engine.backend.type",
    "dialog.engine.backend.extensions",
    "dialog.engine.backend.QnnHtp.kv-dim",
    "dialog.engine.backend.QnnHtp.pos-id-dim",
    "dialog.engine.backend.QnnHtp.rope-theta",
    "dialog.engine.model.",
)
_BINARIES = "dialog.engine.model.binary.ctx-bins"
_GRAPH = re.compile(r"ar(\d+)_cl(\d+)_(\d+)_of_(\d+)(?:_|$)")


def planned_name(compiled: str) -> str | None:
    """`ar128_cl4096_2_of_5` of a compiled graph's name, to which the compiler appends; None where Genie reads none."""
    match = _GRAPH.match(compiled)
    return None if match is None else match[0].removesuffix("_")


def check_genie_folder(folder: Path, plan: GeniePlan, *, emulation: bool = False) -> dict[str, Any]:
    """Check the configuration and every binary it names against the plan.

    Args:
        folder: with genie_config.json.
        plan: what it should be.
        emulation: for Genie on this computer, where binaries hold a graph each, not for a phone.

    Returns:
        The content of genie_config.json.

    Raises:
        TargetError: the first thing that is wrong.
    """
    config = read_json(folder / CONFIG_FILE, error=TargetError, advice="export the target again")
    binaries = check_genie_config(folder / CONFIG_FILE, config, plan)
    _check_backend(folder / BACKEND_FILE, plan)
    tokenizer = read_json(folder / TOKENIZER_FILE, error=TargetError, advice="export the target again")
    if "model" not in tokenizer:
        raise TargetError(f"{folder / TOKENIZER_FILE} is not a tokenizer (it has no 'model'); export again")
    paths = [folder / name for name in binaries]
    infos = dict(zip(paths, refuse_shared(paths) if emulation else read_context_binaries(paths)))
    for path in paths:
        if infos[path].soc_model != plan.soc.model or infos[path].arch != plan.soc.arch:
            raise TargetError(
                f"{path} was compiled for soc_model {infos[path].soc_model}, v{infos[path].arch}; expected "
                f"{plan.soc.name}: {plan.soc.model}, {plan.soc.dsp_arch}"
            )
    _check_graphs(folder, infos, plan)
    if not emulation:
        for path, info in infos.items():
            if len(info.graphs) > 1:
                check_sharing(path, info)
    return config


def check_genie_config(path: Path, config: Mapping[str, Any], plan: GeniePlan) -> list[str]:
    """Check the content of genie_config.json against the plan.

    Args:
        path: the file, for messages.
        config: its content.
        plan: what it should be.

    Returns:
        The binaries it names.

    Raises:
        TargetError: a key is unknown or missing, or a value contradicts the plan.
    """
    listed = _find(config, _BINARIES)
    _compare(path, "", config, genie_config(plan, listed if isinstance(listed, list) else []))
    return listed_binaries(path, config)


def listed_binaries(path: Path, config: Mapping[str, Any]) -> list[str]:
    """The binaries that a genie_config.json names.

    Args:
        path: the file, for messages.
        config: its content.

    Raises:
        TargetError: there are none, one is named twice, or one is no file of the configuration's own folder.
    """
    listed = _find(config, _BINARIES)
    names = listed if isinstance(listed, list) else []
    beside = all(isinstance(name, str) and name not in ("", "..") and Path(name).name == name for name in names)
    if not names or not beside or len(set(names)) != len(names):
        raise TargetError(f"{path}: ctx-bins is {shown(listed)}; expected every binary once, each a file beside it")
    return names


def _compare(path: Path, where: str, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    optional = _OPTIONAL.get(where, ())
    for key in found:
        if key not in expected and key not in optional:
            known = [*expected, *optional]
            raise TargetError(
                f"{path}: unknown key {key!r} in {where or 'the file'}{did_you_mean(key, known)}; "
                f"expected one of {', '.join(sorted(set(known)))}"
            )
    for key, wanted in expected.items():
        inside = f"{where}.{key}" if where else key
        if key not in found:
            if key in optional:
                continue
            raise TargetError(f"{path}: {inside} is missing; expected {json.dumps(wanted)}")
        value = found[key]
        if isinstance(wanted, Mapping):
            if not isinstance(value, Mapping):
                raise TargetError(f"{path}: {inside} is {json.dumps(value)}; expected an object")
            _compare(path, inside, value, wanted)
        elif _is_fixed(inside) and (value != wanted or isinstance(value, bool) != isinstance(wanted, bool)):
            raise TargetError(f"{path}: {inside} is {json.dumps(value)}; expected {json.dumps(wanted)} for this model")


def _is_fixed(inside: str) -> bool:
    return any(inside == fixed or (fixed[-1] == "." and inside.startswith(fixed)) for fixed in _FIXED)


def _check_backend(path: Path, plan: GeniePlan) -> None:
    found = read_json(path, error=TargetError, advice="export the target again")
    expected = backend_config(plan.soc)
    try:
        device = found["devices"][0]
        model, arch = device["soc_model"], device["dsp_arch"]
    except (KeyError, IndexError, TypeError):
        raise TargetError(f"{path} states no soc_model and dsp_arch; expected {json.dumps(expected)}") from None
    if all(soc.model != model for soc in SOCS):
        known = ", ".join(f"{soc.model} ({soc.name})" for soc in SOCS)
        raise TargetError(f"{path}: unknown soc_model {model!r}; expected one of {known}")
    if (model, arch) != (plan.soc.model, plan.soc.dsp_arch):
        raise TargetError(
            f"{path} is for soc_model {model}, {arch}; expected {plan.soc.model}, {plan.soc.dsp_arch} ({plan.soc.name})"
        )
    if set(found) != set(expected):
        odd = sorted(set(found) ^ set(expected))
        raise TargetError(f"{path}: keys {odd} are unknown or missing; expected {sorted(expected)}")


def _check_graphs(folder: Path, infos: Mapping[Path, BinaryInfo], plan: GeniePlan) -> None:
    """Every part has every S × C, with the plan's tensors, and a tensor means the same in every graph."""
    by_name: dict[str, tuple[Path, GraphInfo]] = {}
    for path, info in infos.items():
        for graph in info.graphs:
            name = planned_name(graph.name)
            if name is None:
                raise TargetError(f"{path}: Genie cannot parse graph name {graph.name!r}; expected arS_clC_K_of_N")
            if name in by_name:
                raise TargetError(f"{path} and {by_name[name][0]} both hold {name}; expected it once")
            by_name[name] = path, graph
    wanted = {graph_name(part, *step): (part, step) for part in plan.parts for step in plan.steps}
    missing, extra = sorted(set(wanted) - set(by_name)), sorted(set(by_name) - set(wanted))
    if missing or extra:
        raise TargetError(
            f"{folder}: graphs missing: {missing or 'none'}, not expected: {extra or 'none'}; Genie needs every part "
            f"for every step {list(plan.lengths)} and context {list(plan.contexts)}, and skips tokens without a word"
        )
    meaning: dict[str, tuple[str, TensorInfo]] = {}
    for name, (part, (length, context)) in wanted.items():
        path, graph = by_name[name]
        planned = ports(plan.config, part, GraphStyle.DEVICE, length=length, context=context)
        _check_boundary(path, name, graph, part)
        check_graph(path, graph, planned, plan.encodings if plan.encodings else None)
        for tensor in (*graph.inputs, *graph.outputs):
            key = re.sub(r"^(past_.*)_(in|out)$", r"\1", tensor.name)
            first, known = meaning.setdefault(key, (name, tensor))
            if (tensor.scale, tensor.offset, tensor.dtype) != (known.scale, known.offset, known.dtype):
                raise TargetError(
                    f"{path}: {tensor.name} has scale {tensor.scale}, offset {tensor.offset} in {name}, but "
                    f"{known.scale}, {known.offset} in {first}; expected one quantization everywhere"
                )


def _check_boundary(path: Path, name: str, graph: GraphInfo, part: Part) -> None:
    """Hidden states that are called otherwise in the next part reach it as nothing: every token is then 0."""
    for kind, tensors, number in (("input", graph.inputs, part.number - 1), ("output", graph.outputs, part.number)):
        if (kind == "input" and part.embeds) or (kind == "output" and part.heads):
            continue
        expected = f"hidden_{number}"
        if all(tensor.name != expected for tensor in tensors):
            raise TargetError(
                f"{path}: {kind} {expected} of {name} is missing among {[t.name for t in tensors]}; hidden states need "
                "the same name in both parts, or Genie answers with token 0 forever"
            )


def _find(content: Mapping[str, Any], where: str) -> Any:
    value: Any = content
    for key in where.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value
