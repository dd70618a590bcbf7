"""A torch state dict's pickle, read as data: nothing in it is called, because there is nothing here that calls.

A pickle is a program for a stack machine. This file is such a machine for the opcodes torch.save writes: it makes
strings, numbers, tuples, lists and dicts, and where the program would call a function it makes a description of a
tensor, if the function is one of the few that rebuild one; any other name is refused when it is mentioned.
Source: pickletools, whose table gives each opcode's argument; torch/_utils.py and torch/serialization.py.
Knows neither files nor bytes of tensors.
"""

from __future__ import annotations

import io
import pickletools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from headrace.checkpoint.tensor import ELEMENTS
from headrace.errors import CheckpointError, shown

__all__ = ["Storage", "View", "read_pickle"]

PICKLE_LIMIT = 64 << 20  # bytes; it holds names and shapes: a few hundred KB for the largest dense models
OPCODE_LIMIT = 4_000_000  # 40 a tensor: 100,000 tensors, which is more than any published model has
COPY_LIMIT = 200_000  # items of lists that Python 2 wrote an OrderedDict's content as; each may be named many times
DIMENSIONS_LIMIT = 8
NUMBER_LIMIT = 1 << 62  # so that sums of a few stay in what numpy counts with

STORAGES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool", "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128", "UntypedStorage": "uint8",
}  # fmt: skip


@dataclass(frozen=True)
class Storage:
    """Elements in the file that tensors are views of: their key, `ELEMENTS` name, how many, and where they begin."""

    key: str
    dtype: str
    count: int
    start: int = 0


@dataclass(frozen=True)
class View:
    """A tensor: a strided view of a storage, in elements of `dtype`."""

    storage: Storage
    dtype: str
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    negated: bool = False


class _Name(NamedTuple):
    """Something of torch that a pickle mentions."""

    module: str
    name: str


def read_pickle(data: bytes, path: object) -> tuple[Any, int]:
    """The value of the pickle that `data` begins with, tensors as `View`, and the number of bytes it takes.

    Args:
        data: bytes; only the first `PICKLE_LIMIT` are looked at.
        path: the file, for messages.

    Raises:
        CheckpointError: it is damaged, too long, or mentions anything that is no part of a tensor.
    """
    machine = _Machine(path)
    try:
        return machine.run(data[:PICKLE_LIMIT])
    except CheckpointError:
        raise
    except (
        ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RecursionError,
        DeprecationWarning,  # an escape that is none: pickletools warns of it, which some make an exception
    ) as error:  # fmt: skip
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise CheckpointError(
            f"{path}: its pickle is damaged ({reason}); expected a torch state dict; fetch it again"
        ) from error


