"""Torch .bin files: views of storages are read in place; nothing in the pickle is run."""

from __future__ import annotations

import os
import pickle
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from headrace.checkpoint import open_checkpoint
from headrace.checkpoint.torch_file import read_torch
from headrace.errors import CheckpointError
from tests.checkpoint.torch_writer import Stored, write_legacy, write_zip
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
    with pytest.raises(CheckpointError, match=r"its pickle is damaged|does not fit its storage of 24 elements"):
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
    "huge memo": (b"\x80\x02]r\xff\xff\xff\x7f.", "holds a list"),
    "a hash without end": (b"\x80\x02})" + b"q\x00h\x00\x86" * 60 + b"K\x01s.", "a tuple as a key"),
    "a repr without end": (b"\x80\x02)" + b"q\x00h\x00\x86" * 60 + b"Q.", "a storage is described as"),
    "a set": (b"\x80\x04\x8f.", "opcode EMPTY_SET"),
    "an extension": (b"\x80\x02\x82\x01.", "pickle is damaged"),
    "an instance": (b"(iposix\nsystem\n.", "opcode INST"),
    "values left over": (b"\x80\x02K\x01K\x02.", "values left over"),
    "a list in many dicts": (
        b"\x80\x02](" + b"K\x01K\x02\x86" * 4000 + b"eq\x00" + b"ccollections\nOrderedDict\nh\x00\x85R0" * 4000 + b".",
        "one list in many dicts",
    ),
    "huge string": (b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7fabc.", "pickle is damaged"),
    "attributes": (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}b0}.", "holds a dict"),
    "storage attributes": (b"\x80\x02ctorch\nFloatStorage\n}X\x05\x00\x00\x00dtypeK\x01sb.", "holds a _Name"),
    "not a dict": (pickle.dumps([1]), "holds a list"),
    "no tensors": (pickle.dumps({"a": 1}), "expected a flat state dict"),
    "storage kind": (b"\x80\x02(X\x01\x00\x00\x00sK\x01K\x01K\x01K\x01tQ.", "a storage is described as"),
    "short id": (b"\x80\x02K\x01Q.", "pickle is damaged"),
    "a quantized storage": (b"ctorch\nQInt8Storage\n.", r"asks for torch\.QInt8Storage"),
    "an escape that is none": (b"cfoo\\i\nbar\n.", "pickle is damaged"),
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


# What trainers and converters write. `Stored` says how a tensor lies in the file.

GRID = NUMBERS.reshape(4, 6)
BITS = np.arange(8, dtype=np.uint8)
KINDS: dict[str, tuple[Stored, np.ndarray]] = {
    "plain": (Stored(GRID), GRID),
    "parameter": (Stored(GRID, parameter=True), GRID),
    "parameter with state": (Stored(GRID, parameter="state"), GRID),
    "subclass": (Stored(GRID, subclass=True), GRID),
    "transposed": (Stored(NUMBERS, (6, 4), (1, 6)), GRID.T),
    "expanded": (Stored(NUMBERS, (5, 4), (0, 1), offset=2), np.tile(NUMBERS[2:6], (5, 1))),
    "expanded from one": (Stored(NUMBERS, (300, 7), (0, 0), offset=3), np.full((300, 7), 3)),
    "negated": (Stored(GRID, negated=True), -GRID),
    "negated and expanded": (Stored(NUMBERS, (2, 4), (0, 1), negated=True), -np.tile(NUMBERS[:4], (2, 1))),
    "one row, any stride": (Stored(NUMBERS, (1, 6), (1 << 61, 1)), NUMBERS[None, :6]),
    "scalar": (Stored(NUMBERS, (), (), offset=5), np.array(5.0)),
    "float64": (Stored(GRID.astype(np.float64) / 3), (GRID.astype(np.float64) / 3).astype(np.float32)),
    "int64": (Stored(np.arange(6, dtype=np.int64)), np.arange(6)),
    "bool": (Stored(np.array([True, False])), np.array([1, 0])),
    "uint8": (Stored(BITS), BITS),
    "float8": (Stored(BITS, untyped="float8_e4m3fn"), BITS.view(ml_dtypes.float8_e4m3fn)),
    "uint16": (Stored(BITS, (4,), untyped="uint16"), BITS.view(np.uint16)),
}


