"""A part's weights on disk: a safetensors file whose layout is known before any weight is.

The layout follows from geometry, plan and grids alone, so a file is created at full size, filled in any order, and
graphs can point into it. Knows nothing about how codes were found.

    <weight>_packed   uint8 (N, K)          codes + zero point of int8
                      uint8 (N, K/2)        their low four bits of int4, int5, int6: two a byte, low nibble first
    <weight>_high     uint8 (N, (bits−4)·8·⌈K/64⌉) of int5 and int6: the bits above those (see `pack_high`)
    <weight>_scale    float16 (N, blocks); (N, 1) when scales are LPBQ
    <weight>_factors  uint8 (N, ⌈blocks/2⌉) of LPBQ scales: factor − 1, two a byte, low nibble first
    <module>.bias     float32 (N,)          of a linear that has one
    <norm>.weight     float32 (H,)
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from headrace.bundle.grid import Grid, QuantizedTensor, dequantize, factored, pack, pack_high, unpack
from headrace.bundle.recipe import Recipe
from headrace.config import ModelConfig
from headrace.errors import BundleError
from headrace.files import allocate, sync
from headrace.model.weights import EMBEDDING, FINAL_NORM, HEAD, Weight, layer_weights, quantized_weights, weight_table
from headrace.plan import Part

__all__ = ["Layout", "StoredTensor", "WeightStore", "layouts", "part_weights"]

_DTYPES: dict[str, np.dtype[Any]] = {"U8": np.dtype(np.uint8), "F16": np.dtype("<f2"), "F32": np.dtype("<f4")}


def part_weights(config: ModelConfig, part: Part) -> Mapping[str, Weight]:
    """The rows of the weights that a part's graphs use; a tied head is one, wherever its bytes are."""
    table = weight_table(config)
    rows = {EMBEDDING: table[EMBEDDING]} if part.embeds else {}
    for layer in part.layers:
        rows |= layer_weights(config, layer)
    return rows | ({FINAL_NORM: table[FINAL_NORM], HEAD: table[HEAD]} if part.heads else {})


class StoredTensor(NamedTuple):
    """Where a tensor's bytes are: `file` below the bundle's root, absolute `offset` in it."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * _DTYPES[self.dtype].itemsize


class Layout(NamedTuple):
    """One file: its safetensors header, its tensors by name, its size in bytes."""

    file: str
    header: bytes
    tensors: Mapping[str, StoredTensor]
    nbytes: int


def layouts(config: ModelConfig, parts: Sequence[Part], grids: Mapping[str, Grid]) -> list[Layout]:
    """The layout of each part's file, `weights/part_2_of_5.safetensors`."""
    return [_layout(config, part, grids) for part in parts]


def _stored(config: ModelConfig, part: Part) -> Mapping[str, Weight]:
    """What the part's file holds: all that its graphs use but a tied head."""
    return {name: row for name, row in part_weights(config, part).items() if row.stored_as == name}


