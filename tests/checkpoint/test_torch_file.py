"""Torch .bin files: views of storages are read in place; nothing in the pickle is run."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from headrace.checkpoint import open_checkpoint
from headrace.checkpoint.torch_file import read_torch
from headrace.errors import CheckpointError
from tests.tiny import TorchTensor, torch_pickle, write_llama, write_torch, write_torch_views

NUMBERS = np.arange(24, dtype=np.float32)


def write_views(path: Path, **views: TorchTensor) -> Path:
    write_torch_views(path, views, [("0", NUMBERS)], [("float32", NUMBERS.size)])
    return path


def write_pickle(path: Path, data: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/data.pkl", data)
        archive.writestr("m/data/0", NUMBERS.tobytes())
    return path


def test_views_of_one_storage(tmp_path: Path) -> None:
    path = write_views(
        tmp_path / "m.bin",
        whole=TorchTensor("0", (4, 6), (6, 1)),
        shared=TorchTensor("0", (4, 6), (6, 1)),
        transposed=TorchTensor("0", (6, 4), (1, 6)),
        later=TorchTensor("0", (2, 3), (6, 2), offset=7),
        nothing=TorchTensor("0", (0, 3), (3, 1)),
    )
    tensors = read_torch(path)
    grid = NUMBERS.reshape(4, 6)
    np.testing.assert_array_equal(tensors["whole"].load(), grid)
    np.testing.assert_array_equal(tensors["shared"].load(), grid)
    np.testing.assert_array_equal(tensors["transposed"].load(), grid.T)
    np.testing.assert_array_equal(tensors["transposed"].read(2, 4), grid.T[2:4])
    np.testing.assert_array_equal(tensors["later"].load(), [[7, 9, 11], [13, 15, 17]])
    assert tensors["nothing"].load().shape == (0, 3)
    assert all(tensor.load().flags.c_contiguous for tensor in tensors.values())


@pytest.mark.parametrize(
    "view",
    [
        TorchTensor("0", (5, 6), (6, 1)),
        TorchTensor("0", (4, 6), (7, 1)),
        TorchTensor("0", (4, 6), (6, 1), offset=1),
        TorchTensor("0", (1 << 40, 1 << 30), (0, 0)),
        TorchTensor("0", (4, 6), (6, -1)),
        TorchTensor("0", (4,), (6, 1)),
    ],
)
def test_a_view_that_leaves_its_storage(tmp_path: Path, view: TorchTensor) -> None:
    with pytest.raises(CheckpointError, match="its pickle is damaged"):
        read_torch(write_views(tmp_path / "m.bin", a=view))


class _Runs:
    """Pickles as a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_nothing_is_run(tmp_path: Path, protocol: int) -> None:
    mark = tmp_path / "mark"
    hostile = pickle.dumps({"a": _Runs(os.system, f"touch {mark}")}, protocol)
    with pytest.raises(CheckpointError, match=r"asks for (posix|nt)\.system, which is not part of a tensor"):
        read_torch(write_pickle(tmp_path / "m.bin", hostile))
    assert not mark.exists()


def test_a_folder_whose_bin_imports_os(tmp_path: Path) -> None:
    folder = write_llama(tmp_path, format="bin")
    write_pickle(folder / "pytorch_model.bin", b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(CheckpointError, match=r"asks for os\.system"):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", ["eval", "getattr", "exec", "__import__"])
def test_builtins_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match=rf"asks for builtins\.{name}"):
        read_torch(write_pickle(tmp_path / "m.bin", f"cbuiltins\n{name}\n.".encode()))


HOSTILE = {
    "empty": (b"", "pickle is damaged"),
    "cut": (torch_pickle({"a": TorchTensor("0", (2,), (1,))}, [("float32", 24)])[:-5], "pickle is damaged"),
    "huge memo": (b"\x80\x02]r\xff\xff\xff\x7f.", "LONG_BINPUT"),
    "huge string": (b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7fabc.", "pickle is damaged"),
    "attributes": (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}b0}.", "BUILD before the end"),
    "storage attributes": (b"\x80\x02ctorch\nFloatStorage\n}X\x05\x00\x00\x00dtypeK\x01sb.", "pickle is damaged"),
    "not a dict": (pickle.dumps([1]), "holds a list"),
    "no tensors": (pickle.dumps({"a": 1}), "expected a flat state dict"),
    "storage kind": (b"\x80\x02(X\x01\x00\x00\x00sK\x01K\x01K\x01K\x01tQ.", "a storage is described as"),
    "short id": (b"\x80\x02K\x01Q.", "pickle is damaged"),
    "integers": (b"ctorch\nLongStorage\n.", r"asks for torch\.LongStorage"),
    "calls a storage": (b"ctorch\nFloatStorage\n)R.", "pickle is damaged"),
}


@pytest.mark.parametrize("case", sorted(HOSTILE))
def test_bad_pickle(tmp_path: Path, case: str) -> None:
    data, message = HOSTILE[case]
    with pytest.raises(CheckpointError, match=message) as caught:
        read_torch(write_pickle(tmp_path / "m.bin", data))
    assert "\n" not in str(caught.value)


def test_missing_storage(tmp_path: Path) -> None:
    data = torch_pickle({"a": TorchTensor("1", (2,), (1,))}, [("float32", 24), ("float32", 24)])
    with pytest.raises(CheckpointError, match="lacks the member 'm/data/1'"):
        read_torch(write_pickle(tmp_path / "m.bin", data))


def test_short_storage(tmp_path: Path) -> None:
    data = torch_pickle({"a": TorchTensor("0", (2,), (1,))}, [("float32", 25)])
    with pytest.raises(CheckpointError, match="has 96 bytes; expected 100"):
        read_torch(write_pickle(tmp_path / "m.bin", data))


def test_every_truncation_is_told(tmp_path: Path) -> None:
    path = tmp_path / "m.bin"
    write_torch(path, {"a": NUMBERS.reshape(4, 6), "b": NUMBERS.astype(np.float16)})
    whole = path.read_bytes()
    for size in range(0, len(whole), 37):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError):
            read_torch(path)


def test_compressed_member(tmp_path: Path) -> None:
    path = tmp_path / "m.bin"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("m/data.pkl", pickle.dumps({}) * 100)
    with pytest.raises(CheckpointError, match="compressed or encrypted"):
        read_torch(path)


def test_huge_pickle(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has a pickle of 67108865 bytes"):
        read_torch(write_pickle(tmp_path / "m.bin", bytes((64 << 20) + 1)))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a": b""}, "0 data.pkl members"),
        ({"m/data.pkl": b"", "n/data.pkl": b""}, "2 data.pkl members"),
        ({"m/data.pkl": b"", "m/byteorder": b"big"}, "not little-endian"),
    ],
)
def test_odd_archives(tmp_path: Path, members: dict[str, bytes], message: str) -> None:
    path = tmp_path / "m.bin"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    with pytest.raises(CheckpointError, match=message):
        read_torch(path)


def test_an_older_torch_format(tmp_path: Path) -> None:
    path = tmp_path / "m.bin"
    path.write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, 2) * 10)
    with pytest.raises(CheckpointError, match=r"torch older than 1\.6"):
        read_torch(path)