class _Machine:
    """The stack, the memo and one method for each opcode that does more than push its argument."""

    def __init__(self, path: object) -> None:
        self.path = path
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # the stacks under the marks
        self.memo: dict[int, Any] = {}
        self.copied = 0  # items handed over whole, which opcodes do not bound
        self.opcodes: dict[str, Callable[[Any], None]] = {
            "MARK": self._mark, "POP": self._pop, "POP_MARK": self._pop_mark, "DUP": self._dup,
            "NONE": lambda _: self._push(None),
            "NEWTRUE": lambda _: self._push(True), "NEWFALSE": lambda _: self._push(False),
            "EMPTY_TUPLE": lambda _: self._push(()), "EMPTY_LIST": lambda _: self._push([]),
            "EMPTY_DICT": lambda _: self._push({}),
            "TUPLE": lambda _: self._push(tuple(self._marked())), "LIST": lambda _: self._push(self._marked()),
            "TUPLE1": lambda _: self._tuple(1), "TUPLE2": lambda _: self._tuple(2), "TUPLE3": lambda _: self._tuple(3),
            "APPEND": self._append, "APPENDS": self._appends, "DICT": self._dict,
            "SETITEM": self._set_item, "SETITEMS": self._set_items,
            "PUT": self._put, "BINPUT": self._put, "LONG_BINPUT": self._put,
            "MEMOIZE": lambda _: self._put(len(self.memo)),
            "GET": self._get, "BINGET": self._get, "LONG_BINGET": self._get,
            "GLOBAL": lambda argument: self._name(*argument.split(" ", 1)),
            "STACK_GLOBAL": self._stack_global,
            "REDUCE": self._reduce, "NEWOBJ": self._reduce, "BUILD": self._pop, "BINPERSID": self._storage,
            "PROTO": lambda _: None, "FRAME": lambda _: None,
        }  # fmt: skip
        for name in (
            "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "UNICODE",
            "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES",
            "SHORT_BINBYTES", "BINBYTES8",
        ):  # fmt: skip
            self.opcodes[name] = self._push

    def run(self, data: bytes) -> tuple[Any, int]:
        stream = io.BytesIO(data)
        for count, (opcode, argument, place) in enumerate(pickletools.genops(stream)):
            if count >= OPCODE_LIMIT:
                raise CheckpointError(f"{self.path} has a pickle of over {OPCODE_LIMIT} steps; expected a state dict")
            if opcode.name == "STOP":
                if len(self.stack) != 1 or self.below or place is None:
                    raise ValueError("it ends with values left over")
                return self.stack[0], place + 1
            if opcode.name not in self.opcodes:
                raise ValueError(f"opcode {opcode.name} is no part of a state dict")
            self.opcodes[opcode.name](argument)
        raise ValueError("it has no end")

    def _push(self, argument: Any) -> None:
        self.stack.append(argument)

    def _mark(self, _: Any) -> None:
        self.below.append(self.stack)
        self.stack = []

    def _marked(self) -> list[Any]:
        """The values above the last mark, which goes."""
        values, self.stack = self.stack, self.below.pop()
        return values

    def _pop(self, _: Any) -> None:
        """Also for BUILD, which would set attributes: torch gives a state dict `_metadata`, which nobody needs."""
        self.stack.pop()

    def _pop_mark(self, _: Any) -> None:
        self._marked()

    def _dup(self, _: Any) -> None:
        self.stack.append(self.stack[-1])

    def _tuple(self, count: int) -> None:
        values = tuple(self.stack[-count:])
        if len(values) != count:
            raise ValueError("a tuple of values that are not there")
        self.stack[-count:] = [values]

    def _append(self, _: Any) -> None:
        value = self.stack.pop()
        self._top(list).append(value)

    def _appends(self, _: Any) -> None:
        values = self._marked()
        self._top(list).extend(values)

    def _set_item(self, _: Any) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._fill(self._top(dict), [key, value])

    def _set_items(self, _: Any) -> None:
        values = self._marked()
        self._fill(self._top(dict), values)

    def _dict(self, _: Any) -> None:
        values = self._marked()
        self.stack.append({})
        self._fill(self.stack[-1], values)

    def _top(self, kind: type) -> Any:
        if not isinstance(self.stack[-1], kind):
            raise ValueError(f"items for a {type(self.stack[-1]).__name__}")
        return self.stack[-1]

    @staticmethod
    def _fill(target: dict[Any, Any], values: list[Any]) -> None:
        if len(values) % 2:
            raise ValueError("a key without a value")
        for key, value in zip(values[::2], values[1::2], strict=True):
            # A tuple of tuples of … of itself has a hash that takes for ever.
            if key is not None and not isinstance(key, str | int | float):
                raise ValueError(f"a {type(key).__name__} as a key")
            target[key] = value

    def _put(self, place: Any) -> None:
        self.memo[int(place)] = self.stack[-1]

    def _get(self, place: Any) -> None:
        self.stack.append(self.memo[int(place)])

    def _stack_global(self, _: Any) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self._name(module, name)

    def _name(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("a name that is no text")
        found = _Name(module, name)
        if found not in CALLS and found not in TYPES and _storage_class(found) is None and _dtype(found) is None:
            asked = shown(f"{module}.{name}").strip("'")
            raise CheckpointError(
                f"{self.path} asks for {asked}, which is not part of a tensor; nothing of it was run; expected a state "
                "dict of tensors; do not use this file with other tools"
            )
        self.stack.append(found)

    def _storage(self, _: Any) -> None:
        """("storage", class, key, device, elements), and in torch's old format a view or None."""
        described = self.stack.pop()
        if not isinstance(described, tuple) or len(described) not in (5, 6):
            raise ValueError(f"a storage is described as {shown(described)}")
        _, kind, key, _, count = described[:5]
        dtype = _storage_class(kind) if isinstance(kind, _Name) else None
        if dtype is None or not isinstance(key, str) or not _is_count(count):
            raise ValueError(f"a storage is described as {shown(described)}")
        storage = Storage(key, dtype, count)
        if len(described) == 6 and described[5] is not None:  # (key of the view, first element, elements)
            _, start, viewed = described[5]
            if not _is_count(start) or not _is_count(viewed) or start + viewed > count:
                raise ValueError(f"a storage is a view {shown(described[5])} of {count} elements")
            storage = replace(storage, start=start)
        self.stack.append(storage)

    def _reduce(self, _: Any) -> None:
        arguments, called = self.stack.pop(), self.stack.pop()
        if not isinstance(called, _Name) or called not in CALLS or not isinstance(arguments, tuple):
            raise ValueError(f"a call of {shown(called)}")
        self.stack.append(CALLS[called](self, *arguments))

    def ordered_dict(self, *items: Any) -> dict[Any, Any]:
        """collections.OrderedDict(), or of a list of pairs, which Python 2 wrote."""
        result: dict[Any, Any] = {}
        if items:
            (pairs,) = items
            if not isinstance(pairs, list):
                raise ValueError("a dict of something that is no list")
            self.copied += len(pairs)
            if self.copied > COPY_LIMIT:
                raise ValueError("one list in many dicts")
            for pair in pairs:
                if not isinstance(pair, list | tuple):
                    raise ValueError("a dict of something that is no list of pairs")
                self._fill(result, list(pair[:3]))
        return result

    def from_type(self, called: Any, _: Any, arguments: Any, *__: Any) -> Any:
        """torch._tensor._rebuild_from_type_v2: a tensor of a class of its own, or with attributes."""
        if not isinstance(called, _Name) or called not in REBUILT or not isinstance(arguments, tuple):
            raise ValueError(f"a tensor is rebuilt by {shown(called)}")
        return CALLS[called](self, *arguments)


def _tensor(_: _Machine, storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> View:
    """torch._utils._rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks, metadata)."""
    metadata = rest[2] if len(rest) > 2 else None
    return _view(storage, offset, size, stride, storage.dtype, metadata)


def _tensor_of_dtype(
    _: _Machine, storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *rest: Any
) -> View:
    """torch._utils._rebuild_tensor_v3: of untyped bytes, for the element types that have no storage class."""
    name = _dtype(dtype) if isinstance(dtype, _Name) else None
    if name is None:
        raise ValueError(f"a tensor of element type {shown(dtype)}")
    return _view(storage, offset, size, stride, name, rest[0] if rest else None)


def _view(storage: Any, offset: Any, size: Any, stride: Any, dtype: str, metadata: Any) -> View:
    shaped = isinstance(size, tuple) and isinstance(stride, tuple) and len(size) == len(stride) <= DIMENSIONS_LIMIT
    if not isinstance(storage, Storage) or not shaped:
        raise ValueError("a tensor is not described by a storage, a size and a stride")
    if not all(_is_count(number) for number in (offset, *size, *stride)):
        raise ValueError(f"a tensor has offset {shown(offset)}, size {shown(size)}, stride {shown(stride)}")
    marks = metadata if isinstance(metadata, dict) else {}
    if unknown := [key for key, value in marks.items() if value and key != "neg"]:
        raise ValueError(f"a tensor is marked {shown(unknown[0])}")
    return View(storage, dtype, offset, size, stride, bool(marks.get("neg", False)))


def _parameter(_: _Machine, data: Any, *__: Any) -> View:
    """torch._utils._rebuild_parameter(data, requires_grad, hooks): the tensor."""
    if not isinstance(data, View):
        raise ValueError("a parameter of something that is no tensor")
    return data


def _same(_: _Machine, value: Any = ()) -> tuple[Any, ...]:
    """torch.Size(sizes)."""
    if not isinstance(value, tuple):
        raise ValueError(f"a size of {type(value).__name__}")
    return value


REBUILT: dict[_Name, Callable[..., Any]] = {
    _Name("torch._utils", "_rebuild_tensor"): _tensor,
    _Name("torch._utils", "_rebuild_tensor_v2"): _tensor,
    _Name("torch._utils", "_rebuild_tensor_v3"): _tensor_of_dtype,
    _Name("torch._utils", "_rebuild_parameter"): _parameter,
    _Name("torch._utils", "_rebuild_parameter_with_state"): _parameter,
}
CALLS: dict[_Name, Callable[..., Any]] = REBUILT | {
    _Name("torch._tensor", "_rebuild_from_type_v2"): _Machine.from_type,
    _Name("collections", "OrderedDict"): _Machine.ordered_dict,
    _Name("torch", "Size"): _same,
}
TYPES = {_Name("torch", "Tensor"), _Name("torch.nn.parameter", "Parameter")}  # named, never made


def _storage_class(name: _Name) -> str | None:
    """The element type of torch.FloatStorage and its like."""
    return STORAGES.get(name.name) if name.module in ("torch", "torch.storage") else None


def _dtype(name: _Name) -> str | None:
    """The element type that torch.float8_e4m3fn and its like are."""
    return name.name if name.module == "torch" and name.name in ELEMENTS else None


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < NUMBER_LIMIT
