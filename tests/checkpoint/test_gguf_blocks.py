"""Our block decoders against the gguf package's, on random blocks."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.checkpoint.gguf_blocks import BLOCK_TYPES, TYPE_NAMES

SCALES_AT = {  # fp16 of a block
    2: [0], 3: [0, 2], 6: [0], 7: [0, 2], 8: [0], 10: [80, 82], 11: [108], 12: [0, 2], 13: [0, 2], 14: [208],
    20: [0], 23: [0], 39: [],
}  # fmt: skip
RELATIVE_TOLERANCE = 1e-6  # the same float32 products, perhaps added in another order


def random_blocks(number: int, count: int, seed: int) -> np.ndarray:
    """Any bytes, with finite scales; plain floats are finite too."""
    kind = BLOCK_TYPES[number]
    rng = np.random.default_rng(seed)
    if number not in SCALES_AT:
        stored = {"float32": np.float32, "float16": np.float16, "bfloat16": np.float32, "float64": np.float64}[
            kind.name
        ]
        values = rng.normal(0, 3, count).astype(stored)
        if kind.name == "bfloat16":
            values = (values.view(np.uint32) >> 16).astype(np.uint16)
        return values.view(np.uint8).reshape(count, kind.size)
    blocks = rng.integers(0, 256, (count, kind.size), dtype=np.uint8)
    for start in SCALES_AT[number]:
        blocks[:, start : start + 2] = rng.normal(0, 0.1, (count, 1)).astype(np.float16).view(np.uint8)
    if kind.name == "mxfp4":
        blocks[:, 0] = rng.integers(90, 160, count)  # a power of two that float32 has, times any code
    return blocks


@pytest.mark.parametrize("number", sorted(BLOCK_TYPES), ids=lambda n: BLOCK_TYPES[n].name)
@settings(max_examples=20, deadline=None)
@given(count=st.integers(1, 9), seed=st.integers(0, 2**32 - 1))
def test_decodes_as_the_reference(number: int, count: int, seed: int) -> None:
    blocks = random_blocks(number, count, seed)
    kind = BLOCK_TYPES[number]
    expected = (
        blocks.view(np.float64).astype(np.float32).reshape(1, -1)  # the package gives float64 bytes as they are
        if BLOCK_TYPES[number].name == "float64"
        else gguf.quants.dequantize(blocks.reshape(1, -1), gguf.GGMLQuantizationType(number))
    )
    result = kind.decode(blocks)
    assert result.dtype == np.float32
    assert result.shape == (count, kind.values)
    np.testing.assert_allclose(result.reshape(1, -1), expected, rtol=RELATIVE_TOLERANCE, atol=RELATIVE_TOLERANCE)


def test_sizes_are_the_references() -> None:
    for number, kind in BLOCK_TYPES.items():
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(number)] == (kind.values, kind.size)


def test_names_are_the_references() -> None:
    names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
    names |= {f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)}
    for kind in gguf.GGMLQuantizationType:
        assert TYPE_NAMES[kind.value] == names.get(kind.name, kind.name.lower())
