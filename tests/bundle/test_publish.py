"""A bundle is published whole: nothing half written under its final name, and nothing of others replaced."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from headrace import files
from headrace.bundle import folder as bundle_module
from headrace.bundle.folder import (
    MANIFEST,
    check_files,
    is_bundle,
    publish,
    write_file,
)
from headrace.errors import BundleError


def work(folder: Path, text: str = "one") -> Path:
    (folder / "weights").mkdir(parents=True)
    (folder / "a.onnx").write_text(text)
    (folder / "weights" / "w.safetensors").write_text(text)
    return folder


def test_publishing_replaces_a_bundle(tmp_path: Path) -> None:
    out = tmp_path / "out"
    publish(work(tmp_path / "work1"), out, {}, aside=out.with_name("aside"))
    publish(work(tmp_path / "work2", "two"), out, {}, aside=out.with_name("aside"))
    assert (out / "a.onnx").read_text() == "two"
    assert check_files(out) == []
    assert [p.name for p in tmp_path.iterdir()] == ["out"], "nothing else is left"


def test_publishing_into_an_empty_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    publish(work(tmp_path / "work"), out, {}, aside=out.with_name("aside"))
    assert check_files(out) == []
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_anything_else_is_not_replaced(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    if kind == "folder":
        out.mkdir()
        (out / "precious.txt").write_text("mine")
    else:
        out.write_text("mine")
    with pytest.raises(BundleError, match="exists and is no bundle; choose another -o or remove it"):
        publish(work(tmp_path / "work"), out, {}, aside=out.with_name("aside"))
    assert (out / "precious.txt" if kind == "folder" else out).read_text() == "mine"


def test_nothing_half_written_under_the_final_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever step of publishing fails, the old bundle or the new one is there, whole; and the next one succeeds."""
    out = tmp_path / "out"
    publish(work(tmp_path / "first"), out, {}, aside=out.with_name("aside"))
    calls = 0
    fail_at = 0

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == fail_at:
                raise OSError("stopped here")
            return real(*arguments, **options)

        return call

    monkeypatch.setattr(bundle_module, "sync", counted(bundle_module.sync))
    monkeypatch.setattr(bundle_module, "sha256_file", counted(bundle_module.sha256_file))
    monkeypatch.setattr(files.os, "fsync", counted(files.os.fsync))
    monkeypatch.setattr(Path, "replace", counted(Path.replace))
    failures = 0
    for number in range(1, 100):
        folder = work(tmp_path / "work", str(number))
        calls, fail_at = 0, number
        try:
            publish(folder, out, {}, aside=out.with_name("aside"))
        except OSError:
            failures += 1
            fail_at = 0
            assert check_files(out) == []
            if folder.exists():  # resumed
                publish(folder, out, {}, aside=out.with_name("aside"))
            assert check_files(out) == []
            assert (out / "a.onnx").read_text() == str(number)
            shutil.rmtree(folder, ignore_errors=True)
        else:
            break
    assert failures >= 10
    fail_at = 0
    publish(work(tmp_path / "work", "last"), out, {}, aside=out.with_name("aside"))
    assert [p.name for p in tmp_path.iterdir()] == ["out"], "nothing else is left"

    """Where names cannot be exchanged: the new one is complete beside it and is published next time."""
    out = tmp_path / "out"
    publish(work(tmp_path / "first"), out, {}, aside=out.with_name("aside"))
    real = Path.rename
    monkeypatch.setattr(bundle_module, "exchange", lambda a, b: False)
    monkeypatch.setattr(
        Path, "rename", lambda a, b: (_ for _ in ()).throw(OSError()) if a.name == "work" else real(a, b)
    )
    folder = work(tmp_path / "work", "two")
    with pytest.raises(OSError):
        publish(folder, out, {}, aside=out.with_name("aside"))
    monkeypatch.undo()
    assert is_bundle(folder)
    publish(folder, out, {}, aside=out.with_name("aside"))
    assert check_files(out) == []
    assert [p.name for p in tmp_path.iterdir()] == ["out"], "nothing else is left"


@pytest.mark.skipif(sys.platform != "linux", reason="not run: other systems cannot exchange two names")
def test_a_bundle_is_there_at_every_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On Linux the old and the new one swap names in one step."""
    out = tmp_path / "out"
    publish(work(tmp_path / "first"), out, {}, aside=out.with_name("aside"))
    real = Path.rename

    def watched(a: Path, b: Path) -> Path:
        assert is_bundle(out)
        made = real(a, b)
        assert is_bundle(out)
        return made

    monkeypatch.setattr(Path, "rename", watched)
    publish(work(tmp_path / "work", "two"), out, {}, aside=out.with_name("aside"))
    assert (out / "a.onnx").read_text() == "two"


def test_what_a_killed_manifest_leaves_is_not_part_of_the_next(tmp_path: Path) -> None:
    folder = work(tmp_path / "work")
    (folder / f".{MANIFEST}.part").write_text("{")
    publish(folder, tmp_path / "out", {}, aside=tmp_path / "aside")
    assert check_files(tmp_path / "out") == []
    open_files = json.loads((tmp_path / "out" / MANIFEST).read_text())["files"]
    assert set(open_files) == {"a.onnx", "weights/w.safetensors"}


def test_small_files_are_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    write_file(path, b"old")

    def fail(handle: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(OSError):
        write_file(path, b"new")
    assert path.read_bytes() == b"old"
