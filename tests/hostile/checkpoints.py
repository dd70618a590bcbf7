"""Hostile checkpoints: each reader's format written with lies in it, or a good file damaged.

Half of the inputs are built field by field, so that checks behind the first ones are reached; the others are a good
file with bytes changed.
"""

from __future__ import annotations

import json
import math
import pickle
import shutil
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from headrace.checkpoint import LazyTensor, open_checkpoint
from headrace.checkpoint.gguf_file import read_gguf
from headrace.checkpoint.lora import adapted
from headrace.checkpoint.safetensors_file import read_safetensors
from headrace.checkpoint.torch_file import read_torch
from tests.checkpoint.torch_writer import Stored, write_legacy, write_zip
from tests.hostile.chance import NAMES, NUMBERS, Good, Rng, any_json, damaged
from tests.hostile.format import Format
from tests.tiny import write_gguf, write_llama

READ_LIMIT = 1 << 16  # elements read of one tensor


def good_files(folder: Path) -> Good:
    """One small good file of each kind, by the name it has in a folder."""
    llama = write_llama(
        folder / "llama", layers=1, hidden=16, heads=2, kv_heads=1, head_dim=8, ffn=16, vocab=12, shards=2
    )
    files = {path.name: path.read_bytes() for path in llama.iterdir()}
    views = {
        "a": Stored(np.arange(6.0).reshape(2, 3), parameter=True), "b": Stored(np.arange(4), negated=True),
        "c": Stored(np.arange(4, dtype=np.float32), (3, 4), (0, 1)),
    }  # fmt: skip
    files["zip.bin"] = write_zip(folder / "zip.bin", views).read_bytes()
    files["legacy.bin"] = write_legacy(folder / "legacy.bin", views).read_bytes()
    files["model.gguf"] = write_gguf(
        folder / "model.gguf", layers=1, hidden=32, heads=2, kv_heads=1, head_dim=16, ffn=32, vocab=12, type="Q4_0"
    ).read_bytes()
    return files


# safetensors


def safetensors(rng: Rng, good: Good) -> bytes:
    """A header of entries that are nearly right."""
    if rng.randrange(2):
        return damaged(rng, good["model-00001-of-00002.safetensors"])
    body = rng.randbytes(rng.choice((0, 3, 64, 256)))
    header: dict[str, Any] = {}
    for _ in range(rng.randrange(6)):
        shape = [rng.choice((0, 1, 2, 4, 8)) for _ in range(rng.choice((0, 1, 2, 3, 12)))]
        size = math.prod(shape) * 4
        begin = rng.choice((0, 0, 4, 8))
        entry: dict[str, Any] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, begin + size]}
        if rng.randrange(2):
            key = rng.choice((*entry, "extra"))
            entry[key] = any_json(rng)
        elif rng.randrange(3) == 0:
            entry["data_offsets"][rng.randrange(2)] = rng.choice(NUMBERS)
        elif rng.randrange(3) == 0:
            entry["dtype"] = rng.choice(("F64", "BF16", "F16", "I64", "U8", "BOOL", "F8_E4M3", "F4", "C64", "F6_E2M3"))
        header[rng.choice(NAMES)] = entry if rng.randrange(8) else any_json(rng)
    if rng.randrange(4) == 0:
        header["__metadata__"] = any_json(rng)
    text = json.dumps(header if rng.randrange(8) else any_json(rng)).encode()
    if rng.randrange(8) == 0:
        text = text.replace(b'"shape"', b'"dtype"')
    length = len(text) if rng.randrange(6) else rng.choice(NUMBERS) & ((1 << 64) - 1)
    return struct.pack("<Q", length) + text + body


# torch


def _text(value: str) -> bytes:
    data = value.encode("utf-8", "surrogatepass")
    return pickle.BINUNICODE + struct.pack("<I", len(data)) + data


def _number(value: int) -> bytes:
    data = value.to_bytes(10, "little", signed=True)
    return pickle.LONG1 + bytes([len(data)]) + data


