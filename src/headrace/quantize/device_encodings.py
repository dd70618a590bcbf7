"""From calibrated ranges to encodings: the integer grid of every named result of the decoder on a device."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from headrace.bundle.encodings import ATTENTION_MASK, GATED_OUTLIERS, Encoding, mask_encoding
from headrace.config import ModelConfig
from headrace.errors import CalibrationError
from headrace.model.decoder import residual_names
from headrace.model.ops import attention_name, mlp_name
from headrace.model.weights import Role, find_weight, weight_table
from headrace.quantize.ranges import Ranges

__all__ = ["HEADROOM", "device_encodings"]

HEADROOM = 1.25
"""How much wider than calibration saw a range is made: 16 bits have steps to spare, and a value that is clipped costs
more than a coarser step. tiny-baichuan2, Chinese: KL 2.3e-4 at 1, 1.1e-4 at 1.2, 0.8e-4 at 1.4."""

MASK_LEAD = 20.0
"""How much lower than the best score a blocked one must be, at least, once the mask is added: e^−20 for each of 32,768
blocked positions is 7e-5 of a token's attention."""

LEAST_MASK_DEPTH = 50.0
"""What most models do with: a shallower mask would gain nothing."""

_UNIT = Encoding.of_range(0, 1)


def device_encodings(
    config: ModelConfig,
    calibrated: Ranges,
    kv_scales: Sequence[tuple[float, float]],
) -> dict[str, Encoding]:
    """The encoding of every named result of the decoder, by the name the `Ops` seam gives it.

    Some are not what calibration saw, but what the graph's structure asks for: both halves of a rotated head and
    their concatenation are on one grid; sigmoids and softmaxes are 0 … 1; the mask is as deep as calibration asks
    for, with `HEADROOM` and `MASK_LEAD`, and masked scores reach down to it alone; keys and values are the cache's. All
    but the residual stream have `HEADROOM`.

    Args:
        config: the geometry.
        calibrated: what calibration saw.
        kv_scales: (key, value) scale of each layer's int8 cache.

    Raises:
        CalibrationError: a layer has no KV scale or a range is missing.
    """
    if len(kv_scales) != config.num_layers:
        raise CalibrationError(
            f"the cache has scales for {len(kv_scales)} layers; expected {config.num_layers}, one pair a layer: "
            "device graphs need an int8 KV cache, export with a recipe whose kv is int8"
        )
    tight = _of_the_stream(config)
    ranges = {
        name: (low, high) if name in tight else (HEADROOM * low, HEADROOM * high)
        for name, (low, high) in calibrated.seen.items()
    }
    found = {name: Encoding.of_range(low, high) for name, (low, high) in ranges.items()}
    for feed_forward, channels in calibrated.outliers.items():
        apart = f"{feed_forward}.{GATED_OUTLIERS}"
        found[apart] = replace(found[apart], channels=channels)
    depth = _mask_depth(calibrated, config.num_layers)
    found[ATTENTION_MASK] = mask_encoding(depth)
    for layer, (key_scale, value_scale) in enumerate(kv_scales):
        attention, mlp = attention_name(layer), mlp_name(layer)
        for rope in (f"{attention}.q_rope", f"{attention}.k_rope"):
            low, high = _union(ranges, f"{rope}.low", f"{rope}.high")
            found[rope] = found[f"{rope}.low"] = found[f"{rope}.high"] = Encoding.of_range(low, high)
        low, high = (end / math.sqrt(config.head_dim) for end in _union(ranges, f"{attention}.q_rope.low"))
        found[f"{attention}.q_scaled"] = Encoding.of_range(low, high)
        # A token's best score is above −depth by `MASK_LEAD`: what lies below −depth gets nothing and may be clipped.
        found[f"{attention}.masked_scores"] = Encoding.of_range(-depth, _union(ranges, f"{attention}.scores")[1])
        found[f"{attention}.weights"] = found[f"{mlp}.silu.sigmoid"] = _UNIT
        found[f"{attention}.k_cache"] = Encoding(float(np.float32(key_scale)), 128, 8)
        found[f"{attention}.v_cache"] = Encoding(float(np.float32(value_scale)), 128, 8)
    return found


def _of_the_stream(config: ModelConfig) -> set[str]:
    """What is added to the residual stream, and the stream, by name.

    One token a thousand times larger than the rest leaves these no steps to spare (SmolLM2: KL 0.017 without, 0.023
    with a headroom of 1.2). The table's range is its own, exactly.
    """
    modules = {row.module for row in weight_table(config).values() if row.role.writes_stream}
    sums = {name for layer in range(config.num_layers) for name in residual_names(layer)}
    return {find_weight(config, Role.EMBEDDING).module} | modules | sums


def _mask_depth(calibrated: Ranges, layers: int) -> float:
    gaps = [calibrated.mask_gaps.get(attention_name(layer)) for layer in range(layers)]
    known = [gap for gap in gaps if gap is not None]
    if len(known) < layers:
        raise CalibrationError(
            f"calibration saw the scores of {len(known)} of {layers} layers; calibrate and export again"
        )
    return math.ceil(max(LEAST_MASK_DEPTH, HEADROOM * max(known) + MASK_LEAD))


def _union(ranges: Mapping[str, tuple[float, float]], *names: str) -> tuple[float, float]:
    for name in names:
        if name not in ranges:
            raise CalibrationError(f"calibration gave no range for {name!r}; calibrate and export again")
    return min(ranges[n][0] for n in names), max(ranges[n][1] for n in names)
