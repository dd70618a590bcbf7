"""Device graphs beside a bundle: made once, again for another bundle, and never over what is not headrace's."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from headrace.bundle.derived import derived_folder
from headrace.bundle.folder import Bundle, open_bundle
from headrace.errors import BundleError
from headrace.graph import device_folder
from headrace.graph.device_folder import bundle_device_graphs, kept_device_graphs
from tests.exports import PHONE, Exports


def test_a_full_disk_is_one_line_and_nothing_is_left(
    exports: Exports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = open_bundle(exports.copy(tmp_path / "b"))

    def fill(bundle: Bundle, folder: Path) -> Any:
        (folder / "half").write_bytes(b"x")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(device_folder, "bundle_device_graphs", fill)
    with pytest.raises(BundleError, match=r"has no room left \(No space left on device\); free some and run this"):
        kept_device_graphs(bundle)
    assert [entry.name for entry in tmp_path.iterdir()] == ["b"]


def test_device_graphs_are_made_once_a_bundle(
    exports: Exports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = open_bundle(exports.copy(tmp_path / "b", "phone", parts=3))
    made: list[Path] = []

    def counted(bundle: Bundle, folder: Path) -> Any:
        made.append(folder)
        return bundle_device_graphs(bundle, folder)

    monkeypatch.setattr(device_folder, "bundle_device_graphs", counted)
    folder = kept_device_graphs(bundle)
    assert folder == derived_folder(bundle, "device") == tmp_path / "b.device"
    assert kept_device_graphs(bundle) == folder and len(made) == 1
    other = bundle._replace(files={**bundle.files, "weights/part_2_of_3.safetensors": {"sha256": "other"}})
    assert kept_device_graphs(other) == folder and len(made) == 2
    # What headrace did not make is not taken away.
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "precious.txt").write_text("mine")
    with pytest.raises(BundleError, match=r"b\.device exists and headrace did not make it; move it away"):
        kept_device_graphs(other)
    assert [path.name for path in folder.iterdir()] == ["precious.txt"]


@pytest.mark.qnn
def test_kept_graphs_are_the_bundles_own(exports: Exports) -> None:
    phone = exports.bundle("phone", **PHONE)
    assert kept_device_graphs(open_bundle(phone)) == phone / "device"


def test_two_at_once_make_one(exports: Exports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second waits, says for whom, and takes what the first has made."""
    bundle = open_bundle(exports.copy(tmp_path / "b", "phone", parts=3))
    made: list[Path] = []
    told: list[str] = []
    waits = threading.Event()

    def slow(bundle: Bundle, folder: Path) -> Any:
        made.append(folder)
        assert waits.wait(60)
        return bundle_device_graphs(bundle, folder)

    def progress(stage: str, done: int, total: int) -> None:
        told.append(stage)
        waits.set()

    monkeypatch.setattr(device_folder, "bundle_device_graphs", slow)
    threads = [threading.Thread(target=kept_device_graphs, args=(bundle, progress)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1 and set(told) == {f"process {os.getpid()} makes b.device"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "b.device"]
