"""Where a canonical weight comes from: the table an architecture writes, as data.

Canonical names and shapes are those of model/weights.py. This file knows neither files nor arrays; checkpoint/ carries
the table out.
"""

from __future__ import annotations

from dataclasses import dataclass

from headrace.config import ModelConfig
from headrace.model.weights import Role, weight_table

__all__ = ["Source", "llama_sources"]


@dataclass(frozen=True)
class Source:
    """A canonical weight as rows of one tensor of the checkpoint.

    Attributes:
        name: the checkpoint's tensor.
        shape: the shape that tensor must have.
        rows: first row and the row after the last one that belong to the weight; None for all.
        unit_rows: each row is divided by its L2 norm (Baichuan2's NormHead).
    """

    name: str
    shape: tuple[int, ...]
    rows: tuple[int, int] | None = None
    unit_rows: bool = False


def llama_sources(config: ModelConfig) -> dict[str, Source]:
    """The plain Llama layout: one tensor per weight, under "model." (a head of its own has no prefix)."""
    table = {}
    for name, weight in weight_table(config).items():
        own_head = weight.role is Role.HEAD and weight.stored_as == name
        table[name] = Source(name if own_head else f"model.{weight.stored_as}", weight.shape)
    return table
