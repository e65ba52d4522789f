"""Connections of the web server: uvicorn's own have no time limit for a request's head, and no maximum."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

#: Seconds for a request's head; a silent connection is closed after the same time.
HEAD_SECONDS = 10.0
#: Most connections; beyond that, the one that has been silent longest makes room.
MOST_CONNECTIONS = 512
#: Seconds between two looks at a connection.
_LOOK = 1.0


class Connection(H11Protocol):
    """A connection that is closed when its client is silent for too long, or others need the place."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request."""
        super().connection_made(transport)
        self._silent_since = self.loop.time()
        self.loop.call_later(_LOOK, self._look)
        if len(self.connections) > MOST_CONNECTIONS:
            silent = [one for one in self.connections if isinstance(one, Connection) and one.silent]
            min(silent, key=lambda one: one._silent_since).transport.abort()  # this one is among them

    def on_response_complete(self) -> None:
        """Begin to wait for the next request."""
        super().on_response_complete()
        self._silent_since = self.loop.time()

    @property
    def silent(self) -> bool:
        """Whether it waits for a request."""
        return not self.transport.is_closing() and (self.cycle is None or self.cycle.response_complete)

    def _look(self) -> None:
        if self.transport.is_closing():
            return
        if self.silent and self.loop.time() > self._silent_since + HEAD_SECONDS:
            self.transport.abort()
        else:
            self.loop.call_later(_LOOK, self._look)
