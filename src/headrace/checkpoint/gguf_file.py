"""A GGUF, mapped: key-values, tensor descriptions, blocks. Knows nothing about models.

A model split over several files (NAME-00001-of-00003.gguf) is read whole, whichever of them is named. Every count and
length is checked against the bytes that are left before anything of that size is made.
Source: the format's description in ggml's docs/gguf.md, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrace.checkpoint.gguf_blocks import BLOCK_TYPES, TYPE_NAMES, BlockType
from headrace.checkpoint.layout import shard_set
from headrace.checkpoint.tensor import LazyTensor, let_go, map_file
from headrace.errors import CheckpointError, shown

__all__ = ["GgufFile", "GgufTensor", "Metadata", "read_gguf"]

STRING, ARRAY, BOOL = 8, 9, 7
NUMBERS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    BOOL: "|b1",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
SMALLEST_KEY_VALUE = 8 + 4 + 1  # an empty key, a type, one byte
SMALLEST_TENSOR = 8 + 4 + 4 + 8  # an empty name, no dimension, a type, an offset
DIMENSIONS_LIMIT = 4
DEFAULT_ALIGNMENT = 32


@dataclass(frozen=True)
class _Value:
    """Where a value lies: `kind` of the elements, `count` of them (None: a single one), first byte."""

    kind: int
    count: int | None
    start: int


class Metadata(Mapping[str, Any]):
    """A GGUF's key-values; each is decoded when it is looked up."""

    def __init__(self, data: memoryview, values: dict[str, _Value], path: Path) -> None:
        self._data, self._values, self._path = data, values, path

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, key: object) -> bool:
        return key in self._values

    def __getitem__(self, key: str) -> Any:
        value = self._values[key]
        if value.kind == STRING:
            strings = self._strings(key, value)
            return strings[0] if value.count is None else strings
        count = 1 if value.count is None else value.count
        numbers = np.frombuffer(self._data, NUMBERS[value.kind], count, value.start).tolist()
        return numbers[0] if value.count is None else numbers

    def _strings(self, key: str, value: _Value) -> list[str]:
        strings, at = [], value.start
        try:
            for _ in range(1 if value.count is None else value.count):
                (length,) = struct.unpack_from("<Q", self._data, at)
                strings.append(str(self._data[at + 8 : at + 8 + length], "utf-8"))
                at += 8 + length
        except UnicodeDecodeError as error:
            raise CheckpointError(
                f"{self._path}: {shown(key)} is not UTF-8; the file is damaged; fetch it again"
            ) from error
        return strings


@dataclass(frozen=True)
class GgufTensor:
    """A tensor: `shape` is (rows, columns) or (columns,), `blocks` the mapped bytes (rows, bytes of a row)."""

    shape: tuple[int, ...]
    kind: BlockType
    blocks: NDArray[np.uint8]

    def lazy(self, order: NDArray[np.intp] | None = None) -> LazyTensor:
        """As float32 rows (of a vector: values); row i is row order[i] of the file where an order is given."""

        def read(start: int, stop: int) -> NDArray[np.float32]:
            if len(self.shape) == 1:  # one row of blocks; its values are the tensor's rows
                values = self._decode(self.blocks)
                return values[start:stop] if order is None else values[order[start:stop]]
            return self._decode(self.blocks[start:stop] if order is None else self.blocks[order[start:stop]])

        return LazyTensor(self.shape, self.kind.name, read)

    def _decode(self, rows: NDArray[np.uint8]) -> NDArray[np.float32]:
        with np.errstate(over="ignore", invalid="ignore"):  # a scale may be infinite or no number
            values = self.kind.decode(rows.reshape(-1, self.kind.size))
        let_go(rows)
        return values.reshape((len(rows), *self.shape[1:]) if len(self.shape) > 1 else self.shape)


@dataclass(frozen=True)
class GgufFile:
    """An open GGUF: the first file's key-values, the tensors of all, and the files."""

    metadata: Metadata
    tensors: Mapping[str, GgufTensor]
    files: tuple[Path, ...]


class _Cursor:
    """Reads the header forwards; refuses to pass the end of the file."""

    def __init__(self, path: Path, data: memoryview) -> None:
        self.path, self.data, self.at = path, data, 0

    def skip(self, size: int, what: str) -> int:
        """Move over `size` bytes; where they begin."""
        start = self.at
        if size > len(self.data) - start:
            raise CheckpointError(
                f"{self.path}: {what} needs {size} bytes at byte {start}, but the file has {len(self.data)} in all; "
                "it is truncated or damaged; fetch it again"
            )
        self.at = start + size
        return start

    def number(self, form: str, what: str) -> int:
        value: int = struct.unpack_from(form, self.data, self.skip(struct.calcsize(form), what))[0]
        return value

    def count(self, smallest: int, what: str) -> int:
        """A count of things of at least `smallest` bytes each, which must fit into the rest of the file."""
        count = self.number("<Q", what)
        if count * smallest > len(self.data) - self.at:
            raise CheckpointError(
                f"{self.path} states {count} {what}, which {len(self.data)} bytes cannot hold; it is truncated or "
                "damaged; fetch it again"
            )
        return count

    def string(self, what: str) -> str:
        length = self.count(1, f"bytes of {what}")
        start = self.skip(length, what)
        try:
            return str(self.data[start : start + length], "utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.path}: {what} is not UTF-8; the file is damaged; fetch it again") from error

    def value(self, key: str) -> _Value:
        """A key's value, passed over. `key` is for messages."""
        kind = self.number("<I", key)
        if kind != ARRAY:
            start = self.at
            self._elements(key, kind, 1)
            return _Value(kind, None, start)
        kind = self.number("<I", key)
        count = self.count(8 if kind == STRING else 1, f"elements of {key}")
        start = self.at
        self._elements(key, kind, count)
        return _Value(kind, count, start)

    def _elements(self, key: str, kind: int, count: int) -> None:
        if kind == STRING:
            for _ in range(count):
                self.skip(self.number("<Q", key), key)
        elif kind in NUMBERS:
            self.skip(count * np.dtype(NUMBERS[kind]).itemsize, key)
        else:
            raise CheckpointError(f"{self.path}: {key} has value type {kind}, which is not known; fetch the file again")


