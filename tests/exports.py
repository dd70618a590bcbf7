"""Tiny checkpoints with a vocabulary, and bundles made of them: each is made once a session and shared.

Whoever changes a bundle copies it first. Knows nothing about what tests look at.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from headrace.bundle.folder import Bundle, open_bundle
from headrace.bundle.weights import WeightStore
from headrace.exporter.job import export
from headrace.graph.emit_host import INT8_ACTIVATIONS, HostWeights, emit_host
from headrace.plan import plan_parts
from headrace.text.tokenizer_folder import save_tokenizer
from tests.text.vocabularies import TEXT, byte_level_metadata, sentencepiece_model
from tests.tiny import write_baichuan, write_llama, write_qwen2

LAYERS = 4  # so that five parts are possible
VOCAB = 420
CONTEXT = 200
PROMPT_LENGTH = 32
FLOAT_ARITHMETIC = 1  # MatMulNBits accuracy_level: float32 inside
SMALL = {
    "prompt_length": PROMPT_LENGTH, "context": CONTEXT, "windows": 2, "window_length": 48, "method": "nearest",
}  # fmt: skip
# A context of twice a step would be refused; S 32, 8 and 1 over 96 and 256.
PHONE = {
    "parts": 3,
    "prompt_length": (32, 8),
    "context": (96, 256),
    "targets": ("snapdragon-8-elite",),
    "keep_onnx": True,
}


def _mixed(scales: str, tied: bool) -> dict[str, Any]:
    heads = "" if tied else "lm_head|"
    return {
        "name": f"mixed-{scales}",
        "rules": [
            {"match": match, "bits": bits, "block": block, "lpbq": scales == "lpbq" and bits < 8, "method": "nearest"}
            for match, bits, block in (
                ("embed_tokens", 6, 16),
                (f"{heads}layers.0.self_attn.(k|v)_proj", 5, 32),
                ("layers.0.(self_attn.q_proj|mlp.down_proj)", 6, 16),
                ("layers.0.self_attn.o_proj", 4, 16),
                ("layers.1.mlp.down_proj", 6, 32),
                ("layers.1.", 5, 16),
                ("_proj", 8, "channel"),
            )
        ],
    }


class Exports:
    """Checkpoints and bundles below `root`, by kind.

    gqa     llama, 4 query heads over 2 KV heads, its own head, SentencePiece, no turn format
    tied    llama whose head is the embedding, byte-level vocabulary with a ChatML template
    mha     Baichuan2: W_pack, NormHead, SentencePiece, turn ids
    wide    llama with rows that 256 divides
    phone   mha with two layers and calm's weights: small enough for Qualcomm's compiler and emulator
    qwen2   biases on q, k and v
    calm    gqa with smaller weights: attention and logits are not sharper than a trained model's
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.text = root / "text.txt"
        self.text.write_text("\n".join(TEXT) * 3, encoding="utf-8")
        self._bundles: dict[str, Path] = {}

    def checkpoint(self, kind: str = "gqa") -> Path:
        """A Hugging Face folder."""
        folder = self.root / f"{kind}-checkpoint"
        if not folder.exists():
            write_checkpoint(folder, kind)
        return folder

    def bundle(self, kind: str = "gqa", **options: Any) -> Path:
        """A bundle; `options` are those of `headrace.export`."""
        key = json.dumps([kind, options], sort_keys=True)
        if key not in self._bundles:
            out = self.root / f"{kind}-{len(self._bundles)}.bundle"
            self._bundles[key] = export(
                self.checkpoint(kind), out, **{**SMALL, "calibration": [self.text], **options}
            )  # fmt: skip
        return self._bundles[key]

    def mixed(self, scales: str, kind: str = "gqa") -> str:
        """A recipe's file: tables of 5 and 6 bits, linears of 4, 5, 6 and 8, some of one input on the same grid; blocks
        have `scales` "lpbq" or "float16"."""
        path = self.root / f"mixed-{scales}-{kind}.json"
        path.write_text(json.dumps(_mixed(scales, kind == "tied")), encoding="utf-8")
        return str(path)

    def copy(self, folder: Path, kind: str = "gqa", **options: Any) -> Path:
        """A bundle of one's own."""
        return Path(shutil.copytree(self.bundle(kind, **options), folder))


def write_checkpoint(folder: Path, kind: str = "gqa", **shape: Any) -> Path:
    """A checkpoint of a kind of `Exports` (and a tiny one of any other shape)."""
    if kind in ("mha", "phone"):
        layers = 2 if kind == "phone" else LAYERS
        write_baichuan(folder, 2, **{"layers": layers, "vocab": VOCAB, **shape})
    elif kind == "qwen2":
        write_qwen2(folder, **{"layers": LAYERS, "vocab": VOCAB, **shape})
    elif kind == "wide":
        write_llama(folder, **{"layers": 2, "vocab": VOCAB, "hidden": 256, "head_dim": 64, "ffn": 512, **shape})
    else:
        write_llama(folder, **{"layers": LAYERS, "vocab": VOCAB, "tied": kind == "tied", **shape})
    if kind in ("calm", "phone"):
        tensors = load_file(folder / "model.safetensors")
        calmer = {name: t * np.float32(0.4) if t.ndim == 2 else t for name, t in tensors.items()}
        save_file(calmer, folder / "model.safetensors")
    if kind == "tied":
        save_tokenizer(folder, byte_level_metadata(), folder)
    else:
        (folder / "tokenizer.model").write_bytes(sentencepiece_model())
        (folder / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": False}), encoding="utf-8")
    if kind in ("mha", "phone"):
        turns = {
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            "user_token_id": 195,
            "assistant_token_id": 196,
        }
        (folder / "generation_config.json").write_text(json.dumps(turns), encoding="utf-8")
    return folder


def contents(bundle: Path) -> dict[str, bytes]:
    """Every file of a folder, by path."""
    return {p.relative_to(bundle).as_posix(): p.read_bytes() for p in sorted(bundle.rglob("*")) if p.is_file()}


def opened_store(bundle: Bundle) -> WeightStore:
    """A bundle's weights."""
    return bundle.weights()


def re_emitted(
    path: Path,
    folder: Path,
    *,
    parts: int | None = None,
    kv_scales: Sequence[tuple[float, float]] | None = None,
    accuracy_level: int = FLOAT_ARITHMETIC,
) -> Bundle:
    """The same weights under graphs written anew into `folder`: another split, cache or arithmetic."""
    bundle = open_bundle(path)
    store = opened_store(bundle)
    (folder / "weights").mkdir(parents=True)
    for file in (path / "weights").iterdir():
        os.link(file, folder / "weights" / file.name)
    plan = plan_parts(bundle.config, parts or len(bundle.parts))
    scales = tuple(bundle.kv_scales if kv_scales is None else kv_scales)
    for part in plan:
        weights = HostWeights(store.tensors, store.grids, scales)
        emit_host(bundle.config, part, weights, accuracy_level=accuracy_level).save(folder / f"{part.name}.onnx")
    return bundle._replace(root=folder, parts=plan, kv_scales=scales)


__all__ = [
    "CONTEXT",
    "INT8_ACTIVATIONS",
    "LAYERS",
    "PHONE",
    "PROMPT_LENGTH",
    "SMALL",
    "VOCAB",
    "Exports",
    "contents",
    "opened_store",
    "re_emitted",
    "write_checkpoint",
]
