"""A bundle's binaries for Genie and the HTP emulator on this computer: the phone's graphs compiled apart, once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace.bundle.derived import derive
from headrace.bundle.folder import Bundle
from headrace.files import read_json, write_file
from headrace.graph.device_folder import bundle_device_graphs
from headrace.progress import Progress, silent
from headrace.targets.qualcomm.compiler import GraphFile, compile_apart
from headrace.targets.qualcomm.genie import (
    BACKEND_FILE,
    CONFIG_FILE,
    TOKENIZER_FILE,
    GeniePlan,
    backend_config,
    genie_config,
)
from headrace.targets.qualcomm.genie_bundle import genie_plan, genie_vocabulary
from headrace.targets.qualcomm.genie_check import check_genie_folder
from headrace.targets.qualcomm.soc import find_soc

__all__ = ["Emulated", "emulate"]


@dataclass(frozen=True)
class Emulated:
    """A folder that Genie runs on this computer, and what it was derived from."""

    folder: Path
    config: Mapping[str, Any]
    plan: GeniePlan


def emulate(bundle: Bundle, folder: Path, target: str = "snapdragon-8-elite", progress: Progress = silent) -> Emulated:
    """The same graphs compiled apart, for Genie and the emulator on this computer; made once a bundle.

    Args:
        bundle: a published bundle.
        folder: where binaries and configuration are kept; another bundle's are replaced.
        target: the chip that is emulated.
        progress: told how far it is.

    Raises:
        TargetError: the compiler failed, or what it made is not what was planned.
    """
    plan = genie_plan(bundle, find_soc(target))

    def make(made: Path) -> None:
        graphs = bundle_device_graphs(bundle, made / "device")
        for number, part in enumerate(plan.parts):
            progress("compiling for emulation", number, len(plan.parts))
            compile_apart([GraphFile(g.name, g.path) for g in graphs if g.part == part], plan.soc, made)
        progress("compiling for emulation", len(plan.parts), len(plan.parts))
        binaries = [path.name for path in sorted(made.glob("*.bin"))]
        config = genie_config(plan, binaries)
        write_file(made / CONFIG_FILE, json.dumps(config, indent=2).encode())
        write_file(made / BACKEND_FILE, json.dumps(backend_config(plan.soc), indent=2).encode())
        write_file(
            made / TOKENIZER_FILE, genie_vocabulary(bundle.root, bundle.read_json("generation_config.json")).encode()
        )
        check_genie_folder(made, plan, emulation=True)
        shutil.rmtree(made / "device")

    derive(bundle, target, folder, make, progress)
    return Emulated(folder, read_json(folder / CONFIG_FILE), plan)
