"""A conversation without a terminal: its commands, what it says of answers, and what it keeps."""

from __future__ import annotations

import io
import os
import signal
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from rich.console import Console

import headrace
from headrace.cli import running
from headrace.cli.answer_view import AnswerView
from headrace.cli.console import print_answer
from headrace.cli.conversation import HELP, Conversation, _Commands, _History
from headrace.cli.interruption import uninterrupted
from headrace.cli.main import _run
from headrace.errors import UserError
from headrace.runtime.answer import Token
from headrace.runtime.session import read_session
from headrace.text.turns import Message
from tests.exports import Exports


def test_ctrl_c_waits_until_the_screen_is_whole() -> None:
    drawn = []
    with pytest.raises(KeyboardInterrupt), uninterrupted():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        drawn.append("all of it")
    assert drawn
    with pytest.raises(KeyboardInterrupt):  # and comes at once elsewhere
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(90.0)  # seconds; it is not waited for


def test_a_command_is_completed() -> None:
    def completed(text: str) -> list[str]:
        found = _Commands(["/help", "/save", "/system"], sentence=True)
        return [c.text for c in found.get_completions(Document(text), CompleteEvent())]

    assert completed("/sa") == ["/save"]
    assert completed("/s") == ["/save", "/system"]
    assert completed("/save he") == completed("sa") == []


