"""RUNNERS: the one registry of what can run a bundle; load, chat, bench, evaluate and verify all ask here.

A new runner is one function here that imports what it needs when it is called, and one line in `RUNNERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import NamedTuple, TypeAlias

from headrace.bundle.folder import Bundle
from headrace.errors import TargetError, did_you_mean
from headrace.progress import Progress, silent
from headrace.runtime.answer import Answerer
from headrace.runtime.runner import Runner

__all__ = ["RUNNERS", "Opener", "Options", "default_runner", "find_runner", "open_runner"]


class Options(NamedTuple):
    """How a runner is opened; each takes what applies to it.

    Attributes:
        threads: size of the thread pool; None for physical cores.
        slots: sequences held at once.
        context: positions of a slot; None for the bundle's.
        huge_pages: native: weights whose files lie in small pages are copied into huge ones, which are read faster:
            True when it opens, None bit by bit while it runs, False never.
        progress: told what is being made before the first use.
    """

    threads: int | None = None
    slots: int = 1
    context: int | None = None
    huge_pages: bool | None = None
    progress: Progress = silent


Opener: TypeAlias = Callable[[Bundle, Options], Runner | Answerer]


def _host(bundle: Bundle, options: Options) -> Runner:
    """ONNX Runtime's CPU kernels."""
    from headrace.targets.host.runner import HostRunner

    return HostRunner(bundle, threads=options.threads, slots=options.slots, context=options.context)


def _native(bundle: Bundle, options: Options) -> Runner:
    """headrace-kernels."""
    from headrace.native.runner import NativeRunner

    return NativeRunner(
        bundle,
        threads=options.threads,
        slots=options.slots,
        context=options.context,
        huge_pages=options.huge_pages,
    )


def _device(bundle: Bundle, options: Options) -> Runner:
    """The phone's graphs on this CPU; for checking."""
    from headrace.graph.device_folder import kept_device_graphs
    from headrace.targets.device import DeviceRunner

    return DeviceRunner.open(
        bundle, kept_device_graphs(bundle, options.progress), threads=options.threads, slots=options.slots
    )


def _genie(bundle: Bundle, options: Options) -> Answerer:
    """Qualcomm's Genie over binaries in HTP emulation, compiled once and kept beside the bundle."""
    from headrace.bundle.derived import derived_folder
    from headrace.genie_answers import GenieAnswers
    from headrace.targets.qualcomm.emulation import emulate

    return GenieAnswers(emulate(bundle, derived_folder(bundle, "emulation"), progress=options.progress))


RUNNERS: Mapping[str, Opener] = {
    "native": _native,
    "host": _host,
    "device": _device,
    "genie": _genie,
}


def default_runner() -> str:
    """The fastest runner that is installed here."""
    return "native" if find_spec("headrace_kernels") is not None else "host"


def find_runner(name: str | None) -> Opener:
    """The opener of a runner's name; None for the default.

    Raises:
        TargetError: there is no such runner.
    """
    name = default_runner() if name is None else name
    if name not in RUNNERS:
        known = tuple(RUNNERS)
        raise TargetError(f"runner {name!r} is unknown{did_you_mean(name, known)}; expected {', '.join(known)}")
    return RUNNERS[name]


def open_runner(bundle: Bundle, name: str | None = None, options: Options | None = None) -> Runner:
    """A runner that gives logits, opened on a bundle.

    Raises:
        TargetError: there is no such runner, it gives no logits (genie), or what it needs is not installed.
    """
    if name == "genie":
        raise TargetError("runner 'genie' chooses tokens by itself and gives no logits; expected another, such as host")
    made = find_runner(name)(bundle, options or Options())
    assert isinstance(made, Runner)
    return made
