"""GGUF headers: hostile counts and lengths are refused at once; everything else is read as it was written."""

from __future__ import annotations

import math
import struct
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headrace.checkpoint import open_checkpoint
from headrace.checkpoint.gguf_file import read_gguf
from headrace.config import RopeScaling
from headrace.errors import CheckpointError, ConfigError, UserError
from tests.tiny import write_gguf

HUGE = 1 << 61
QUICK = 1.0  # seconds; a refusal reads a header and makes nothing of the stated size


GEOMETRY = {
    "llama.embedding_length": 8, "llama.attention.head_count": 2, "llama.feed_forward_length": 8,
    "llama.block_count": 1, "llama.context_length": 64,
}  # fmt: skip


def string(text: str | bytes, length: int | None = None) -> bytes:
    data = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(data) if length is None else length) + data


def header(tensors: int = 0, values: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, values)


def key(name: str, kind: int, data: bytes) -> bytes:
    return string(name) + struct.pack("<I", kind) + data


def tensor(name: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0, dimensions: int | None = None) -> bytes:
    count = len(shape) if dimensions is None else dimensions
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", count, *shape, kind, offset)


BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "cannot be read"),
    "magic": (b"GGML" + bytes(40), "does not begin with 'GGUF'"),
    "three bytes": (b"GGU", "does not begin with 'GGUF'"),
    "no counts": (b"GGUF\3\0\0\0", "truncated or damaged"),
    "version": (header(version=1), "version 1; expected 2 or 3"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "version 50331648"),
    "huge tensors": (header(tensors=HUGE), f"states {HUGE} tensors"),
    "huge values": (header(values=HUGE), f"states {HUGE} key-values"),
    "huge key": (header(values=1) + string("a", HUGE) + bytes(40), "states 2305843009213693952 bytes of a key"),
    "huge string": (header(values=1) + key("a", 8, struct.pack("<Q", HUGE)) + bytes(40), "a needs"),
    "huge array": (header(values=1) + key("a", 9, struct.pack("<IQ", 4, HUGE)), "elements of a"),
    "huge strings": (header(values=1) + key("a", 9, struct.pack("<IQ", 8, HUGE)), "elements of a"),
    "nested array": (header(values=1) + key("a", 9, struct.pack("<IQ", 9, 1)) + bytes(40), "value type 9"),
    "unknown type": (header(values=1) + key("a", 77, bytes(40)), "value type 77"),
    "key not UTF-8": (header(values=1) + string(b"\xff\xfe") + bytes(40), "not UTF-8"),
    "key twice": (header(values=2) + key("a", 0, b"\1") * 2, "key 'a' twice"),
    "alignment 3": (header(values=1) + key("general.alignment", 4, struct.pack("<I", 3)), "power of two"),
    "alignment text": (header(values=1) + key("general.alignment", 8, string("x")), "power of two"),
    "no dimension": (header(tensors=1) + tensor("t", ()) + bytes(40), "0 dimensions"),
    "many dimensions": (header(tensors=1) + tensor("t", (1,), dimensions=1 << 30) + bytes(40), "dimensions"),
    "huge tensor": (header(tensors=1) + tensor("t", (1 << 40, 1 << 40)) + bytes(64), "truncated: tensor 't'"),
    "tensor overflow": (header(tensors=1) + tensor("t", (1 << 63, 1 << 63, 4, 4)) + bytes(64), "truncated"),
    "far offset": (header(tensors=1) + tensor("t", (4,), offset=HUGE) + bytes(64), "truncated"),
    "no rows": (header(tensors=1) + tensor("t", (4, 0)) + bytes(64), "cannot be cut"),
    "broken block": (header(tensors=1) + tensor("t", (33,), kind=2) + bytes(64), "q4_0 blocks of 32"),
    "unknown tensor type": (
        header(tensors=1) + tensor("t", (32,), kind=19) + bytes(64),
        "type IQ1_S, which is not read",
    ),
    "unheard tensor type": (header(tensors=1) + tensor("t", (32,), kind=99) + bytes(64), "type 99, A NEWER ONE, which"),
    "removed tensor type": (header(tensors=1) + tensor("t", (32,), kind=31) + bytes(64), "type Q4_0_4_4, which is not"),
    "a name of two lines": (header(tensors=1) + tensor("t\nu", (32,), kind=31) + bytes(64), r"tensor 't\\nu' has"),
    "a key of two lines": (header(values=1) + key("a\nb", 77, bytes(9)), r"a\\nb has value type 77"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n", "run: git lfs pull"),
    "tensor twice": (header(tensors=2) + tensor("t", (1,)) * 2 + bytes(64), "tensor 't' twice"),
}


