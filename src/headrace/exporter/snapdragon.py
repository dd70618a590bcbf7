"""From a bundle's device graphs to a chip's folder in it: shared binaries, each checked against the plan, for Genie.

    device graphs (S × C) ─► one shared binary a part ─► checked against the plan ─► Genie's folder

Orchestrates, part by part and resumable; graphs, compiler and checks are written elsewhere.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from headrace.bundle.folder import Bundle
from headrace.bundle.work_folder import remove_leftovers
from headrace.files import read_json, sync, write_file
from headrace.graph.emit_device import DeviceGraph
from headrace.progress import Progress, silent
from headrace.targets.qualcomm.binary_check import check_binary
from headrace.targets.qualcomm.compiler import GraphFile, compile_shared
from headrace.targets.qualcomm.context_binary import read_context_binary
from headrace.targets.qualcomm.genie import TOKENIZER_FILE, GeniePlan, binary_name, write_genie_folder
from headrace.targets.qualcomm.genie_bundle import genie_plan, genie_vocabulary, sample_prompt
from headrace.targets.qualcomm.genie_check import check_genie_folder
from headrace.targets.qualcomm.geniex import GENIEX_FILE, geniex_metadata
from headrace.targets.qualcomm.soc import find_soc
from headrace.text.tokenizer_folder import load_tokenizer

__all__ = ["compile_target"]


def compile_target(
    bundle: Bundle, target: str, graphs: Sequence[DeviceGraph], work: Path, progress: Progress = silent
) -> Path:
    """Compile every part for a chip into `bundle.root/target` and write the Genie folder there.

    Binaries that an interrupted run finished are kept: each is checked against the plan either way.

    Args:
        bundle: weights, encodings, tokenizer; it need not be published yet.
        target: the chip's name.
        graphs: all its device graphs.
        work: where the log of finished binaries is.
        progress: told how far it is.

    Raises:
        TargetError: the chip is unknown, the compiler failed, or what it made is not what was planned.
    """
    plan = genie_plan(bundle, find_soc(target))
    folder = bundle.root / target
    folder.mkdir(exist_ok=True)
    remove_leftovers(folder)  # of a run that was killed: they would become part of the bundle
    work.mkdir(parents=True, exist_ok=True)
    made: dict[str, dict[str, Any]] = {}
    log = work / f"{target}.json"
    if log.exists():
        made = read_json(log)
    for number, part in enumerate(plan.parts):
        progress(f"compiling for {target}", number, len(plan.parts))
        binary = folder / binary_name(part)
        if binary.name not in made or not binary.is_file():
            own = [GraphFile(graph.name, graph.path) for graph in graphs if graph.part == part]
            compiled = compile_shared(own, plan.soc, binary)
            sync(binary)  # the log must not remember what the disk has forgotten
            made[binary.name] = {"seconds": round(compiled.seconds, 1), "peak_bytes": compiled.peak_bytes}
        info = read_context_binary(binary)
        check_binary(binary, info, plan.soc, plan.config, part, plan.steps, plan.encodings)
        made[binary.name] |= {"bytes": binary.stat().st_size, "qairt": info.build}
        write_file(log, json.dumps(made, indent=1).encode())
    progress(f"compiling for {target}", len(plan.parts), len(plan.parts))
    _write_folder(bundle, folder, plan, info.build)
    check_genie_folder(folder, plan)
    return folder


def _write_folder(bundle: Bundle, folder: Path, plan: GeniePlan, qairt_build: str) -> None:
    tokenizer = folder / TOKENIZER_FILE
    write_file(tokenizer, genie_vocabulary(bundle.root, bundle.read_json("generation_config.json")).encode())
    write_genie_folder(
        folder,
        plan,
        name=str(bundle.provenance.get("checkpoint", bundle.root.name)),
        tokenizer=tokenizer,
        sample_prompt=sample_prompt(bundle),
        qairt_build=qairt_build,
        package=f"onnxruntime-qnn {importlib.metadata.version('onnxruntime-qnn')}",
    )
    name = str(bundle.provenance.get("checkpoint", bundle.root.name))
    write_file(folder / GENIEX_FILE, json.dumps(geniex_metadata(plan, name), indent=1).encode())
    if (template := load_tokenizer(bundle.root).chat_template) is not None:
        write_file(folder / "tokenizer_config.json", json.dumps({"chat_template": template}, indent=1).encode())