GLOBALS = (
    ("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_tensor_v3"), ("torch", "FloatStorage"),
    ("torch._utils", "_rebuild_parameter"), ("torch._tensor", "_rebuild_from_type_v2"), ("torch", "float8_e4m3fn"),
    ("collections", "OrderedDict"), ("torch", "Size"), ("torch", "LongStorage"), ("posix", "system"),
    ("builtins", "eval"), ("torch", "UntypedStorage"), ("a", "b"),
)  # fmt: skip
OPCODES = (
    b"(", b")", b"]", b"}", b"N", b"\x88", b"\x89", b"t", b"l", b"d", b"\x85", b"\x86", b"\x87", b"a", b"e", b"s", b"u",
    b"R", b"b", b"Q", b"q\0", b"h\0", b"q\1", b"h\1", b"0", b"1", b"2", b"\x94", b"\x8f", b"\x90", b"\x91", b"\x81",
    b"\x92", b"o", b"i", b"P1\n", b"I1\n", b"F1.5\n", b"\x82\1", b"\x8a\0", b"K\1", b"G" + bytes(8),
    b"r\xff\xff\xff\x7f", b"\x8e" + b"\xff" * 8, b"\x95" + b"\xff" * 8, b"X\xff\xff\xff\x7f", b"B\xff\xff\xff\xff",
    b"\x93", b"\x96" + b"\xff" * 8,
)  # fmt: skip


def _storage(rng: Rng) -> bytes:
    kind = rng.choice((b"FloatStorage", b"LongStorage", b"UntypedStorage", b"BFloat16Storage"))
    count = rng.choice((0, 1, 4, 6, 24, *NUMBERS))
    key = rng.choice(("0", "1", "../x", "a\nb"))
    return b"(" + _text("storage") + b"ctorch\n" + kind + b"\n" + _text(key) + _text("cpu") + _number(count) + b"tQ"


