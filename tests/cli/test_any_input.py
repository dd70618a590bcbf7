"""Whatever is in a folder, a template, a text file or a terminal: an answer or one line, never a traceback.

Each example is one run of the program in a child process; the child goes on to the next one, since starting Python
anew would take most of the time.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headrace.bundle.folder import MANIFEST, publish
from tests.exports import Exports

LIMIT = 120.0  # seconds of one run on a busy machine; most take a tenth of one
ENCODINGS = ("utf-8", "utf-8", "ascii", "cp1252", "gbk")
KINDS = ("gqa", "tied", "mha")

TEXT = st.text(st.sampled_from("the sea 百川😀é\n\t 0{}[]\"'<>|▁\x00\ufdd0\ud800") | st.characters(), max_size=30)
PLAIN = TEXT.map(lambda t: t.replace("\x00", "").encode("utf-8", "replace").decode())
NUMBERS = st.sampled_from([-1, 0, 1, 2, 3, 7, 64, 10**6, 2**31, 2**63, 10**30, -0.5, 1e-9, 1e308, float("nan")])
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | PLAIN,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(PLAIN, inner, max_size=3),
    max_leaves=5,
)
FRAGMENTS = (
    "{{ messages[0].content }}", "{% for m in messages %}", "{% endfor %}", "{{ m }}", "{{ bos_token ~ m.role }}",
    "{% set ns = namespace(t='a') %}", "{% set ns.t = ns.t * 9 ~ ns.t %}", "{{ ns.t }}", "{% if tools %}",
    "{% endif %}",
    "{{ raise_exception('no') }}", "{{ messages | tojson(indent=2) }}", "{{ 1 / 0 }}", "{{ x.y.z }}",
    "{% macro f(a) %}",
    "{% endmacro %}", "{{ f(f) }}", "<|im_start|>", "</s>", "{{", "}}", "{%", "{#", "百", "\n", "{{ ''.join }}",
    "{{ messages | join | center(99999) }}", "{{ 'a' * 10**9 }}", "{{ range(9) | list }}", "{% generation %}",
)  # fmt: skip
TEMPLATES = st.lists(st.sampled_from(FRAGMENTS) | PLAIN, max_size=8).map("".join)
NAMES = (
    "config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "model.safetensors",
    "model.safetensors.index.json", "pytorch_model.bin", "model.gguf", "adapter_config.json", "encodings.json",
    MANIFEST,     "part_1_of_5.onnx", "weights", "x.txt",
)  # fmt: skip
CONTENTS = st.one_of(
    st.binary(max_size=60), TEXT.map(lambda t: t.encode("utf-8", "replace")), JSON.map(lambda v: json.dumps(v).encode())
)


@dataclass(frozen=True)
class Change:
    """One thing that is done to a folder; `where` chooses a file, a key or a place in a file."""

    what: str
    where: float
    content: bytes = b""
    value: Any = None

    def apply(self, folder: Path) -> None:
        """Do it."""
        files = sorted(path for path in folder.rglob("*") if path.is_file() or path.is_symlink())
        path = folder / NAMES[int(self.where * len(NAMES))]
        if self.what != "write" and files:
            path = files[int(self.where * len(files))]
        if self.what == "template":
            path = folder / "chat_template.jinja"
        data = path.read_bytes() if path.is_file() else b""
        if self.what in ("flip", "cut") and data:
            at = int(self.where * 997) * len(data) // 997
            data = data[:at] + (bytes([data[at] ^ 0x55]) + data[at + 1 :] if self.what == "flip" else b"")
        elif self.what == "key":
            with contextlib.suppress(ValueError):
                document = json.loads(data)
                if isinstance(document, dict) and document:
                    document[sorted(document)[int(self.where * 31) % len(document)]] = self.value
                    data = json.dumps(document).encode()
        else:
            data = self.content
        with contextlib.suppress(OSError):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            path.unlink(missing_ok=True)
            if self.what == "folder":
                path.mkdir()
            elif self.what == "link":
                path.symlink_to(path)
            elif self.what != "delete":
                path.write_bytes(data)


CHANGES = st.builds(
    Change,
    st.sampled_from(["write", "replace", "key", "key", "key", "flip", "cut", "delete", "folder", "link", "template"]),
    st.floats(0, 1, exclude_max=True),
    CONTENTS | TEMPLATES.map(str.encode),
    JSON,
)


@dataclass(frozen=True)
class Job:
    """One run: on what, changed how, by which verb, with which text, at which terminal."""

    base: str
    changes: tuple[Change, ...]
    signed: bool
    verb: tuple[str, ...]
    text: bytes
    encoding: str
    piped: bytes | None


VERBS = st.sampled_from([
    ("inspect", "PATH"), ("inspect", "PATH", "--json", "--tensors"), ("plan", "PATH"),
    ("verify", "PATH", "--files-only"),
    ("chat", "PATH", "-n", "2", "-p", "ARGUMENT"), ("chat", "PATH", "-n", "2", "-p", "ARGUMENT", "--raw"),
    ("chat", "PATH", "-n", "2"), ("chat", "PATH", "-n", "3", "--temp", "1", "--system", "ARGUMENT", "-p", "x"),
    ("evaluate", "PATH", "--text", "TEXT", "--length", "8", "--windows", "1"),
    ("bench", "PATH", "-p", "4", "-n", "1", "-d", "1", "-r", "1"), ("push", "PATH", "--dry-run"),
    ("export", "PATH", "-o", "OUT", "--windows", "1", "--window-length", "16", "--context", "64", "--prompt-length",
     "16",      "--method", "nearest", "--calibration", "TEXT"),
    ("ARGUMENT",), ("chat", "TEXT"), ("inspect", "TEXT"), ("export", "TEXT", "-o", "OUT"),
    ("chat", "PATH", "ARGUMENT"),
])  # fmt: skip
JOBS = st.builds(
    Job,
    st.sampled_from([*(f"{kind} {what}" for kind in KINDS for what in ("checkpoint", "bundle", "bundle")), "nothing"]),
    st.lists(CHANGES, max_size=3).map(tuple),
    st.booleans(),
    VERBS,
    CONTENTS,
    st.sampled_from(ENCODINGS),
    st.none() | CONTENTS,
)


class Child:
    """The program, again and again; started anew when it has died."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def run(self, arguments: list[str], encoding: str, piped: bytes | None) -> dict[str, Any]:
        process = self._process
        if process is None or process.poll() is not None:
            process = self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.cli.any_input_child"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                cwd=Path(__file__).parents[2],
            )  # fmt: skip
        assert process.stdin is not None and process.stdout is not None
        stdin = None if piped is None else base64.b64encode(piped).decode()
        process.stdin.write(json.dumps({"arguments": arguments, "encoding": encoding, "stdin": stdin}).encode() + b"\n")
        process.stdin.flush()
        ready = select.select([process.stdout], [], [], LIMIT)[0]
        line = process.stdout.readline() if ready else b""
        if not line:
            process.kill()
            status = process.wait()
            raise AssertionError(f"{arguments} {'ended the process: ' + str(status) if ready else 'took too long'}")
        return dict(json.loads(line))

    def close(self) -> None:
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
            assert self._process.stdout is not None
            self._process.stdout.close()
            self._process.wait(LIMIT)


