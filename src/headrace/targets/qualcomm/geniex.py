"""What GenieX reads beside Genie's own files: metadata.json, derived from the same plan.

GenieX is Qualcomm's newer runtime (github.com/qualcomm/GenieX). Its QAIRT plugin takes the order of binaries, the
tokens, the rotary base and the sampler from the block `geniex`, and counts layers, heads and channels from the tensors
that `model_files` lists by graph. Source: core/src/llm/llm_spec_loader.cpp of qualcomm/geniex-qairt-plugin at commit
0b40ac2, whose keys these are, and no others. Not run on a phone. This file does not know how binaries are made.
"""

from __future__ import annotations

from typing import Any

from headrace.config import RopeScaling
from headrace.plan import GraphStyle, Port, graph_name, ports
from headrace.targets.qualcomm.genie import NO_TOKEN, GeniePlan, binary_name, genie_config

__all__ = ["GENIEX_FILE", "geniex_metadata"]

GENIEX_FILE = "metadata.json"


def geniex_metadata(plan: GeniePlan, name: str) -> dict[str, Any]:
    """The content of metadata.json.

    Args:
        plan: what a phone's folder is derived from.
        name: of the model.
    """
    graphs = {}
    for part in plan.parts:
        for length, context in plan.steps:
            inputs, outputs = ports(plan.config, part, GraphStyle.DEVICE, length=length, context=context)
            graphs[graph_name(part, length, context)] = {"inputs": _tensors(inputs), "outputs": _tensors(outputs)}
    sampler = dict(genie_config(plan, [])["dialog"]["sampler"])
    del sampler["version"]
    position: dict[str, Any] = {"rope_theta": plan.config.rope_theta}
    if plan.config.rope_scaling is not None:
        position["rope_scaling"] = _scaling(plan.config.rope_scaling)
    return {
        "model_id": name,
        "model_files": graphs,
        "geniex": {
            "dialog_type": "basic",
            "supports_vision": False,
            "ctx_bins": [binary_name(part) for part in plan.parts],
            "context": {
                "max_context_length": max(plan.contexts),
                "bos_token": NO_TOKEN if plan.bos is None else plan.bos,
                "eos_token": list(plan.eos),
                "pad_token": plan.pad,
            },
            "positional_encoding": position,
            "sampler": sampler,
        },
    }


def _tensors(graph_ports: tuple[Port, ...]) -> dict[str, dict[str, Any]]:
    return {port.name: {"shape": list(port.shape), "dtype": port.dtype} for port in graph_ports}


def _scaling(scaling: RopeScaling) -> dict[str, Any]:
    found: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
        found |= {
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_context,
        }
    return found
