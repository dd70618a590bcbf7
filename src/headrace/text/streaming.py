"""TextStream: text out of tokens as they come, never half a character and never the beginning of a stop string.

The bytes of the tokens go through an incremental UTF-8 decoder, so the pieces joined are exactly `Tokenizer.decode` of
all ids. Knows nothing about models, sampling or terminals.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator, Sequence

from headrace.errors import UserError
from headrace.text.tokenizer import Tokenizer

__all__ = ["TextStream"]


class TextStream:
    """Turns token ids into text, one at a time.

    The text ends at the first stop string to be complete (of several complete at the same place, the longest), which
    does not depend on how the text is cut into tokens. The stop string itself is not given out.

    Args:
        tokenizer: gives the bytes of each token.
        stops: strings that end the text.
        continues: the text goes on from a prompt, so a leading space is part of it (see `Tokenizer.decode`).
        may_stop: asked with the whole text before a stop string whether it may end there; None: it always may.

    Attributes:
        stop: the stop string that came, or None; behind it, whatever is pushed gives no text.
        raw: the bytes that the last token added.
        length: characters that are whole, given out or not.

    Raises:
        UserError: a stop string is empty.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stops: Sequence[str] = (),
        *,
        continues: bool = False,
        may_stop: Callable[[str], bool] | None = None,
    ) -> None:
        if isinstance(stops, str) or not all(stops):
            raise UserError(f"stop strings are {stops!r}; expected a list of strings, none of them empty")
        self._tokenizer = tokenizer
        self._stops = tuple(stops)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._at_start = tokenizer.drops_leading_space and not continues
        self._may_stop = may_stop
        self._given = ""  # all text given out, where somebody will ask for it
        self._held = ""
        self.raw = b""
        self.length = 0
        self.stop: str | None = None

    def push(self, token: int) -> str:
        """The text that is certain after one more token; often empty."""
        self.raw = self._tokenizer.piece_bytes(token)
        if self._at_start and self.raw:
            self.raw = self.raw.removeprefix(b" ")
            self._at_start = False
        text = self._decoder.decode(self.raw)
        self.length += len(text)
        return self._give(text)

    def finish(self) -> str:
        """What was held back: an unfinished character as U+FFFD, and the beginning of a stop string as text."""
        text = self._give(self._decoder.decode(b"", final=True))
        rest, self._held = self._held, ""
        return text + rest

    def _give(self, text: str) -> str:
        if self.stop is not None:
            return ""
        held = self._held + text
        for end, at in sorted((at + len(stop), at) for stop in self._stops for at in _places(held, stop)):
            if self._may_stop is None or self._may_stop(self._given + held[:at]):
                self.stop, self._held = held[at:end], ""
                return held[:at]
        keep = max((_overlap(held, stop) for stop in self._stops), default=0)
        self._held = held[len(held) - keep :]
        given = held[: len(held) - keep]
        if self._may_stop is not None:
            self._given += given
        return given


def _places(text: str, stop: str) -> Iterator[int]:
    """Where `stop` stands in `text`, occurrences that overlap included."""
    at = text.find(stop)
    while at >= 0:
        yield at
        at = text.find(stop, at + 1)


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that is a beginning of `stop`, but not all of it."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