def _layout(config: ModelConfig, part: Part, grids: Mapping[str, Grid]) -> Layout:
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
    high: dict[str, tuple[str, tuple[int, ...]]] = {}
    factors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, weight in _stored(config, part).items():
        if not weight.quantized:
            shapes[name] = ("F32", weight.shape)
            continue
        (rows, columns), grid = weight.matrix, grids[name]
        blocks = grid.blocks(columns, name)
        shapes[f"{name}_packed"] = ("U8", (rows, columns if grid.bits == 8 else columns // 2))
        if grid.high_bits:
            high[f"{name}_high"] = ("U8", (rows, grid.high_bytes(columns)))
        shapes[f"{name}_scale"] = ("F16", (rows, 1 if grid.lpbq else blocks))
        if grid.lpbq:
            factors[f"{name}_factors"] = ("U8", (rows, -(-blocks // 2)))
    # float32 first, then float16, then bytes: everything is aligned without gaps, which safetensors forbids. High bits
    # and factors come last, so that each kind of bytes of linears of one input still follow each other.
    shapes |= high | factors
    order = sorted(shapes, key=lambda name: -_DTYPES[shapes[name][0]].itemsize)
    entries: dict[str, dict[str, Any]] = {}
    at = 0
    for name in order:
        dtype, shape = shapes[name]
        size = math.prod(shape) * _DTYPES[dtype].itemsize
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps({"__metadata__": {"format": "headrace"}, **entries}, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % 64)
    header = len(text).to_bytes(8, "little") + text
    file = f"weights/{part.name}.safetensors"
    tensors = {
        name: StoredTensor(file, e["dtype"], tuple(e["shape"]), len(header) + e["data_offsets"][0])
        for name, e in entries.items()
    }
    return Layout(file, header, tensors, len(header) + at)


class WeightStore:
    """The weights files of a bundle, memory-mapped: weights are written and read one at a time by canonical name.

    Args:
        root: the bundle's folder.
        config: the geometry.
        parts: how the model is split.
        grids: the grid of each quantized weight; also an attribute.
        create: make the files (zeros, full size, with room on the disk) instead of opening what is there.
    """

    def __init__(
        self, root: Path, config: ModelConfig, parts: Sequence[Part], grids: Mapping[str, Grid], *, create: bool = False
    ) -> None:
        self._root = root
        self.grids = grids
        self._table = weight_table(config)
        self.names = [name for part in parts for name in _stored(config, part)]
        self._layouts = layouts(config, parts, grids)
        self.tensors: Mapping[str, StoredTensor] = {n: t for one in self._layouts for n, t in one.tensors.items()}
        if create:
            for layout in self._layouts:
                path = root / layout.file
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("wb") as out:
                    out.write(layout.header)
                    allocate(out, layout.nbytes)
            for folder in {(root / layout.file).parent for layout in self._layouts} | {root}:
                sync(folder)  # that they are there must not be forgotten when a layer of them is remembered

    @classmethod
    def open(cls, root: Path, config: ModelConfig, parts: Sequence[Part], recipe: Recipe) -> WeightStore:
        """The files that are there, on the grids that a recipe gives.

        Raises:
            BundleError: a file is not as long as the geometry and the recipe say.
            RecipeError: the recipe does not fit the geometry.
        """
        rules = recipe.resolve(quantized_weights(config))
        store = cls(root, config, parts, {name: rule.grid for name, rule in rules.items()})
        for layout in store._layouts:
            path = root / layout.file
            size = path.stat().st_size if path.is_file() else None
            if size != layout.nbytes:
                found = "is missing" if size is None else f"has {size} bytes"
                raise BundleError(
                    f"{path} {found}; its geometry and recipe want {layout.nbytes}: export the bundle again"
                )
        return store

    def write(self, name: str, value: QuantizedTensor | NDArray[np.float32]) -> None:
        """Store a weight, with its bias when it has one."""
        if isinstance(value, QuantizedTensor):
            self._write(f"{name}_packed", pack(value.codes, value.grid.bits))
            if value.grid.high_bits:
                self._write(f"{name}_high", pack_high(value.codes, value.grid.bits))
            self._write_scales(name, value)
            bias = self._table[name].bias
            if (bias is None) != (value.bias is None):
                raise ValueError(f"{name} comes {'without a' if value.bias is None else 'with a'} bias")
            if bias is not None and value.bias is not None:
                self._write(bias, value.bias)
        else:
            self._write(name, value)

    def read(self, name: str) -> NDArray[np.float32]:
        """A weight as float32, dequantized when it has a grid; a tied head is the embedding."""
        value = self.read_stored(name)
        return dequantize(value) if isinstance(value, QuantizedTensor) else value

    def read_codes(self, name: str) -> QuantizedTensor:
        """A quantized weight, with its bias when it has one."""
        grid, bias = self.grids[name], self._table[name].bias
        high = np.asarray(self._view(f"{name}_high")) if grid.high_bits else None
        codes = unpack(np.asarray(self._view(f"{name}_packed")), grid.bits, high)
        return QuantizedTensor(codes, self.read_scales(name), grid, None if bias is None else self._float(bias))

    def read_scales(self, name: str) -> NDArray[np.float16]:
        """The scales of a quantized weight, (N, blocks), LPBQ ones multiplied out."""
        scales = np.array(self._view(f"{name}_scale"))
        if not self.grids[name].lpbq:
            return scales
        blocks = self.grids[name].blocks(self._table[name].matrix[1])
        stored = np.asarray(self._view(f"{name}_factors"))
        factors = np.stack([stored & 15, stored >> 4], axis=2).reshape(len(stored), -1)[:, :blocks] + np.float32(1)
        return (scales.astype(np.float32) * factors).astype(np.float16)

    def _write_scales(self, name: str, value: QuantizedTensor) -> None:
        if not value.grid.lpbq:
            self._write(f"{name}_scale", value.scales)
            return
        row, factors = factored(value.scales, value.grid)
        nibbles = (factors - 1).astype(np.uint8)
        even = np.pad(nibbles, ((0, 0), (0, nibbles.shape[1] % 2)))
        self._write(f"{name}_scale", row)
        self._write(f"{name}_factors", even[:, 0::2] | even[:, 1::2] << np.uint8(4))

    def read_stored(self, name: str) -> QuantizedTensor | NDArray[np.float32]:
        """A weight as it is stored: codes and scales, or float32 for a norm or a bias; a tied head is the embedding."""
        weight = self._table[name]
        return self.read_codes(weight.stored_as) if weight.quantized else self._float(name)

    def _float(self, name: str) -> NDArray[np.float32]:
        return np.array(self._view(name), np.float32)

    def sync(self) -> None:
        """Everything written so far is on disk when this returns."""
        for file in {tensor.file for tensor in self.tensors.values()}:
            with (self._root / file).open("rb+") as handle:
                os.fsync(handle.fileno())

    def _write(self, name: str, array: NDArray[np.generic]) -> None:
        t = self.tensors[name]
        if t.shape != array.shape:
            raise ValueError(f"{name}: {array.shape} is not the planned {t.shape}")
        # Written, not mapped: a full disk is then an error and not the end of the process.
        with (self._root / t.file).open("rb+") as file:
            file.seek(t.offset)
            file.write(np.ascontiguousarray(array, _DTYPES[t.dtype]).data)

    def _view(self, name: str) -> np.memmap[tuple[int, ...], np.dtype[np.generic]]:
        t = self.tensors[name]
        return np.memmap(self._root / t.file, _DTYPES[t.dtype], "r", t.offset, t.shape)
