"""Write a checkpoint of Baichuan2-7B's geometry, or any other of its design, with random weights.

    python benchmarks/make_checkpoint.py OUT [--layers 8] [--format bin] [--tokenizer tokenizer.model]

The folder is what a hub would give: config.json, generation_config.json with turn ids, a SentencePiece vocabulary
padded to the model's size, bfloat16 shards with their index, W_pack and NormHead. Weights are random, with what makes
real activations hard to quantize: a few channels of the residual stream 20 to 100 times larger than the others, and
begin tokens that are far larger still in those channels. Tensors are drawn in stretches of rows and written as they
come; a .bin holds one tensor at a time. Run from the repository's root.
"""

from __future__ import annotations

import argparse
import json
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from sentencepiece import sentencepiece_model_pb2

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.text.vocabularies import sentencepiece_model
from tests.tiny import write_torch

BEGIN, END, USER, ASSISTANT = 1, 2, 195, 196
SPREAD = 0.02  # standard deviation of every matrix, as transformers are initialised
LOUD_CHANNELS = 6  # of the residual stream
LOUDEST, LEAST_LOUD = 100.0, 20.0  # times the other channels
MASSIVE = 40.0  # of the begin tokens' loud channels, times those of other tokens
ROWS_BYTES = 64 << 20  # float32 bytes that are drawn at once
SHARD_BYTES = 2 << 30


@dataclass(frozen=True)
class Geometry:
    """A Baichuan2 of the 7B design; the defaults are Baichuan2-7B's own."""

    layers: int = 32
    hidden: int = 4096
    heads: int = 32
    ffn: int = 11008
    vocab: int = 125696
    context: int = 4096

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Shapes by Hugging Face's names, in the order of computation."""
        h, f = self.hidden, self.ffn
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab, h)}
        for i in range(self.layers):
            p = f"model.layers.{i}"
            shapes |= {
                f"{p}.input_layernorm.weight": (h,),
                f"{p}.self_attn.W_pack.weight": (3 * h, h),
                f"{p}.self_attn.o_proj.weight": (h, h),
                f"{p}.post_attention_layernorm.weight": (h,),
                f"{p}.mlp.gate_proj.weight": (f, h),
                f"{p}.mlp.up_proj.weight": (f, h),
                f"{p}.mlp.down_proj.weight": (h, f),
            }
        return shapes | {"model.norm.weight": (h,), "lm_head.weight": (self.vocab, h)}

    def config(self) -> dict[str, object]:
        """config.json."""
        return {
            "architectures": ["BaichuanForCausalLM"],
            "model_type": "baichuan",
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": self.context,
            "model_max_length": self.context,
            "tie_word_embeddings": False,
            "vocab_size": self.vocab,
            "hidden_act": "silu",
            "torch_dtype": "bfloat16",
            "bos_token_id": BEGIN,
            "eos_token_id": END,
            "pad_token_id": 0,
        }


def loudness(hidden: int) -> NDArray[np.float32]:
    """By how much each channel of the residual stream is larger than most: 1, but for a few."""
    rng = np.random.default_rng(0)
    gains = np.ones(hidden, np.float32)
    count = min(LOUD_CHANNELS, hidden)
    gains[rng.choice(hidden, count, replace=False)] = np.geomspace(LEAST_LOUD, LOUDEST, count)
    return gains


