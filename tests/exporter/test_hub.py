"""pull of a repository: one format, whole and checked, resumed where it stopped, at one commit; or one line."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from headrace.bundle.work_folder import work_folder
from headrace.checkpoint import open_checkpoint
from headrace.cli.main import _run
from tests.exporter.hub_server import Hub, commit_of, serve_hub
from tests.tiny import write_gguf, write_llama

LIMIT = 120  # seconds a child may take
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
JUNK = (
    "optimizer.pt", "training_args.bin", "scheduler.pt", "rng_state_0.pth", "trainer_state.json", "modeling_tiny.py",
    "onnx/model.onnx", "original/consolidated.00.pth", "consolidated.safetensors", "tf_model.h5", "pytorch_model.bin",
    "model.fp16.gguf", "runs/events.out",
)  # fmt: skip
Served = tuple[str, type[Hub]]


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Served]:
    """A hub with org/tiny: a sharded model of 4 MB and everything a trainer leaves beside it."""
    folder = write_llama(tmp_path / "hub" / "org" / "tiny", shards=2, vocab=8000)
    (folder / "LICENSE").write_text("Apache-2.0")
    (folder / "tokenizer.model").write_bytes(b"x" * 3000)
    for name in JUNK:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"not wanted")
    with serve_hub(tmp_path / "hub") as served:
        yield served


def command(endpoint: str, tmp_path: Path, *arguments: str, **settings: str) -> tuple[list[str], dict[str, str]]:
    environment = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy") and not k.startswith("HF_")}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    return [sys.executable, "-m", "headrace", "pull", *arguments], environment | settings


@dataclass(frozen=True)
class Done:
    """What a command line left."""

    returncode: int
    stdout: str
    stderr: str


Fetch = Callable[..., Done]


@pytest.fixture
def fetch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Fetch:
    """The command line in this process; huggingface_hub reads address and mode once, so they are set there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))

    def run(endpoint: str, *arguments: str, offline: bool = False, token: str | None = None) -> Done:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        address = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", address)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
        monkeypatch.setenv("HF_TOKEN", token or "")
        capsys.readouterr()
        status = _run(["pull", *arguments])
        return Done(status, *capsys.readouterr())

    return run


def refused(done: Done) -> str:
    """The one line of a refusal."""
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    return line


def names(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and ".cache" not in p.parts}


def largest(folder: Path) -> int:
    """Bytes of the largest file that grows there, while another process may rename it at any time."""
    sizes = [0]
    for path in folder.glob("[!.]*.part"):
        with suppress(FileNotFoundError):
            sizes.append(path.stat().st_size)
    return max(sizes)


def test_one_format_and_what_goes_with_it(hub: Served, fetch: Fetch, tmp_path: Path) -> None:
    endpoint, handler = hub
    handler.card = {"license": "apache-2.0"}
    done = fetch(endpoint, "org/tiny", "-o", "mine", "--json")
    assert done.returncode == 0, done.stderr
    commit = commit_of("org/tiny")
    expected = {"path": "mine", "repository": "org/tiny", "revision": commit}
    assert json.loads(done.stdout.splitlines()[-1]) == expected
    assert f"org/tiny at {commit}; licence: apache-2.0" in done.stderr
    assert "download (MB): done" in done.stderr
    assert open_checkpoint(tmp_path / "mine").config.num_layers == 3
    assert names(tmp_path / "mine") == {
        "config.json", "generation_config.json", "tokenizer.model", "LICENSE", "model.safetensors.index.json",
        FIRST, SECOND,
    }  # fmt: skip
    assert set(handler.revisions) == {commit}, "all files are of one commit"
    fetched = len(handler.served)
    assert fetch(endpoint, "org/tiny", "-o", "mine").returncode == 0
    assert len(handler.served) == fetched, "what is there is not fetched again"


