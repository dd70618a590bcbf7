"""The shared library: its functions with their types, and its error codes as exceptions."""

from __future__ import annotations

import ctypes
import os
from ctypes import POINTER, c_char_p, c_double, c_float, c_int, c_int64, c_uint64, c_void_p
from pathlib import Path
from typing import Any

__all__ = [
    "Cancelled",
    "ProgramError",
    "SpanError",
    "available_isas",
    "checked",
    "known_isas",
    "load",
    "physical_cores",
]


_LONGEST = 1000  # characters of a message


class _Refusal(ValueError):
    """What is refused is told in one line that can be printed, whatever names and values stand in it."""

    def __init__(self, message: object = "") -> None:
        line = "".join(c if c.isprintable() else "\ufffd" for c in str(message))
        super().__init__(line if len(line) <= _LONGEST else f"{line[: _LONGEST // 2]}…{line[-_LONGEST // 2 + 1 :]}")


class ProgramError(_Refusal):
    """A program that cannot be run, or an engine that cannot be made as asked."""


class SpanError(_Refusal):
    """Spans, slots or positions that the engine does not have."""


class Cancelled(RuntimeError):
    """The run was stopped by `Engine.cancel`."""


_ERRORS: dict[int, type[Exception]] = {
    1: ProgramError,
    2: SpanError,
    3: Cancelled,
    4: RuntimeError,
    5: MemoryError,
    6: RuntimeError,
}

# Name → (result, arguments). Pointers to arrays are addresses.
_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "hk_error": (c_char_p, []),
    "hk_known_isas": (c_char_p, []),
    "hk_available_isas": (c_char_p, []),
    "hk_program_new": (c_int, [c_int] * 7 + [c_float, POINTER(c_void_p)]),
    "hk_program_free": (None, [c_void_p]),
    "hk_program_file": (c_int, [c_void_p, c_char_p]),
    "hk_program_tensor": (c_int, [c_void_p, c_char_p, c_int, c_uint64, c_int, c_int64, c_int64]),
    "hk_program_array": (c_int, [c_void_p, c_char_p, c_void_p, c_uint64, c_int, c_int64, c_int64]),
    "hk_program_weight": (c_int, [c_void_p, c_char_p, c_int, c_char_p, c_char_p, c_char_p, c_char_p, c_int, c_char_p]),
    "hk_program_register": (c_int, [c_void_p, c_int]),
    "hk_program_cache": (c_int, [c_void_p, c_int, POINTER(c_float), c_int]),
    "hk_program_instruction": (
        c_int,
        [c_void_p, c_char_p, c_int, c_int, c_int, POINTER(c_int), c_int, POINTER(c_char_p)],
    ),
    "hk_engine_new": (c_int, [c_void_p, c_int, c_int, c_int, c_char_p, c_int, c_int, POINTER(c_void_p)]),
    "hk_engine_free": (None, [c_void_p]),
    "hk_engine_threads": (c_int, [c_void_p]),
    "hk_engine_isa": (c_char_p, [c_void_p]),
    "hk_engine_run": (c_int, [c_void_p, c_int, c_void_p, c_void_p, c_void_p, c_void_p]),
    "hk_engine_cancel": (None, [c_void_p]),
    "hk_engine_length": (c_int, [c_void_p, c_int, POINTER(c_int)]),
    "hk_engine_copy": (c_int, [c_void_p, c_int, c_int, c_int]),
    "hk_engine_read_bytes": (c_int, [c_void_p, c_int, c_int, c_int, POINTER(c_uint64)]),
    "hk_engine_read": (c_int, [c_void_p, c_int, c_int, c_int, c_char_p]),
    "hk_engine_write": (c_int, [c_void_p, c_int, c_int, c_int, c_char_p, c_uint64]),
    "hk_engine_stats": (c_int, [c_void_p, POINTER(c_int64), POINTER(c_double)]),
    "hk_kinds": (c_int, []),
    "hk_kind": (c_char_p, [c_int]),
}

_loaded: list[ctypes.CDLL] = []


def load() -> ctypes.CDLL:
    """The library, loaded once. HEADRACE_KERNELS names another file, as sanitize.sh does.

    Raises:
        ImportError: the package was installed without it.
    """
    if not _loaded:
        here = Path(__file__).parent
        named = os.environ.get("HEADRACE_KERNELS")
        found = [Path(named)] if named else [here / f"libheadrace_kernels.{end}" for end in ("so", "dylib")]
        path = next((p for p in found if p.exists()), None)
        if path is None:
            raise ImportError(f"{found[0]} is missing; build and install the package: pip install ./kernels")
        library = ctypes.CDLL(str(path))
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
        _loaded.append(library)
    return _loaded[0]


def checked(code: int) -> None:
    """Raises what the library says went wrong in the call that gave `code`; nothing when it is 0."""
    if code:
        raise _ERRORS[code](load().hk_error().decode("utf-8", "replace"))


def known_isas() -> tuple[str, ...]:
    """Every variant there is, on any machine."""
    return tuple(load().hk_known_isas().decode().split())


def available_isas() -> tuple[str, ...]:
    """The variants that this machine can run, best first."""
    return tuple(load().hk_available_isas().decode().split())


def physical_cores() -> int:
    """Physical cores among the processors that this process may use; all of those where the system does not say."""
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    cores = set()
    for cpu in allowed:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            cores.add(siblings.read_text())
        except OSError:
            cores.add(str(cpu))
    return max(1, len(cores))
