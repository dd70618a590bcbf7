"""What a server writes to its log: where something went wrong and of what kind, and never what a client sent.

An exception's message may quote a prompt or a header; its type and the lines of code it passed cannot. Knows no HTTP.
"""

from __future__ import annotations

import logging
import traceback
from types import TracebackType
from typing import Any, TypeAlias

__all__ = ["LOGGING", "Discreet"]

_Raised: TypeAlias = (
    tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]
)  # as sys.exc_info() has it


class Discreet(logging.Formatter):
    """Lines with tracebacks whose exceptions are named and not quoted."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line; of asyncio's messages the first one, since the others show tasks with their exceptions."""
        if record.name == "asyncio":
            record.message = record.message.partition("\n")[0]
        return super().formatMessage(record)

    def formatException(self, ei: _Raised) -> str:
        """The lines of code that an exception passed, and its type."""
        return "\n".join(_told(ei[1])) if ei[1] is not None else ""


def _told(error: BaseException) -> list[str]:
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    before = [] if cause is None else [*_told(cause), "then:"]
    frames = [f"  {f.filename}:{f.lineno} in {f.name}" for f in traceback.extract_tb(error.__traceback__)]
    inside = [line for one in getattr(error, "exceptions", ()) for line in _told(one)]
    return [*before, f"{type(error).__module__}.{type(error).__qualname__}, raised at:", *frames, *inside]


LOGGING: dict[str, Any] = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"discreet": {"()": Discreet, "fmt": "%(asctime)s %(levelname)s %(message)s"}},
    "handlers": {"log": {"class": "logging.StreamHandler", "formatter": "discreet", "stream": "ext://sys.stderr"}},
    "loggers": {name: {"handlers": ["log"], "level": "WARNING"} for name in ("uvicorn", "asyncio", "headrace")},
}
