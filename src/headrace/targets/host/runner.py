"""HostRunner: a bundle's host graphs on ONNX Runtime's CPU kernels. Knows sessions, threads and buffers, no text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from headrace.bundle.folder import Bundle
from headrace.model.rope import rope_tables
from headrace.plan import GraphStyle, Part, ports
from headrace.runtime.engine import Logits

__all__ = ["HostRunner", "default_threads", "make_session"]

_DTYPES = {"int8": np.int8, "float32": np.float32}
_KEPT_BINDINGS = 4  # prompt step, token step, and the last odd lengths
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
    """An onnxruntime session on the CPU in the shared pool; `options`: the caller's own `SessionOptions`."""
    _share_threads(threads)
    options = options or ort.SessionOptions()
    options.use_per_session_threads = False
    options.log_severity_level = 3
    # The cache's buffers come from outside and weights are packed by the kernels: an arena would only hold on to peaks.
    options.enable_cpu_mem_arena = True
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


class HostRunner:
    """The parts of a bundle in one process, sharing one KV cache that is written in place.

    Args:
        bundle: an opened bundle.
        threads: size of the shared pool; physical cores by default, and the first runner of a process decides.
        batch: sequences that run in step.
        context: positions of the cache, the bundle's by default.

    A `Runner`; `step` takes one sequence, `step_batch` as many as `batch`.
    """

    def __init__(
        self, bundle: Bundle, *, threads: int | None = None, batch: int = 1, context: int | None = None
    ) -> None:
        config = bundle.config
        self.vocab_size = config.vocab_size
        self.context = context or bundle.context
        self.prompt_length = bundle.prompt_length
        self.batch = batch
        self._hidden = config.hidden_size
        self._parts = [
            _PartSession(make_session(str(bundle.graph(part)), threads or default_threads()), part, bundle)
            for part in bundle.parts
        ]
        # np.zeros maps pages when they are first written: a long context costs memory only as it fills.
        shape = (batch, config.num_kv_heads, self.context, config.head_dim)
        self._cache = {
            f"past_{kind}_{layer}": ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, _DTYPES[bundle.kv_dtype]))
            for layer in range(config.num_layers)
            for kind in ("key", "value")
        }
        self.kv_bytes = len(self._cache) * int(np.prod(shape)) * np.dtype(_DTYPES[bundle.kv_dtype]).itemsize
        cos, sin = rope_tables(config, self.context)
        self._tables = {"cos": ort.OrtValue.ortvalue_from_numpy(cos), "sin": ort.OrtValue.ortvalue_from_numpy(sin)}
        self._keep = (cos, sin)
        self._steps: dict[tuple[int, int], _Step] = {}

    def step(self, ids: NDArray[np.int64], start: int, wanted: NDArray[np.int64]) -> Logits:
        logits: Logits = self.step_batch(ids[None, :], np.array([start]), wanted)[0]
        return logits

    def step_batch(self, ids: NDArray[np.int64], starts: NDArray[np.int64], wanted: NDArray[np.int64]) -> Logits:
        """Run ids (batch, S), each sequence from its own start; several tokens over a past need batch 1.

        Returns:
            float32 (batch, len(wanted), V); a fresh array.
        """
        key = (ids.shape[1], len(wanted))
        step = self._steps.pop(key, None) or _Step(self, *key)
        self._steps[key] = step  # now the most recent
        if len(self._steps) > _KEPT_BINDINGS:
            del self._steps[next(iter(self._steps))]
        return step.run(ids, starts, wanted)

    def close(self) -> None:
        """Drop sessions and buffers."""
        self._steps.clear()
        self._parts.clear()
        self._cache.clear()


class _PartSession:
    def __init__(self, session: Any, part: Part, bundle: Bundle) -> None:
        self.session = session
        self.part = part
        self.inputs, self.outputs = ports(bundle.config, part, GraphStyle.HOST, kv_dtype=bundle.kv_dtype)


class _Step:
    """Buffers and bindings of one number of tokens S and wanted rows R, made once and written in place."""

    def __init__(self, runner: HostRunner, length: int, rows: int) -> None:
        batch = runner.batch
        self.ids = np.zeros((batch, length), np.int64)
        self.last_position = np.zeros(batch, np.int32)
        self.total_length = np.zeros((), np.int32)
        self.rows = np.zeros(rows, np.int64)
        self.logits = np.zeros((batch, rows, runner.vocab_size), np.float32)
        self._own: dict[str, Any] = {
            "input_ids": self.ids,
            "last_position": self.last_position,
            "total_length": self.total_length,
            "rows": self.rows,
            "logits": self.logits,
        }
        for number in range(1, len(runner._parts)):
            self._own[f"hidden_{number}"] = np.zeros((batch, length, runner._hidden), np.float32)
        values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in self._own.items()} | runner._tables
        self._bound = []
        # Without wanted rows the last part's head would still run on nothing; its layers must run for their cache.
        for part in runner._parts:
            binding = part.session.io_binding()
            for port in part.inputs:
                binding.bind_ortvalue_input(port.name, _value(port.name, values, runner._cache))
            for port in part.outputs:
                binding.bind_ortvalue_output(port.name, _value(port.name, values, runner._cache))
            self._bound.append((part.session, binding))
        self._values: Sequence[Any] = list(values.values())

    def run(self, ids: NDArray[np.int64], starts: NDArray[np.int64], wanted: NDArray[np.int64]) -> Logits:
        self.ids[:] = ids
        self.last_position[:] = starts + ids.shape[1] - 1
        self.total_length[...] = int(starts.max()) + ids.shape[1]
        self.rows[:] = wanted
        for session, binding in self._bound:
            session.run_with_iobinding(binding)
        return self.logits.copy()


def _value(name: str, values: dict[str, Any], cache: dict[str, Any]) -> Any:
    """The buffer behind a port; a cache's past and present are one buffer."""
    return values[name] if name in values else cache[name.removesuffix("_in").removesuffix("_out")]
