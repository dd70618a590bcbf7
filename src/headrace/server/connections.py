"""A client's connection with clocks: who sends a request too slowly, or does not read the answer, is let go.

    opened ──head──► whole head ──body──► whole request        head within `head` seconds, body within `body` seconds
    answer written ──────────────────────► taken by the client within `reading` seconds, or the connection is dropped

uvicorn waits for ever in all three places: a thousand clients that send a byte now and then would keep everybody else
out. Knows no route and no dialect.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

__all__ = ["Connection", "Patience"]


@dataclass(frozen=True)
class Patience:
    """How long a client may take, in seconds.

    Attributes:
        head: for a request's first line and headers, from the connection's opening or the request's first byte.
        body: for the body, from the head on: 8 MiB in a minute is a slow line.
        reading: for what has been written to it and does not fit the system's buffers.
    """

    head: float = 10.0
    body: float = 60.0
    reading: float = 60.0


class Connection(H11Protocol):
    """One connection, HTTP/1.1 by h11.

    Args:
        patience: how long the client may take.
        uvicorn: what uvicorn gives its protocols.
    """

    def __init__(self, *, patience: Patience, **uvicorn: Any) -> None:
        super().__init__(**uvicorn)
        self._patience = patience
        self._stage: object = None  # what the clock of the request runs for, a state of h11
        self._sending: asyncio.TimerHandle | None = None
        self._reading: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # Any byte that the client has not taken counts, also one that is left when the server closes.
        transport.set_write_buffer_limits(high=0)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()  # half of the next request may have come with this one

    def pause_writing(self) -> None:
        super().pause_writing()
        self._reading = self.loop.call_later(self._patience.reading, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        _stop(self._reading)

    def connection_lost(self, exc: Exception | None) -> None:
        _stop(self._sending)
        _stop(self._reading)
        super().connection_lost(exc)

    def _watch(self) -> None:
        """Start the clock of the stage that the request is in; one that runs for this stage goes on."""
        stage = self.conn.their_state
        if stage is self._stage:
            return
        self._stage = stage
        _stop(self._sending)
        seconds = {h11.IDLE: self._patience.head, h11.SEND_BODY: self._patience.body}.get(stage)
        if seconds is not None:
            self._sending = self.loop.call_later(seconds, self.transport.abort)


def _stop(clock: asyncio.TimerHandle | None) -> None:
    if clock is not None:
        clock.cancel()
