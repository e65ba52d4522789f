"""The client for synchronous programs and threads."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, TypeVar

from lfdm_export.client.asynchronous import AsyncClient
from lfdm_export.client.settings import Settings
from lfdm_export.client.stream import OpeningStream, Stream
from lfdm_export.client.waiting import Blocking, finish

P = ParamSpec("P")
T = TypeVar("T")
Here = TypeVar("Here")


def _derived(
    method: Callable[Concatenate[AsyncClient, P], T], end: Callable[[T], Here], returns: str = ""
) -> Callable[Concatenate[Client, P], Here]:
    """Derive a method of `Client`: same arguments, docstring and errors as `method`; `end` converts the result."""

    @functools.wraps(method)
    def derived(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> Here:
        return end(method(self._client, *args, **kwargs))

    derived.__qualname__ = f"Client.{derived.__name__}"
    if returns:
        signature = inspect.signature(method).replace(return_annotation=returns)
        derived.__signature__ = signature  # type: ignore[attr-defined]
    return derived


def _waited(
    method: Callable[Concatenate[AsyncClient, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[Client, P], T]:
    return _derived(method, finish)


def _opened(opening: OpeningStream) -> Stream:
    return Stream(finish(opening.begin()))


class Client:
    """Generates clips on a server: the methods of `AsyncClient`, blocking. Thread-safe.

    Examples:
        >>> with Client("localhost:8001") as client:
        ...     client.generate("face.jpg", label="happiness", seed=0).save("happiness.gif")
    """

    def __init__(self, address: str, settings: Settings | None = None) -> None:
        """Set the server's address; the first request opens the connection.

        Args:
            address: HOST:PORT of the server's gRPC endpoint.
            settings: TLS, token, timeouts and limits; None uses the defaults of `Settings`.

        Raises:
            InputError: the address or a file named in the settings is invalid.
            MissingDependencyError: gRPC or Triton's client is not installed.
        """
        self._client = AsyncClient(address, settings, waiting=Blocking())

    @property
    def settings(self) -> Settings:
        """Settings of the connection."""
        return self._client.settings

    def __repr__(self) -> str:
        return repr(self._client).replace("AsyncClient", "Client", 1)

    def __enter__(self) -> Client:
        """Return the client itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the client."""
        self.close()

    close = _waited(AsyncClient.close)
    health = _waited(AsyncClient.health)
    facts = _waited(AsyncClient.facts)
    labels = _waited(AsyncClient.labels)
    generate = _waited(AsyncClient.generate)
    animate = _waited(AsyncClient.animate)
    stream = _derived(AsyncClient.stream, _opened, "Stream")
    cancel = _waited(AsyncClient.cancel)