@pytest.mark.parametrize("write", [write_zip, write_legacy])
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_every_kind_of_tensor(tmp_path: Path, write: Callable[..., Path], protocol: int) -> None:
    state = OrderedDict((name, stored) for name, (stored, _) in KINDS.items())
    tensors = read_torch(write(tmp_path / "m.bin", state, protocol=protocol))
    assert set(tensors) == set(KINDS)
    for name, (_, expected) in KINDS.items():
        result = tensors[name].load()
        assert result.dtype == np.float32
        np.testing.assert_array_equal(result, np.asarray(expected, np.float32), err_msg=name)


def test_a_value_beyond_float32_is_infinite_as_torch_makes_it(tmp_path: Path) -> None:
    tensors = read_torch(write_zip(tmp_path / "m.bin", {"a": Stored(np.array([1e300, -1e300, 1e-300]))}))
    np.testing.assert_array_equal(tensors["a"].load(), [np.inf, -np.inf, 0])


@pytest.mark.parametrize("root", ["", "pytorch_model", "a.b/c", "江"])
def test_the_archive_may_have_any_root(tmp_path: Path, root: str) -> None:
    path = write_zip(tmp_path / "m.bin", {"a": Stored(GRID)}, root=root or ".")
    np.testing.assert_array_equal(read_torch(path)["a"].load(), GRID)


def test_layers_without_a_state_write_none(tmp_path: Path) -> None:
    assert list(read_torch(write_zip(tmp_path / "m.bin", {"a": Stored(GRID), "b._extra_state": None}))) == ["a"]


@pytest.mark.parametrize("write", [write_zip, write_legacy])
def test_a_training_checkpoint_says_where_its_weights_are(tmp_path: Path, write: Callable[..., Path]) -> None:
    state = {"epoch": 3, "state_dict": {"a": Stored(GRID)}, "optimizer": {"state": {0: {"step": 1}}}}
    with pytest.raises(CheckpointError, match=r"'epoch' is a int; .* training checkpoint: save its 'state_dict' alone"):
        read_torch(write(tmp_path / "m.bin", state))


def test_a_small_file_cannot_grow_without_bound(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not fit its storage of 24 elements"):
        read_torch(write_zip(tmp_path / "m.bin", {"a": Stored(NUMBERS, (1 << 30, 1 << 20), (0, 0))}))


def test_an_unknown_mark_is_not_ignored(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "m.bin", {"a": Stored(GRID, negated=True)})
    data = path.read_bytes()
    assert data.count(b"neg") == 1
    path.write_bytes(data.replace(b"neg", b"foo"))
    with pytest.raises(CheckpointError, match="a tensor is marked 'foo'"):
        read_torch(path)  # members are mapped, not unpacked: nothing looks at the zip's checksums


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (pickle.dumps(0x1950A86A20F9469CFC6C, 2) * 10, "is of version 119547037146038801333356"),
        (pickle.dumps({"a": 1}, 2) * 5, "is a plain pickle"),
        (pickle.dumps(0x1950A86A20F9469CFC6C, 2), "pickle is damaged"),
    ],
)
def test_old_files_that_are_none(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "m.bin"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=message):
        read_torch(path)


def test_an_old_file_of_a_big_endian_machine(tmp_path: Path) -> None:
    path = write_legacy(tmp_path / "m.bin", {"a": Stored(GRID)}, little_endian=False)
    with pytest.raises(CheckpointError, match="not little-endian"):
        read_torch(path)


def test_every_truncation_of_an_old_file_is_told(tmp_path: Path) -> None:
    path = write_legacy(tmp_path / "m.bin", {"a": Stored(GRID), "b": Stored(NUMBERS.astype(np.float16))})
    whole = path.read_bytes()
    for size in range(0, len(whole), 7):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError):
            read_torch(path)


def test_other_archives_are_named(tmp_path: Path) -> None:
    program = tmp_path / "program.bin"
    with zipfile.ZipFile(program, "w") as archive:
        archive.writestr("m/data.pkl", b"")
        archive.writestr("m/constants.pkl", b"")
    with pytest.raises(CheckpointError, match="is a TorchScript program"):
        read_torch(program)
    with tarfile.open(tmp_path / "old.bin", "w") as archive:
        archive.add(program)
    with pytest.raises(CheckpointError, match="is a tar, as torch wrote before"):
        read_torch(tmp_path / "old.bin")