@pytest.mark.parametrize("case", sorted(BAD))
def test_bad_header(tmp_path: Path, case: str) -> None:
    data, message = BAD[case]
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    begin = time.perf_counter()
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(path)
    assert time.perf_counter() - begin < QUICK
    assert "\n" not in str(caught.value)


def test_every_truncation_is_told(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", layers=1)
    whole = path.read_bytes()
    for size in [*range(0, 6000, 61), len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError):
            read_gguf(path)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 2500), byte=st.integers(0, 255))
def test_one_wrong_byte_is_refused_or_harmless(tmp_path: Path, place: int, byte: int) -> None:
    path = tmp_path / "model.gguf"
    if not path.exists():
        write_gguf(path, layers=1)
    whole = bytearray(path.read_bytes())
    whole[place] = byte
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(whole)
    try:
        dict(open_checkpoint(damaged).metadata)
    except UserError as error:
        assert "\n" not in str(error)


def test_every_value_type(tmp_path: Path) -> None:
    values: dict[str, tuple[str, Any]] = {
        "a.u8": ("uint8", 200), "a.i8": ("int8", -3), "a.u16": ("uint16", 60000), "a.i16": ("int16", -300),
        "a.u32": ("uint32", 1 << 31), "a.i32": ("int32", -70000), "a.f32": ("float32", 0.5), "a.bool": ("bool", True),
        "a.text": ("string", "百川"), "a.u64": ("uint64", 1 << 60), "a.i64": ("int64", -(1 << 60)),
        "a.f64": ("float64", math.pi), "a.texts": ("array", ["a", "江", ""]), "a.ints": ("array", [1, -2, 3]),
    }  # fmt: skip
    writer = gguf.GGUFWriter(tmp_path / "v.gguf", "llama")
    for name, (kind, value) in values.items():
        getattr(writer, f"add_{kind}")(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    metadata = read_gguf(tmp_path / "v.gguf").metadata
    for name, (_, value) in values.items():
        assert metadata[name] == value
        assert type(metadata[name]) is type(value)


def test_text_that_is_not_utf8_is_told_when_used(tmp_path: Path) -> None:
    path = tmp_path / "v.gguf"
    path.write_bytes(header(values=1) + key("a", 8, string(b"\xff")) + bytes(64))
    metadata = read_gguf(path).metadata
    with pytest.raises(CheckpointError, match="'a' is not UTF-8"):
        metadata["a"]


def split(path: Path, count: int) -> list[Path]:
    """A GGUF in `count` files as llama.cpp's gguf-split writes it; the whole one goes."""
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(path, "llama", split_max_tensors=-(-len(reader.tensors) // count))
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        kind = field.types[0]
        writer.add_key_value(field.name, field.contents(), kind, field.types[1] if len(field.types) > 1 else None)
    for t in reader.tensors:
        writer.add_tensor(t.name, t.data.copy(), raw_dtype=t.tensor_type)
    path.unlink()
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(path.parent.glob(f"{path.stem}-*-of-*.gguf"))


def test_a_split_model_is_read_whole_whichever_file_is_named(tmp_path: Path) -> None:
    whole = open_checkpoint(write_gguf(tmp_path / "whole.gguf", type="Q8_0"))
    (tmp_path / "parts").mkdir()
    parts = split(write_gguf(tmp_path / "parts" / "model.gguf", type="Q8_0"), 3)
    assert len(parts) == 3
    for path in [*parts, tmp_path / "parts"]:
        found = open_checkpoint(path)
        assert found.files == tuple(parts)
        assert found.metadata["tokenizer.ggml.tokens"] == whole.metadata["tokenizer.ggml.tokens"]
        assert found.config == whole.config
        for name in whole.names:
            np.testing.assert_array_equal(found.tensor(name).load(), whole.tensor(name).load())
    digest = open_checkpoint(parts[0]).digest()
    parts[2].write_bytes(parts[2].read_bytes()[:-1] + b"\xff")
    assert open_checkpoint(parts[0]).digest() != digest, "the digest covers every file"


def test_a_split_model_with_a_file_that_is_not_its_own(tmp_path: Path) -> None:
    parts = split(write_gguf(tmp_path / "model.gguf"), 3)
    third = parts[2].read_bytes()
    parts[2].write_bytes(parts[1].read_bytes())
    with pytest.raises(CheckpointError, match="says that it is file 1 of 3; expected 2 of 3"):
        open_checkpoint(parts[0])
    parts[2].unlink()
    with pytest.raises(CheckpointError, match=r"model-00003-of-00003\.gguf is missing, although"):
        open_checkpoint(parts[1])
    parts[2].write_bytes(third)
    renamed = parts[0].rename(tmp_path / "renamed.gguf")
    with pytest.raises(CheckpointError, match="is one of 3 files of a model; expected them beside it as NAME-00001-of"):
        open_checkpoint(renamed)


@pytest.mark.parametrize("type", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_quantized_model_is_near_the_plain_one(tmp_path: Path, type: str) -> None:
    """Each value within its block's step: 4 bits are at worst 1/7 of the block's largest value apart."""
    plain = open_checkpoint(write_gguf(tmp_path / "plain.gguf"))
    quantized = open_checkpoint(write_gguf(tmp_path / "quantized.gguf", type=type))
    for name in plain.names:
        a, b = plain.tensor(name).load(), quantized.tensor(name).load()
        assert np.abs(a - b).max() <= np.abs(a).max() / 7


def test_linear_rope_scaling(tmp_path: Path) -> None:
    scaling = open_checkpoint(write_gguf(tmp_path / "m.gguf", linear_scaling=2.0)).config.rope_scaling
    assert scaling is not None
    assert (scaling.kind, scaling.factor) == ("linear", 2.0)


def test_llama3_rope_scaling_is_known_by_its_table(tmp_path: Path) -> None:
    """The table as llama.cpp's converter makes it (`Llama3Model.generate_extra_tensors`), for factor 32."""
    table = []
    for pair in range(8):
        wavelength = 2 * math.pi * 50000.0 ** (pair / 8)
        if wavelength < 8192 / 4.0:
            table.append(1.0)
        elif wavelength > 8192 / 1.0:
            table.append(32.0)
        else:
            smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
            table.append(1 / ((1 - smooth) / 32.0 + smooth))
    factors = np.array(table, np.float32)
    assert len(set(table)) > 2
    scaling = open_checkpoint(write_gguf(tmp_path / "m.gguf", rope_factors=factors)).config.rope_scaling
    assert scaling == RopeScaling("llama3", 32.0, 1.0, 4.0, 8192)
    factors[3] += 1
    with pytest.raises(ConfigError, match=r"rope_freqs.weight is not llama3's table for factor 32"):
        open_checkpoint(write_gguf(tmp_path / "other.gguf", rope_factors=factors))
    with pytest.raises(ConfigError, match="no table of finite numbers"):
        open_checkpoint(write_gguf(tmp_path / "nan.gguf", rope_factors=np.full(8, np.nan, np.float32)))


def edited(path: Path, old: bytes, new: bytes) -> Path:
    data = path.read_bytes()
    assert data.count(old) >= 1
    assert len(old) == len(new)
    path.write_bytes(data.replace(old, new))
    return path


def test_another_architecture(tmp_path: Path) -> None:
    path = edited(
        write_gguf(tmp_path / "m.gguf"),
        string("llama") + struct.pack("<Q", 17),
        string("lamma") + struct.pack("<Q", 17),
    )
    with pytest.raises(
        ConfigError,
        match="architecture 'lamma', which is not known; known are llama, baichuan, qwen2; did you mean 'llama'",
    ):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "has no llama.embedding_length"),
        ({"llama.expert_count": 8}, "mixture of 8 experts"),
        (GEOMETRY | {"llama.rope.dimension_count": 2}, "turns 2 of 4 dimensions"),
        (GEOMETRY | {"llama.rope.scaling.type": 7}, "rope scaling 7 is not supported"),
        (GEOMETRY | {"llama.rope.scale_linear": 0}, "factor is 0.0; expected a number above 0"),
        ({"llama.embedding_length": 8, "llama.attention.head_count": 0}, "above 0|does not state"),
        ({"llama.embedding_length": 8, "llama.attention.head_count": 2}, "does not state intermediate_size"),
    ],
)
def test_header_without_geometry(tmp_path: Path, values: dict[str, int], message: str) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    for name, value in values.items():
        writer.add_uint32(name, value)
    writer.add_tensor("token_embd.weight", np.zeros((4, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ConfigError, match=message):
        open_checkpoint(tmp_path / "m.gguf")


@pytest.mark.parametrize("kind", ["adapter", "mmproj", "imatrix"])
def test_a_gguf_that_is_no_model(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(header(values=1) + key("general.type", 8, string(kind)) + bytes(64))
    with pytest.raises(CheckpointError, match=f"is of GGUF type '{kind}'; expected a model"):
        open_checkpoint(path)


def test_model_without_embedding(tmp_path: Path) -> None:
    path = edited(write_gguf(tmp_path / "m.gguf"), b"token_embd.weight", b"token_embb.weight")
    with pytest.raises(CheckpointError, match=r"lacks tensor 'token_embd.weight'"):
        open_checkpoint(path)


def test_heads_that_do_not_divide_the_rows(tmp_path: Path) -> None:
    old, new = (string("llama.attention.head_count") + struct.pack("<II", 4, heads) for heads in (4, 5))
    with pytest.raises(CheckpointError, match="expected a multiple of twice its 5 heads"):
        open_checkpoint(edited(write_gguf(tmp_path / "m.gguf"), old, new))


def test_vocabulary_alone(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match="a vocabulary alone"):
        open_checkpoint(tmp_path / "m.gguf")


@pytest.mark.shared
def test_a_real_vocabulary_opens_as_a_file_and_not_as_a_model(shared_data: Path) -> None:
    path = shared_data / "baichuan-7b-vocab.gguf"
    assert len(read_gguf(path).metadata["tokenizer.ggml.tokens"]) == 64000
    with pytest.raises(CheckpointError, match="has no tensors \\(a vocabulary alone\\)"):
        open_checkpoint(path)


@pytest.mark.embedded
def test_the_embedded_model_reads_as_the_gguf_package_reads_it(smollm2: Path) -> None:
    theirs = {t.name: t for t in gguf.GGUFReader(smollm2).tensors}
    ours = open_checkpoint(smollm2)
    for name, their_name in [
        ("layers.3.mlp.down_proj.weight", "blk.3.ffn_down.weight"),
        ("norm.weight", "output_norm.weight"),
    ]:
        their = theirs[their_name]
        np.testing.assert_array_equal(
            ours.tensor(name).load(), gguf.quants.dequantize(their.data, their.tensor_type)
        )  # fmt: skip
    rows = ours.tensor("embed_tokens.weight").read(1000, 1010)
    embedding = theirs["token_embd.weight"]
    np.testing.assert_array_equal(rows, gguf.quants.dequantize(embedding.data[1000:1010], embedding.tensor_type))
