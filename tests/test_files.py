"""Files whole or not at all, also when two write the same one, and no more memory than a file has bytes."""

from __future__ import annotations

import errno
import sys
import threading
import tracemalloc
from pathlib import Path

import pytest

from headrace.errors import BundleError, UserError
from headrace.files import exchange, full_disk, read_bytes, read_json, sync_below, temporary_name, whole_file


def test_two_writers_come_one_after_the_other(tmp_path: Path) -> None:
    """What is there is always one of the two, and nothing is left beside it."""
    path = tmp_path / "talk"

    def write(letter: bytes) -> None:
        for _ in range(20):
            with whole_file(path) as out:
                for _ in range(64):
                    out.write(letter * 4096)

    threads = [threading.Thread(target=write, args=(letter,)) for letter in (b"a", b"b")]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        if path.is_file():
            assert path.read_bytes() in (b"a" * (64 * 4096), b"b" * (64 * 4096))
    for thread in threads:
        thread.join()
    assert [entry.name for entry in tmp_path.iterdir()] == ["talk"]


def test_what_a_killed_writer_left_is_no_part_of_the_next(tmp_path: Path) -> None:
    temporary_name(tmp_path / "x").write_bytes(b"y" * 100)
    with whole_file(tmp_path / "x") as out:
        out.write(b"new")
    assert (tmp_path / "x").read_bytes() == b"new"


@pytest.mark.skipif(sys.platform != "linux", reason="not run: other systems cannot exchange two names")
def test_two_folders_swap_names(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "f").write_text(name)
    assert exchange(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a" / "f").read_text() == "b" and (tmp_path / "b" / "f").read_text() == "a"
    assert not exchange(tmp_path / "a", tmp_path / "missing")


def test_a_small_file_takes_little_memory(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"a": 1}')
    tracemalloc.start()
    read_json(tmp_path / "x.json")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20
    with pytest.raises(UserError, match="has 8 bytes; expected at most 7"):
        read_bytes(tmp_path / "x.json", limit=7)
    assert len(read_bytes(tmp_path / "x.json", limit=8)) == 8


def test_half_a_character_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(r'{"a": "\ud83d\ude00"}')
    assert read_json(tmp_path / "x.json") == {"a": "😀"}
    (tmp_path / "x.json").write_text(r'{"a": "\ud83d"}')
    with pytest.raises(BundleError, match=r"is not JSON .*surrogates not allowed"):
        read_json(tmp_path / "x.json")


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    with (
        pytest.raises(BundleError, match=r"has no room left \(no space\); free some and run this again"),
        full_disk(BundleError, tmp_path, "run this again"),
    ):
        raise OSError(errno.ENOSPC, "no space")
    with pytest.raises(OSError, match="other"), full_disk(BundleError, tmp_path, ""):
        raise OSError(errno.EIO, "other")


def test_syncing_passes_links_by(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "f").write_text("x")
    (tmp_path / "a" / "link").symlink_to(tmp_path / "nowhere")
    sync_below(tmp_path)