def read_gguf(path: Path) -> GgufFile:
    """Read the header, of each file of a split model, and map the rest.

    Raises:
        CheckpointError: a file is missing, truncated, damaged, of another version, or has a type that is not supported.
    """
    first, tensors = _read_file(path)
    count = first.get("split.count", 1)
    if not isinstance(count, int) or count <= 1:
        return GgufFile(first, tensors, (path,))
    paths = shard_set(path)
    if len(paths) != count:
        raise CheckpointError(
            f"{path} is one of {count} files of a model; expected them beside it as NAME-00001-of-{count:05}.gguf"
        )
    tensors, metadata = {}, None
    for number, shard in enumerate(paths):
        values, part = _read_file(shard)
        if values.get("split.no") != number or values.get("split.count") != count:
            raise CheckpointError(
                f"{shard} says that it is file {shown(values.get('split.no'))} of {shown(values.get('split.count'))}; "
                f"expected {number} of {count}; fetch the model again"
            )
        if twice := sorted(tensors.keys() & part.keys()):
            raise CheckpointError(f"{shard} repeats the tensor {shown(twice[0])}; fetch the model again")
        tensors |= part
        metadata = metadata or values
    stated = first.get("split.tensors.count", len(tensors))
    if metadata is None or stated != len(tensors):
        raise CheckpointError(f"{path} states {shown(stated)} tensors in all, but its files have {len(tensors)}")
    return GgufFile(metadata, tensors, paths)


def _read_file(path: Path) -> tuple[Metadata, dict[str, GgufTensor]]:
    """One file."""
    data = map_file(path)
    cursor = _Cursor(path, data.data)
    if bytes(cursor.data[:4]) != b"GGUF":
        raise CheckpointError(f"{path} does not begin with 'GGUF'; expected a GGUF file; fetch it again")
    cursor.skip(4, "magic")
    version = cursor.number("<I", "version")
    if version not in (2, 3):
        raise CheckpointError(f"{path} is GGUF version {version}; expected 2 or 3 (little-endian); convert it again")
    tensor_count = cursor.count(SMALLEST_TENSOR, "tensors")
    values: dict[str, _Value] = {}
    for _ in range(cursor.count(SMALLEST_KEY_VALUE, "key-values")):
        key = cursor.string("a key")
        if key in values:
            raise CheckpointError(f"{path} has the key {shown(key)} twice; the file is damaged; fetch it again")
        values[key] = cursor.value(shown(key).strip("'"))
    described = [_description(cursor) for _ in range(tensor_count)]
    metadata = Metadata(cursor.data, values, path)
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise CheckpointError(f"{path}: general.alignment is {shown(alignment)}; expected a power of two")
    start = (cursor.at + alignment - 1) // alignment * alignment
    tensors: dict[str, GgufTensor] = {}
    for name, shape, kind, offset in described:
        if name in tensors:
            raise CheckpointError(f"{path} has the tensor {shown(name)} twice; the file is damaged; fetch it again")
        tensors[name] = _tensor(path, name, shape, kind, data, start + offset)
    return metadata, tensors


def _description(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """(name, shape with the columns last, type, offset)."""
    name = cursor.string("a tensor's name")
    title = shown(name)
    dimensions = cursor.number("<I", title)
    if not 0 < dimensions <= DIMENSIONS_LIMIT:
        raise CheckpointError(
            f"{cursor.path}: tensor {title} has {dimensions} dimensions; expected 1 to {DIMENSIONS_LIMIT}"
        )
    sizes = [cursor.number("<Q", title) for _ in range(dimensions)]
    return name, tuple(reversed(sizes)), cursor.number("<I", title), cursor.number("<Q", title)


def _tensor(
    path: Path, name: str, shape: tuple[int, ...], number: int, data: NDArray[np.uint8], start: int
) -> GgufTensor:
    """A tensor whose bytes are all there."""
    if number not in BLOCK_TYPES:
        names = ", ".join(t.name for t in BLOCK_TYPES.values())
        kind_name = TYPE_NAMES.get(number, f"{number}, a newer one").upper()
        raise CheckpointError(
            f"{path}: tensor {shown(name)} has type {kind_name}, which is not read; expected one of {names}; fetch the "
            "model in one of these"
        )
    kind = BLOCK_TYPES[number]
    if shape[-1] % kind.values or not all(shape):
        raise CheckpointError(
            f"{path}: tensor {shown(name)} {list(shape)} cannot be cut into {kind.name} blocks of {kind.values}"
        )
    rows, row_size = math.prod(shape[:-1]), shape[-1] // kind.values * kind.size
    if start + rows * row_size > len(data):
        raise CheckpointError(
            f"{path} is truncated: tensor {shown(name)} ends at byte {start + rows * row_size} of {len(data)}; "
            "fetch it again"
        )
    return GgufTensor(shape, kind, data[start : start + rows * row_size].reshape(rows, row_size))
