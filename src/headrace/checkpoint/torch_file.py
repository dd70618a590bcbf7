"""One torch .bin file, mapped, without torch and without running anything from it.

Both formats of torch.save are read: the zip whose members are stored as they are (a pickle that describes tensors, and
one member per storage), and the older one (a few pickles one after the other, then the storages). The pickles are read
as data by torch_pickle.py. Source: torch/serialization.py (`_save`, `_legacy_save`). Knows nothing about models.
"""

from __future__ import annotations

import math
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrace.checkpoint.tensor import ELEMENTS, LazyTensor, from_storage, map_file
from headrace.checkpoint.torch_pickle import PICKLE_LIMIT, Storage, View, read_pickle
from headrace.errors import CheckpointError, shown

__all__ = ["read_torch"]

EXPANDED_LIMIT = 1 << 26  # values a tensor may have beyond its storage's: 256 MB as float32, a 7B model's FFN matrix
LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, …, length of the name, length of the extra field
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001
WRAPPED = ("state_dict", "model", "module", "model_state_dict", "params")  # keys under which trainers keep weights

Find = Callable[[Storage], NDArray[np.uint8]]


def read_torch(path: Path) -> dict[str, LazyTensor]:
    """The file's tensors by name.

    Raises:
        CheckpointError: the file is truncated, compressed or of another format, or its pickle asks for anything but
            tensors.
    """
    data = map_file(path)
    views, find = _legacy(path, data) if data[:1].tobytes() == b"\x80" else _zip(path, data)
    return {name: _lazy(path, name, view, find) for name, view in views.items()}


def _views(path: Path, state: Any) -> dict[str, View]:
    """The tensors of a state dict; an entry may be None, as layers without a state of their own write it."""
    if not isinstance(state, dict) or not state:
        raise CheckpointError(f"{path} holds a {type(state).__name__}; expected a state dict of tensors")
    for name, value in state.items():
        if isinstance(name, str) and (value is None or isinstance(value, View)):
            continue
        inside = [key for key in WRAPPED if isinstance(state.get(key), dict)]
        hint = f"; it is a training checkpoint: save its {inside[0]!r} alone" if inside else ""
        raise CheckpointError(
            f"{path}: {shown(name)} is a {type(value).__name__}; expected a flat state dict of tensors{hint}"
        )
    return {name: view for name, view in state.items() if view is not None}