def test_a_connection_cut_in_the_middle_goes_on_by_itself(hub: Served, fetch: Fetch, tmp_path: Path) -> None:
    endpoint, handler = hub
    handler.cut = {FIRST: 1_000_000}
    done = fetch(endpoint, "org/tiny", "-o", "mine")
    assert done.returncode == 0, done.stderr
    begins = [begin for name, begin, _ in handler.served if name == FIRST]
    assert begins[0] == 0
    assert len(begins) == 2
    assert begins[1] > 500_000, "what had come was not fetched again"
    open_checkpoint(tmp_path / "mine")


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_pull_that_was_killed_goes_on_where_it_stopped(
    hub: Served, fetch: Fetch, tmp_path: Path, how: signal.Signals
) -> None:
    endpoint, handler = hub
    handler.hold = {FIRST: 1_000_000}  # of 2 MB; the others are smaller than what is waited for
    line, environment = command(endpoint, tmp_path, "org/tiny", "-o", "mine")
    with subprocess.Popen(line, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        parts = tmp_path / "mine" / ".cache" / "headrace"
        deadline = time.monotonic() + LIMIT
        while largest(parts) < 500_000:
            assert time.monotonic() < deadline
            assert child.poll() is None
            time.sleep(0.02)
        child.send_signal(how)
        _, error = child.communicate(timeout=LIMIT)
        assert child.returncode == (130 if how == signal.SIGINT else -signal.SIGKILL), error
    assert not (tmp_path / "mine" / FIRST).exists(), "a file has its name when it is whole"
    handler.go_on.set()
    handler.served.clear()
    done = fetch(endpoint, "org/tiny", "-o", "mine")
    assert done.returncode == 0, done.stderr
    (begin,) = [begin for name, begin, _ in handler.served if name == FIRST and begin]
    assert begin >= 500_000, "what had come was not fetched again"
    whole = open_checkpoint(tmp_path / "hub" / "org" / "tiny")
    assert open_checkpoint(tmp_path / "mine").digest() == whole.digest()
    assert not list(parts.glob("*.part"))


def test_a_mirror_that_knows_no_ranges(hub: Served, fetch: Fetch, tmp_path: Path) -> None:
    endpoint, handler = hub
    handler.cut, handler.ranges = {FIRST: 100_000}, False
    done = fetch(endpoint, "org/tiny", "-o", "mine")
    assert done.returncode == 0, done.stderr
    assert open_checkpoint(tmp_path / "mine").digest() == open_checkpoint(tmp_path / "hub" / "org" / "tiny").digest()


def test_a_mirror_that_states_neither_sizes_nor_hashes(hub: Served, fetch: Fetch, tmp_path: Path) -> None:
    endpoint, handler = hub
    handler.sizes = False
    for _ in range(2):
        done = fetch(endpoint, "org/tiny", "-o", "mine")
        assert done.returncode == 0, done.stderr
    assert open_checkpoint(tmp_path / "mine").config.num_layers == 3


def test_content_that_is_not_what_the_hub_states_is_not_kept(hub: Served, fetch: Fetch, tmp_path: Path) -> None:
    endpoint, handler = hub
    handler.spoil = SECOND
    line = refused(fetch(endpoint, "org/tiny", "-o", "mine"))
    assert line.startswith(f"error: {SECOND} of org/tiny came with hash ")
    assert not (tmp_path / "mine" / SECOND).exists()
    handler.spoil = None
    assert fetch(endpoint, "org/tiny", "-o", "mine").returncode == 0


def test_a_revision_is_pinned(hub: Served, fetch: Fetch, tmp_path: Path) -> None:
    endpoint, handler = hub
    write_llama(tmp_path / "hub" / "org" / "tiny@v1", layers=1, seed=3)
    for revision in ("v1", commit_of("org/tiny", "v1")):
        folder = tmp_path / revision
        handler.revisions.clear()
        done = fetch(endpoint, "org/tiny", "-o", str(folder), "--revision", revision)
        assert done.returncode == 0, done.stderr
        assert set(handler.revisions) == {commit_of("org/tiny", "v1")}
        assert open_checkpoint(folder).config.num_layers == 1
    line = refused(fetch(endpoint, "org/tiny", "-o", "other", "--revision", "v2"))
    assert line == "error: org/tiny has no revision 'v2'; expected a branch, tag or commit"


def test_another_revision_replaces_what_pull_wrote(hub: Served, fetch: Fetch, tmp_path: Path) -> None:
    endpoint, _ = hub
    write_llama(tmp_path / "hub" / "org" / "tiny@v1", layers=2, shards=2, seed=3)
    for revision, layers in (("v1", 2), ("main", 3), ("v1", 2)):
        done = fetch(endpoint, "org/tiny", "-o", "mine", "--revision", revision)
        assert done.returncode == 0, done.stderr
        assert open_checkpoint(tmp_path / "mine").config.num_layers == layers


def test_another_revision_leaves_no_file_of_the_old_one(hub: Served, fetch: Fetch, tmp_path: Path) -> None:
    """A single file of weights comes before shards, so that what is left of it would be the model."""
    endpoint, handler = hub
    old = write_llama(tmp_path / "hub" / "org" / "tiny@v1", shards=1, seed=3)
    (old / "added_tokens.json").write_text("{}")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    assert fetch(endpoint, "org/tiny", "-o", "mine", "--revision", "v1").returncode == 0
    handler.spoil = SECOND
    refused(fetch(endpoint, "org/tiny", "-o", "mine"))
    assert "model.safetensors" not in names(tmp_path / "mine"), "what a pull leaves that stopped is of one commit too"
    handler.spoil = None
    done = fetch(endpoint, "org/tiny", "-o", "mine")
    assert done.returncode == 0, done.stderr
    assert names(tmp_path / "mine") == {
        "config.json", "generation_config.json", "tokenizer.model", "LICENSE", "model.safetensors.index.json",
        FIRST, SECOND, "notes.txt",
    }  # fmt: skip
    assert open_checkpoint(tmp_path / "mine").digest() == open_checkpoint(tmp_path / "hub" / "org" / "tiny").digest()


@pytest.mark.parametrize("sizes", [True, False])
@pytest.mark.parametrize("name", ["config.json", "added_tokens.json"])
@pytest.mark.parametrize("revision", ["v1", "main"])
def test_a_file_that_was_changed_by_hand_is_neither_replaced_nor_removed(
    hub: Served, fetch: Fetch, tmp_path: Path, sizes: bool, name: str, revision: str
) -> None:
    endpoint, handler = hub
    handler.sizes = sizes
    old = write_llama(tmp_path / "hub" / "org" / "tiny@v1", layers=2, seed=3)
    (old / "added_tokens.json").write_text("{}")
    assert fetch(endpoint, "org/tiny", "-o", "mine", "--revision", "v1").returncode == 0
    changed = tmp_path / "mine" / name
    changed.write_text(f"{changed.read_text()}\n")
    here = {each: (tmp_path / "mine" / each).read_bytes() for each in names(tmp_path / "mine")}
    line = refused(fetch(endpoint, "org/tiny", "-o", "mine", "--revision", revision))
    assert line == (
        f"error: mine/{name} was changed since pull wrote it and would be replaced; move it away, or choose another "
        "folder, -o"
    )
    assert {each: (tmp_path / "mine" / each).read_bytes() for each in names(tmp_path / "mine")} == here
    changed.unlink()
    done = fetch(endpoint, "org/tiny", "-o", "mine", "--revision", revision)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("way", ["../outside.txt", "link/outside.txt"])
def test_a_record_that_names_a_file_outside_removes_nothing(
    hub: Served, fetch: Fetch, tmp_path: Path, way: str
) -> None:
    endpoint, _ = hub
    write_llama(tmp_path / "hub" / "org" / "tiny@v1", layers=2, seed=3)
    assert fetch(endpoint, "org/tiny", "-o", "mine", "--revision", "v1").returncode == 0
    (tmp_path / "outside.txt").write_text("mine")
    (tmp_path / "mine" / "link").symlink_to(tmp_path)
    path = tmp_path / "mine" / ".cache" / "headrace" / "pull.json"
    record = json.loads(path.read_text())
    record["files"][way] = {"size": 4, "content": hashlib.sha256(b"mine").hexdigest()}
    path.write_text(json.dumps(record))
    assert "was changed since pull wrote it" in refused(fetch(endpoint, "org/tiny", "-o", "mine"))
    assert (tmp_path / "outside.txt").read_text() == "mine"


def test_files_of_another_origin_are_left_alone(hub: Served, fetch: Fetch, tmp_path: Path) -> None:
    endpoint, _ = hub
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    line = refused(fetch(endpoint, "org/tiny", "-o", "mine"))
    assert line == (
        "error: mine/config.json is there with other content, which pull did not write; choose another folder, -o"
    )
    assert (tmp_path / "mine" / "config.json").read_text() == "{}"
    shutil.copy(tmp_path / "hub" / "org" / "tiny" / "config.json", tmp_path / "mine" / "config.json")
    assert fetch(endpoint, "org/tiny", "-o", "mine").returncode == 0, "the same content is taken as it is"
    write_llama(tmp_path / "hub" / "org" / "other")
    line = refused(fetch(endpoint, "org/other", "-o", "mine"))
    assert line == "error: mine has org/tiny; expected a folder for org/other; choose another with -o"


def test_two_pulls_into_one_folder(hub: Served, fetch: Fetch, tmp_path: Path) -> None:
    endpoint, _ = hub
    with work_folder(tmp_path / "mine" / ".cache" / "headrace", "another pull"):
        line = refused(fetch(endpoint, "org/tiny", "-o", "mine"))
    assert line.startswith("error: mine/.cache/headrace ")
    assert str(os.getpid()) in line
    assert fetch(endpoint, "org/tiny", "-o", "mine").returncode == 0


def test_tokens(hub: Served, fetch: Fetch, tmp_path: Path) -> None:
    endpoint, handler = hub
    handler.token = "hf_secret"
    line = refused(fetch(endpoint, "org/tiny", "-o", "mine"))
    assert (
        line
        == f"error: org/tiny is not on {endpoint}, or is private; expected ORG/REPO; check the name, or set HF_TOKEN"
    )
    handler.gated = True
    line = refused(fetch(endpoint, "org/tiny", "-o", "mine", token="hf_wrong"))
    assert line == (
        "error: org/tiny is given only to those who accepted its terms; accept them at "
        f"{endpoint}/org/tiny and set HF_TOKEN"
    )
    done = fetch(endpoint, "org/tiny", "-o", "mine", token="hf_secret")
    assert done.returncode == 0, done.stderr
    assert "hf_secret" not in done.stdout + done.stderr
    assert not [p for p in (tmp_path / "mine").rglob("*") if p.is_file() and b"hf_secret" in p.read_bytes()]


def test_offline(hub: Served, fetch: Fetch, tmp_path: Path) -> None:
    endpoint, handler = hub
    line = refused(fetch(endpoint, "org/tiny", "-o", "mine", offline=True))
    assert line == "error: HF_HUB_OFFLINE is set and mine does not have org/tiny; unset it and run pull again"
    assert fetch(endpoint, "org/tiny", "-o", "mine").returncode == 0
    handler.served.clear()
    done = fetch("http://127.0.0.1:9", "org/tiny", "-o", "mine", offline=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "mine\n"
    (tmp_path / "mine" / FIRST).write_bytes(b"half")
    line = refused(fetch(endpoint, "org/tiny", "-o", "mine", offline=True))
    assert line == f"error: HF_HUB_OFFLINE is set and mine/{FIRST} is not whole; unset it and run pull again"
    assert not handler.served


def test_the_program_by_itself(hub: Served, tmp_path: Path) -> None:
    """HF_ENDPOINT and HF_TOKEN as a shell sets them."""
    endpoint, handler = hub
    handler.token = "hf_secret"
    line, environment = command(endpoint, tmp_path, "org/tiny", HF_TOKEN="hf_secret")
    done = subprocess.run(line, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=LIMIT)
    assert (done.returncode, done.stdout) == (0, "tiny\n"), done.stderr
    line, environment = command(endpoint, tmp_path, "org/tiny", HF_HUB_OFFLINE="1")
    done = subprocess.run(line, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=LIMIT)
    assert (done.returncode, done.stdout) == (0, "tiny\n"), done.stderr


def test_no_hub(fetch: Fetch) -> None:
    line = refused(fetch("http://127.0.0.1:9", "org/tiny"))
    assert line.startswith("error: org/tiny could not be downloaded from http://127.0.0.1:9: ")
    assert line.endswith("; run pull again, it goes on where it stopped")


def test_a_repository_that_is_not_there(hub: Served, fetch: Fetch, tmp_path: Path) -> None:
    assert refused(fetch(hub[0], "org/absent")).startswith(f"error: org/absent is not on {hub[0]}, or is")


def test_one_of_several_gguf(hub: Served, fetch: Fetch, tmp_path: Path) -> None:
    endpoint, handler = hub
    folder = tmp_path / "hub" / "org" / "quants"
    folder.mkdir()
    for kind in ("Q4_0", "Q8_0"):
        write_gguf(folder / f"tiny-{kind}.gguf", type=kind)
    (folder / "README.md").write_text("---\nlicense: mit\n---")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    line = refused(fetch(endpoint, "org/quants"))
    assert line == (
        "error: the repository has 2 models: tiny-Q4_0.gguf (0.0 GB), tiny-Q8_0.gguf (0.0 GB); expected the name of "
        "one; add --file NAME, a part of it is enough"
    )
    assert not handler.served
    assert not (tmp_path / "quants").exists(), "nothing came, nothing stays"
    done = fetch(endpoint, "org/quants", "--file", "q8_0")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "quants/tiny-Q8_0.gguf\n"
    assert names(tmp_path / "quants") == {"tiny-Q8_0.gguf", "README.md"}
    assert open_checkpoint(tmp_path / "quants").config.num_layers == 3
    assert fetch(endpoint, "org/quants", "--file", "q4_0").returncode == 0
    assert names(tmp_path / "quants") == {"tiny-Q4_0.gguf", "tiny-Q8_0.gguf", "README.md"}, "both are of one commit"
    line = refused(fetch(endpoint, "org/quants", "--file", "Q2_K"))
    assert line == ("error: --file 'Q2_K' is no file of the repository; expected one of tiny-Q4_0.gguf, tiny-Q8_0.gguf")
