"""Checkpoints on disk, opened lazily under canonical names: Hugging Face folders and GGUF files."""

from __future__ import annotations

from headrace.checkpoint.opened import Checkpoint, open_checkpoint
from headrace.checkpoint.tensor import LazyTensor

__all__ = ["Checkpoint", "LazyTensor", "open_checkpoint"]