def _lazy(path: Path, name: str, view: View, find: Find) -> LazyTensor:
    """The tensor a view is, once its storage is found and every index of it lies inside."""
    element = ELEMENTS[view.dtype]
    data = find(view.storage)
    if element.stored is None:
        return from_storage(None, view.size, view.dtype)
    item = element.bits // 8
    elements = data[: len(data) // item * item].view(element.stored)
    empty = not all(view.size)
    last = view.offset + sum((n - 1) * step for n, step in zip(view.size, view.stride, strict=True))
    if math.prod(view.size) > max(len(elements), EXPANDED_LIMIT) or not (empty or last < len(elements)):
        raise CheckpointError(
            f"{path}: tensor {shown(name)} of size {view.size} does not fit its storage of {len(elements)} elements; "
            "the file is damaged; fetch it again"
        )
    # A dimension of one element is never stepped over, and its stride may be anything.
    strides = tuple(0 if n <= 1 or empty else step * item for n, step in zip(view.size, view.stride, strict=True))
    begin = 0 if empty else view.offset
    stored = np.lib.stride_tricks.as_strided(elements[begin:], view.size, strides, writeable=False)
    return from_storage(stored, view.size, view.dtype, view.negated)


def _zip(path: Path, data: NDArray[np.uint8]) -> tuple[dict[str, View], Find]:
    """The tensors and the storages of a zip, whose members are found without being copied."""
    if data[257:262].tobytes() == b"ustar":
        raise CheckpointError(f"{path} is a tar, as torch wrote before 0.1.10; expected a newer format; save it again")
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename: info for info in archive.infolist()}
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error, OSError) as error:
        raise CheckpointError(
            f"{path} is no readable zip ({shown(str(error))}); expected a file of torch.save; it is truncated or "
            "damaged; fetch it again"
        ) from error
    if any(name.endswith("/constants.pkl") for name in members):
        raise CheckpointError(f"{path} is a TorchScript program; expected a state dict; fetch the model's own weights")
    pickles = [name for name in members if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise CheckpointError(f"{path} has {len(pickles)} data.pkl members; expected a torch state dict, which has one")
    prefix = pickles[0].removesuffix("data.pkl")

    def member(name: str) -> NDArray[np.uint8]:
        if name not in members:
            raise CheckpointError(f"{path} lacks the member {shown(name)}; it is truncated or damaged; fetch it again")
        info = members[name]
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise CheckpointError(
                f"{path}: member {shown(name)} is compressed or encrypted; expected stored bytes, as torch.save writes"
            )
        head = info.header_offset
        if 0 <= head <= len(data) - 30:
            signature, name_length, extra = LOCAL_HEADER.unpack(data[head : head + LOCAL_HEADER.size].tobytes())
            start = head + 30 + name_length + extra
            if signature == b"PK\3\4" and start + info.file_size <= len(data):
                return data[start : start + info.file_size]
        raise CheckpointError(f"{path}: member {shown(name)} does not lie inside the file; fetch it again")

    order = f"{prefix}byteorder"
    if order in members and member(order)[:8].tobytes() != b"little":
        raise CheckpointError(f"{path} is not little-endian; expected byteorder 'little'; save it again")
    pickled = member(pickles[0])
    if len(pickled) > PICKLE_LIMIT:
        raise CheckpointError(f"{path} has a pickle of {len(pickled)} bytes; expected at most {PICKLE_LIMIT}")
    state, _ = read_pickle(pickled.tobytes(), path)

    def find(storage: Storage) -> NDArray[np.uint8]:
        return _cut(path, storage, member(f"{prefix}data/{storage.key}"))

    return _views(path, state), find


def _legacy(path: Path, data: NDArray[np.uint8]) -> tuple[dict[str, View], Find]:
    """The tensors and the storages of torch's format before 1.6.

    Pickles: a magic number, a version, the machine's sizes, the state, the keys of the storages; then each storage: its
    count of elements as int64 and its elements.
    """
    values, at = [], 0
    for _ in range(5):
        value, size = read_pickle(data[at : at + PICKLE_LIMIT].tobytes(), path)
        values.append(value)
        at += size
        if values[0] != LEGACY_MAGIC:
            raise CheckpointError(f"{path} is a plain pickle; expected a file of torch.save; save it as safetensors")
    _, version, machine, state, keys = values
    if version != LEGACY_PROTOCOL or not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise CheckpointError(f"{path} is of version {shown(version)} or not little-endian; expected {LEGACY_PROTOCOL}")
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise CheckpointError(f"{path} does not list its storages; it is damaged; fetch it again")
    views = _views(path, state)
    described = {view.storage.key: view.storage for view in views.values()}
    found: dict[str, NDArray[np.uint8]] = {}
    for key in keys:
        if key not in described:
            raise CheckpointError(f"{path} has a storage {shown(key)} of no tensor; it is damaged; fetch it again")
        count = int.from_bytes(data[at : at + 8].tobytes(), "little")
        size = count * ELEMENTS[described[key].dtype].bits // 8
        at += 8
        if at + size > len(data):
            raise CheckpointError(
                f"{path} is truncated: storage {shown(key)} ends at byte {at + size} of {len(data)}; fetch it again"
            )
        found[key] = data[at : at + size]
        at += size

    def find(storage: Storage) -> NDArray[np.uint8]:
        if storage.key not in found:
            raise CheckpointError(f"{path} lacks storage {shown(storage.key)}; it is truncated; fetch it again")
        return _cut(path, storage, found[storage.key])

    return views, find


def _cut(path: Path, storage: Storage, data: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The storage's own bytes."""
    item = ELEMENTS[storage.dtype].bits // 8
    if storage.count * item > len(data):
        raise CheckpointError(
            f"{path}: storage {shown(storage.key)} has {len(data)} bytes; expected {storage.count * item}; "
            "fetch it again"
        )
    return data[storage.start * item : storage.count * item]
