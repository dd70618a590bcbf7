"""A conversation on a terminal: Ctrl-C stops an answer, Ctrl-D leaves; on a real pseudo-terminal."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from headrace.cli import repl
from headrace.cli.repl import converse, print_answer
from headrace.errors import ContextFull
from headrace.runtime.answer import Token
from tests.exports import Exports

LIMIT = 90.0  # seconds, on a busy machine


class Terminal:
    """A child process on a pseudo-terminal."""

    def __init__(self, code: str, *arguments: str) -> None:
        self.master, slave = pty.openpty()
        command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
        # A session of its own with this terminal as the controlling one, so that Ctrl-C is a signal.
        self.process = subprocess.Popen(
            [sys.executable, "-c", _LAUNCH, *command], stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
            env={**os.environ, "TERM": "dumb"},
        )  # fmt: skip
        os.close(slave)
        self.shown = ""

    def until(self, text: str, after: int = 0) -> int:
        """Wait until `text` is shown behind position `after`: the position behind it."""
        end = time.monotonic() + LIMIT
        while text not in self.shown[after:]:
            assert time.monotonic() < end, f"{text!r} was not shown: {self.shown!r}"
            if select.select([self.master], [], [], 0.1)[0]:
                try:
                    self.shown += os.read(self.master, 4096).decode("utf-8", "replace")
                except OSError:  # the child has closed its end
                    assert text in self.shown[after:], f"left before {text!r}: {self.shown!r}"
        return self.shown.index(text, after) + len(text)

    def send(self, text: str) -> None:
        os.write(self.master, text.encode())

    def leave(self) -> int:
        try:
            return self.process.wait(LIMIT)
        finally:
            os.close(self.master)


_LAUNCH = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"


def test_ctrl_c_stops_the_answer_and_not_the_program() -> None:
    terminal = Terminal("""
        import time
        from headrace.cli.repl import converse
        from headrace.runtime.answer import Token

        def answer(text):
            try:
                for number in range(1000 if text == "long" else 3):
                    time.sleep(0.02)
                    yield Token(0, f"{text}{number} ")
            finally:
                print("CLOSED", flush=True)

        converse(answer)
        print("LEFT")
    """)
    at = terminal.until("> ")
    terminal.send("long\n")
    at = terminal.until("long5 ", at)
    terminal.send("\x03")
    at = terminal.until("CLOSED", at)
    at = terminal.until("> ", at)
    terminal.send("short\n")
    at = terminal.until("short2 ", at)
    at = terminal.until("> ", at)
    terminal.send("\x03")  # at the prompt: a hint, not the end
    at = terminal.until("Ctrl-D leaves.", at)
    at = terminal.until("> ", at)
    terminal.send("\x04")
    terminal.until("LEFT", at)
    assert terminal.leave() == 0
    assert "long999" not in terminal.shown
    assert "Traceback" not in terminal.shown


def test_chat_on_a_terminal(exports: Exports) -> None:
    """The real program with a real (slowed) model: an interrupted answer stays in the conversation."""
    terminal = Terminal(
        """
        import sys, time
        from headrace.cli import main as cli
        from headrace.targets.host.runner import HostRunner

        run, steps = HostRunner.run, []
        HostRunner.run = lambda *a: (steps.append(1), time.sleep(0.1), run(*a))[2]
        status = cli._run(["chat", sys.argv[1], "--greedy", "--raw", "-n", "150", "--runner", "host"])
        print("STATUS", status, "STEPS", len(steps), ".")
        """,
        str(exports.bundle()),
    )
    at = terminal.until("> ")
    terminal.send("The river\n")
    at = terminal.until("\n", at)
    end = time.monotonic() + LIMIT
    while len(terminal.shown) < at + 8 and time.monotonic() < end:  # some of the answer
        if select.select([terminal.master], [], [], 0.1)[0]:
            terminal.shown += os.read(terminal.master, 4096).decode("utf-8", "replace")
    terminal.send("\x03")
    at = terminal.until("> ", at + 8)
    terminal.send("/exit\n")
    at = terminal.until("STATUS 0 STEPS ", at)
    terminal.until(".", at)
    assert terminal.leave() == 0
    assert int(terminal.shown[at:].split()[0]) < 150, "the answer was stopped"
    assert "Traceback" not in terminal.shown


# Without a terminal


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str | BaseException]:
    """What the user types; the end of input after it."""
    typed: list[str | BaseException] = []

    def read(prompt: str) -> str:
        item = typed.pop(0) if typed else EOFError()
        if isinstance(item, BaseException):
            raise item
        return item

    monkeypatch.setattr("builtins.input", read)
    return typed


def test_a_conversation(lines: list, capsys: pytest.CaptureFixture[str]) -> None:
    heard: list[str] = []

    def answer(text: str) -> Iterator[Token]:
        heard.append(text)
        yield Token(1, text.upper())
        yield Token(2, "!", "stop")

    lines += ["one", "   ", KeyboardInterrupt(), "two", "/exit", "three"]
    converse(answer)
    out, err = capsys.readouterr()
    assert heard == ["one", "two"]
    assert out == "ONE!\nTWO!\n"
    assert "Ctrl-C stops an answer" in err
    assert lines == ["three"]


@pytest.mark.parametrize(
    ("finish", "said"), [("length", "(cut: --max-tokens reached)"), ("context", "(cut: the context is full)")]
)
def test_a_cut_answer_says_why(lines: list, capsys: pytest.CaptureFixture[str], finish: str, said: str) -> None:
    lines.append("x")
    converse(lambda text: iter([Token(1, "a", finish)]))
    out, err = capsys.readouterr()
    assert out == "a\n\n"
    assert err.splitlines()[-1] == said


def test_errors_and_interrupts_do_not_end_it(lines: list, capsys: pytest.CaptureFixture[str]) -> None:
    closed = []

    def answer(text: str) -> Iterator[Token]:
        try:
            if text == "full":
                raise ContextFull(900, 512)
            yield Token(1, "begun")
            if text == "stop":
                raise KeyboardInterrupt
        finally:
            closed.append(text)

    lines += ["full", "stop", "fine"]
    converse(answer)
    out, err = capsys.readouterr()
    assert closed == ["full", "stop", "fine"]
    assert out.split() == ["begun"] * 2
    assert "error: the prompt has 900 tokens, but the context holds 512" in err


def test_an_answer_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    last = print_answer(iter([Token(1, "百"), Token(2, "川 😀", "stop")]))
    assert last is not None
    assert last.finish == "stop"
    assert capsys.readouterr().out == "百川 😀\n"
    assert print_answer(iter([])) is None


def test_readline_is_optional(lines: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "readline", None)
    repl.converse(lambda text: iter([]))
    assert Path(repl.__file__).name == "repl.py"
