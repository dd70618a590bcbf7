"""A part's weights as the device graphs want them: signed codes in one file that all graphs of the part point into.

Derived from the bundle's weights, a tensor at a time; both roles and all contexts share the bytes. Knows what forms
the HTP compiler takes, not what graphs look like: it has no 5 and 6 bits, and LPBQ weights of so many are given as the
int8 weights with one scale a row that they are.

    <weight>.codes   int4 or int8 (K, N), transposed for MatMul      <weight>.scale   float32 (N,); LPBQ: (blocks, N)
    <down_proj>.outliers.codes, .scale   the columns of outlier channels, zero in the linear itself (see outliers.py)
    <norm>.codes     uint16 (H,), one scale                          <bias>.codes     the same, (N,)
    embed_tokens     see EmbeddingForm
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from headrace.bundle.encodings import GATED_OUTLIERS, Encoding
from headrace.bundle.grid import QuantizedTensor, factored
from headrace.bundle.weights import part_weights
from headrace.config import ModelConfig
from headrace.errors import RecipeError
from headrace.files import whole_file
from headrace.model.ops import mlp_name
from headrace.model.weights import EMBEDDING, Role
from headrace.plan import Part

__all__ = ["DeviceTensor", "DeviceWeights", "EmbeddingForm", "ReadWeight", "derive_weights"]

ReadWeight = Callable[[str], QuantizedTensor | NDArray[np.float32]]
"""Gives a weight by canonical name: quantized, or float32 for a norm or a bias; a tied head is the embedding."""

_ALIGNMENT = 64
_AT_ONCE = 1 << 24  # codes unpacked at a time


class EmbeddingForm(Enum):
    """How the embedding's codes with a scale a row become a table; a gathered table must have one scale.

    ROWS: the codes as they are (uint8), times a second, gathered table of row scales (uint16): exact to a quarter of
    the result's step, one byte an element. WIDE: uint16 on the result's own grid, two bytes an element. NARROW: uint8
    with one scale for the table, one byte an element, which loses what small rows hold.
    """

    ROWS = "rows"
    WIDE = "uint16"
    NARROW = "uint8"


@dataclass(frozen=True)
class DeviceTensor:
    """Where a tensor's bytes are: `offset` in the part's file. `encoding`: of a tensor with one scale."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    encoding: Encoding | None = None


@dataclass(frozen=True)
class DeviceWeights:
    """A part's derived file.

    Attributes:
        path: the file.
        tensors: by name.
        bits: 4 or 8 of each linear, by canonical name.
        embedding: the table's form.
    """

    path: Path
    tensors: Mapping[str, DeviceTensor]
    bits: Mapping[str, int]
    embedding: EmbeddingForm = EmbeddingForm.ROWS


def derive_weights(
    config: ModelConfig,
    part: Part,
    read: ReadWeight,
    encodings: Mapping[str, Encoding],
    folder: Path,
    embedding: EmbeddingForm = EmbeddingForm.ROWS,
) -> DeviceWeights:
    """Write `part_2_of_5.weights` into `folder`, whole or not at all.

    Args:
        config: the geometry.
        part: which part.
        read: gives the bundle's weights.
        encodings: of the results (the embedding's own grid is needed for WIDE).
        folder: exists.
        embedding: the table's form.

    Raises:
        RecipeError: a linear is in blocks whose scales are not LPBQ, which the device does not take.
    """
    path = folder / f"{part.name}.weights"
    bits: dict[str, int] = {}
    with whole_file(path) as file:
        writer = _Writer(file, path.name)
        for name, weight in part_weights(config, part).items():
            value = read(name)
            if isinstance(value, QuantizedTensor) and value.grid.on_device != value.grid:
                value = value.as_int8()
            if not isinstance(value, QuantizedTensor):
                e = Encoding.of_range(float(value.min()), float(value.max()))
                writer.add(f"{name}.codes", e.quantize(value), encoding=e)
            elif weight.role is Role.EMBEDDING:
                _write_table(writer, value, encodings["embed_tokens"], embedding)
            else:
                bits[name] = value.grid.bits
                apart = None
                if weight.role is Role.DOWN and weight.layer is not None:
                    apart = encodings.get(f"{mlp_name(weight.layer)}.{GATED_OUTLIERS}")
                if apart is not None:
                    value = _write_apart(writer, name, value, list(apart.channels))
                    bits[f"{name}.outliers"] = 8
                _write_linear(writer, name, value)
    return DeviceWeights(path, writer.tensors, bits, embedding)


