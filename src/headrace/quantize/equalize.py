"""Keys of similar size in all channels: one 8-bit scale serves all keys of a layer, and a few must not decide it.

A rotary pair (channels i and i + D/2 of a head) of the keys may be any number of times larger if the same pair of the
queries is as many times smaller: scores stay the same, also after rope, which mixes only the two of a pair. Powers of
two move through the float16 scales and the biases of q_proj and k_proj unrounded, so that codes stay too.

Source: the idea of Xiao et al. 2023 (SmoothQuant), between two linears. Knows no cache and no text.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from headrace.bundle.grid import QuantizedTensor

__all__ = ["equalize_keys"]

_SMALLEST = float(np.finfo(np.float16).smallest_normal)  # below it a power of two would round a scale
_LARGEST = float(np.finfo(np.float16).max)
_STEEPEST = 15  # a power of two beyond it is no float16


def equalize_keys(
    q: QuantizedTensor, k: QuantizedTensor, peaks: NDArray[np.float32]
) -> tuple[QuantizedTensor, QuantizedTensor, float]:
    """The same attention with keys as near to one size as scaling by powers of two makes them.

    Args:
        q: q_proj, (heads·D, H); the heads that share a KV head are neighbours.
        k: k_proj, (kv_heads·D, H).
        peaks: the largest |key| of each channel, (kv_heads, D).

    Returns:
        q_proj, k_proj, and the largest |key| now: that of the largest pair, which stays as it is.
    """
    kv_heads, width = peaks.shape
    pairs = np.maximum(peaks[:, : width // 2], peaks[:, width // 2 :])
    ratio = np.divide(pairs.max(), pairs, out=np.ones_like(pairs), where=pairs > 0)
    room = np.minimum(
        _rows(q.scales, kv_heads, width).min(1) / _SMALLEST, _LARGEST / _rows(k.scales, kv_heads, width).max(1)
    )
    exponent = np.clip(np.floor(np.log2(np.minimum(ratio, room))), 0, _STEEPEST)
    grow = np.exp2(np.concatenate([exponent, exponent], 1)).astype(np.float16)  # (kv_heads, D)
    shrink = np.repeat(1 / grow, len(q.scales) // len(k.scales), axis=0)
    return (
        q.scaled(shrink.reshape(-1)),
        k.scaled(grow.reshape(-1)),
        float((peaks * grow).max()),
    )


def _rows(scales: NDArray[np.float16], kv_heads: int, width: int) -> NDArray[np.float32]:
    """Sizes of scales (heads·D, blocks) as (kv_heads, …, D/2): each pair's. A kept grid can have negative ones."""
    by_pair = np.abs(scales.astype(np.float32)).reshape(kv_heads, -1, 2, width // 2, scales.shape[1])
    return by_pair.transpose(0, 1, 2, 4, 3).reshape(kv_heads, -1, width // 2)
