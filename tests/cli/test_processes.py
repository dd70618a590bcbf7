"""The program's processes and threads: what it begins, what it leaves, and what it does where it may begin no more."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.cli.calling import HEADRACE, LIMIT, child, export_arguments
from tests.exports import Exports

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="not run: no process is copied here")


def test_another_process_reads_the_vocabulary_of_a_prompt(exports: Exports) -> None:
    command = [sys.executable, "-X", "importtime", *HEADRACE[1:], "chat", str(exports.bundle()), "--raw", "-n", "2"]
    beside, alone = (
        subprocess.run([*command, *more], input="The", capture_output=True, text=True, timeout=LIMIT)
        for more in (["-p", "The"], [])
    )
    assert beside.stdout == alone.stdout
    assert "headrace.text.tokenizer_config" in alone.stderr  # the other process says nothing to anybody
    assert "headrace.language_model" in beside.stderr
    assert "headrace.text.tokenizer_config" not in beside.stderr


@pytest.mark.parametrize("more", [[], ["--no-such-option"], ["--regex", "a|b"], ["--session", "/no/such/folder/s"]])
@pytest.mark.parametrize("there", [True, False])
def test_no_process_is_left(exports: Exports, tmp_path: Path, there: bool, more: list[str]) -> None:
    bundle = exports.bundle() if there else tmp_path / "none"
    command = [*HEADRACE, "chat", str(bundle), "--raw", "-n", "2", "-p", "The", *more]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True) as process:
        process.communicate(timeout=LIMIT)
    until = time.monotonic() + LIMIT
    while left := _running(process.pid):
        assert time.monotonic() < until, left
        time.sleep(0.01)


def _running(group: int) -> list[str]:
    """The processes of a group that still run."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it ends meanwhile
            text = status.read_text(errors="replace")
            state, _, its = text.rpartition(")")[2].split()[:3]
            if int(its) == group and state != "Z":
                found.append(text)
    return found


def _threadless(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The program where no thread is started: each would want a stack that no memory has room for."""
    hard = resource.getrlimit(resource.RLIMIT_STACK)[1]
    if hard != resource.RLIM_INFINITY:
        pytest.skip("not run: stacks are limited here")

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_STACK, (1 << 46, hard))

    return child(*arguments, preexec_fn=limit, env={**os.environ, "OPENBLAS_NUM_THREADS": "1"})


def test_where_no_thread_is_started_one_answers(exports: Exports) -> None:
    arguments = ["chat", exports.bundle(), "--raw", "-n", "8", "--greedy", "-p", "The river", "--runner", "native"]
    done, expected = _threadless(*arguments), child(*arguments)
    assert (done.returncode, done.stdout, done.stderr) == (0, expected.stdout, expected.stderr)


def test_where_no_thread_is_started_others_say_so(exports: Exports, tmp_path: Path) -> None:
    for arguments in (
        ["chat", exports.bundle(), "--raw", "-p", "The", "--runner", "host", "-t", "2"],
        ["export", exports.checkpoint(), "-o", tmp_path / "out", *export_arguments(exports)],
    ):
        done = _threadless(*arguments)
        assert done.returncode == 2
        told = done.stderr.splitlines()[-1]
        assert told.startswith("error: the system starts no further thread; ") and "ulimit -u" in told


def test_chat_takes_numpy_without_its_documentation(exports: Exports) -> None:
    """Should NumPy make its documentation elsewhere one day, this says so: nothing else would."""
    look = (
        "import numpy; print(numpy.ndarray.__doc__ is None, numpy.arange(3) @ numpy.arange(3), numpy.ma.zeros(2).sum())"
    )
    opened = "import pathlib, sys, headrace.cli.running as verbs; verbs._open_model(pathlib.Path(sys.argv[1]), False)"
    for script, without in ((look, False), (f"{opened}; {look}", True)):
        done = subprocess.run(
            [sys.executable, "-c", script, exports.bundle()], capture_output=True, text=True, check=True
        )
        assert done.stdout == f"{without} 5 0.0\n"
