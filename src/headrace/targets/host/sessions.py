"""ONNX Runtime sessions on the CPU that share one pool of threads. Knows no model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime as ort

from headrace.errors import BundleError
from headrace.targets.graph_check import check_graph_file

__all__ = ["default_threads", "make_session"]

_pool: int | None = None


def default_threads() -> int:
    """Physical cores this process may use."""
    import psutil

    usable = len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, "cpu_affinity") else None
    physical = psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
    return max(1, min(physical, usable or physical))


def _share_threads(threads: int) -> None:
    """One pool for every session of the process: pools of their own would spin against each other between steps.
    ONNX Runtime makes it once; the first number asked for stays."""
    global _pool
    if _pool is None:
        ort.set_global_thread_pool_sizes(threads, 1)
        _pool = threads


def make_session(path: str, threads: int, options: Any = None) -> Any:
    """An onnxruntime session on the CPU in the shared pool; `options`: the caller's own `SessionOptions`.

    Raises:
        BundleError: ONNX Runtime cannot open the graph, or the weights that it names, or headrace would not let it.
    """
    check_graph_file(Path(path))
    _share_threads(threads)
    options = options or ort.SessionOptions()
    options.use_per_session_threads = False
    options.log_severity_level = 3
    try:
        return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no class of their own in common
        reason = " ".join(str(error).split())
        raise BundleError(f"ONNX Runtime cannot open {path}: {reason}; export the bundle again") from None
