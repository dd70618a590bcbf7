"""Where an export may go, whose folders are whose, and a disk that fills up."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from headrace.bundle.folder import MANIFEST, check_files
from headrace.bundle.work_folder import MARK
from headrace.cli.main import _run
from headrace.errors import BundleError
from headrace.exporter import job, workspace
from headrace.exporter.job import export
from headrace.exporter.workspace import differences
from headrace.files import temporary_name
from tests.exports import SMALL, Exports


@pytest.fixture
def run(exports: Exports) -> Any:
    """Export the tiny model to a place."""

    def call(out: str | Path, **options: Any) -> Path:
        return export(exports.checkpoint(), out, **{**SMALL, "calibration": [exports.text], **options})

    return call


def command(exports: Exports, out: Path | str, *more: str, before: str = "") -> subprocess.CompletedProcess[str]:
    """The same through the command line, in a child process that runs `before` first."""
    options = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    arguments = ["export", str(exports.checkpoint()), "-o", str(out), *options, f"--calibration={exports.text}", *more]
    code = f"{textwrap.dedent(before)}\nimport sys\nfrom headrace.cli.main import _run\nsys.exit(_run({arguments!r}))"
    # What measures coverage could not write its own file on a disk that is full.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COV")}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


# Places


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("", "-o is empty; expected the bundle's folder"),
        (" ", "-o is empty"),
        (".", "-o . is or holds the folder you are in"),
        ("..", "-o .. is or holds the folder you are in"),
        ("/", "-o / is the root of a disk"),
        ("ring", "-o 'ring' is no possible folder"),
        ("a\0b", "is no possible folder"),
    ],
)
def test_no_place_for_a_bundle(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ring").symlink_to(tmp_path / "ring")
    with pytest.raises(BundleError) as error:
        run(out)
    assert str(error.value).startswith(message) or message in str(error.value)
    assert "\n" not in str(error.value)
    assert names(tmp_path) == ["ring"]


def test_the_checkpoint_is_no_place_for_its_bundle(run: Any, exports: Exports) -> None:
    for place in (exports.checkpoint(), exports.checkpoint().parent):
        with pytest.raises(BundleError, match="is or holds the checkpoint"):
            run(place)


def test_a_link_stays_a_link(run: Any, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "disk" / "bundle")  # nothing there yet
    for parts in (5, 3):
        assert run(link, parts=parts) == link
        assert link.is_symlink() and check_files(link) == []
        assert names(tmp_path / "disk") == ["bundle"]
        assert json.loads((link / MANIFEST).read_text())["plan"]["parts"] == parts


@pytest.mark.parametrize("name", ["out.partial", ".out.old", "out.device", "out.emulation"])
def test_foreign_folders_are_left_alone(run: Any, tmp_path: Path, name: str) -> None:
    run(tmp_path / "out")
    (tmp_path / name).mkdir()
    (tmp_path / name / "precious.txt").write_text("mine")
    if name == "out.partial":
        with pytest.raises(BundleError, match=r"out\.partial exists and headrace did not make it"):
            run(tmp_path / "out", restart=True)
    else:
        run(tmp_path / "out")
    assert (tmp_path / name / "precious.txt").read_text() == "mine"


def test_a_users_file_in_a_bundle_is_not_lost(run: Any, tmp_path: Path) -> None:
    out = run(tmp_path / "out")
    (out / "notes.txt").write_text("mine")
    with pytest.raises(BundleError, match=r"out holds notes\.txt, which is not the bundle's; choose another"):
        run(out)
    assert (out / "notes.txt").read_text() == "mine"
    (out / "notes.txt").unlink()
    (out / "part_1_of_5.onnx").write_bytes(b"damaged")
    (out / ".DS_Store").write_bytes(b"")
    run(out)
    assert check_files(out) == []


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("README.md", "my words"),
        ("measurements/notes.txt", "mine"),
        ("measurements/mine.json", '{"format": "mine"}'),
        ("measurements/broken.json", "{"),
        ("measurements/deep/photo.png", "mine"),
    ],
)
def test_a_users_file_where_headrace_writes_later_is_not_lost(run: Any, tmp_path: Path, name: str, text: str) -> None:
    out = run(tmp_path / "out")
    (out / name).parent.mkdir(parents=True, exist_ok=True)
    (out / name).write_text(text)
    with pytest.raises(BundleError, match=f"out holds {name}, which is not the bundle's; choose another"):
        run(out)
    assert (out / name).read_text() == text


def test_what_was_measured_of_a_bundle_goes_with_it(run: Any, tmp_path: Path) -> None:
    out = run(tmp_path / "out")
    assert _run(["bench", str(out), "--save", "--prompts", "4", "--depth", "4", "--tokens", "2", "--repeats", "1"]) == 0
    assert _run(["card", str(out)]) == 0
    for name in (".bench-host.json.part", "ttft.svg", "decode.png"):
        (out / "measurements" / name).write_text("")
    assert (out / "README.md").exists() and list((out / "measurements").glob("*.json"))
    run(out)
    assert check_files(out) == [] and not (out / "README.md").exists()


def test_a_users_file_in_the_work_folder_is_not_lost(run: Any, tmp_path: Path) -> None:
    def stop(stage: str, done: int, total: int) -> None:
        if stage == "host graphs":
            (tmp_path / "out.partial" / "notes.txt").write_text("mine")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", progress=stop)
    run(tmp_path / "out", resume=True)
    assert check_files(tmp_path / "out") == []
    assert (tmp_path / "out.partial" / "notes.txt").read_text() == "mine"


def test_killed_while_the_bundle_was_replaced(run: Any, exports: Exports, tmp_path: Path) -> None:
    """Between two renames the old bundle is in the work folder; the next run brings it back, or goes on."""
    old = run(tmp_path / "out")
    kill = f"""
        import os, signal
        from pathlib import Path
        from headrace.bundle import folder
        folder.exchange = lambda a, b: False
        rename = Path.rename
        def killed(self, target):
            if self.name == "bundle" and Path(target) == Path({str(tmp_path / "out")!r}):
                os.kill(os.getpid(), signal.SIGKILL)
            return rename(self, target)
        Path.rename = killed
    """
    assert command(exports, tmp_path / "out", "--parts=3", before=kill).returncode == -signal.SIGKILL
    assert not old.exists() and (tmp_path / "out.partial" / "replaced" / MANIFEST).exists()
    with pytest.raises(BundleError, match="--parts 3 → 4"):
        run(tmp_path / "out", parts=4)
    assert json.loads((old / MANIFEST).read_text())["plan"]["parts"] == 5
    run(tmp_path / "out", parts=3, resume=True)
    assert json.loads((old / MANIFEST).read_text())["plan"]["parts"] == 3
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("options", [{"bits": 5.0}, {"method": "best"}], ids=["costs", "gradients"])
@pytest.mark.parametrize("removed", range(4))
def test_stopped_while_the_work_folder_was_cleared(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, removed: int, options: dict[str, Any]
) -> None:
    """The bundle is at its place, and some of what was kept for going on is gone."""
    real, calls = workspace.clear, 0

    def clear(path: Path, kept: Sequence[str]) -> None:
        nonlocal calls
        calls += 1
        real(path, kept[:removed] if calls == 2 else kept)
        if calls == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(workspace, "clear", clear)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", **options)
    assert not (tmp_path / "out.partial" / "bundle").exists()
    run(tmp_path / "out", resume=removed == 0, **options)
    assert check_files(tmp_path / "out") == []
    assert names(tmp_path) == ["out"]


# Two at once


@pytest.mark.parametrize("name", ["state.json", "sensitivity.json", "gradients.npz"])
def test_killed_while_work_was_kept(run: Any, tmp_path: Path, name: str) -> None:
    """What was half written is not taken for somebody's, and does not stay."""
    work = tmp_path / "out.partial"
    work.mkdir()
    (work / MARK).touch()
    temporary_name(work / name).write_text("half")
    run(tmp_path / "out")
    assert not work.exists()


