"""What can run a bundle: ONNX Runtime on the host, the device graphs, Qualcomm's compiler, emulator and Genie."""

from __future__ import annotations

from headrace.bundle import Bundle
from headrace.errors import TargetError, did_you_mean
from headrace.runtime.engine import Runner

__all__ = ["RUNNERS", "open_runner"]

RUNNERS = ("host",)


def open_runner(bundle: Bundle, name: str = "host", *, threads: int | None = None) -> Runner:
    """A bundle ready to compute.

    Raises:
        TargetError: there is no such runner.
    """
    if name == "host":
        from headrace.targets.onnxruntime import HostRunner

        return HostRunner(bundle, threads=threads)
    raise TargetError(f"runner {name!r} is unknown{did_you_mean(name, RUNNERS)}; expected {', '.join(RUNNERS)}")
