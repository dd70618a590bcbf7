"""A conversation on a terminal: line editing and history, several lines, commands, Markdown as it streams.

Ctrl-C stops an answer, Ctrl-D or /exit leaves. Knows no model's inside.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completion, WordCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.formatted_text import HTML
from prompt_toolkit.history import FileHistory, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from rich.console import Console

from headrace.cli.answer_view import AnswerView
from headrace.cli.console import note
from headrace.cli.interruption import interruptible, unechoed
from headrace.cli.options import refuse_place
from headrace.errors import UserError, reason
from headrace.runtime.answer import Token
from headrace.runtime.session import read_session
from headrace.text.turns import Message

if TYPE_CHECKING:
    from headrace.runtime.chat import Chat

__all__ = ["Conversation", "converse", "history_file"]

HELP = """\
/system TEXT   tell the model this first, and begin anew; without TEXT: show it
/regenerate    answer the last message again
/edit          change the last message
/clear         begin anew
/save FILE     write the conversation, with its cache
/load FILE     go on with it
/stats         tokens, speed, context
/exit          leave (or Ctrl-D)
Enter sends, Alt-Enter begins a new line, Ctrl-C stops an answer."""


@dataclass
class Stats:
    """What became of the newest answer."""

    tokens: int = 0
    first: float = 0.0
    seconds: float = 0.0
    finish: str | None = None

    @property
    def speed(self) -> float:
        """Tokens a second behind the first."""
        return (self.tokens - 1) / self.seconds if self.tokens > 1 and self.seconds else 0.0


class Conversation:
    """What a person does with a chat: saying, and the commands.

    Args:
        chat: the conversation.
        say: a message → tokens; carries sampling and limits.
        console: where answers are shown.
        markdown: set answers as Markdown.

    Attributes:
        stats: of the newest answer.
        draft: text that the next prompt begins with.
        left: the person wants to leave.
    """

    def __init__(
        self, chat: Chat, say: Callable[[str], Generator[Token]], console: Console, *, markdown: bool = True
    ) -> None:
        self.chat = chat
        self._say = say
        self._console = console
        self._markdown = markdown
        self.stats = Stats()
        self.draft = ""
        self.left = False

    def take(self, text: str) -> None:
        """A line from the person: a command, or something said.

        Raises:
            UserError: the command is unknown, or what it asks for is not possible.
        """
        if not text.strip():
            return
        if text.startswith("/"):
            name, _, argument = text[1:].strip().partition(" ")
            command = self._commands().get(name)
            if command is None:
                raise UserError(f"there is no command /{name}; expected one of {', '.join(self.names)}: see /help")
            command(argument.strip())
        else:
            self.answer(text)

    def answer(self, text: str) -> None:
        """Say something and show the answer; Ctrl-C ends it, and what was said so far stays."""
        self.stats = Stats()
        started = time.monotonic()
        first = started
        try:
            view = AnswerView(self._console, markdown=self._markdown)
            with unechoed(), closing(self._say(text)) as tokens, view:
                for token in tokens:
                    now = time.monotonic()
                    first = now if not self.stats.tokens else first
                    self.stats = replace(
                        self.stats,
                        tokens=self.stats.tokens + 1,
                        first=first - started,
                        seconds=now - first,
                        finish=token.finish,
                    )
                    view.push(token.text)
        except KeyboardInterrupt:
            note("(stopped)")
        if self.stats.finish in ("length", "context"):
            note(f"(cut: {'--max-tokens reached' if self.stats.finish == 'length' else 'the context is full'})")

    def status(self) -> str:
        """The quiet last line: speed and context."""
        parts = []
        if self.stats.tokens:
            parts = [f"{self.stats.speed:.1f} tok/s", f"first token {self.stats.first:.2f} s"]
        return " · ".join([*parts, f"context {self.chat.used} of {self.chat.model.context}", "/help"])

    @property
    def names(self) -> list[str]:
        """All commands."""
        return [f"/{name}" for name in self._commands()]

    def _commands(self) -> dict[str, Callable[[str], None]]:
        return {
            "help": lambda _: note(HELP),
            "system": self._system,
            "regenerate": self._regenerate,
            "edit": self._edit,
            "clear": lambda _: self._begin(self.system),
            "save": self._save,
            "load": self._load,
            "stats": lambda _: note(self.status().removesuffix(" · /help") + f" · {self.stats.tokens} tokens"),
            "exit": self._exit,
        }

    @property
    def system(self) -> str | None:
        """What the model is told first."""
        first = self.chat.messages[:1]
        return first[0].content if first and first[0].role == "system" else None

    def _begin(self, system: str | None) -> None:
        self.chat.messages = [] if system is None else [Message("system", system)]
        self.stats = Stats()

    def _system(self, text: str) -> None:
        if text:
            self._begin(text)
        else:
            note(self.system or "(nothing is told first)")

    def _save(self, file: str) -> None:
        path = _path("save", file)
        refuse_place("/save", path)
        if path.exists():
            read_session(path)  # a session may be written again, a file of another kind not
        self.chat.save(path)
        note(f"saved to {path}")

    def _load(self, file: str) -> None:
        path = _path("load", file)
        before, self.chat.messages = self.chat.messages, []
        try:
            self.chat.restore(path)
        except UserError:
            self.chat.messages = before
            raise
        self.stats = Stats()
        for message in self.chat.messages[-2:]:
            self._console.print(f"{message.role}: {message.content}", markup=False, highlight=False)

    def _take_back(self) -> str:
        """The last thing said, which together with its answer leaves the conversation."""
        at = max((i for i, m in enumerate(self.chat.messages) if m.role == "user"), default=None)
        if at is None:
            raise UserError("nothing was said yet")
        text = self.chat.messages[at].content
        self.chat.messages = self.chat.messages[:at]
        return text

    def _regenerate(self, _: str) -> None:
        before, stats = self.chat.messages, self.stats
        text = self._take_back()
        try:
            self.answer(text)
        finally:
            if not self.stats.tokens:  # nothing came: the old answer stays
                self.chat.messages, self.stats = before, stats

    def _edit(self, _: str) -> None:
        self.draft = self._take_back()
        self.stats = Stats()

    def _exit(self, _: str) -> None:
        self.left = True


def converse(conversation: Conversation, history: Path | None = None) -> None:
    """Read lines and answer them until the person leaves.

    Args:
        conversation: what takes the lines.
        history: where lines are remembered, or None.
    """
    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    session: PromptSession[str] = PromptSession(
        history=_History(str(history)) if history is not None else InMemoryHistory(),
        key_bindings=keys,
        completer=_Commands(conversation.names, sentence=True),
        complete_while_typing=False,
        bottom_toolbar=lambda: HTML("<style bg='default' fg='ansibrightblack'>{}</style>").format(
            conversation.status()
        ),
        prompt_continuation=lambda width, line, wrapped: " " * width,
    )
    # Ctrl-C is a key of the prompt, and stops answers; between the two it would hit a library in the midst of its work.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        while not conversation.left:
            draft, conversation.draft = conversation.draft, ""
            try:
                text = session.prompt("> ", default=draft)
            except EOFError:
                return
            except KeyboardInterrupt:
                note("Ctrl-D leaves.")
                continue
            try:
                with interruptible():
                    conversation.take(text)
            except UserError as error:
                note(f"error: {error}")
            except KeyboardInterrupt:
                note("(stopped)")
    finally:
        signal.signal(signal.SIGINT, before)


class _History(FileHistory):
    """Lines of earlier conversations; where their file cannot be used, a note says so once, and the talk goes on."""

    _works = True

    def load_history_strings(self) -> Iterable[str]:
        with self._told():
            return list(super().load_history_strings())
        return []

    def store_string(self, string: str) -> None:
        with self._told():
            super().store_string(string)

    @contextmanager
    def _told(self) -> Generator[None]:
        try:
            yield
        except OSError as error:
            if self._works:
                note(f"what you type is not remembered: {self.filename!s} cannot be used ({reason(error)})")
            self._works = False


class _Commands(WordCompleter):
    """Completes commands, and nothing else."""

    def get_completions(self, document: Document, event: CompleteEvent) -> Iterable[Completion]:
        if document.text.startswith("/") and " " not in document.text:
            yield from super().get_completions(document, event)


def _path(command: str, text: str) -> Path:
    if not text:
        raise UserError(f"/{command} needs a file: /{command} FILE")
    return Path(text).expanduser()


def history_file() -> Path | None:
    """Where lines of earlier conversations are remembered; None where there is no such place."""
    try:
        folder = Path.home() / ".local" / "state" / "headrace"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except (OSError, RuntimeError):
        return None
    return folder / "history"
