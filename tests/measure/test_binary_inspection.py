"""inspect of what was compiled: real binaries of a tiny model, folders that lie, files that are none."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from headrace.errors import CheckpointError, TargetError
from headrace.measure.inspection import inspect_path
from tests.exports import PHONE, Exports

TARGET = "snapdragon-8-elite"


@pytest.fixture(scope="module")
def phone(exports: Exports) -> Path:
    """A bundle with a chip's folder; not to be changed."""
    return exports.bundle("phone", **PHONE)


@pytest.mark.qnn
def test_a_chip_folder_is_as_planned(phone: Path) -> None:
    folder = phone / TARGET
    report = inspect_path(folder)
    summary = report["summary"]
    assert summary["kind"] == "Genie folder"
    assert summary["chip"] == f"{TARGET} (soc_model 69, v79)"
    assert summary["bytes"] == sum(path.stat().st_size for path in folder.glob("*.bin"))
    assert summary["plan"].startswith("as planned")
    steps = [(s, c) for s in (32, 8, 1) for c in (96, 256)]
    assert {g["name"] for g in report["graphs"]} == {f"ar{s}_cl{c}_{n}_of_3" for s, c in steps for n in (1, 2, 3)}
    ids = next(t for t in report["tensors"] if t["name"] == "ar32_cl96_1_of_3: input_ids")
    assert ids == {"name": "ar32_cl96_1_of_3: input_ids", "precision": "int32", "shape": [1, 32]}


@pytest.mark.qnn
def test_one_binary_alone(phone: Path) -> None:
    binary = phone / TARGET / "weight_sharing_model_2_of_3.serialized.bin"
    report = inspect_path(binary)
    assert report["summary"]["kind"] == "context binary" and "plan" not in report["summary"]
    assert len({g["weight_bytes"] for g in report["graphs"]}) == 1, "weights are shared"
    assert all(g["binary"] == binary.name for g in report["graphs"])


@pytest.mark.qnn
def test_a_folder_that_was_changed_is_shown_and_told(phone: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(phone, tmp_path / "bundle"))
    config = bundle / TARGET / "genie_config.json"
    config.write_text(re.sub(r'"n-vocab": 420', '"n-vocab": 421', config.read_text(encoding="utf-8")), encoding="utf-8")
    report = inspect_path(bundle / TARGET)
    assert re.match("differs: .*genie_config.json was changed", report["summary"]["plan"]) and report["graphs"]


@pytest.mark.qnn
def test_a_folder_of_another_bundle_is_shown_and_told(phone: Path, exports: Exports, tmp_path: Path) -> None:
    other = Path(shutil.copytree(exports.bundle("gqa"), tmp_path / "other"))
    shutil.copytree(phone / TARGET, other / TARGET)
    report = inspect_path(other / TARGET)
    assert report["summary"]["plan"].startswith("differs: ") and report["graphs"]


@pytest.mark.parametrize("names", [[], ["../part.bin"], ["/etc/passwd"], [".."], ["a.bin", "a.bin"], [3], None])
def test_a_folder_that_names_no_binaries_of_its_own(tmp_path: Path, names: object) -> None:
    content = {"dialog": {"engine": {"model": {"binary": {"ctx-bins": names}}}}}
    (tmp_path / "genie_config.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(TargetError, match="expected every binary once, each a file beside it"):
        inspect_path(tmp_path)


def test_a_checkpoint_file_is_not_taken_for_a_binary(tmp_path: Path) -> None:
    for name, data in (("pytorch_model.bin", b"PK\x03\x04" + bytes(64)), ("old.bin", b"\x80\x02" + bytes(64))):
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match="is one file of a model"):
            inspect_path(path)