@pytest.fixture(scope="module")
def child() -> Iterator[Child]:
    made = Child()
    yield made
    made.close()


def prepare(job: Job, exports: Exports, folder: Path) -> Path:
    """The folder of a job."""
    kind, _, what = job.base.partition(" ")
    path = folder / "川 it"
    if what:
        source = exports.bundle(kind) if what == "bundle" else exports.checkpoint(kind)
        shutil.copytree(source, path)
    else:
        path.mkdir()
    for change in job.changes:
        change.apply(path)
    if what == "bundle" and job.signed:  # a manifest that fits what is there now
        with contextlib.suppress(Exception):
            manifest = json.loads((path / MANIFEST).read_bytes())
            body = {key: value for key, value in manifest.items() if key not in ("files", "digest")}
            publish(path, folder / "signed", body, aside=folder / "aside")
            path = folder / "signed"
    return path


def check(job: Job, exports: Exports, child: Child) -> None:
    """Run a job: it ends with a status that is known, and says no more than one line about what went wrong."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        path = prepare(job, exports, folder)
        text = folder / "text.txt"
        text.write_bytes(job.text)
        argument = job.text.replace(b"\x00", b"").decode("utf-8", "surrogateescape")
        places = {"PATH": str(path), "TEXT": str(text), "OUT": str(folder / "out"), "ARGUMENT": argument}
        answer = child.run([places.get(word, word) for word in job.verb], job.encoding, job.piped)
    shown = answer["err"] + answer["native"]
    assert answer["status"] in (0, 1, 2, 130), answer
    assert "Traceback (most recent call last)" not in shown, shown
    assert "panicked at" not in shown, shown
    lines = [line for line in answer["err"].splitlines() if line.startswith(("error: ", "failed: "))]
    assert len(lines) == (answer["status"] in (1, 2)), answer
    if answer["status"] == 2:
        assert answer["err"].splitlines()[-1] == lines[0], answer
    if os.environ.get("HEADRACE_SHOW_UNEXPECTED") and "unexpected" in shown:
        with Path(os.environ["HEADRACE_SHOW_UNEXPECTED"]).open("a") as log:
            log.write(f"{lines} {job}\n")


QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]


@given(JOBS)
@settings(max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=QUIET)
def test_a_few_dozen_inputs(exports: Exports, child: Child, job: Job) -> None:
    check(job, exports, child)


@pytest.mark.slow
@given(JOBS)
@settings(
    max_examples=int(os.environ.get("HEADRACE_EXAMPLES", "3000")), deadline=None, database=None,
    suppress_health_check=QUIET,
)  # fmt: skip
def test_a_few_thousand_inputs(exports: Exports, child: Child, job: Job) -> None:
    check(job, exports, child)
