"""Conversations that a server saved: a folder of session files, found by name. Knows no HTTP and no engine."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from headrace.errors import UserError
from headrace.server.generation import Refused
from headrace.text.turns import Message

__all__ = ["SavedSessions", "message_object", "message_of"]

_NAME = re.compile(r"\w[\w.-]{0,47}")  # a file name of at most 255 bytes, whatever the letters
_SUFFIX = ".session"


class SavedSessions:
    """The files of a folder, those that `headrace chat --session` writes.

    Args:
        folder: where they are, or None: nothing is saved here.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Name, bytes and time of each, the newest first."""
        files = []
        for path in self._home().glob(f"*{_SUFFIX}"):
            with suppress(FileNotFoundError):  # another process has deleted it since
                if path.is_file():
                    files.append((path, path.stat()))
        for path, told in sorted(files, key=lambda item: item[1].st_mtime, reverse=True):
            yield {
                "name": path.name.removesuffix(_SUFFIX),
                "bytes": told.st_size,
                "saved_at": datetime.fromtimestamp(told.st_mtime, UTC).isoformat(timespec="seconds"),
            }

    @contextmanager
    def file(self, name: str, *, exists: bool = True) -> Iterator[Path]:
        """The file of a name, for what is done with it; errors from there tell the name and not the folder.

        Raises:
            Refused: nothing is saved here, the name is none, or there is no such session.
        """
        if not _NAME.fullmatch(name):
            raise Refused(f"session {name!r} is no name; expected at most 48 letters, digits, _ . and -", field="name")
        path = self._home() / f"{name}{_SUFFIX}"
        missing = Refused(f"there is no session {name!r}; expected one that was saved here", status=404, field="name")
        if exists and not path.is_file():
            raise missing
        try:
            yield path
        except FileNotFoundError:  # deleted by another since
            if not exists:
                raise
            raise missing from None
        except UserError as error:
            raise Refused(str(error).replace(str(path), f"session {name!r}"), field="name") from None

    def _home(self) -> Path:
        if self._folder is None:
            raise Refused("sessions are not saved here; start the server with --sessions FOLDER", status=404)
        return self._folder


def message_of(raw: Mapping[str, Any]) -> Message:
    """A message of a request as the turn format takes it."""
    calls = tuple(raw.get("tool_calls", ()))
    return Message(raw["role"], raw["content"], calls=calls, tool_call_id=raw.get("tool_call_id"))


def message_object(message: Message) -> dict[str, Any]:
    """A message as OpenAI's clients send it."""
    told: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.calls:
        told["tool_calls"] = [
            {**call, "function": {**call["function"], "arguments": json.dumps(call["function"].get("arguments", {}))}}
            for call in message.calls
        ]
    if message.tool_call_id is not None:
        told["tool_call_id"] = message.tool_call_id
    return told
