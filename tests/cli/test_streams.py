"""Terminals that cannot show a character, input that is no text, streams that were closed: never a traceback."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.exports import Exports

LIMIT = 120  # seconds a child process may take on a busy machine
HEADRACE = [sys.executable, "-m", "headrace"]
ENCODINGS = ["utf-8", "ascii", "cp1252", "gbk", "utf-16-le"]


def headrace(*arguments: object, stdin: bytes | None = None, shell: str = "", **env: str) -> tuple[int, bytes, str]:
    """(status, stdout, stderr) of the program in a child; `shell` redirects its streams."""
    command = [*HEADRACE, *map(str, arguments)]
    if shell:
        command = ["sh", "-c", f'"$@" {shell}', "sh", *command]
    done = subprocess.run(
        command, input=stdin, stdin=subprocess.DEVNULL if stdin is None and not shell else None, capture_output=True,
        timeout=LIMIT, env={**os.environ, **env},
    )  # fmt: skip
    err = done.stderr.decode("utf-8", "replace")
    assert "Traceback" not in err and "Exception ignored" not in err, err
    return done.returncode, done.stdout, err


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_terminal_that_cannot_show_a_character(tmp_path: Path, encoding: str) -> None:
    missing = tmp_path / "川 😀é"
    status, _, err = headrace("inspect", missing, PYTHONIOENCODING=encoding)
    assert status == 2
    assert "does not exist" in err.replace("\0", "")


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_an_answer_that_a_terminal_cannot_show(exports: Exports, encoding: str) -> None:
    # byte pieces of this random model make characters of all kinds, whole and broken
    arguments = ("chat", exports.bundle("tied"), "-p", "百", "-n", "24", "--temp", "3", "-s", "3")
    status, out, err = headrace(*arguments, PYTHONIOENCODING=encoding)
    assert (status, err) == (0, "")
    plain = headrace(*arguments, PYTHONIOENCODING="utf-8")[1].decode()
    shown = out.decode(encoding)
    expected = plain.encode(encoding, "replace").decode(encoding)
    assert shown == expected


def test_json_loses_nothing_where_a_character_cannot_be_shown(exports: Exports, tmp_path: Path) -> None:
    import json

    bundle = exports.copy(tmp_path / "川")
    reports = [
        json.loads(
            headrace("inspect", bundle, "--json", PYTHONIOENCODING=encoding)[1].decode(encoding).splitlines()[-1]
        )
        for encoding in ("utf-8", "ascii", "gbk")
    ]
    assert reports[0] == reports[1] == reports[2]
    assert "川" in json.dumps(reports[0], ensure_ascii=False)


@pytest.mark.parametrize("piped", [b"The \xff\xfe river", "川".encode("gbk"), b"a\x00b", b"\xed\xa0\x80"])
def test_input_that_is_not_utf_8(exports: Exports, piped: bytes) -> None:
    status, out, err = headrace("chat", exports.bundle(), "--raw", "--greedy", "-n", "3", stdin=piped)
    assert (status, err) == (0, "")
    assert out.endswith(b"\n")


def test_a_piped_prompt_is_the_prompt_without_its_line_end(exports: Exports) -> None:
    options = ("chat", exports.bundle(), "--raw", "--greedy", "-n", "8")
    expected = headrace(*options, "-p", "The river")
    assert expected[0] == 0
    for piped in (b"The river\n", b"The river\r\n\n", b"The river"):
        assert headrace(*options, stdin=piped) == expected


def test_an_argument_that_is_not_utf_8(exports: Exports) -> None:
    command = [*HEADRACE, "chat", str(exports.bundle()), "--raw", "--greedy", "-n", "3", "-p", b"a\xff"]
    done = subprocess.run(command, capture_output=True, timeout=LIMIT)
    assert (done.returncode, done.stderr) == (0, b"")


def test_nothing_from_stdin_is_one_line(exports: Exports) -> None:
    for stdin, shell in ((b"", ""), (b"\n", ""), (None, "<&-")):
        status, out, err = headrace("chat", exports.bundle(), "--raw", stdin=stdin, shell=shell)
        assert (status, out) == (2, b"")
        assert err == "error: stdin is empty; expected a prompt there, a terminal, or -p PROMPT\n"


def test_an_empty_prompt_is_one_line(exports: Exports) -> None:
    status, _, err = headrace("chat", exports.bundle(), "--raw", "-p", "")
    assert (status, err) == (2, "error: the prompt is empty; expected at least one token: say something\n")


@pytest.mark.parametrize("shell", [">&-", "2>&-", "<&- >&- 2>&-", ">&- 2>&-"])
def test_closed_streams(exports: Exports, shell: str) -> None:
    status, out, err = headrace("chat", exports.bundle(), "--raw", "-p", "The", "-n", "3", shell=shell)
    assert status == 0
    assert out == b"" or ">&-" not in shell.replace("2>&-", "")
    assert err == ""
    assert headrace("inspect", "/no/such/place", shell=shell)[0] == 2


def test_a_disk_that_is_full(exports: Exports) -> None:
    status, _, err = headrace("inspect", exports.bundle(), shell="> /dev/full")
    assert status == 2
    assert err == "error: No space left on device\n"


def test_more_threads_than_processors(exports: Exports) -> None:
    status, _, err = headrace("chat", exports.bundle(), "--raw", "-p", "The", "-n", "2", "-t", "999")
    assert status == 0
    assert re.match(r"--threads 999 is more than the (\d+) processors? here: \1 threads? will run", err)
    assert err.count("\n") == 1


def test_what_nobody_expected_is_one_line_and_can_be_looked_into(tmp_path: Path) -> None:
    code = (
        "import sys, headrace.measure.inspection as i; from headrace.cli import main as cli\n"
        "def fail(path): raise ValueError('a\\nb\\x1b[2J')\n"
        "i.inspect_path = fail; sys.argv = ['headrace', 'inspect', 'x']; cli.main()"
    )
    for traced in (False, True):
        env = {**os.environ, **({"HEADRACE_TRACEBACK": "1"} if traced else {})}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=LIMIT, env=env)
        assert done.returncode == 2
        last = done.stderr.splitlines()[-1]
        assert last == "error: unexpected ValueError: a b\ufffd[2J; HEADRACE_TRACEBACK=1 shows where"
        assert ("Traceback" in done.stderr) is traced


@pytest.mark.parametrize("verb", ["inspect", "plan", "verify", "push", "--help"])
def test_a_pipe_whose_reader_has_gone(exports: Exports, verb: str) -> None:
    more: dict[str, list[object]] = {
        "inspect": [exports.bundle(), "--tensors"],
        "plan": [exports.checkpoint(), "--prompt-length", "32"],
        "verify": [exports.bundle(), "--files-only"],
        "push": ["--list"],
    }
    reading, writing = os.pipe()
    os.close(reading)
    try:
        command = [*HEADRACE, verb, *map(str, more.get(verb, []))]
        done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, timeout=LIMIT)
    finally:
        os.close(writing)
    assert done.returncode == 0, done.stderr
    assert not done.stderr or done.stderr == b"hashing: done\n"
