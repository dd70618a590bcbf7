"""Static encodings of activations: the integer grid of every tensor of the device graphs, and their file.

A tensor's encoding maps a real number to an unsigned code: real = (code − zero_point) · scale. Results of the decoder
are uint16 over the range calibration saw, outlier channels on a grid of their own (quantize/outliers.py); keys and
values are uint8 with zero point 128, so that their codes are the host cache's int8 plus 128. The file is AIMET's
encodings 1.0.0, which Qualcomm's converter reads; there an `offset` is the negated zero point.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrace.bundle.grid import Grid, factored
from headrace.errors import BundleError, CalibrationError, shown
from headrace.files import read_json, write_file
from headrace.model.decoder import residual_names
from headrace.model.ops import attention_name
from headrace.model.weights import Role
from headrace.plan import Part

__all__ = [
    "ANGLE",
    "ATTENTION_MASK",
    "GATED_OUTLIERS",
    "Encoding",
    "mask_encoding",
    "port_encodings",
    "read_encodings",
    "write_encodings",
]

SMALLEST_SCALE, LARGEST_SCALE = 1e-37, 1e30  # of a file: normal float32 numbers, whose products with codes are finite
_SMALLEST_WIDTH = 1e-6  # of a range: a tensor that was always zero still needs a scale
AIMET_VERSION = "1.0.0"

GATED_OUTLIERS = "gated_outliers"
"""Name of the tensor of outlier channels, beside `gated` (quantize/outliers.py)."""


@dataclass(frozen=True)
class Encoding:
    """real = (code − zero_point) · scale, codes 0 … 2^bits − 1.

    Attributes:
        scale: a float32 value.
        zero_point: the code of 0.
        bits: 8 or 16.
        channels: of a tensor that is some channels of another, which ones.
    """

    scale: float
    zero_point: int
    bits: int = 16
    channels: tuple[int, ...] = ()

    @classmethod
    def of_range(cls, low: float, high: float, bits: int = 16) -> Encoding:
        """The grid over low … high, widened to hold 0, which is exactly a code.

        Raises:
            CalibrationError: the range is not finite.
        """
        low, high = min(float(low), 0.0), max(float(high), 0.0)
        if not (math.isfinite(low) and math.isfinite(high)):
            raise CalibrationError(f"range {low} … {high} is not finite; expected finite activations")
        top = (1 << bits) - 1
        scale = float(np.float32(max(high - low, _SMALLEST_WIDTH) / top))
        return cls(scale, min(max(round(-low / scale), 0), top), bits)

    @property
    def dtype(self) -> str:
        """NumPy name of the codes."""
        return f"uint{self.bits}"

    @property
    def top(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    @property
    def low(self) -> float:
        """The smallest real number."""
        return -self.zero_point * self.scale

    @property
    def high(self) -> float:
        """The largest real number."""
        return (self.top - self.zero_point) * self.scale

    def quantize(self, x: NDArray[np.floating[Any]]) -> NDArray[np.unsignedinteger[Any]]:
        """The nearest codes, halves to even, as ONNX's QuantizeLinear (float32 division)."""
        codes = np.rint(np.asarray(x, np.float32) / np.float32(self.scale))
        codes += np.float32(self.zero_point)
        return np.asarray(np.clip(codes, 0, self.top), self.dtype)

    def floor(self, x: NDArray[np.floating[Any]]) -> NDArray[np.unsignedinteger[Any]]:
        """The codes at or below, in double precision: how Genie quantizes cos and sin."""
        codes = np.floor(np.asarray(x, np.float64) / self.scale) + self.zero_point
        return np.asarray(np.clip(codes, 0, self.top), self.dtype)

    def dequantize(self, codes: NDArray[np.unsignedinteger[Any]]) -> NDArray[np.float32]:
        """What codes stand for, float32."""
        return (codes.astype(np.float32) - np.float32(self.zero_point)) * np.float32(self.scale)

    def simulate(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """What is left of x on this grid, float32."""
        codes = np.rint(x / np.float32(self.scale))
        np.clip(codes, -self.zero_point, self.top - self.zero_point, out=codes)
        codes *= np.float32(self.scale)
        return np.asarray(codes, np.float32)


ATTENTION_MASK = "attention_mask"
"""Name of the port of the mask, and of its encoding: one for all layers, since Genie refuses parts that differ."""

ANGLE = Encoding(float(np.float32(2 / 65535)), 32768)
"""position_ids_cos, position_ids_sin: −1 … 1."""


def mask_encoding(depth: float) -> Encoding:
    """The mask's grid: code 65535 adds 0 to a score, code 0 adds −`depth`."""
    return Encoding(float(np.float32(depth / 65535)), 65535)


def port_encodings(parts: Sequence[Part], encodings: Mapping[str, Encoding]) -> dict[str, Encoding]:
    """The encoding of every device port of all parts that has one (`input_ids` has none), by port name.

    Raises:
        CalibrationError: an encoding is missing.
    """
    found = {"position_ids_cos": ANGLE, "position_ids_sin": ANGLE}
    wanted = {ATTENTION_MASK: ATTENTION_MASK}
    for part in parts:
        for layer in part.layers:
            for kind, cache in (("key", "k_cache"), ("value", "v_cache")):
                for side in ("in", "out"):
                    wanted[f"past_{kind}_{layer}_{side}"] = f"{attention_name(layer)}.{cache}"
        last = residual_names(part.stop - 1)[1] if part.layers else Role.EMBEDDING.value
        wanted["logits" if part.heads else f"hidden_{part.number}"] = Role.HEAD.value if part.heads else last
    for port, name in wanted.items():
        if name not in encodings:
            raise CalibrationError(f"the encodings lack {name!r} (port {port}); calibrate and export again")
        found[port] = encodings[name]
    return found


def write_encodings(
    path: Path,
    encodings: Mapping[str, Encoding],
    parameters: Mapping[str, tuple[Grid, NDArray[np.float16]]] | None = None,
) -> None:
    """Write encodings as AIMET 1.0.0.

    Args:
        path: the file.
        encodings: of activations, by name.
        parameters: of weights, by name: the grid and the scales, (N, 1) or LPBQ's (N, blocks).
    """
    activations = [
        _entry(name, e.bits, [e.scale], [-e.zero_point], symmetric=e.bits == 8)
        | ({"channels": list(e.channels)} if e.channels else {})
        for name, e in encodings.items()
    ]
    weights = [_parameter(name, grid, scales) for name, (grid, scales) in (parameters or {}).items()]
    body = {
        "version": AIMET_VERSION,
        "quantizer_args": {
            "activation_bitwidth": 16,
            "param_bitwidth": 4,
            "dtype": "int",
            "is_symmetric": True,
            "per_channel_quantization": True,
            "quant_scheme": "post_training_tf",
        },
        "activation_encodings": activations,
        "param_encodings": weights,
        "excluded_layers": [],
    }
    write_file(path, json.dumps(body, indent=1).encode())


def read_encodings(path: Path) -> dict[str, Encoding]:
    """The activations' encodings of a file that `write_encodings` wrote.

    Raises:
        BundleError: it is missing or something else.
    """
    if not path.exists():
        raise BundleError(
            f"{path.parent} has no {path.name}: it was made for computers alone, and a phone's grids are not known; "
            "export with --target or --keep-onnx"
        )
    raw = read_json(path)
    try:
        if raw["version"] != AIMET_VERSION:
            raise BundleError(f"{path} has version {raw['version']!r}; expected {AIMET_VERSION}: export again")
        found = {e["name"]: _encoding(e) for e in raw["activation_encodings"]}
        if ATTENTION_MASK not in found:  # a file of before the mask was calibrated: its masked scores tell the depth
            scores, masked = (found[f"{attention_name(0)}.{kind}"] for kind in ("scores", "masked_scores"))
            found[ATTENTION_MASK] = mask_encoding(round(scores.low - masked.low))
        return found
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, ArithmeticError) as error:
        raise BundleError(
            f"{path} cannot be read ({error}); expected encodings in AIMET 1.0.0 form: export again"
        ) from None