class FakeChat:
    """What a conversation needs of a chat."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.used = 0
        self.model = SimpleNamespace(context=512)
        self.files: dict[str, list[Message]] = {}

    def save(self, path: Path) -> None:
        self.files[path.name] = list(self.messages)

    def restore(self, path: Path) -> None:
        if path.name not in self.files:
            raise UserError(f"{path} cannot be read")
        self.messages = list(self.files[path.name])


def talking(say: Callable[[str], Iterator[Token]], chat: FakeChat | None = None) -> tuple[Conversation, io.StringIO]:
    """A conversation with a fake chat, and what is shown of its answers."""
    shown = io.StringIO()
    made: Any = chat or FakeChat()
    return Conversation(made, say, Console(file=shown, force_terminal=False)), shown  # type: ignore[arg-type]


def remembered(chat: FakeChat) -> Callable[[str], Iterator[Token]]:
    """Answers with capitals, and remembers as a Chat does."""

    def say(text: str) -> Iterator[Token]:
        chat.messages = [*chat.messages, Message("user", text), Message("assistant", text.upper())]
        yield Token(1, text.upper())
        chat.used = 12
        yield Token(2, "!", "stop")

    return say


def test_what_is_said_and_what_is_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    chat = FakeChat()
    talk, shown = talking(remembered(chat), chat)
    for line in ("one", "   ", "two"):
        talk.take(line)
    assert shown.getvalue() == "ONE!\nTWO!\n"
    assert talk.stats.tokens == 2
    assert "tok/s" in talk.status() and "context 12 of 512" in talk.status()
    talk.take("/help")
    assert "/regenerate" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"there is no command /frob; expected one of /help"):
        talk.take("/frob")
    talk.take("/exit")
    assert talk.left


def test_commands_change_the_conversation(capsys: pytest.CaptureFixture[str]) -> None:
    chat = FakeChat()
    talk, _ = talking(remembered(chat), chat)
    with pytest.raises(UserError, match="nothing was said yet"):
        talk.take("/regenerate")
    talk.take("one")
    talk.take("/regenerate")
    assert [m.content for m in chat.messages] == ["one", "ONE"]
    talk.take("/edit")
    assert (talk.draft, chat.messages) == ("one", [])
    talk.take("/system Be brief.")
    assert talk.system == "Be brief."
    talk.take("two")
    talk.take("/save talk.bin")
    talk.take("/clear")
    assert [m.content for m in chat.messages] == ["Be brief."]
    talk.take("/load talk.bin")
    assert [m.content for m in chat.messages] == ["Be brief.", "two", "TWO"]
    with pytest.raises(UserError, match="cannot be read"):
        talk.take("/load other")
    assert len(chat.messages) == 3  # as it was
    with pytest.raises(UserError, match="/save needs a file"):
        talk.take("/save")
    talk.take("/system")
    talk.take("/stats")
    assert "Be brief." in capsys.readouterr().err


def test_every_command_that_changes_the_conversation_tells_its_context(exports: Exports, tmp_path: Path) -> None:
    """The last line after a command is that of the conversation as it now is, and a speed is of an answer it has."""
    with headrace.load(exports.bundle(), runner="host") as model:
        chat = model.chat("Rivers.")
        talk, _ = talking(lambda text: chat.say(text, max_tokens=4), chat)  # type: ignore[arg-type]
        talk.take("one")
        after_one = talk.chat.used
        talk.take("two")
        after_two = talk.chat.used
        file = tmp_path / "talk.session"
        talk.take(f"/save {file}")
        assert 0 < after_one < len(read_session(file).tokens) <= after_two
        for line, used in (
            ("/edit", after_one), ("/edit", 0), (load := f"/load {file}", after_two), ("/clear", 0), (load, after_two),
            ("/system Seas.", 0), (load, after_two), ("/edit", after_one),
        ):  # fmt: skip
            talk.take(line)
            assert talk.status() == f"context {used} of {model.context} · /help", line
        talk.take("three")
        talk.take("/regenerate")
        assert talk.status().startswith(f"{talk.stats.speed:.1f} tok/s")
        assert chat.used == len(model.turns.render(chat.messages, model.context)) > after_one


def test_an_answer_that_is_not_given_again_stays(capsys: pytest.CaptureFixture[str]) -> None:
    """Where the second answer fails, or is stopped before it begins, the conversation is as it was."""
    chat = FakeChat()
    fails: list[type[BaseException]] = []

    def say(text: str) -> Iterator[Token]:
        if fails:
            raise fails[0]("no room")
        yield from remembered(chat)(text)

    talk, _ = talking(say, chat)
    talk.take("one")
    before, stats = list(chat.messages), talk.stats
    fails.append(UserError)
    with pytest.raises(UserError, match="no room"):
        talk.take("/regenerate")
    fails[0] = KeyboardInterrupt
    talk.take("/regenerate")
    assert capsys.readouterr().err == "(stopped)\n"
    assert (chat.messages, talk.stats) == (before, stats)


@pytest.mark.parametrize(
    ("finish", "said"), [("length", "(cut: --max-tokens reached)"), ("context", "(cut: the context is full)")]
)
def test_a_cut_answer_says_why(capsys: pytest.CaptureFixture[str], finish: str, said: str) -> None:
    talk, shown = talking(lambda text: iter_of(Token(1, "a", finish)))
    talk.take("x")
    assert shown.getvalue() == "a\n"
    assert capsys.readouterr().err.splitlines()[-1] == said


def iter_of(*tokens: Token) -> Iterator[Token]:
    yield from tokens


def test_an_interrupted_answer_is_closed() -> None:
    closed = []

    def say(text: str) -> Iterator[Token]:
        try:
            yield Token(1, "begun")
            raise KeyboardInterrupt
        finally:
            closed.append(text)

    talk, shown = talking(say)
    talk.take("stop")
    assert (closed, shown.getvalue()) == (["stop"], "begun\n")


@given(text=st.text(alphabet="ab `\n#-", max_size=60), cuts=st.lists(st.integers(0, 60), max_size=8))
def test_blocks_are_the_text_however_it_is_cut(text: str, cuts: list[int]) -> None:
    """Markdown that streams in pieces is set in the very blocks of the whole."""

    def shown(pieces: list[str]) -> str:
        out = io.StringIO()
        console = Console(file=out, force_terminal=True, width=40, color_system=None)
        settled: list[str] = []
        view = AnswerView(console)
        view._settle = settled.append  # type: ignore[method-assign]
        view._draw = lambda text: None  # type: ignore[method-assign]
        for piece in pieces:
            view.push(piece)
        view.finish()
        return "|".join(settled)

    places = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    pieces = [text[a:b] for a, b in pairwise(places)]
    whole = shown([text])
    assert shown(pieces) == whole
    assert whole.replace("|", "").strip() == text.strip()


def test_an_answer_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    last = print_answer(iter([Token(1, "百"), Token(2, "川 😀", "stop")]))
    assert last is not None
    assert last.finish == "stop"
    assert capsys.readouterr().out == "百川 😀\n"
    assert print_answer(iter([])) is None


def test_the_help_fits_a_terminal_and_names_every_command() -> None:
    talk, _ = talking(lambda text: iter(()))
    assert max(map(len, HELP.splitlines())) < 80
    assert [name for name in talk.names if f"\n{name} " not in f"\n{HELP}" and name != "/help"] == []


def test_what_was_cleared_leaves_the_session_file(
    exports: Exports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "talk.session"
    arguments = ["chat", str(exports.bundle("tied")), "--session", str(file), "--runner", "host", "-n", "2"]
    assert _run([*arguments, "-p", "Water?"]) == 0
    assert len(read_session(file).messages) == 2
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr(running, "_converse", lambda talk, answer, plain: setattr(talk, "messages", []))
    assert _run(arguments) == 0
    assert not read_session(file).messages
    assert _run(arguments) == 0


def test_a_history_that_cannot_be_used_is_told_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    history = _History(str(tmp_path))  # a folder in its place
    assert list(history.load_history_strings()) == []
    history.append_string("one")
    history.append_string("two")
    assert history.get_strings() == ["one", "two"]
    assert capfd.readouterr().err.count("is not remembered") == 1


def test_a_file_that_is_no_session_is_not_saved_over(tmp_path: Path) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("mine")
    chat = FakeChat()
    talk, _ = talking(remembered(chat), chat)
    talk.take("one")
    for place, message in ((notes, "is no session"), (tmp_path, "is a folder")):
        with pytest.raises(UserError, match=message):
            talk.take(f"/save {place}")
    assert notes.read_text() == "mine"
