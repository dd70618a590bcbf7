"""Seeded tiny decoders, written as real checkpoint folders and files.

    write_llama, write_baichuan,   a Hugging Face folder: config.json, generation_config.json, safetensors or torch .bin
    write_qwen2, write_mistral
    write_gguf                     a GGUF, rows in the order llama.cpp's converter gives them
    write_torch                    one .bin file as torch.save lays it out, without torch
    rewrite_as_baichuan            any open llama checkpoint as a Baichuan (v1) folder

Knows nothing about how headrace reads them.
"""

from __future__ import annotations

import json
import pickle
import struct
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from headrace.checkpoint import Checkpoint

Tensors = dict[str, NDArray[Any]]

DTYPES: dict[str, Any] = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
TORCH_STORAGES = {"float32": "FloatStorage", "float16": "HalfStorage", "bfloat16": "BFloat16Storage"}
WEIGHT_SPREAD = 0.3  # wide enough that attention is not uniform and logits differ by whole units
MAX_POSITIONS = 512


@dataclass(frozen=True)
class Shape:
    """A tiny decoder's geometry."""

    layers: int = 3
    hidden: int = 64
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    ffn: int = 96
    vocab: int = 160


QKV, OUTPUT, MLP = ("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj", "down_proj")  # with a bias


def llama_tensors(seed: int, shape: Shape, tied: bool, biases: Sequence[str] = ()) -> Tensors:
    """Random weights under Hugging Face's Llama names, float32; linears named in `biases` have one."""
    rng = np.random.default_rng(seed)

    def matrix(rows: int, columns: int) -> NDArray[np.float32]:
        return rng.normal(0, WEIGHT_SPREAD, (rows, columns)).astype(np.float32)

    def gains() -> NDArray[np.float32]:
        return rng.uniform(0.5, 1.5, shape.hidden).astype(np.float32)

    tensors: Tensors = {"model.embed_tokens.weight": matrix(shape.vocab, shape.hidden)}
    for i in range(shape.layers):
        p = f"model.layers.{i}"
        tensors |= {
            f"{p}.input_layernorm.weight": gains(),
            f"{p}.self_attn.q_proj.weight": matrix(shape.heads * shape.head_dim, shape.hidden),
            f"{p}.self_attn.k_proj.weight": matrix(shape.kv_heads * shape.head_dim, shape.hidden),
            f"{p}.self_attn.v_proj.weight": matrix(shape.kv_heads * shape.head_dim, shape.hidden),
            f"{p}.self_attn.o_proj.weight": matrix(shape.hidden, shape.heads * shape.head_dim),
            f"{p}.post_attention_layernorm.weight": gains(),
            f"{p}.mlp.gate_proj.weight": matrix(shape.ffn, shape.hidden),
            f"{p}.mlp.up_proj.weight": matrix(shape.ffn, shape.hidden),
            f"{p}.mlp.down_proj.weight": matrix(shape.hidden, shape.ffn),
        }
    tensors["model.norm.weight"] = gains()
    if not tied:
        tensors["lm_head.weight"] = matrix(shape.vocab, shape.hidden)
    for name in [name for name in tensors if name.split(".")[-2] in biases]:
        size = len(tensors[name])
        tensors[name.replace(".weight", ".bias")] = rng.normal(0, 1, size).astype(np.float32)
    return tensors


def write_llama(
    folder: Path,
    *,
    seed: int = 0,
    layers: int = 3,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    ffn: int = 96,
    vocab: int = 160,
    tied: bool = False,
    dtype: str = "float32",
    shards: int = 1,
    format: str = "safetensors",
    rope_scaling: Mapping[str, Any] | None = None,
    attention_bias: bool = False,
    mlp_bias: bool = False,
) -> Path:
    """A Llama folder."""
    biases = ((*QKV, *OUTPUT) if attention_bias else ()) + (MLP if mlp_bias else ())
    shape = Shape(layers, hidden, heads, kv_heads, head_dim, ffn, vocab)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "rms_norm_eps": 1e-5,
        "rope_theta": 50000.0,
        "rope_scaling": rope_scaling,
        "max_position_embeddings": MAX_POSITIONS,
        "tie_word_embeddings": tied,
        "vocab_size": vocab,
        "hidden_act": "silu",
        "torch_dtype": dtype,
        "attention_bias": attention_bias,
        "mlp_bias": mlp_bias,
    }
    tensors = llama_tensors(seed, shape, tied, biases)
    return write_folder(folder, config, tensors, dtype=dtype, shards=shards, format=format)


