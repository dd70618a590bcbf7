"""Where a canonical weight comes from: the table an architecture writes, as data.

Canonical names are those of model/decoder.py: Hugging Face's Llama names without the leading "model.". This file
knows neither files nor arrays; checkpoint/ carries the table out.
"""

from __future__ import annotations

from dataclasses import dataclass

from headrace.config import ModelConfig

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
    """The plain Llama layout: one tensor per weight, under "model." (the head has no prefix).

    A tied head is the embedding's tensor.
    """
    h, f = config.hidden_size, config.intermediate_size
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm": (h,),
        "self_attn.q_proj": (config.query_size, h),
        "self_attn.k_proj": (config.kv_size, h),
        "self_attn.v_proj": (config.kv_size, h),
        "self_attn.o_proj": (h, config.query_size),
        "post_attention_layernorm": (h,),
        "mlp.gate_proj": (f, h),
        "mlp.up_proj": (f, h),
        "mlp.down_proj": (h, f),
    }
    embedding = Source("model.embed_tokens.weight", (config.vocab_size, h))
    table = {"embed_tokens.weight": embedding}
    for i in range(config.num_layers):
        for part, shape in layer.items():
            name = f"layers.{i}.{part}.weight"
            table[name] = Source(f"model.{name}", shape)
    table["norm.weight"] = Source("model.norm.weight", (h,))
    table["lm_head.weight"] = embedding if config.tied_head else Source("lm_head.weight", (config.vocab_size, h))
    return table
