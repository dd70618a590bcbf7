"""One torch .bin file, mapped, without torch and without running anything from it.

The file is a zip whose members are stored as they are: a pickle that describes tensors, and one member per storage.
The pickle may call exactly three things, of which the first two are replaced by functions of this file:
torch._utils._rebuild_tensor_v2, a torch storage class, collections.OrderedDict. Everything else is refused by name.
Source: torch.serialization's zip format (torch 1.6 and later). Knows nothing about models.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from headrace.checkpoint.tensor import LazyTensor, from_storage, map_file
from headrace.errors import CheckpointError

__all__ = ["read_torch"]

PICKLE_LIMIT = 64 << 20  # bytes; it holds names and shapes: a few hundred KB for the largest models
DIMENSIONS_LIMIT = 8
LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, …, length of the name, length of the extra field


class _StorageClass(NamedTuple):
    """Stands for torch.FloatStorage and its like; a tuple, because no pickle can change one."""

    dtype: str
    stored: type[np.generic]


STORAGES = {
    "FloatStorage": _StorageClass("float32", np.float32),
    "HalfStorage": _StorageClass("float16", np.float16),
    "BFloat16Storage": _StorageClass("bfloat16", np.uint16),
}


def read_torch(path: Path) -> dict[str, LazyTensor]:
    """The file's tensors by name.

    Raises:
        CheckpointError: the file is truncated, of an older format or compressed, or its pickle asks for anything
            but tensors.
    """
    archive = _Archive(path)
    pickled = archive.pickle()
    try:
        _check_opcodes(pickled)
        state = _Unpickler(pickled, archive).load()
    except CheckpointError:
        raise
    except Exception as error:  # a hostile pickle can raise anything
        raise CheckpointError(
            f"{path}: its pickle is damaged ({type(error).__name__}: {error}); expected a torch state dict; "
            "fetch it again"
        ) from error
    if not isinstance(state, dict) or not state:
        raise CheckpointError(f"{path} holds a {type(state).__name__}; expected a state dict of tensors")
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, LazyTensor):
            raise CheckpointError(
                f"{path}: {name!r} is a {type(tensor).__name__}; expected a flat state dict of tensors"
            )
    return dict(state)


class _Archive:
    """The zip: where each stored member's bytes lie in the mapped file."""

    def __init__(self, path: Path) -> None:
        self.path, self.data = path, map_file(path)
        try:
            with zipfile.ZipFile(path) as archive:
                self.members = {info.filename: info for info in archive.infolist()}
        except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as error:
            raise CheckpointError(
                f"{path} is no readable zip ({error}); it is truncated, or torch older than 1.6 wrote it; "
                "fetch it again or save it as safetensors"
            ) from error
        pickles = [name for name in self.members if name == "data.pkl" or name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise CheckpointError(
                f"{path} has {len(pickles)} data.pkl members; expected a torch state dict, which has one"
            )
        self.prefix = pickles[0].removesuffix("data.pkl")
        order = f"{self.prefix}byteorder"
        if order in self.members and self.bytes_of(order).tobytes() != b"little":
            raise CheckpointError(f"{path} is not little-endian; expected byteorder 'little'; save it again")

    def pickle(self) -> bytes:
        """The pickle."""
        data = self.bytes_of(f"{self.prefix}data.pkl")
        if len(data) > PICKLE_LIMIT:
            raise CheckpointError(f"{self.path} has a pickle of {len(data)} bytes; expected at most {PICKLE_LIMIT}")
        return data.tobytes()

    def bytes_of(self, name: str) -> NDArray[np.uint8]:
        """A member, in place."""
        if name not in self.members:
            raise CheckpointError(f"{self.path} lacks the member {name!r}; it is truncated or damaged; fetch it again")
        info = self.members[name]
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise CheckpointError(
                f"{self.path}: member {name!r} is compressed or encrypted; expected stored bytes, as torch.save writes"
            )
        head = info.header_offset
        if 0 <= head <= len(self.data) - 30:
            signature, name_length, extra = LOCAL_HEADER.unpack(self.data[head : head + LOCAL_HEADER.size].tobytes())
            start = head + 30 + name_length + extra
            if signature == b"PK\3\4" and start + info.file_size <= len(self.data):
                return self.data[start : start + info.file_size]
        raise CheckpointError(f"{self.path}: member {name!r} does not lie inside the file; fetch it again")


@dataclass(frozen=True)
class _Storage:
    """A storage's elements, mapped."""

    dtype: str
    elements: NDArray[Any]


def _rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> LazyTensor:
    """In place of torch._utils._rebuild_tensor_v2: a view of a storage."""
    numbers = [offset, *size, *stride]
    if not isinstance(storage, _Storage) or len(size) != len(stride) or len(size) > DIMENSIONS_LIMIT:
        raise ValueError("a tensor is not described by a storage, a size and a stride")
    if not all(isinstance(n, int) and n >= 0 for n in numbers):
        raise ValueError(f"a tensor has offset {offset}, size {size}, stride {stride}")
    count = len(storage.elements)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if math.prod(size) > count or (math.prod(size) and last >= count):
        raise ValueError(f"a tensor of size {tuple(size)} does not fit its storage of {count}")
    item = storage.elements.itemsize
    view = np.lib.stride_tricks.as_strided(
        storage.elements[offset:], tuple(size), tuple(step * item for step in stride), writeable=False
    )
    return from_storage(view, storage.dtype)


class _Unpickler(pickle.Unpickler):
    """Admits tensors and nothing else."""

    def __init__(self, pickled: bytes, archive: _Archive) -> None:
        super().__init__(io.BytesIO(pickled))
        self.archive = archive

    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda *described: _rebuild_tensor(*described)  # a new one: a pickle may set its attributes
        if module == "torch" and name in STORAGES:
            return STORAGES[name]  # type: ignore[return-value]  # never called: only named by persistent ids
        raise CheckpointError(
            f"{self.archive.path} asks for {module}.{name}, which is not part of a tensor; nothing of it was run; "
            "expected float32, float16 or bfloat16 tensors; do not use this file with other tools"
        )

    def persistent_load(self, pid: Any) -> _Storage:
        _, kind, key, _, count = pid  # ("storage", class, key, device, elements)
        if not isinstance(kind, _StorageClass) or not isinstance(key, str) or not isinstance(count, int):
            raise ValueError(f"a storage is described as {pid!r}")
        data = self.archive.bytes_of(f"{self.archive.prefix}data/{key}")
        size = count * np.dtype(kind.stored).itemsize
        if count < 0 or size > len(data):
            raise CheckpointError(
                f"{self.archive.path}: storage {key} has {len(data)} bytes; expected {size}; fetch it again"
            )
        return _Storage(kind.dtype, data[:size].view(kind.stored))


def _check_opcodes(pickled: bytes) -> None:
    """Refuse what the unpickler would carry out without asking `find_class`.

    A memo index makes it allocate a table of that many entries. BUILD sets attributes of any object; torch.save needs
    it once, at the end, to give the state dict its `_metadata`.
    """
    built = False
    for opcode, argument, _ in pickletools.genops(pickled):
        if built and opcode.name != "STOP":
            raise ValueError("BUILD before the end")
        built = opcode.name == "BUILD"
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(argument or 0) > len(pickled):
            raise ValueError(f"{opcode.name} {argument}")
