"""Whether a checkpoint is already quantized, told by its tensors, and by which method, told by its config.

A section in config.json alone says little: it stays behind when quantized weights are merged back to floats. Knows the
marks that GPTQ, AWQ, bitsandbytes and the others leave, and reads none of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from headrace.checkpoint.tensor import ELEMENTS, FLOATS, LazyTensor
from headrace.errors import shown

__all__ = ["quantization"]

SECTIONS = ("quantization_config", "compression_config", "quantization")  # the last is MLX's

# The last part of a tensor's name that only a quantized checkpoint has, and who writes it when config.json says
# nothing, the telling ones first.
MARKS = {
    "g_idx": "gptq",
    "qweight": "gptq or awq",
    "qzeros": "gptq or awq",
    "q_weight": "exl2",
    "absmax": "bitsandbytes",
    "quant_map": "bitsandbytes",
    "nested_absmax": "bitsandbytes",
    "SCB": "bitsandbytes",
    "weight_packed": "compressed-tensors",
    "weight_shape": "compressed-tensors",
    "weight_scale_inv": "fp8",
    "weight_scale_2": "modelopt",
    "weight_scale": "compressed-tensors or fp8",
    "codebooks": "aqlm",
    "W_q": "hqq",
    "scales": "mlx or gptq",
}


def quantization(config: Mapping[str, Any], tensors: Mapping[str, LazyTensor]) -> str | None:
    """The method as a message names it, "gptq, 4 bits", when the weights are not floats any more; None when they are.

    Args:
        config: config.json.
        tensors: by the names in the files.
    """
    endings = {name.rsplit(".", 1)[-1] for name in tensors}
    marks = [method for mark, method in MARKS.items() if mark in endings]
    if any(".quant_state." in name for name in tensors):
        marks.append("bitsandbytes")
    stored = sorted({tensor.dtype for name, tensor in tensors.items() if _is_coded(name, tensor)})
    if not marks and not stored:
        return None
    section: Mapping[str, Any] = next((config[key] for key in SECTIONS if isinstance(config.get(key), Mapping)), {})
    method = section.get("quant_method")
    if method is None and any(str(key).startswith("load_in_") for key in section):
        method = "bitsandbytes"
    words = [shown(method).strip("'") if method is not None else (marks or ["stored as codes"])[0]]
    bits = section.get("bits", section.get("w_bit", 4 if section.get("load_in_4bit") else None))
    if isinstance(bits, int):
        words.append(f"{shown(bits)} bits")
    return ", ".join(words + [f"tensors of {dtype}" for dtype in stored])


def _is_coded(name: str, tensor: LazyTensor) -> bool:
    """A weight that is no float; masks and positions are integers too, and are no weights."""
    return name.endswith(".weight") and tensor.dtype in ELEMENTS and tensor.dtype not in FLOATS
