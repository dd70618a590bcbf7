"""Files of torch.save without torch: Python's own pickler over stand-ins for torch's classes, in both formats.

    Stored(array, …)       a tensor: a view of a storage, negated, a Parameter, of a type without a storage class
    write_zip, write_legacy    a state dict as torch ≥ 1.6 and as older ones write it

Source: torch/serialization.py and torch/_utils.py. Knows nothing about how headrace reads them.
"""

from __future__ import annotations

import io
import pickle
import struct
import sys
import types
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray

FUNCTIONS = (
    "_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_parameter",
    "_rebuild_parameter_with_state",
)  # fmt: skip
CLASSES = {
    "float64": "DoubleStorage", "float32": "FloatStorage", "float16": "HalfStorage", "int64": "LongStorage",
    "int32": "IntStorage", "int16": "ShortStorage", "int8": "CharStorage", "uint8": "ByteStorage",
    "bool": "BoolStorage",
}  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """A tensor as torch.save would meet it.

    Attributes:
        array: the storage's elements.
        size, stride, offset: the view, in elements; the whole storage as it is when size is None.
        negated: with torch's negative bit set.
        parameter: a torch.nn.Parameter; "state" for one with attributes.
        subclass: rebuilt through torch._tensor._rebuild_from_type_v2.
        untyped: an element type without a storage class, such as "float8_e4m3fn", whose bytes the array is.
    """

    array: NDArray[Any]
    size: tuple[int, ...] | None = None
    stride: tuple[int, ...] | None = None
    offset: int = 0
    negated: bool = False
    parameter: bool | str = False
    subclass: bool = False
    untyped: str | None = None


class _Storage:
    def __init__(self, array: NDArray[Any], kind: str) -> None:
        self.array, self.kind = array, kind


class _Called:
    """Pickles as a call of a function of torch's."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


class _Named:
    """Pickles as a name: torch.float8_e4m3fn."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __reduce__(self) -> str:
        return self.name


@contextmanager
def _torch() -> Iterator[dict[str, Any]]:
    """Modules with torch's names, which the pickler looks its globals up in."""
    names: dict[str, Any] = {}
    modules = {m: types.ModuleType(m) for m in ("torch", "torch._utils", "torch._tensor", "torch.storage", "torch.nn")}
    modules["torch.nn.parameter"] = types.ModuleType("torch.nn.parameter")

    def add(module: str, name: str) -> None:
        names[name] = type(name, (), {"__module__": module, "__qualname__": name})
        setattr(modules[module], name, names[name])

    for function in FUNCTIONS:
        add("torch._utils", function)
    add("torch._tensor", "_rebuild_from_type_v2")
    for kind in [*CLASSES.values(), "Size", "Tensor"]:
        add("torch", kind)
    add("torch.storage", "UntypedStorage")
    add("torch.nn.parameter", "Parameter")
    with mock.patch.dict(sys.modules, modules):
        yield names


class _Pickler(pickle.Pickler):
    def __init__(self, file: Any, protocol: int, names: Mapping[str, Any], legacy: bool) -> None:
        super().__init__(file, protocol)
        self.names, self.legacy = names, legacy
        self.storages: dict[int, NDArray[Any]] = {}

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, _Storage):
            return None
        keys = list(self.storages)
        if id(value.array) not in keys:
            keys.append(id(value.array))
            self.storages[id(value.array)] = value.array
        key = str(keys.index(id(value.array)))
        described = ("storage", self.names[value.kind], key, "cpu", value.array.size)
        return (*described, None) if self.legacy else described

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, _Named):
            sys.modules["torch"].__dict__.setdefault(value.name, value)
            value.__class__.__module__ = "torch"
            return value.name
        if not isinstance(value, Stored):
            return NotImplemented
        call = self._tensor(value)
        if value.subclass:
            call = self.names["_rebuild_from_type_v2"], (call[0], self.names["Tensor"], call[1], {"mark": 1})
        if value.parameter:
            function = "_rebuild_parameter_with_state" if value.parameter == "state" else "_rebuild_parameter"
            state = ({"mark": 1},) if value.parameter == "state" else ()
            call = self.names[function], (_Called(*call[:1], *call[1]), True, OrderedDict(), *state)
        return call

    def _tensor(self, value: Stored) -> tuple[Any, tuple[Any, ...]]:
        size = value.array.shape if value.size is None else value.size
        stride = value.stride
        if stride is None:
            stride = tuple(int(np.prod(size[i + 1 :])) for i in range(len(size)))
        kind = "UntypedStorage" if value.untyped else CLASSES[str(value.array.dtype)]
        storage = _Storage(value.array, kind)
        described = (storage, value.offset, tuple(size), stride, False, OrderedDict())
        metadata = ({"neg": True},) if value.negated else ()
        if value.untyped:
            return self.names["_rebuild_tensor_v3"], (*described, _Named(value.untyped), *metadata)
        return self.names["_rebuild_tensor_v2"], (*described, *metadata)


def _pickled(state: Any, protocol: int, legacy: bool) -> tuple[bytes, list[NDArray[Any]]]:
    out = io.BytesIO()
    with _torch() as names:
        pickler = _Pickler(out, protocol, names, legacy)
        pickler.dump(state)
    return out.getvalue(), list(pickler.storages.values())


def write_zip(path: Path, state: Any, *, root: str = "archive", protocol: int = 2) -> Path:
    """As torch ≥ 1.6 writes it; the members lie under `root`."""
    data, storages = _pickled(state, protocol, legacy=False)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(f"{root}/data.pkl", data)
        for key, array in enumerate(storages):
            archive.writestr(f"{root}/data/{key}", array.tobytes())
        archive.writestr(f"{root}/version", b"3\n")
    return path


def write_legacy(path: Path, state: Any, *, protocol: int = 2, little_endian: bool = True) -> Path:
    """As torch before 1.6 writes it."""
    data, storages = _pickled(state, protocol, legacy=True)
    machine = {"protocol_version": 1001, "little_endian": little_endian, "type_sizes": {"short": 2, "int": 4}}
    head = b"".join(pickle.dumps(value, protocol) for value in (0x1950A86A20F9469CFC6C, 1001, machine))
    keys = pickle.dumps([str(key) for key in range(len(storages))], protocol)
    bodies = b"".join(struct.pack("<q", array.size) + array.tobytes() for array in storages)
    path.write_bytes(head + data + keys + bodies)
    return path