def _tuple(rng: Rng, values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(_number(rng.choice(values)) for _ in range(rng.choice((0, 1, 2, 2, 2, 3, 9)))) + b"t"


def _tensor(rng: Rng) -> bytes:
    sizes, strides = (0, 1, 2, 3, 6, *NUMBERS[:12]), (0, 1, 2, 3, 6, -1, *NUMBERS)
    parts = [_storage(rng), _number(rng.choice((0, 0, 1, *NUMBERS))), _tuple(rng, sizes), _tuple(rng, strides)]
    parts += [b"\x89", b"ccollections\nOrderedDict\n)R"]
    if rng.randrange(3) == 0:
        parts.append(b"}" + _text(rng.choice(("neg", "conj"))) + b"\x88s")
    if rng.randrange(4) == 0:
        parts[rng.randrange(len(parts))] = rng.choice(OPCODES)
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + b"".join(parts) + b"tR"


def _state(rng: Rng) -> bytes:
    """A pickle: tensors as they should be, or opcodes as they come."""
    if rng.randrange(3) == 0:
        body = b""
        for _ in range(rng.randrange(1, 30)):
            if rng.randrange(6) == 0:
                body += "c{}\n{}\n".format(*rng.choice(GLOBALS)).encode()
            elif rng.randrange(8) == 0:
                body += _tensor(rng)
            else:
                body += rng.choice((*OPCODES, _text(rng.choice(NAMES)), _number(rng.choice(NUMBERS))))
        return b"\x80\x02" + body + b"."
    body = b"".join(_text(rng.choice(NAMES)) + _tensor(rng) for _ in range(rng.randrange(5)))
    return b"\x80\x02}(" + body + b"u."


def torch(rng: Rng, good: Good) -> bytes:
    """Either of torch's formats."""
    if rng.randrange(2):
        return damaged(rng, good[rng.choice(("zip.bin", "legacy.bin"))])
    state, storage = _state(rng), bytes(range(96))
    if rng.randrange(3) == 0:  # the old format
        machine = pickle.dumps({"little_endian": rng.choice((True, True, False, 1)), "protocol_version": 1001}, 2)
        keys = pickle.dumps(rng.choice((["0"], ["0", "1"], [], "0", [1], ["0"] * 50)), 2)
        head = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + machine + state + keys
        return head + struct.pack("<Q", rng.choice((24, 24, *NUMBERS))) + storage
    path = good["folder"].decode()
    with zipfile.ZipFile(Path(path) / "made.zip", "w", rng.choice((0, 0, 0, 8))) as archive:
        root = rng.choice(("m", "m", "archive", "..", "a/b", ""))
        archive.writestr(f"{root}/data.pkl", state)
        if rng.randrange(8):
            archive.writestr(f"{root}/data/0", storage[: rng.choice((96, 96, 3, 0))])
        if rng.randrange(4) == 0:
            archive.writestr(rng.choice((f"{root}/byteorder", "n/data.pkl", f"{root}/constants.pkl")), b"little")
    data = (Path(path) / "made.zip").read_bytes()
    return data if rng.randrange(3) else damaged(rng, data)


# GGUF


def _string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def gguf(rng: Rng, good: Good) -> bytes:
    """A header of key-values and tensors whose counts, types and places may lie."""
    if rng.randrange(2):
        return damaged(rng, good["model.gguf"])
    keys = (
        b"general.architecture",
        b"general.alignment",
        b"llama.block_count",
        b"split.count",
        b"llama.embedding_length",
        b"\xff",
        b"k\n",
    )
    values = b""
    count, tensors = rng.randrange(6), rng.randrange(5)
    for _ in range(count):
        kind = rng.choice((*range(13), 77))
        values += _string(rng.choice(keys)) + struct.pack("<I", kind)
        if kind == 8:
            values += _string(rng.choice((b"llama", b"qwen2", b"\xff", b"x" * 500)))
        elif kind == 9:
            inner = rng.choice((0, 4, 8, 9, 12))
            values += struct.pack("<IQ", inner, rng.choice((0, 1, 2, *NUMBERS))) + rng.randbytes(rng.choice((8, 40)))
        else:
            values += struct.pack("<Q", rng.choice(NUMBERS))[: rng.choice((1, 2, 4, 8))]
    described = b""
    for _ in range(tensors):
        dimensions = rng.choice((1, 2, 2, 2, 3, 4, 0, 9))
        sizes = [rng.choice((1, 2, 32, 64, 256, *NUMBERS)) for _ in range(min(dimensions, 4))]
        described += _string(rng.choice(NAMES).encode("utf-8", "surrogatepass")[:300]) + struct.pack("<I", dimensions)
        described += struct.pack(f"<{len(sizes)}Q", *sizes)
        described += struct.pack("<IQ", rng.choice((*range(43), 99)), rng.choice((0, 0, 32, 64, *NUMBERS)))
    if rng.randrange(6) == 0:
        count = rng.choice(NUMBERS)
    if rng.randrange(6) == 0:
        tensors = rng.choice(NUMBERS)
    head = b"GGUF" + struct.pack("<IQQ", rng.choice((3, 3, 3, 2, 1, 99)), tensors, count)
    return head + values + described + rng.randbytes(rng.choice((0, 64, 4096)))


# JSON


def config(rng: Rng, good: Good) -> bytes:
    """A config.json with values of any kind."""
    if rng.randrange(4) == 0:
        return damaged(rng, good["config.json"])
    value = json.loads(good["config.json"])
    names = [
        *value,
        "quantization_config",
        "text_config",
        "rope_parameters",
        "max_sequence_length",
        "partial_rotary_factor",
    ]
    for _ in range(rng.randint(1, 4)):
        value[rng.choice(names)] = any_json(rng)
    if rng.randrange(6) == 0:
        value["architectures"], value["model_type"] = ["BaichuanForCausalLM"], "baichuan"
    return json.dumps(value if rng.randrange(20) else any_json(rng)).encode()


def index(rng: Rng, good: Good) -> bytes:
    """An index whose shards may be anything."""
    if rng.randrange(3) == 0:
        return damaged(rng, good["model.safetensors.index.json"])
    value = json.loads(good["model.safetensors.index.json"])
    shards = (
        *NAMES,
        "model-00001-of-00002.safetensors",
        "model-00009-of-99999.safetensors",
        "a\0b",
        "..",
        "config.json",
    )
    for name in list(value["weight_map"]):
        if rng.randrange(4) == 0:
            value["weight_map"][name] = rng.choice(shards) if rng.randrange(4) else any_json(rng)
        elif rng.randrange(4) == 0:
            del value["weight_map"][name]
    if rng.randrange(6) == 0:
        value["weight_map"] = any_json(rng)
    return json.dumps(value if rng.randrange(10) else any_json(rng)).encode()


def adapter(rng: Rng, good: Good) -> bytes:
    """An adapter_config.json."""
    if rng.randrange(4) == 0:
        return damaged(rng, good["adapter_config.json"])
    value = json.loads(good["adapter_config.json"])
    names = [*value, "use_dora", "bias", "modules_to_save", "rank_pattern", "alpha_pattern", "fan_in_fan_out"]
    for _ in range(rng.randint(1, 3)):
        value[rng.choice(names)] = any_json(rng)
    return json.dumps(value if rng.randrange(20) else any_json(rng)).encode()


def adapter_weights(rng: Rng, good: Good) -> bytes:
    """Its weights."""
    return damaged(rng, good["adapter_model.safetensors"])


def _open_adapter(path: Path) -> None:
    _read(adapted(open_checkpoint(path.parents[1] / "folder"), [path.parent]).tensors)


def _open_folder(path: Path) -> None:
    _read(open_checkpoint(path.parent).tensors)


def _open_gguf(path: Path) -> None:
    dict(read_gguf(path).metadata)
    _read(open_checkpoint(path).tensors)


def _read(tensors: Mapping[str, LazyTensor]) -> None:
    """Some rows of each."""
    for tensor in tensors.values():
        if tensor.shape and tensor.shape[0] and math.prod(tensor.shape[1:]) <= READ_LIMIT:
            tensor.read(0, 1)
            tensor.read(tensor.shape[0] - 1, tensor.shape[0])


def prepare(folder: Path) -> Good:
    """The good files, and a model's folder into which one hostile file at a time is put."""
    good = good_files(folder / "good") if (folder / "good").mkdir(parents=True) is None else {}
    shutil.copytree(folder / "good" / "llama", folder / "folder")
    (folder / "adapter").mkdir()
    pair = {"lora_A": np.ones((2, 16), np.float32), "lora_B": np.ones((16, 2), np.float32)}
    target = "base_model.model.model.layers.0.self_attn.q_proj"
    save_file(
        {f"{target}.{part}.weight": t for part, t in pair.items()}, folder / "adapter" / "adapter_model.safetensors"
    )
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "use_rslora": False}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    good |= {path.name: path.read_bytes() for path in (folder / "adapter").iterdir()}
    return good | {"folder": str(folder).encode()}


FORMATS = {
    "safetensors": Format(prepare, safetensors, "x.safetensors", lambda path: _read(read_safetensors(path))),
    "torch": Format(prepare, torch, "x.bin", lambda path: _read(read_torch(path))),
    "gguf": Format(prepare, gguf, "x.gguf", _open_gguf),
    "config.json": Format(prepare, config, "folder/config.json", _open_folder),
    "index.json": Format(prepare, index, "folder/model.safetensors.index.json", _open_folder),
    "adapter_config.json": Format(prepare, adapter, "adapter/adapter_config.json", _open_adapter),
    "adapter": Format(prepare, adapter_weights, "adapter/adapter_model.safetensors", _open_adapter),
}
