"""Folders in the making: foreign ones untouched, one process at a time, nothing left behind."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from headrace.bundle.work_folder import MARK, SCRATCH, clear, scratch_folder, work_folder
from headrace.errors import BundleError
from headrace.files import try_lock

HOLD = """
import sys
from pathlib import Path
from headrace.bundle.work_folder import work_folder
with work_folder(Path(sys.argv[1]), "a test"):
    (Path(sys.argv[1]) / "result").write_text("kept")
    print("held", flush=True)
    sys.stdin.read()
"""


SCRATCHING = """
import sys
from pathlib import Path
from headrace.bundle.work_folder import scratch_folder
with scratch_folder(Path(sys.argv[1]), "a test") as folder:
    (folder / "result").write_text("half")
    print("held", flush=True)
    sys.stdin.read()
"""


def hold(path: Path, code: str = HOLD) -> subprocess.Popen[str]:
    """A process that holds the folder until its stdin closes."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def end(process: subprocess.Popen[str], kill: bool = False) -> None:
    if kill:
        process.send_signal(signal.SIGKILL)
    process.communicate()


def test_an_empty_one_goes_and_a_filled_one_stays(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.partial"
    with work_folder(path, "a test"):
        assert {entry.name for entry in path.iterdir()} == {MARK}
        assert (path / MARK).read_text() == (
            f"{os.getpid()}\nheadrace makes or uses this folder for a test; above, the process at work.\n"
        )
    assert not path.exists()
    with work_folder(path, "a test"):
        (path / "result").write_text("kept")
    with work_folder(path, "a test"):
        assert (path / "result").read_text() == "kept"
        clear(path, ["result", "never there"])
    assert not path.exists()


@pytest.mark.parametrize("kind", ["folder", "file", "link", "dangling link"])
def test_what_headrace_did_not_make_is_refused(tmp_path: Path, kind: str) -> None:
    path, target = tmp_path / "out.partial", tmp_path / "target"
    if kind == "folder":
        path.mkdir()
        (path / "precious.txt").write_text("mine")
    elif kind == "file":
        path.write_text("mine")
    else:
        if kind == "link":
            target.mkdir()
        path.symlink_to(target)
    before = sorted(entry.name for entry in tmp_path.rglob("*"))
    with pytest.raises(BundleError, match="exists and headrace did not make it"), work_folder(path, "a test"):
        pass
    assert sorted(entry.name for entry in tmp_path.rglob("*")) == before


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    with work_folder(tmp_path / "x", "a test"):
        assert (tmp_path / "x" / MARK).exists()


def test_one_process_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "out.partial"
    process = hold(path)
    with pytest.raises(BundleError) as error, work_folder(path, "a test"):
        pass
    assert str(error.value) == (
        f"{path} is in use by process {process.pid}; wait until it has ended, or choose another place"
    )
    end(process)
    with work_folder(path, "a test"):
        pass


def test_a_killed_process_holds_nothing(tmp_path: Path) -> None:
    path = tmp_path / "out.partial"
    end(hold(path), kill=True)
    with work_folder(path, "a test"):
        assert (path / "result").exists()


def test_the_second_waits_for_the_first(tmp_path: Path) -> None:
    path = tmp_path / "out.partial"
    process = hold(path)
    seen: list[int] = []

    def waiting(holder: int) -> None:
        seen.append(holder)
        if len(seen) == 2:
            end(process)

    with work_folder(path, "a test", waiting=waiting):
        assert (path / "result").exists()
    assert set(seen) == {process.pid}


def test_who_has_just_taken_it_is_told_by_name(tmp_path: Path) -> None:
    """Between taking the lock and writing its id a process has none, or that of the one before."""
    path = tmp_path / "out.partial"
    with work_folder(path, "a test"):
        (path / "result").touch()
    assert (path / MARK).read_bytes().startswith(b"\nheadrace makes")
    mark = (path / MARK).open("ab")
    assert try_lock(mark)
    mark.truncate(0)

    def name() -> None:
        mark.write(b"4711\n")
        mark.flush()

    with mark:
        timer = threading.Timer(0.3, name)
        timer.start()
        with pytest.raises(BundleError, match="in use by process 4711;"), work_folder(path, "a test"):
            pass
        timer.join()
        mark.truncate(0)
        with pytest.raises(BundleError, match="in use by another process;"), work_folder(path, "a test"):
            pass


def test_a_full_disk_at_the_end_hides_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.partial"

    def full(file: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(BundleError, match="the reason"), work_folder(path, "a test"):
        (path / "result").touch()
        monkeypatch.setattr(os, "write", full)
        raise BundleError("the reason")
    monkeypatch.undo()
    with work_folder(path, "a test"):
        assert (path / "result").exists()


def test_many_at_once_come_one_after_the_other(tmp_path: Path) -> None:
    """Each makes the folder and takes it away: nobody works in one that another has just removed."""
    path, inside, most = tmp_path / "out.partial", 0, 0

    def enter() -> None:
        nonlocal inside, most
        for _ in range(20):
            with work_folder(path, "a test", waiting=lambda _: None):
                inside += 1
                most = max(most, inside)
                assert (path / MARK).exists()
                inside -= 1

    threads = [threading.Thread(target=enter) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1 and not path.exists()


def test_a_place_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(BundleError, match="cannot be made"), work_folder(tmp_path / "file" / "x", "a test"):
        pass
    with pytest.raises(BundleError, match="cannot be made"), work_folder(tmp_path / ("x" * 300), "a test"):
        pass


def test_a_scratch_folder_is_gone_at_the_end(tmp_path: Path) -> None:
    place = tmp_path / "not there yet"
    with scratch_folder(place, "a test") as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "file").write_text("x")
        assert folder.parent == place
    assert list(place.iterdir()) == []
    with pytest.raises(ValueError, match="mine"), scratch_folder(place, "a test") as folder:
        (folder / "file").touch()
        raise ValueError("mine")
    assert list(place.iterdir()) == []


def test_what_a_killed_process_left_goes_with_the_next_one(tmp_path: Path) -> None:
    killed, alive = hold(tmp_path, SCRATCHING), hold(tmp_path, SCRATCHING)
    names = {entry.name for entry in tmp_path.iterdir() if entry.is_dir()}
    assert len(names) == 2
    end(killed, kill=True)
    with scratch_folder(tmp_path, "a test"):
        left = {entry.name for entry in tmp_path.iterdir() if entry.is_dir()} & names
        assert len(left) == 1, "the living one's stays"
    end(alive)
    assert not [entry for entry in tmp_path.iterdir() if entry.is_dir()]


def test_only_what_headrace_made_is_swept(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / MARK).touch()
    (tmp_path / f"{SCRATCH}link").symlink_to(target)
    (tmp_path / f"{SCRATCH}mine").mkdir()
    (tmp_path / f"{SCRATCH}mine" / "file").touch()
    (tmp_path / f"{SCRATCH}file").touch()
    before = sorted(entry.relative_to(tmp_path) for entry in tmp_path.rglob("*"))
    with scratch_folder(tmp_path, "a test"):
        pass
    assert sorted(entry.relative_to(tmp_path) for entry in tmp_path.rglob("*")) == before


@pytest.mark.skipif(sys.platform == "win32", reason="it has locks everywhere")
def test_without_locks_nothing_is_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    left = tmp_path / f"{SCRATCH}left"
    left.mkdir()
    (left / MARK).touch()
    monkeypatch.setattr("fcntl.flock", none)
    with scratch_folder(tmp_path, "a test"):
        assert left.exists(), "its process may be alive"


def test_what_somebody_still_writes_into_goes_too(tmp_path: Path) -> None:
    """The compiler that a killed export had started goes on for a while."""
    left = tmp_path / f"{SCRATCH}left"
    left.mkdir()
    (left / MARK).touch()
    for number in range(300):
        (left / f"old {number}").touch()
    writing = threading.Event()

    def write() -> None:
        for number in range(1_000_000):
            try:
                (left / f"new {number}").touch()
            except FileNotFoundError:
                return
            writing.set()

    writer = threading.Thread(target=write)
    writer.start()
    assert writing.wait(10)
    with scratch_folder(tmp_path, "a test"):
        writer.join(10)
        assert not writer.is_alive()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [FileNotFoundError, FileExistsError])
def test_a_place_where_no_folder_ever_is_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[OSError]
) -> None:
    # As in /proc, or where a link leads nowhere.
    def refuse(self: Path, *arguments: object, **options: object) -> None:
        raise error(errno.ENOENT, "never")

    monkeypatch.setattr(Path, "mkdir", refuse)
    message = r"b\.partial cannot be made \(never\); choose another place"
    with pytest.raises(BundleError, match=message), work_folder(tmp_path / "b.partial", "a test"):
        pass
