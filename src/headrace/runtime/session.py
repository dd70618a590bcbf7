"""A conversation as a file: its messages and, as the cache holds them, its tokens, so that it goes on bit for bit.

    "headrace session 1\\n" · header's length, 8 bytes little endian · header, JSON · cache · sha256 of all before

The cache is in the layout of the runner that made it (`Runner.read`). Knows no runner and no bundle.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

from headrace.errors import UserError, reason
from headrace.files import whole_file
from headrace.text.turns import Message

__all__ = ["Session", "read_session", "write_session"]

MAGIC = b"headrace session 1\n"
HEADER_LIMIT = 64 << 20  # bytes; a conversation's texts and token ids
TOKEN_LIMIT = 1 << 31
_LENGTH, _DIGEST = 8, 32


class Session(NamedTuple):
    """What is saved.

    Attributes:
        model: fingerprint of the model, its recipe and vocabulary.
        runner: who made the cache.
        messages: the conversation.
        tokens: the tokens that `cache` is of.
        cache: their keys and values.
    """

    model: str
    runner: str
    messages: tuple[Message, ...]
    tokens: tuple[int, ...] = ()
    cache: bytes = b""

    def check(self, model: str, runner: str, path: Path) -> None:
        """Raise UserError when another model or runner made this; `path` is for the message."""
        if self.model != model:
            raise UserError(f"{path} is a conversation with another model or recipe; open the bundle it was saved with")
        if self.runner != runner:
            raise UserError(
                f"{path} holds the cache of the runner {self.runner!r}, this is {runner!r}; use --runner {self.runner}"
            )


def write_session(path: Path, session: Session) -> None:
    """Write a session; the file appears whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    header = json.dumps(
        {
            "model": session.model,
            "runner": session.runner,
            "messages": [vars(message) for message in session.messages],
            "tokens": session.tokens,
            "cache_bytes": len(session.cache),
        },
        ensure_ascii=True,
    ).encode()
    digest = hashlib.sha256()
    try:
        with whole_file(path) as out:
            for piece in (MAGIC, len(header).to_bytes(_LENGTH, "little"), header, session.cache):
                digest.update(piece)
                out.write(piece)
            out.write(digest.digest())
    except OSError as error:
        raise UserError(f"{path} cannot be written ({reason(error)}); choose another place") from None


def read_session(path: Path) -> Session:
    """Read a session.

    Raises:
        UserError: it is missing, damaged, or no session at all.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({reason(error)}); expected a saved conversation") from None
    if not data.startswith(MAGIC):
        raise UserError(f"{path} is no session; expected a saved conversation")
    at = len(MAGIC) + _LENGTH
    if len(data) < at + _DIGEST or hashlib.sha256(data[:-_DIGEST]).digest() != data[-_DIGEST:]:
        raise UserError(f"{path} is damaged (its sha256 differs); delete it to begin anew")
    length = int.from_bytes(data[len(MAGIC) : at], "little")
    try:
        if length > HEADER_LIMIT:
            raise ValueError("a header of that size")
        header: dict[str, Any] = json.loads(data[at : at + length])
        cache = data[at + length : -_DIGEST]
        if len(cache) != header["cache_bytes"]:
            raise ValueError("cache_bytes")
        return Session(
            model=str(header["model"]),
            runner=str(header["runner"]),
            messages=tuple(map(_message, header["messages"])),
            tokens=_tokens(header["tokens"]),
            cache=cache,
        )
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError, RecursionError, UserError) as error:
        raise UserError(f"{path} lacks or misstates {error}; delete it to begin anew") from None


def _message(raw: dict[str, Any]) -> Message:
    calls = raw.get("calls", [])  # files of before 2026-11-26 have none
    if not all(isinstance(call["function"]["name"], str) for call in calls):
        raise ValueError("the name of a call")
    ids = None if raw["ids"] is None else _tokens(raw["ids"])
    answered = raw.get("tool_call_id")  # files of before 2026-11-28 have none
    return Message(
        str(raw["role"]), str(raw["content"]), ids, tuple(calls), None if answered is None else str(answered)
    )


def _tokens(values: list[Any]) -> tuple[int, ...]:
    """Token ids of a header."""
    if not all(type(value) is int and 0 <= value < TOKEN_LIMIT for value in values):
        raise ValueError("tokens")
    return tuple(values)
