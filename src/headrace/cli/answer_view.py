"""An answer as it streams onto a terminal: whole blocks of Markdown are set for good, the open one is drawn anew.

A block ends at an empty line outside of a code fence, so that what has been said is never drawn twice and long answers
do not flicker. Knows no model.
"""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.markdown import Markdown

from headrace.cli.interruption import uninterrupted

__all__ = ["AnswerView"]

FENCE = "```"


class AnswerView:
    """Draws one answer; use it in a `with` block.

    Args:
        console: where.
        markdown: set the text as Markdown; otherwise it is printed as it comes.
    """

    def __init__(self, console: Console, *, markdown: bool = True) -> None:
        self._console = console
        self._markdown = markdown and console.is_terminal and not console.is_dumb_terminal
        self._open = ""
        self._live: Live | None = None

    def push(self, text: str) -> None:
        """Show more of the answer. Ctrl-C waits until it is shown."""
        with uninterrupted():
            if not self._markdown:
                self._console.file.write(text)
                self._console.file.flush()
                return
            self._open += text
            while (end := _block_end(self._open)) is not None:
                self._settle(self._open[:end])
                self._open = self._open[end:]
            if self._open.strip():
                self._draw(self._open)

    def finish(self) -> None:
        """Set what is left. Ctrl-C waits until it is set."""
        with uninterrupted():
            if not self._markdown:
                self._console.file.write("\n")
                self._console.file.flush()
            elif self._live is not None or self._open.strip():
                self._settle(self._open)
            self._open = ""

    def _draw(self, text: str) -> None:
        if self._live is None:
            # Only as much as the screen holds is drawn: what scrolled off cannot be drawn anew.
            self._live = Live(console=self._console, auto_refresh=False, transient=True, vertical_overflow="crop")
            self._live.start()
        self._live.update(Markdown(text), refresh=True)

    def _settle(self, text: str) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
        if text.strip():
            self._console.print(Markdown(text))
            self._console.print()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.finish()


def _block_end(text: str) -> int | None:
    """Where the first whole block ends: behind the first empty line outside of a fence; None while it is open."""
    at, fenced = 0, False
    while (end := text.find("\n", at)) >= 0:
        line = text[at:end]
        if line.lstrip().startswith(FENCE):
            fenced = not fenced
        if not fenced and not line.strip() and text[:at].strip():
            return end + 1
        at = end + 1
    return None
