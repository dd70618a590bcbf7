"""A vocabulary in another process: the same answers, the same errors, and nothing of it is left behind."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from headrace.errors import TokenizerError
from headrace.text.tokenizer import Tokenizer
from headrace.text.tokenizer_folder import load_tokenizer
from headrace.text.tokenizer_process import FACTS, Reading, TokenizerProcess
from tests.text.vocabularies import CHATML, TEXT, byte_level_tokenizer, sentencepiece_tokenizer

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="not run: no process is copied here")
PATIENCE = 20  # seconds for what takes milliseconds


@pytest.fixture(params=["sentencepiece", "byte-level"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "sentencepiece":
        sentencepiece_tokenizer(tmp_path, dummy_prefix=True, chat_template={"default": CHATML, "tool_use": "tools"})
    else:
        byte_level_tokenizer(tmp_path)
    return tmp_path


@pytest.fixture
def both(folder: Path) -> Iterator[tuple[Tokenizer, TokenizerProcess]]:
    read = Reading(folder).done(folder)
    assert isinstance(read, TokenizerProcess)
    yield load_tokenizer(folder), read
    read.close()


def children() -> set[int]:
    """Processes that this thread has begun and that still run."""
    listed = Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text().split()
    found = set()
    for pid in map(int, listed):
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        if state != "Z":
            found.add(pid)
    return found


def test_it_answers_as_the_vocabulary_itself(both: tuple[Tokenizer, TokenizerProcess]) -> None:
    own, other = both
    assert {name: getattr(own, name) for name in FACTS} == {name: getattr(other, name) for name in FACTS}
    assert own.vocab_size == other.vocab_size
    for text in ["", " ", "\ud800", "a" * 100_000, *TEXT[:4]]:
        for special in (False, True):
            for continues in (False, True):
                ids = own.encode(text, special=special, continues=continues)
                assert other.encode(text, special=special, continues=continues) == ids
                assert other.decode(ids, continues=continues) == own.decode(ids, continues=continues)
    for token in range(own.vocab_size + 3):
        assert other.piece_bytes(token) == own.piece_bytes(token)
        assert other.id_to_piece(token) == own.id_to_piece(token)
    for piece in ("the", "百", "<|im_start|>", "no such piece"):
        assert other.token_id(piece) == own.token_id(piece)


def test_errors_are_told_and_it_goes_on(both: tuple[Tokenizer, TokenizerProcess]) -> None:
    own, other = both
    with pytest.raises(TokenizerError) as expected:
        own.id_to_piece(-1)
    with pytest.raises(TokenizerError) as told:
        other.id_to_piece(-1)
    assert str(told.value) == str(expected.value)
    assert other.encode("the sea") == own.encode("the sea")


def test_what_cannot_be_read_is_told_by_this_process(tmp_path: Path) -> None:
    before = children()
    with pytest.raises(TokenizerError, match=f"{tmp_path} has neither tokenizer.json nor tokenizer.model"):
        Reading(tmp_path).done(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        Reading(tmp_path).done(tmp_path)
    assert _soon(lambda: children() <= before)


def test_another_folder_than_was_begun_is_read_itself(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("other")
    own = byte_level_tokenizer(other)
    read = Reading(folder).done(other)
    assert type(read) is type(own)
    assert read.encode("the sea") == own.encode("the sea")


def test_it_outlives_ctrl_c_and_ends_when_closed(folder: Path) -> None:
    before = children()
    read = Reading(folder).done(folder)
    (pid,) = children() - before
    os.kill(pid, signal.SIGINT)
    assert read.encode("the sea") == load_tokenizer(folder).encode("the sea")
    read.close()
    assert _soon(lambda: children() <= before)


def test_its_end_is_one_line(folder: Path) -> None:
    before = children()
    read = Reading(folder).done(folder)
    (pid,) = children() - before
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(TokenizerError, match="the process that read the vocabulary was ended; start again"):
        for _ in range(3):  # the first may still be written to the pipe
            read.encode("the sea")
    read.close()


def test_no_more_processes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused() -> int:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    files = _open_files()
    monkeypatch.setattr(os, "fork", refused)
    read = Reading(folder).done(folder)
    assert not isinstance(read, TokenizerProcess) and read.encode("the sea")
    assert _open_files() == files


def _open_files() -> set[str]:
    return {file.name for file in Path("/proc/self/fd").iterdir()}


def _soon(holds: Callable[[], bool]) -> bool:
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        if holds():
            return True
        time.sleep(0.01)
    return False
