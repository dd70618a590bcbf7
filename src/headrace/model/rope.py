"""Rotary tables: the angles every backend shares. Knows nothing about graphs or caches."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from headrace.config import ModelConfig

__all__ = ["rope_angles", "rope_tables"]

STEP = 64  # positions; a power of two, so that an angle times it is exact


def rope_tables(config: ModelConfig, length: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """cos and sin of `rope_angles`, each float32 (length, head_dim / 2)."""
    # A position's turn is that of the STEP it is in and that of its place in there, one after the other: a product of
    # float64 numbers instead of a cosine and a sine, and only what it gives is rounded.
    places = np.exp(1j * rope_angles(config, STEP))
    steps = np.exp(1j * STEP * rope_angles(config, -(-length // STEP)))
    turns = (steps[:, None] * places).reshape(-1, places.shape[1])[:length]
    return turns.real.astype(np.float32), turns.imag.astype(np.float32)


def rope_angles(config: ModelConfig, length: int) -> NDArray[np.float64]:
    """Position × frequency, (length, head_dim / 2), in float64, so that position 4095 is as exact as position 0.

    Source: Su et al. 2021 (RoFormer), rotate-half form; scaling as in `RopeScaling`.
    """
    half = config.head_dim // 2
    frequencies = config.rope_theta ** (-np.arange(half, dtype=np.float64) / half)
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind == "linear":
        frequencies = frequencies / scaling.factor
    elif scaling is not None:
        turns = scaling.original_context * frequencies / (2 * math.pi)  # full turns within the old context
        share = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        share = np.clip(share, 0.0, 1.0)  # 1: a fast frequency, kept; 0: a slow one, divided
        frequencies = share * frequencies + (1 - share) * frequencies / scaling.factor
    return np.arange(length, dtype=np.float64)[:, None] * frequencies
