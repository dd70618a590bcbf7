"""A GGUF's model with weights that lie on no grid: each moved at random by up to half a step of its own.

    python benchmarks/off_grid.py IN.gguf OUT.gguf

A quantizer that knows the grid of a GGUF finds it again in the dequantized weights, and loses nothing; of a model whose
weights are as training leaves them it cannot. A step is the smallest gap between two of a block's 32 weights. An
output matrix of its own is dropped, and what it holds becomes the embedding, as in models whose head is tied.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from gguf import GGUFReader, quants
from llama_cpp_quality import write_f16

BLOCK = 32
AT_ONCE = 1 << 18  # blocks
EQUAL = 1e-3  # of a block's largest weight: a smaller gap is float16's, not the grid's
SEED = 7
EMBEDDING, HEAD = "token_embd.weight", "output.weight"


def off_grid(weights: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """The weights, float16 of their shape, each moved by less than half a step."""
    blocks = weights.reshape(-1, BLOCK)
    moved = np.empty(blocks.shape, np.float16)
    for first in range(0, len(blocks), AT_ONCE):
        some = blocks[first : first + AT_ONCE]
        gaps = np.diff(np.sort(some, axis=1), axis=1)
        step = np.where(gaps <= EQUAL * np.abs(some).max(1, keepdims=True), np.inf, gaps).min(1, keepdims=True)
        step[~np.isfinite(step)] = 0
        moved[first : first + AT_ONCE] = some + random.uniform(-0.5, 0.5, some.shape) * step
    return moved.reshape(weights.shape)


def tensors(reader: GGUFReader) -> Iterator[tuple[str, np.ndarray]]:
    """All but a head of its own, matrices moved."""
    named, random = {tensor.name: tensor for tensor in reader.tensors}, np.random.default_rng(SEED)
    for name in named:
        if name != HEAD:
            source = named.get(HEAD, named[name]) if name == EMBEDDING else named[name]
            values = quants.dequantize(source.data, source.tensor_type)
            yield name, values if values.ndim == 1 else off_grid(values, random)


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    opened = GGUFReader(source)
    write_f16(opened, target, tensors(opened))