def _encoding(entry: Mapping[str, Any]) -> Encoding:
    """An entry of the file, whose values are what this file writes.

    Raises:
        ValueError: one is not; KeyError, TypeError and the like where the entry is nothing of the sort.
    """
    scale, offset, bits, channels = entry["scale"][0], entry["offset"][0], entry["bw"], entry.get("channels", [])
    whole = all(type(value) is int for value in (offset, bits, *channels))
    if not whole or bits not in (8, 16) or not 0 <= -offset < 1 << bits or not all(0 <= c < 1 << 31 for c in channels):
        raise ValueError(f"offset, bw or channels of {shown(entry['name'])}")
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not SMALLEST_SCALE <= scale <= LARGEST_SCALE:
        raise ValueError(f"scale {shown(scale)} of {shown(entry['name'])}")
    return Encoding(float(scale), -offset, bits, tuple(channels))


def _parameter(name: str, grid: Grid, scales: NDArray[np.float16]) -> dict[str, Any]:
    """A weight's entry. Of LPBQ the 8 bits are those of codes times factors, which with 5 and 6 bits is all that a
    device sees."""
    row, factors = factored(scales, grid) if grid.lpbq else (scales, None)
    bits = grid.bits if factors is None else 8
    entry = _entry(name, bits, row[:, 0].astype(np.float64).tolist(), [-(1 << (bits - 1))] * len(row), symmetric=True)
    if factors is None or grid.on_device != grid:
        return entry
    whole = factors.astype(np.int64).ravel().tolist()
    form = {"enc_type": "LPBQ", "compressed_bw": grid.bits, "block_size": grid.block}
    return entry | form | {"per_block_int_scale": whole}


def _entry(name: str, bits: int, scales: list[float], offsets: list[int], *, symmetric: bool) -> dict[str, Any]:
    return {
        "name": name,
        "dtype": "INT",
        "enc_type": "PER_TENSOR" if len(scales) == 1 else "PER_CHANNEL",
        "bw": bits,
        "is_sym": symmetric,
        "scale": scales,
        "offset": offsets,
    }
