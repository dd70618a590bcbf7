"""A conversation on a real terminal: keys, Ctrl-C, and what a person then sees."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import closing

import pytest

from headrace.cli.interruption import interruptible
from tests.exports import Exports

LIMIT = 90.0  # seconds, on a busy machine
# Looks are counted, and no clock is asked: this process and a child may stand still, both, for minutes.
GLANCE = 0.1  # seconds, the longest that a look at a child takes
LOOKS = range(int(LIMIT / GLANCE))


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
        self._wait(lambda: text in self.shown[after:], repr(text))
        return self.shown.index(text, after) + len(text)

    def until_more(self, count: int, after: int) -> None:
        """Wait until so many characters are shown behind position `after`."""
        self._wait(lambda: len(self.shown) >= after + count, f"{count} characters")

    def _wait(self, done: Callable[[], bool], what: str) -> None:
        for _ in LOOKS:
            if done():
                return
            if select.select([self.master], [], [], GLANCE)[0]:
                try:
                    self.shown += os.read(self.master, 4096).decode("utf-8", "replace")
                except OSError:  # the child has closed its end
                    assert done(), f"left before {what} was shown: {self.shown!r}"
        raise AssertionError(f"{what} was not shown: {self.shown!r}")

    def listen(self, seconds: float) -> None:
        """Take in what is shown within some time."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if select.select([self.master], [], [], left)[0]:
                try:
                    self.shown += os.read(self.master, 4096).decode("utf-8", "replace")
                except OSError:  # the child has closed its end
                    return

    def press(self, key: str, text: str, after: int) -> int:
        """Press a key until `text` is shown: what comes between two prompts is lost, and a person presses again."""
        for _ in range(int(LIMIT)):
            if text in self.shown[after:]:
                break
            self.send(key)
            self.listen(1.0)
        return self.until(text, after)

    def send(self, text: str) -> None:
        os.write(self.master, text.encode())

    def leave(self) -> int:
        try:
            for _ in LOOKS:
                if (status := self.process.poll()) is not None:
                    return status
                time.sleep(GLANCE)
            raise AssertionError("the child does not end")
        finally:
            os.close(self.master)


_LAUNCH = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"


def conversing(answer: str) -> Terminal:
    """A terminal with a conversation, whose answers a function of this source makes: `answer(text)`."""
    before = """
        import time
        from types import SimpleNamespace
        from rich.console import Console
        from headrace.cli.conversation import Conversation, converse
        from headrace.runtime.answer import Token
    """
    behind = """
        chat = SimpleNamespace(messages=[], used=0, model=SimpleNamespace(context=64))
        converse(Conversation(chat, answer, Console()))
        print("LEFT")
    """
    return Terminal("\n".join(map(textwrap.dedent, (before, answer, behind))))


def test_ctrl_c_stops_the_answer_and_not_the_program() -> None:
    terminal = conversing("""
        def answer(text):
            try:
                for number in range(1000 if text == "long" else 3):
                    time.sleep(0.02)
                    yield Token(0, f"{text}{number} ")
            finally:
                print("CLOSED", flush=True)
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
    at = terminal.press("\x03", "Ctrl-D leaves.", at)  # at the prompt: a hint, not the end
    at = terminal.until("> ", at)
    terminal.press("\x04", "LEFT", at)
    assert terminal.leave() == 0
    assert "long999" not in terminal.shown
    assert "Traceback" not in terminal.shown


def test_ctrl_c_pressed_again_lets_the_answer_end() -> None:
    """What tidies up behind a stopped answer is not stopped itself, and the program goes on."""
    terminal = conversing("""
        def answer(text):
            try:
                while True:
                    time.sleep(0.02)
                    yield Token(0, "word ")
            finally:
                print("CLOSING", flush=True)
                end = time.monotonic() + 1.0
                while time.monotonic() < end:
                    pass
                print("CLOSED", flush=True)
    """)
    at = terminal.until("> ")
    terminal.send("long\n")
    at = terminal.until("word word ", at)
    terminal.send("\x03")
    at = terminal.until("CLOSING", at)
    for _ in range(3):
        terminal.send("\x03")
        terminal.listen(0.1)
    at = terminal.until("CLOSED", at)
    at = terminal.until("(stopped)", at)
    at = terminal.until("> ", at)
    terminal.press("\x04", "LEFT", at)
    assert terminal.leave() == 0
    assert terminal.shown.count("(stopped)") == 1 and "Traceback" not in terminal.shown


def test_another_press_does_not_end_what_a_generator_tidies_up() -> None:
    closed = False

    def answer() -> Iterator[int]:
        nonlocal closed
        try:
            yield 1
        finally:  # for the generator it is its own end that is handled here, not the first press
            signal.raise_signal(signal.SIGINT)
            closed = True

    with pytest.raises(KeyboardInterrupt), interruptible(), closing(answer()) as tokens:
        next(tokens)
        signal.raise_signal(signal.SIGINT)
    assert closed


def test_chat_on_a_terminal(exports: Exports) -> None:
    """The real program with a real (slowed) model: an interrupted answer stays in the conversation."""
    terminal = Terminal(
        """
        import faulthandler, sys, time
        from headrace.cli import main as cli
        from headrace.targets.host.runner import HostRunner

        faulthandler.dump_traceback_later(80)  # a child that hangs shows where

        run, steps = HostRunner.run, []
        HostRunner.run = lambda *a: (steps.append(1), time.sleep(0.1), run(*a))[2]
        status = cli._run(["chat", sys.argv[1], "--greedy", "--raw", "-n", "150", "--runner", "host"])
        print("STATUS", status, "STEPS", len(steps), ".")
        """,
        str(exports.bundle()),
    )
    at = terminal.until("> ")
    terminal.send("The river\n")
    at = terminal.until("\r\r\n", at)  # a dumb terminal's echo of the whole line
    terminal.until_more(8, at)  # some of the answer
    terminal.send("\x03")
    at = terminal.until("> ", at + 8)
    terminal.send("/exit\n")
    at = terminal.until("STATUS 0 STEPS ", at)
    terminal.until(".", at)
    assert terminal.leave() == 0
    assert int(terminal.shown[at:].split()[0]) < 150, "the answer was stopped"
    assert "Traceback" not in terminal.shown


def test_keys_are_not_shown_in_the_midst_of_an_answer() -> None:
    terminal = Terminal("""
        import sys
        from headrace.cli.interruption import unechoed

        with unechoed():
            print("ANSWERING", flush=True)
            got = sys.stdin.readline()
        print("GOT", len(got), flush=True)
        sys.stdin.readline()
        print("LEFT")
    """)
    at = terminal.until("ANSWERING")
    terminal.send("ahead\n")
    at = terminal.until("GOT 6", at)
    terminal.send("later\n")
    terminal.until("LEFT", at)
    assert terminal.leave() == 0
    assert "later" in terminal.shown and "ahead" not in terminal.shown
