"""A program, from the plain description of docs/kernels.md into the library. Checks that every field is there and of
its type; what the numbers mean is checked by the library."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrace_kernels.library import ProgramError, checked, load

__all__ = ["build"]

FORMAT = 4

_GEOMETRY = ("layers", "heads", "kv_heads", "head_dim", "hidden", "vocab", "context")
_DTYPES = {"U8": 0, "F16": 1, "F32": 2}
_ARRAY_DTYPES = {"uint8": 0, "float16": 1, "float32": 2}

# Operation → fields that are registers, fields that are names, in the order of the library.
_FIELDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "embed": (("out",), ("weight",)),
    "rms_norm": (("in", "out"), ("weight",)),
    "add_norm": (("in", "update", "sum", "out"), ("weight",)),
    "add": (("in", "update", "out"), ()),
    "linear": (("in", "out"), ("weights",)),
    "rope_cache": (("q", "k", "v"), ("cos", "sin")),
    "attention": (("q", "out"), ()),
    "silu_mul": (("gate", "up", "out"), ()),
    "rows": (("in", "out"), ()),
    "head": (("in",), ("weight",)),
}
_INT32 = 1 << 31
_LARGEST = 3e38  # of a float32
_LAYERED = ("rope_cache", "attention")
_GROUPED = ("linear", "head")


def build(program: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> ctypes.c_void_p:
    """The program in the library; whoever calls must give it to an engine or free it.

    Raises:
        ProgramError: a field is missing, unknown, of another type or out of range.
    """
    keys = ("format", "geometry", "cache", "files", "tensors", "weights", "registers", "instructions")
    _keys(program, keys, "the program")
    if program["format"] != FORMAT:
        raise ProgramError(f"program format {program['format']!r}; expected {FORMAT}")
    geometry = _mapping(program["geometry"], "geometry")
    _keys(geometry, (*_GEOMETRY, "eps"), "geometry")
    numbers = [_int(geometry[key], f"geometry: {key}") for key in _GEOMETRY]
    library, handle = load(), ctypes.c_void_p()
    checked(library.hk_program_new(*numbers, _float(geometry["eps"], "geometry: eps"), ctypes.byref(handle)))
    try:
        _fill(handle, program, arrays)
    except BaseException:
        library.hk_program_free(handle)
        raise
    return handle


def _fill(handle: ctypes.c_void_p, program: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> None:
    library = load()
    for path in _sequence(program["files"], "files"):
        checked(library.hk_program_file(handle, _text(path, "a file")))
    for name, tensor in _mapping(program["tensors"], "tensors").items():
        what = f"tensor {name}"
        _keys(_mapping(tensor, what), ("file", "offset", "dtype", "shape"), what)
        shape = [_int(n, f"{what}: shape", 63) for n in _sequence(tensor["shape"], f"{what}: shape")]
        dtype = _DTYPES.get(tensor["dtype"]) if isinstance(tensor["dtype"], str) else None
        if dtype is None or len(shape) not in (1, 2):
            raise ProgramError(
                f"{what}: dtype {tensor['dtype']!r} and shape {shape}; expected U8, F16 or F32, 1 or 2 axes"
            )
        file, offset = _int(tensor["file"], what), _int(tensor["offset"], what, 63)
        if offset < 0:
            raise ProgramError(f"{what}: offset {offset} is below 0")
        checked(
            library.hk_program_tensor(handle, _text(name, what), file, offset, dtype, *([1] * (2 - len(shape))), *shape)
        )
    for name, array in arrays.items():
        what = f"array {name}"
        if not isinstance(array, np.ndarray) or array.dtype.name not in _ARRAY_DTYPES or array.ndim not in (1, 2):
            raise ProgramError(f"{what}: expected a NumPy array of uint8, float16 or float32 with 1 or 2 axes")
        if not array.flags.c_contiguous:
            raise ProgramError(f"{what}: expected a C-contiguous array")
        shape, dtype = [1] * (2 - array.ndim) + list(array.shape), _ARRAY_DTYPES[array.dtype.name]
        checked(library.hk_program_array(handle, _text(name, what), array.ctypes.data, array.nbytes, dtype, *shape))
    for name, weight in _mapping(program["weights"], "weights").items():
        what = f"weight {name}"
        _keys(_mapping(weight, what), ("bits", "packed", "scale"), what, optional=("high", "factors", "block", "bias"))
        packed, high, scale, factors, bias = (
            b"" if key not in ("packed", "scale") and weight.get(key) is None else _text(weight[key], f"{what}: {key}")
            for key in ("packed", "high", "scale", "factors", "bias")
        )
        bits = _int(weight["bits"], what)
        block = 0 if weight.get("block") is None else _int(weight["block"], f"{what}: block")
        if bool(factors) != bool(block):
            given = "factors" if factors else f"a block of {block}"
            raise ProgramError(f"{what}: {given} alone; expected factors and their block, both or neither")
        checked(library.hk_program_weight(handle, _text(name, what), bits, packed, high, scale, factors, block, bias))
    for width in _sequence(program["registers"], "registers"):
        checked(library.hk_program_register(handle, _int(width, "a register's width")))
    _cache(handle, _mapping(program["cache"], "cache"))
    for number, instruction in enumerate(_sequence(program["instructions"], "instructions")):
        _instruction(handle, _mapping(instruction, f"instruction {number}"), f"instruction {number}")


def _cache(handle: ctypes.c_void_p, cache: Mapping[str, Any]) -> None:
    kind = cache.get("dtype")
    if kind not in ("int8", "float32"):
        raise ProgramError(f"cache: dtype {kind!r}; expected int8 or float32")
    _keys(cache, ("dtype", "scales") if kind == "int8" else ("dtype",), "cache")
    flat: list[float] = []
    for pair in _sequence(cache.get("scales", []), "cache: scales"):
        if len(_sequence(pair, "cache: scales")) != 2:
            raise ProgramError("cache: scales are pairs, of keys and of values")
        flat += [_float(scale, "cache: a scale") for scale in pair]
    checked(load().hk_program_cache(handle, kind == "int8", (ctypes.c_float * len(flat))(*flat), len(flat)))


def _instruction(handle: ctypes.c_void_p, instruction: Mapping[str, Any], where: str) -> None:
    op = instruction.get("op")
    if not isinstance(op, str) or op not in _FIELDS:
        raise ProgramError(f"{where}: op {op!r}; expected one of {', '.join(_FIELDS)}")
    where = f"{where} ({op})"
    register_fields, name_fields = _FIELDS[op]
    numbers = ("layer",) if op in _LAYERED else ("group",) if op in _GROUPED else ()
    _keys(instruction, ("op", *numbers, *register_fields, *name_fields), where)
    registers: list[int] = []
    names: list[bytes] = []
    for field in register_fields:
        several = op == "linear" and field == "out"
        values = _sequence(instruction[field], f"{where}: {field}") if several else [instruction[field]]
        registers += [_int(value, f"{where}: {field}") for value in values]
    for field in name_fields:
        values = _sequence(instruction[field], f"{where}: {field}") if field == "weights" else [instruction[field]]
        names += [_text(value, f"{where}: {field}") for value in values]
    checked(
        load().hk_program_instruction(
            handle,
            op.encode(),
            _int(instruction.get("layer", -1), f"{where}: layer"),
            _int(instruction.get("group", 0), f"{where}: group"),
            len(registers),
            (ctypes.c_int * len(registers))(*registers),
            len(names),
            (ctypes.c_char_p * len(names))(*names),
        )
    )


def _keys(given: Mapping[str, Any], wanted: Sequence[str], what: str, optional: Sequence[str] = ()) -> None:
    if len(_mapping(given, what)) == len(wanted) and all(map(given.__contains__, wanted)):
        return
    missing = [key for key in wanted if key not in given]
    unknown = [key for key in given if key not in wanted and key not in optional]
    if missing or unknown:
        raise ProgramError(f"{what}: missing {missing}, unknown {unknown}; expected {list(wanted)}")


def _mapping(value: object, what: str) -> Mapping[str, Any]:
    if not isinstance(value, (dict, Mapping)):  # a dict is known at once
        raise ProgramError(f"{what} is {value!r:.80}; expected an object")
    return value


def _sequence(value: object, what: str) -> Sequence[Any]:
    if not isinstance(value, (list, tuple)):
        raise ProgramError(f"{what} is {value!r:.80}; expected a list")
    return value


def _int(value: object, what: str, bits: int = 31) -> int:
    if type(value) is int and -_INT32 <= value < _INT32:  # nearly all are known at once
        return value
    if isinstance(value, bool) or not isinstance(value, int) or not -(1 << bits) <= value < 1 << bits:
        raise ProgramError(f"{what} is {value!r:.80}; expected a whole number of {bits} bits")
    return value


def _float(value: object, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= _LARGEST:
        raise ProgramError(f"{what} is {value!r:.80}; expected a number")
    return float(value)


def _text(value: object, what: str) -> bytes:
    try:
        if not isinstance(value, str) or not value or "\0" in value:
            raise ValueError
        return value.encode("utf-8", "surrogateescape")
    except ValueError:  # half a character is no name either
        raise ProgramError(f"{what} is {value!r:.80}; expected a name") from None