class _Writer:
    """Appends tensors to a file."""

    def __init__(self, file: IO[bytes], name: str) -> None:
        self.file = file
        self.name = name
        self.tensors: dict[str, DeviceTensor] = {}

    def add(self, name: str, array: NDArray[Any], *, encoding: Encoding | None = None) -> None:
        self._align()
        offset = self.file.tell()
        data = np.ascontiguousarray(array)
        self.file.write(data.data)
        self.tensors[name] = DeviceTensor(self.name, data.dtype.name, data.shape, offset, data.nbytes, encoding)

    def add_transposed(self, name: str, codes: NDArray[np.int8], bits: int) -> None:
        """Codes (N, K) as (K, N), some rows of the result at a time; int4 two a byte, low nibble first."""
        rows, columns = codes.shape
        self._align()
        offset = self.file.tell()
        step = max(2, _AT_ONCE // rows & ~1)  # an even number of rows: int4 pairs never span two writes
        for start in range(0, columns, step):
            flat = np.ascontiguousarray(codes[:, start : start + step].T).reshape(-1)
            if bits == 4:
                pairs = flat.view(np.uint8)
                flat = (pairs[0::2] & 15) | (pairs[1::2] << 4)
            self.file.write(flat.data)
        nbytes = self.file.tell() - offset
        self.tensors[name] = DeviceTensor(self.name, f"int{bits}", (columns, rows), offset, nbytes)

    def _align(self) -> None:
        self.file.write(b"\0" * (-self.file.tell() % _ALIGNMENT))


def _write_linear(writer: _Writer, name: str, value: QuantizedTensor) -> None:
    if value.grid.block is not None and not value.grid.lpbq:
        raise RecipeError(
            f"{name} is quantized in blocks of {value.grid.block} with scales of their own; device graphs take LPBQ "
            f"scales or one a channel (compilers round others again): export with --block {value.grid.block} or channel"
        )
    writer.add_transposed(f"{name}.codes", value.codes, value.grid.bits)
    scales = value.scales.astype(np.float32)
    writer.add(f"{name}.scale", scales.T if value.grid.lpbq else scales[:, 0])


def _write_apart(writer: _Writer, name: str, value: QuantizedTensor, channels: list[int]) -> QuantizedTensor:
    """Write the columns of outlier channels as a linear of their own; the linear without them.

    Always int8, the same values: HTP drops the last 8 bits of an accumulator, which are 16 times less of an int8 step.
    """
    if value.grid.lpbq:
        scale, blocks = factored(value.scales, value.grid)
        factors = np.repeat(blocks, value.codes.shape[1] // blocks.shape[1], axis=1)[:, channels]
    else:
        factors = np.array(16 if value.grid.bits == 4 else 1, np.float32)
        scale = value.scales.astype(np.float32) / factors
    writer.add_transposed(f"{name}.outliers.codes", (value.codes[:, channels] * factors).astype(np.int8), 8)
    writer.add(f"{name}.outliers.scale", scale[:, 0])
    codes = value.codes.copy()
    codes[:, channels] = 0
    return value._replace(codes=codes)


def _write_table(writer: _Writer, table: QuantizedTensor, grid: Encoding, form: EmbeddingForm) -> None:
    rows, columns = table.codes.shape
    blocks = table.scales.shape[1]
    if form is EmbeddingForm.ROWS:
        scales = table.scales.astype(np.float32) * 128
        e = Encoding.of_range(0.0, float(scales.max()))
        unsigned = (table.codes.view(np.uint8) ^ np.uint8(128)).reshape(rows, columns)  # + 128
        writer.add(f"{EMBEDDING}.codes", unsigned, encoding=Encoding(2**-7, 128, 8))
        writer.add(f"{EMBEDDING}.scale", e.quantize(scales), encoding=e)
        return
    e = grid
    if form is EmbeddingForm.NARROW:
        largest = np.maximum(table.codes.max(1, keepdims=True), -table.codes.min(1, keepdims=True).astype(np.float32))
        peak = float((largest * table.scales.astype(np.float32)).max())
        e = Encoding(float(np.float32(peak / 127)), 128, 8)
    codes = np.empty((rows, columns), e.dtype)
    step = max(1, _AT_ONCE // columns)
    for start in range(0, rows, step):
        at = slice(start, start + step)
        scales = table.scales[at].astype(np.float32)[:, :, None]
        values = table.codes[at].reshape(-1, blocks, columns // blocks) * scales
        codes[at] = e.quantize(values.reshape(-1, columns))
    writer.add(f"{EMBEDDING}.codes", codes, encoding=e)