def drawn(name: str, shape: tuple[int, ...], loud: NDArray[np.float32]) -> Iterator[NDArray[ml_dtypes.bfloat16]]:
    """A tensor's rows, a stretch at a time; the same ones whenever they are asked for."""
    rng = np.random.Generator(np.random.SFC64(zlib.crc32(name.encode())))
    if len(shape) == 1:
        # A trained norm tames the loud channels, or nothing else would be heard after it.
        gains = rng.uniform(0.5, 1.5, shape[0]) / np.sqrt(loud)
        yield gains.astype(ml_dtypes.bfloat16)
        return
    rows, columns = shape
    step = max(1, ROWS_BYTES // (4 * columns))
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        block = rng.standard_normal((stop - start, columns), np.float32) * np.float32(SPREAD)
        if name.endswith("embed_tokens.weight"):
            block *= loud
            for token in (BEGIN, USER):
                if start <= token < stop:
                    block[token - start, loud > 1] *= np.float32(MASSIVE)
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            block *= loud[start:stop, None]  # what is added to the stream is loud in the same channels
        yield block.astype(ml_dtypes.bfloat16)


def shards(shapes: dict[str, tuple[int, ...]], limit: int) -> list[list[str]]:
    """Tensor names in files of at most `limit` bytes, but for one tensor that is larger."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        nbytes = 2 * int(np.prod(shape))
        if groups[-1] and size + nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += nbytes
    return groups


def write_safetensors(path: Path, shapes: dict[str, tuple[int, ...]], loud: NDArray[np.float32]) -> None:
    """One shard, rows written as they are drawn."""
    header, at = {}, 0
    for name, shape in shapes.items():
        end = at + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            for block in drawn(name, shape, loud):
                out.write(block.view(np.uint8).data)


def write_weights(folder: Path, geometry: Geometry, form: str, limit: int) -> None:
    """All shards, and the index that says which tensor is in which."""
    shapes, loud = geometry.tensors(), loudness(geometry.hidden)
    stem, suffix = {"safetensors": ("model", "safetensors"), "bin": ("pytorch_model", "bin")}[form]
    groups = shards(shapes, limit)
    where = {}
    for number, names in enumerate(groups, 1):
        file = folder / f"{stem}-{number:05}-of-{len(groups):05}.{suffix}"
        if form == "safetensors":
            write_safetensors(file, {name: shapes[name] for name in names}, loud)
        else:
            write_torch(file, {name: np.concatenate(list(drawn(name, shapes[name], loud))) for name in names})
        where |= dict.fromkeys(names, file.name)
        print(f"{file.name}: {file.stat().st_size / 1e9:.2f} GB", flush=True)
    total = sum(2 * int(np.prod(shape)) for shape in shapes.values())
    write_json(folder / f"{stem}.{suffix}.index.json", {"metadata": {"total_size": total}, "weight_map": where})


def padded_vocabulary(model: bytes, size: int) -> bytes:
    """A SentencePiece vocabulary with more pieces at its end, each made of two of its own, up to `size`."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    known = {piece.piece for piece in proto.pieces}
    plain = [piece.piece for piece in proto.pieces if piece.type == piece.NORMAL]
    single = [piece for piece in plain if len(piece) == 1]
    lowest = min(piece.score for piece in proto.pieces)
    pairs = (a + b for pool in (single, plain) for a, b in product(pool, pool))
    while len(proto.pieces) < size:
        pair = next(pairs, None)
        if pair is None:
            raise SystemExit(f"error: {len(proto.pieces)} pieces give no {size}; give a larger --tokenizer")
        if pair not in known:
            known.add(pair)
            lowest -= 1
            proto.pieces.add(piece=pair, score=lowest)
    proto.trainer_spec.vocab_size = len(proto.pieces)
    data: bytes = proto.SerializeToString()
    return data


def write_json(path: Path, value: object) -> None:
    """One JSON file."""
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")


def make_checkpoint(
    folder: Path,
    geometry: Geometry,
    *,
    form: str = "safetensors",
    limit: int = SHARD_BYTES,
    tokenizer: Path | None = None,
) -> None:
    """Write everything into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = sentencepiece_model() if tokenizer is None else tokenizer.read_bytes()
    (folder / "tokenizer.model").write_bytes(padded_vocabulary(vocabulary, geometry.vocab))
    write_json(folder / "tokenizer_config.json", {"add_bos_token": False, "bos_token": "<s>", "eos_token": "</s>"})
    turns = {"bos_token_id": BEGIN, "eos_token_id": END, "pad_token_id": 0, "user_token_id": USER}
    sampling = {"do_sample": True, "temperature": 0.3, "top_k": 5, "top_p": 0.85, "repetition_penalty": 1.05}
    write_json(folder / "generation_config.json", {**turns, "assistant_token_id": ASSISTANT, **sampling})
    write_json(folder / "config.json", geometry.config())
    write_weights(folder, geometry, form, limit)


def main() -> None:
    """Read the options and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    for name, default in vars(Geometry()).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--format", choices=("safetensors", "bin"), default="safetensors")
    parser.add_argument("--shard-bytes", type=int, default=SHARD_BYTES)
    parser.add_argument("--tokenizer", type=Path, help="a SentencePiece model to pad; a small one is made by default")
    args = parser.parse_args()
    geometry = Geometry(args.layers, args.hidden, args.heads, args.ffn, args.vocab, args.context)
    make_checkpoint(args.out, geometry, form=args.format, limit=args.shard_bytes, tokenizer=args.tokenizer)


if __name__ == "__main__":
    main()
