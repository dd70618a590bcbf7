"""Damaged safetensors files and shard indexes: one clear line each."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headrace.checkpoint.folder import read_folder
from headrace.checkpoint.safetensors_file import read_safetensors
from headrace.errors import CheckpointError
from tests.tiny import write_llama


def write_raw(path: Path, header: Any, body: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + body)
    return path


def entry(**changes: Any) -> dict[str, Any]:
    return {"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]} | changes}


BAD = {
    "empty": (b"", 0, "fetch it again"),
    "short": (b"1234", None, "truncated or no safetensors"),
    "huge header": (b"{}", 1 << 62, "states a header of 4611686018427387904 bytes"),
    "not JSON": (b"{a}", None, "not JSON"),
    "deep JSON": (b"[" * 50_000, None, "not JSON"),
    "no object": (b"[]", None, "no JSON object"),
    "no dtype": (b'{"a": {}}', None, "lacks dtype"),
    "entry is a number": (b'{"a": 3}', None, "lacks dtype"),
}


@pytest.mark.parametrize("case", sorted(BAD))
def test_bad_header(tmp_path: Path, case: str) -> None:
    text, length, message = BAD[case]
    path = tmp_path / "x.safetensors"
    if case in ("empty", "short"):
        path.write_bytes(text if case == "empty" else struct.pack("<Q", 50) + text)
    else:
        write_raw(path, text, length=length)
    with pytest.raises(CheckpointError, match=message):
        read_safetensors(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "I128"}, "expected one of F32, F16, BF16"),
        ({"dtype": ["F32"]}, "expected one of F32, F16, BF16"),
        ({"dtype": "F64"}, "has 16 bytes; expected 32"),
        ({"shape": [2, 3]}, "has 16 bytes; expected 24"),
        ({"shape": [-2, -2]}, "has shape"),
        ({"shape": [True, 4]}, "has shape"),
        ({"data_offsets": [16, 32]}, "truncated: tensor 'a' ends at byte 32"),
        ({"data_offsets": [16, 0]}, "has -16 bytes"),
        ({"shape": [1 << 40, 1 << 40]}, "expected 4835703278458516698824704"),
        ({"shape": [1] * 65 + [4]}, "has shape"),
    ],
)
def test_bad_entry(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_safetensors(write_raw(tmp_path / "x.safetensors", entry(**changes), bytes(16)))


def test_good_entry_at_an_odd_offset(tmp_path: Path) -> None:
    body = np.arange(4, dtype=np.float32).tobytes()
    header = json.dumps(entry()).encode()
    path = write_raw(tmp_path / "x.safetensors", header + b" " * (1 - len(header) % 2), body)
    np.testing.assert_array_equal(read_safetensors(path)["a"].load(), [[0, 1], [2, 3]])


def test_every_truncation_is_told(tmp_path: Path) -> None:
    path = write_llama(tmp_path) / "model.safetensors"
    whole = path.read_bytes()
    for size in [0, 7, 8, 100, len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError):
            read_safetensors(path)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.binary(max_size=60), length=st.integers(0, 2**64 - 1))
def test_any_bytes_are_refused_or_read(tmp_path: Path, text: bytes, length: int) -> None:
    path = write_raw(tmp_path / "x.safetensors", text, length=length)
    with pytest.raises(CheckpointError):
        read_safetensors(path)


INDEXES = [
    ({}, "has no weight_map"),
    ({"weight_map": []}, "has no weight_map"),
    ({"weight_map": {"a": "../model.safetensors"}}, "expected a file name inside the folder"),
    ({"weight_map": {"a": 3}}, "expected a file name inside the folder"),
    ({"weight_map": {"a": ""}}, "expected a file name inside the folder"),
    ({"weight_map": {"a": "x" * 5000}}, "expected a file name inside the folder"),
    ({"weight_map": {"a": "a\nb"}}, "expected a file name inside the folder"),
    ({"weight_map": {"a": "\ud800"}}, "is not JSON"),
    ({"weight_map": {"a": ".."}}, "expected a file name inside the folder"),
    (
        {"weight_map": {"a": "absent.safetensors", "b": "model-00001-of-00002.safetensors"}},
        "absent.safetensors is missing",
    ),
]


@pytest.mark.parametrize(("index", "message"), INDEXES)
def test_bad_index(tmp_path: Path, index: dict[str, Any], message: str) -> None:
    folder = write_llama(tmp_path, shards=2)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=message):
        read_folder(folder)
