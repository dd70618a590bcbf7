"""The engine: one program with its caches and threads, called with ragged batches of spans. See docs/kernels.md."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from headrace_kernels.library import ProgramError, SpanError, checked, load, physical_cores
from headrace_kernels.program import build

__all__ = ["Engine", "Span", "Stats"]

Span = tuple[int, int, "NDArray[np.int32] | Sequence[int]", "NDArray[np.int32] | Sequence[int]"]
_INT32 = np.iinfo(np.int32)
_SETTLE = {True: 0, None: 1, False: 2}


class Stats(TypedDict):
    """What an engine did since it was made; `meetings` of threads are those of the last run, `copied_bytes` are weights
    that were copied into huge pages."""

    runs: int
    tokens: int
    meetings: int
    copied_bytes: int
    seconds: dict[str, float]


class Engine:
    """A program ready to run.

    Args:
        program: the description of docs/kernels.md.
        arrays: tensors in memory, by name (uint8, float16 or float32, C-contiguous); the engine keeps them alive.
        slots: how many sequences have a cache.
        context: positions of a slot; None: as many as the program's tables have.
        threads: 0: one a physical core. Where the system starts fewer, they do the work.
        isa: a name of `available_isas()`; None: HEADRACE_ISA, else the best.
        huge_pages: files whose pages are small are copied into pages of 2 MB: True now, None bit by bit once the engine
            has worked for a second, False never. For nothing where the system has none, or too little memory.
        fuse: False runs one instruction at a time, which gives the same numbers; for tests.

    Attributes:
        slots, context, threads, isa, vocab: as they are; `threads` that were started, the caller among them.

    Raises:
        ProgramError: the program, or what is asked of it, is not possible.
    """

    def __init__(
        self,
        program: Mapping[str, Any],
        arrays: Mapping[str, NDArray[Any]] | None = None,
        *,
        slots: int = 1,
        context: int | None = None,
        threads: int = 0,
        isa: str | None = None,
        fuse: bool = True,
        huge_pages: bool | None = None,
    ) -> None:
        self._handle = ctypes.c_void_p()
        self._library = load()
        self._arrays = dict(arrays or {})
        description = build(program, self._arrays)
        geometry = program["geometry"]
        self.slots = slots
        self.context: int = geometry["context"] if context is None else context
        self.threads = threads or physical_cores()
        self.vocab: int = geometry["vocab"]
        for what, n in (("slots", slots), ("context", self.context), ("threads", self.threads)):
            if isinstance(n, bool) or not isinstance(n, int) or not 0 < n <= _INT32.max:
                self._library.hk_program_free(description)
                raise ProgramError(f"{what} is {n!r}; expected a whole number above 0")
        name = (isa or os.environ.get("HEADRACE_ISA", "")).encode()
        checked(
            self._library.hk_engine_new(
                description,
                slots,
                self.context,
                self.threads,
                name,
                fuse,
                _SETTLE[huge_pages],
                ctypes.byref(self._handle),
            )
        )
        self.threads = self._library.hk_engine_threads(self._handle)
        self.isa: str = self._library.hk_engine_isa(self._handle).decode()

    def run(self, spans: Sequence[Span]) -> NDArray[np.float32]:
        """Computes the spans' tokens; logits of their wanted rows, float32 (total wanted, vocab).

        Raises:
            SpanError: a slot, a position, an id or a wanted row is not possible; nothing was computed.
            Cancelled: `cancel` was called; the slots hold what was before their spans.
        """
        table = np.empty((len(spans), 6), np.int32)
        ids, wanted = [], []
        id_count = wanted_count = 0
        for row, (slot, start, span_ids, span_wanted) in enumerate(spans):
            ids.append(_int32(span_ids, "ids"))
            wanted.append(_int32(span_wanted, "wanted"))
            table[row] = (
                _number(slot, "a slot"), _number(start, "start"),
                len(ids[-1]), id_count, len(wanted[-1]), wanted_count,
            )  # fmt: skip
            id_count, wanted_count = id_count + len(ids[-1]), wanted_count + len(wanted[-1])
        if not spans:
            raise SpanError("there are no spans")
        all_ids = ids[0] if len(ids) == 1 else np.concatenate(ids)
        all_wanted = wanted[0] if len(wanted) == 1 else np.concatenate(wanted)
        logits = np.empty((wanted_count, self.vocab), np.float32)
        checked(
            self._library.hk_engine_run(
                self._open(),
                len(spans),
                table.ctypes.data,
                all_ids.ctypes.data,
                all_wanted.ctypes.data,
                logits.ctypes.data,
            )
        )
        return logits

    def cancel(self) -> None:
        """Stops the run of another thread at its next meeting of threads; nothing when none is running."""
        self._library.hk_engine_cancel(self._open())

    def length(self, slot: int) -> int:
        """Positions that the slot holds."""
        out = ctypes.c_int()
        checked(self._library.hk_engine_length(self._open(), _number(slot, "a slot"), ctypes.byref(out)))
        return out.value

    def copy(self, source: int, target: int, n: int) -> None:
        """The first n positions of one slot into another, which holds n afterwards."""
        numbers = _number(source, "source"), _number(target, "target"), _number(n, "n")
        checked(self._library.hk_engine_copy(self._open(), *numbers))

    def read(self, slot: int, start: int, stop: int) -> bytes:
        """Keys and values of a stretch: (layers, 2, kv_heads, stop − start, head_dim), int8 or float32."""
        numbers = _number(slot, "a slot"), _number(start, "start"), _number(stop, "stop")
        size = ctypes.c_uint64()
        checked(self._library.hk_engine_read_bytes(self._open(), *numbers, ctypes.byref(size)))
        data = ctypes.create_string_buffer(size.value)
        checked(self._library.hk_engine_read(self._open(), *numbers, data))
        return data.raw

    def write(self, slot: int, start: int, stop: int, data: bytes) -> None:
        """The inverse of `read`; the slot holds `stop` positions afterwards."""
        numbers = _number(slot, "a slot"), _number(start, "start"), _number(stop, "stop")
        checked(self._library.hk_engine_write(self._open(), *numbers, bytes(data), len(data)))

    @property
    def stats(self) -> Stats:
        """Runs, tokens, meetings of the last run, and seconds of each kind of step."""
        kinds = [self._library.hk_kind(i).decode() for i in range(self._library.hk_kinds())]
        counts, seconds = (ctypes.c_int64 * 4)(), (ctypes.c_double * len(kinds))()
        checked(self._library.hk_engine_stats(self._open(), counts, seconds))
        return Stats(
            runs=counts[0],
            tokens=counts[1],
            meetings=counts[2],
            copied_bytes=counts[3],
            seconds=dict(zip(kinds, seconds)),
        )

    def close(self) -> None:
        """Gives memory, mappings and threads back; the engine is of no use afterwards."""
        handle, self._handle = self._handle, ctypes.c_void_p()
        if handle:
            self._library.hk_engine_free(handle)
        self._arrays = {}

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self.close()

    def _open(self) -> ctypes.c_void_p:
        if not self._handle:
            raise RuntimeError("the engine is closed")
        return self._handle


def _number(value: object, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not _INT32.min <= value <= _INT32.max:
        raise SpanError(f"{what} is {value!r:.80}; expected a whole number")
    return int(value)


def _int32(values: NDArray[np.int32] | Sequence[int], what: str) -> NDArray[np.int32]:
    try:
        array = np.asarray(values)
    except (ValueError, OverflowError):  # rows of several lengths
        raise SpanError(f"{what} are {values!r:.80}; expected whole numbers in one row") from None
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise SpanError(f"{what} have shape {array.shape} and dtype {array.dtype}; expected whole numbers in one row")
    if array.size and (array.min() < _INT32.min or array.max() > _INT32.max):
        raise SpanError(f"{what} are beyond int32")
    return np.ascontiguousarray(array, np.int32)