def test_a_second_export_into_one_place_is_refused(run: Any, exports: Exports, tmp_path: Path) -> None:
    told: list[subprocess.CompletedProcess[str]] = []

    def second(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("quantizing layers", 1) and not told:
            told.append(command(exports, tmp_path / "out"))

    run(tmp_path / "out", progress=second)
    assert told[0].returncode == 2
    assert told[0].stderr == (
        f"error: {tmp_path / 'out.partial'} is in use by process {os.getpid()}; wait until it has ended, or choose "
        "another place\n"
    )
    assert check_files(tmp_path / "out") == [] and names(tmp_path) == ["out"]


# A full disk


def test_room_is_looked_for_before_work(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workspace.shutil, "disk_usage", lambda _: _Usage())
    seen: list[str] = []
    with pytest.raises(BundleError, match=r"has 0\.00 GB free and this export needs 0\.03 GB more; free some"):
        run(tmp_path / "out", progress=lambda stage, _d, _t: seen.append(stage))
    assert not seen and not names(tmp_path)


class _Usage:
    free = 1000


def test_room_is_really_taken_before_work(run: Any, tmp_path: Path) -> None:
    """The weights' files have all their blocks before the first layer is quantized."""

    def look(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("quantizing layers", 0):
            for file in (tmp_path / "out.partial" / "bundle" / "weights").iterdir():
                assert file.stat().st_blocks * 512 >= file.stat().st_size
                sizes.append(file.stat().st_size)

    sizes: list[int] = []
    run(tmp_path / "out", progress=look)
    assert len(sizes) == 5


@pytest.mark.parametrize("limit", [20_000, 60_000], ids=["the weights' files", "a later file"])
def test_a_file_that_cannot_grow(exports: Exports, tmp_path: Path, limit: int) -> None:
    """No file may be longer than `limit` bytes: what a full disk does, wherever it comes."""
    before = f"""
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, resource.RLIM_INFINITY))
    """
    done = command(exports, tmp_path / "out", before=before)
    assert done.returncode == 2, done
    *told, line = done.stderr.splitlines()
    assert all(line.endswith(": done") for line in told), told  # what was finished before
    assert line.startswith(f"error: {tmp_path} has no room left (File too large); free some and go on with --resume")
    resumed = command(exports, tmp_path / "out", "--resume")
    assert resumed.returncode == 0, resumed
    assert check_files(tmp_path / "out") == []


def test_a_disk_that_fills_up_while_layers_are_written(run: Any, exports: Exports, tmp_path: Path) -> None:
    before = """
        import errno, os
        from headrace import files
        real = os.fsync
        count = 0
        def full(handle):
            global count
            count += 1
            if count > 24:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real(handle)
        os.fsync = full
    """
    done = command(exports, tmp_path / "out", before=before)
    assert done.returncode == 2 and "has no room left (No space left on device)" in done.stderr
    finished = json.loads((tmp_path / "out.partial" / "state.json").read_text())["layers"]
    assert 0 < len(finished) < 4
    run(tmp_path / "out", resume=True)
    expected = exports.bundle()
    assert {f.name: f.read_bytes() for f in (tmp_path / "out" / "weights").iterdir()} == {
        f.name: f.read_bytes() for f in (expected / "weights").iterdir()
    }


def test_other_disk_errors_are_not_called_full(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_arguments: Any, **_options: Any) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(job, "_emit_graphs", broken)
    with pytest.raises(OSError, match="Input/output error"):
        run(tmp_path / "out")


def test_differences_are_told_by_their_flags() -> None:
    old = {"headrace": "0.1", "prompt_length": [32, 128], "bits": None, "checkpoint": {"a": [1, 2], "b": [3, 4]}}
    new = {"headrace": "0.2", "prompt_length": [128], "bits": 4.5, "checkpoint": {"a": [1, 2], "c": [3, 4]}}
    assert differences(old, new) == [
        "headrace 0.1 → 0.2", "--prompt-length 32,128 → 128", "--bits by default → 4.5", "the checkpoint's b, c",
    ]  # fmt: skip
    assert differences(new, new) == []
