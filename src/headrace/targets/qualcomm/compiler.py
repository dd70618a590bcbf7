"""Compiles device graphs to QNN context binaries, and runs compiled graphs in HTP emulation.

    graphs of one part, S × C  ── compile_shared ──►  one binary, weights held once  ──►  phone
                               ── compile_apart ───►  one binary each               ──►  Emulator, Genie on x86

The emulator cannot open a binary with shared weights: the same graphs are compiled a second time, apart. Compiler and
emulator live in child processes. This file does not know what the graphs compute nor what a binary should contain.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from numpy.typing import NDArray

from headrace.bundle.work_folder import scratch_folder
from headrace.errors import TargetError
from headrace.files import sync
from headrace.targets.qualcomm.child import Arrays, Child
from headrace.targets.qualcomm.context_binary import BinaryInfo, read_context_binaries, read_context_binary
from headrace.targets.qualcomm.soc import Soc

__all__ = ["Compiled", "EmulationGraph", "Emulator", "GraphFile", "compile_apart", "compile_shared"]

COMPILE_SECONDS = 3600.0  # one graph; 7 layers at 7B shape take 57 s on a core
LOAD_SECONDS = 600.0
RUN_SECONDS = 3600.0  # one step; a 7B layer at context 4096 takes 51 s for 128 tokens
OPTIMIZATION = 3  # highest level of the HTP compiler; costs seconds at 7B shape

_WORKER = "headrace.targets.qualcomm.worker"


@dataclass(frozen=True)
class GraphFile:
    """A device graph as an ONNX file, and the name it shall have in the binary ("ar128_cl4096_2_of_5")."""

    name: str
    onnx: Path


@dataclass(frozen=True)
class Compiled:
    """A finished context binary.

    Attributes:
        path: the binary.
        info: what it says about itself.
        seconds: time to compile, all graphs.
        peak_bytes: peak resident memory of the compiler.
    """

    path: Path
    info: BinaryInfo
    seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class EmulationGraph:
    """A graph compiled alone: `binary` for Genie, `onnx` (which refers to it) for the Emulator."""

    name: str
    onnx: Path
    binary: Path


def compile_shared(
    graphs: Sequence[GraphFile], soc: Soc, binary: Path, *, progress: Callable[[str], None] | None = None
) -> Compiled:
    """Compile the graphs over one part's weights into one binary that holds the weights once.

    The binary appears at its path when it is complete, or not at all.

    Args:
        graphs: every length and context of the part; names must differ.
        soc: the chip.
        binary: where the binary goes; its folder exists.
        progress: called with each graph's name when it is compiled.

    Raises:
        TargetError: the compiler refused a graph, or died.
    """
    if len({graph.name for graph in graphs}) != len(graphs) or not graphs:
        raise TargetError(f"cannot compile graphs {[g.name for g in graphs]} together; expected distinct names")
    started = time.monotonic()
    with scratch_folder(binary.parent, "what the compiler writes") as scratch:
        with Child(_WORKER, "the HTP compiler") as child:
            # Every session stays open until the last one writes the binary.
            for graph in graphs:
                answer = _prepare(child, graph, soc, scratch, share=True, last=graph is graphs[-1])
                if progress is not None:
                    progress(graph.name)
        made = _only_binary(scratch, graphs[0].name)
        info = read_context_binary(made)
        _publish(made, binary)
    return Compiled(binary, info, time.monotonic() - started, int(answer["peak_bytes"]))


def compile_apart(
    graphs: Sequence[GraphFile], soc: Soc, folder: Path, *, progress: Callable[[str], None] | None = None
) -> list[EmulationGraph]:
    """Compile each graph into a binary of its own, for emulation.

    Writes NAME.onnx and NAME_qnn.bin into `folder`, which must exist.

    Args:
        graphs: of one part: they are compiled one after another in one child process.
        soc: the chip whose code is emulated.
        folder: where they go.
        progress: called with each graph's name when it is compiled.

    Raises:
        TargetError: the compiler refused a graph, or died.
    """
    finished = []
    with (
        scratch_folder(folder, "what the compiler writes") as scratch,
        Child(_WORKER, "the HTP compiler") as child,
    ):
        for graph in graphs:
            _prepare(child, graph, soc, scratch, share=False, last=True)
            made = _only_binary(scratch, graph.name)
            # The .onnx names its binary, so both keep the names they were written under.
            _publish(made, folder / made.name)
            _publish(scratch / f"{graph.name}.onnx", folder / f"{graph.name}.onnx")
            finished.append(EmulationGraph(graph.name, folder / f"{graph.name}.onnx", folder / made.name))
            if progress is not None:
                progress(graph.name)
    return finished


def _prepare(child: Child, graph: GraphFile, soc: Soc, scratch: Path, *, share: bool, last: bool) -> dict[str, Any]:
    if not graph.onnx.is_file():
        raise TargetError(f"there is no device graph at {graph.onnx}; export with --target again")
    request = {
        "action": "prepare",
        "name": graph.name,
        "onnx": str(graph.onnx),  # a path: graphs given as bytes collide when weights are shared
        "context": str(scratch / f"{graph.name}.onnx"),
        "share": share,
        "last": last,
        "options": {
            # Both numbers: soc_model alone or an arch alone compiles for no chip, silently.
            "soc_model": str(soc.model),
            "htp_arch": str(soc.arch),
            "vtcm_mb": str(soc.vtcm_mb),
            "htp_graph_finalization_optimization_mode": str(OPTIMIZATION),
            # Otherwise weights in blocks would be run as float16.
            "enable_block_quant_weight_optimization": "1",
            # Otherwise the graph's first and last quantization would run on the CPU.
            "offload_graph_io_quantization": "0",
        },
    }
    return child.call(request, seconds=COMPILE_SECONDS)[0]


def _only_binary(folder: Path, name: str) -> Path:
    made = sorted(folder.glob("*.bin"))
    if len(made) != 1:
        raise TargetError(
            f"compiling {name} gave {len(made)} binaries; expected one; the installed onnxruntime-qnn is not the "
            "version headrace was made for (2.7.0)"
        )
    return made[0]


def _publish(made: Path, target: Path) -> None:
    """Move a finished file to its place, durably and at once."""
    sync(made)
    made.replace(target)


class Emulator:
    """Compiled graphs in HTP emulation on this computer, in a child process.

    Args:
        graphs: graphs compiled alone.

    Raises:
        TargetError: a binary has shared weights or cannot be loaded.
    """

    def __init__(self, graphs: Sequence[EmulationGraph]) -> None:
        refuse_shared([graph.binary for graph in graphs])
        self._child = Child(_WORKER, "the HTP emulator")
        try:
            for graph in graphs:
                request = {"action": "load", "name": graph.name, "onnx": str(graph.onnx), "options": {}}
                self._child.call(request, seconds=LOAD_SECONDS)
        except TargetError:
            self._child.close()
            raise

    def __enter__(self) -> Emulator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def run(self, name: str, feeds: Arrays) -> dict[str, NDArray[Any]]:
        """One step of a graph: codes in, codes out, by port name.

        Raises:
            TargetError: there is no such graph, the feeds do not fit it, or the emulator died.
        """
        return self._child.call({"action": "run", "name": name}, feeds, seconds=RUN_SECONDS)[1]

    def close(self) -> None:
        """End the child."""
        self._child.close()


def refuse_shared(binaries: Sequence[Path]) -> list[BinaryInfo]:
    """What the binaries say about themselves.

    Raises:
        TargetError: one has weights shared between graphs, which crashes the emulator, or cannot be read.
    """
    infos = read_context_binaries(binaries)
    for path, info in zip(binaries, infos):
        if info.shared:
            raise TargetError(
                f"{path} holds weights shared between {len(info.graphs)} graphs, which only a phone can open; expected "
                "graphs compiled apart for emulation"
            )
    return infos
