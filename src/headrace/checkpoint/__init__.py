"""Checkpoints on disk, opened lazily under canonical names: Hugging Face folders and GGUF files."""

from __future__ import annotations

from headrace.checkpoint.gguf_blocks import BLOCK_TYPES
from headrace.checkpoint.opened import Checkpoint, open_checkpoint
from headrace.checkpoint.tensor import ELEMENTS, LazyTensor

__all__ = ["BITS", "Checkpoint", "LazyTensor", "open_checkpoint"]

BITS: dict[str, float] = {name: element.bits for name, element in ELEMENTS.items()}  # a value takes, by `dtype`
BITS |= {kind.name: 8 * kind.size / kind.values for kind in BLOCK_TYPES.values()}