def write_qwen2(folder: Path, *, tied: bool = False, seed: int = 0, dtype: str = "float32", **changes: Any) -> Path:
    """A Qwen2 folder: biases on q, k and v; `changes` to config.json (its own names), or to `Shape`."""
    shape = Shape(**{name: changes.pop(name) for name in list(changes) if name in Shape.__dataclass_fields__})
    config = _shared_config(shape, tied, dtype) | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
    config |= {"use_sliding_window": False, "sliding_window": 32, "max_window_layers": 21} | changes
    tensors = llama_tensors(seed, shape, tied, QKV)
    return write_folder(folder, config, tensors, dtype=dtype, shards=1, format="safetensors")


def write_mistral(folder: Path, *, tied: bool = False, seed: int = 0, dtype: str = "float32", **changes: Any) -> Path:
    """A Mistral folder without a sliding window; `changes` to config.json (its own names), or to `Shape`."""
    shape = Shape(**{name: changes.pop(name) for name in list(changes) if name in Shape.__dataclass_fields__})
    config = _shared_config(shape, tied, dtype) | {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    config |= {"head_dim": shape.head_dim, "sliding_window": None} | changes
    tensors = llama_tensors(seed, shape, tied)
    return write_folder(folder, config, tensors, dtype=dtype, shards=1, format="safetensors")


def _shared_config(shape: Shape, tied: bool, dtype: str) -> dict[str, Any]:
    return {
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "rms_norm_eps": 1e-6,
        "rope_theta": 20000.0,
        "max_position_embeddings": MAX_POSITIONS,
        "tie_word_embeddings": tied,
        "vocab_size": shape.vocab,
        "hidden_act": "silu",
        "torch_dtype": dtype,
    }


def write_baichuan(
    folder: Path,
    version: int = 2,
    *,
    seed: int = 0,
    layers: int = 3,
    hidden: int = 64,
    heads: int = 4,
    ffn: int = 96,
    vocab: int = 160,
    dtype: str = "float32",
    shards: int = 1,
    format: str = "safetensors",
) -> Path:
    """A Baichuan folder: version 1 has a plain head, version 2 has NormHead."""
    tensors = llama_tensors(seed, Shape(layers, hidden, heads, heads, hidden // heads, ffn, vocab), tied=False)
    for i in range(layers):
        p = f"model.layers.{i}.self_attn"
        tensors[f"{p}.W_pack.weight"] = np.concatenate([tensors.pop(f"{p}.{part}_proj.weight") for part in "qkv"])
    config = _baichuan_config(version, layers, hidden, heads, ffn, vocab, dtype)
    return write_folder(folder, config, tensors, dtype=dtype, shards=shards, format=format)


def write_folder(
    folder: Path, config: Mapping[str, Any], tensors: Tensors, *, dtype: str, shards: int, format: str
) -> Path:
    """config.json and the weights, in `shards` files."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0})
    stem, suffix = {"safetensors": ("model", "safetensors"), "bin": ("pytorch_model", "bin")}[format]
    names = list(tensors)
    groups = [names[i::shards] for i in range(shards)]
    for number, group in enumerate(groups, 1):
        part = {name: tensors[name].astype(DTYPES[dtype]) for name in group}
        file = folder / _shard_name(stem, suffix, number, shards)
        if format == "bin":
            write_torch(file, part)
        else:
            save_file(part, file)
    if shards > 1:
        weight_map = {name: _shard_name(stem, suffix, n, shards) for n, group in enumerate(groups, 1) for name in group}
        _write_json(folder / f"{stem}.{suffix}.index.json", {"metadata": {}, "weight_map": weight_map})
    return folder


def write_gguf(
    path: Path,
    *,
    seed: int = 0,
    layers: int = 3,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    ffn: int = 96,
    vocab: int = 160,
    tied: bool = False,
    type: str = "F32",
    linear_scaling: float | None = None,
    rope_factors: NDArray[np.float32] | None = None,
    architecture: str = "llama",
    biases: Sequence[str] = (),
) -> Path:
    """The weights of `write_llama` (`write_baichuan`, `write_qwen2`) of the same seed and shape as a GGUF.

    `type`: F32, F16, BF16, Q4_0 … Q8_0 for matrices; `biases`: as for `llama_tensors`.
    """
    tensors = llama_tensors(seed, Shape(layers, hidden, heads, kv_heads, head_dim, ffn, vocab), tied, biases)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(layers)
    writer.add_context_length(MAX_POSITIONS)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(50000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    if linear_scaling is not None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(linear_scaling)
    if rope_factors is not None:
        writer.add_tensor("rope_freqs.weight", rope_factors)
    writer.add_vocab_size(vocab)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<{i}>" for i in range(vocab)])
    kind = gguf.GGMLQuantizationType[type]
    for name, tensor in tensors.items():
        if architecture != "qwen2" and "q_proj" in name:
            tensor = permute(tensor, heads)
        elif architecture != "qwen2" and "k_proj" in name:
            tensor = permute(tensor, kv_heads)
        if tensor.ndim == 2:
            writer.add_tensor(_gguf_name(name), gguf.quants.quantize(tensor, kind), raw_dtype=kind)
        else:
            writer.add_tensor(_gguf_name(name), tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def permute(weight: NDArray[Any], heads: int) -> NDArray[Any]:
    """llama.cpp's order of a q or k matrix's rows, or of a bias: the halves of a head interleaved."""
    by_half = weight.reshape(heads, 2, len(weight) // heads // 2, *weight.shape[1:])
    return by_half.swapaxes(1, 2).reshape(weight.shape)


@dataclass(frozen=True)
class TorchTensor:
    """A tensor of a .bin file as a view of a storage, in elements."""

    storage: str
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int = 0


def write_torch(path: Path, tensors: Mapping[str, NDArray[Any]]) -> None:
    """A state dict of contiguous tensors, each with a storage of its own."""
    views = {name: _contiguous(str(i), t.shape) for i, (name, t) in enumerate(tensors.items())}
    write_torch_views(path, views, ((str(i), t) for i, t in enumerate(tensors.values())), _kinds(tensors.values()))


def write_torch_views(
    path: Path,
    views: Mapping[str, TorchTensor],
    storages: Iterable[tuple[str, NDArray[Any]]],
    kinds: Sequence[tuple[str, int]],
) -> None:
    """A state dict whose tensors are any views of any storages.

    Args:
        path: the file.
        views: tensors by name.
        storages: key and elements, in the order of `kinds`; taken one at a time.
        kinds: dtype name and element count of storage "0", "1", ….
    """
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        _store(archive, f"{path.stem}/data.pkl", torch_pickle(views, kinds))
        _store(archive, f"{path.stem}/byteorder", b"little")
        for key, elements in storages:
            _store(archive, f"{path.stem}/data/{key}", np.ascontiguousarray(elements).view(np.uint8).data)
        _store(archive, f"{path.stem}/version", b"3\n")


def torch_pickle(views: Mapping[str, TorchTensor], kinds: Sequence[tuple[str, int]]) -> bytes:
    """The pickle of an OrderedDict of tensors, protocol 2, opcode by opcode as torch.save writes it."""
    ordered_dict = b"ccollections\nOrderedDict\n)R"

    def text(value: str) -> bytes:
        data = value.encode()
        return pickle.BINUNICODE + struct.pack("<I", len(data)) + data

    def integer(value: int) -> bytes:
        if 0 <= value < 1 << 31:
            return pickle.BININT + struct.pack("<i", value)
        data = value.to_bytes(9, "little", signed=True)
        return pickle.LONG1 + bytes([len(data)]) + data

    def tuple_of(values: Iterable[int]) -> bytes:
        return b"(" + b"".join(integer(v) for v in values) + b"t"

    body = b""
    for name, view in views.items():
        dtype, count = kinds[int(view.storage)]
        storage_class = f"ctorch\n{TORCH_STORAGES[dtype]}\n".encode()
        storage = b"(" + text("storage") + storage_class + text(view.storage) + text("cpu") + integer(count) + b"tQ"
        described = storage + integer(view.offset) + tuple_of(view.size) + tuple_of(view.stride)
        body += text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n(" + described + b"\x89" + ordered_dict + b"tR"
    metadata = b"}" + text("_metadata") + ordered_dict + b"sb"  # an attribute of the dict
    return b"\x80\x02" + ordered_dict + b"(" + body + b"u" + metadata + b"."


def rewrite_as_baichuan(checkpoint: Checkpoint, folder: Path, shards: int = 2) -> Path:
    """A llama checkpoint as Baichuan (v1): W_pack with KV heads repeated, plain head, float32 .bin shards.

    One storage is in memory at a time. A tied head shares the embedding's storage, as torch.save would write it.
    """
    config = checkpoint.config
    h, groups = config.hidden_size, config.group_size
    if config.query_size != h:
        raise ValueError(f"Baichuan needs heads · head_dim = hidden, not {config.query_size} = {h}")
    folder.mkdir(parents=True, exist_ok=True)
    raw = _baichuan_config(
        1, config.num_layers, h, config.num_heads, config.intermediate_size, config.vocab_size, "float32"
    )
    raw |= {"rms_norm_eps": config.rms_norm_eps, "rope_theta": config.rope_theta}
    raw |= {"max_position_embeddings": config.max_context, "model_max_length": config.max_context}
    _write_json(folder / "config.json", raw)
    outer = ["embed_tokens.weight", "norm.weight"] + ([] if config.tied_head else ["lm_head.weight"])
    first = [name for name in checkpoint.names if name in outer]
    packed = [name.replace("q_proj", "W_pack") for name in checkpoint.names if name not in first and "layers." in name]
    rest = [name for name in packed if "k_proj" not in name and "v_proj" not in name]
    groups_of_names = [first, *(rest[i :: shards - 1] for i in range(shards - 1))]

    def repeated(name: str) -> NDArray[np.float32]:
        heads = checkpoint.tensor(name).load().reshape(config.num_kv_heads, config.head_dim, h)
        return np.repeat(heads, groups, axis=0).reshape(h, h)

    def read(name: str) -> NDArray[np.float32]:
        if "W_pack" not in name:
            return checkpoint.tensor(name).load()
        q, k, v = (name.replace("W_pack", f"{part}_proj") for part in "qkv")
        return np.concatenate([checkpoint.tensor(q).load(), repeated(k), repeated(v)])

    def size(name: str) -> tuple[int, ...]:
        return (3 * h, h) if "W_pack" in name else checkpoint.tensor(name).shape

    def storages(names: Sequence[str]) -> Iterator[tuple[str, NDArray[np.float32]]]:
        for i, name in enumerate(names):
            yield str(i), read(name)

    weight_map = {}
    for number, names in enumerate(groups_of_names, 1):
        views = {_hugging_face(name): _contiguous(str(i), size(name)) for i, name in enumerate(names)}
        if number == 1 and config.tied_head:
            views["lm_head.weight"] = views["model.embed_tokens.weight"]
        file = folder / _shard_name("pytorch_model", "bin", number, shards)
        write_torch_views(file, views, storages(names), [("float32", int(np.prod(size(name)))) for name in names])
        weight_map |= dict.fromkeys(views, file.name)
    _write_json(folder / "pytorch_model.bin.index.json", {"metadata": {}, "weight_map": weight_map})
    return folder


def _baichuan_config(
    version: int, layers: int, hidden: int, heads: int, ffn: int, vocab: int, dtype: str
) -> dict[str, Any]:
    return {
        "architectures": [{1: "BaiChuanForCausalLM", 2: "BaichuanForCausalLM"}[version]],
        "model_type": "baichuan",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": MAX_POSITIONS,
        "model_max_length": MAX_POSITIONS,
        "tie_word_embeddings": False,
        "vocab_size": vocab,
        "hidden_act": "silu",
        "torch_dtype": dtype,
    }


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")


def _shard_name(stem: str, suffix: str, number: int, count: int) -> str:
    return f"{stem}.{suffix}" if count == 1 else f"{stem}-{number:05}-of-{count:05}.{suffix}"


def _hugging_face(name: str) -> str:
    return name if name == "lm_head.weight" else f"model.{name}"


def _gguf_name(name: str) -> str:
    parts = {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "model.layers": "blk",
        "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    for theirs, ours in parts.items():
        name = name.replace(theirs, ours)
    return name


def _contiguous(storage: str, size: tuple[int, ...]) -> TorchTensor:
    stride, step = [], 1
    for n in reversed(size):
        stride.append(step)
        step *= n
    return TorchTensor(storage, size, tuple(reversed(stride)))


def _kinds(arrays: Iterable[NDArray[Any]]) -> list[tuple[str, int]]:
    return [(str(array.dtype), array.size) for array in arrays]


def _store(archive: zipfile.ZipFile, name: str, data: Any) -> None:
    """One stored member whose bytes begin at a multiple of 64, padded in the extra field as torch does."""
    info = zipfile.ZipInfo(name)
    begin = archive.fp.tell() + 30 + len(name) + 4  # type: ignore[union-attr]
    padding = -begin % 64
    info.extra = b"FB" + struct.pack("<H", padding) + b"Z" * padding
    archive.writestr(info, data)
