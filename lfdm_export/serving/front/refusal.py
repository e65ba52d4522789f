"""How a request is refused: one sentence and a status, in the shape that Triton gives its own errors."""

from __future__ import annotations

from collections.abc import Mapping

from lfdm_export.errors import LfdmExportError

#: HTTP's status for each of gRPC's. Source: Triton's `HttpCodeFromError`; google.rpc.Code for those that it has not.
HTTP_STATUS: Mapping[str, int] = {
    "INVALID_ARGUMENT": 400,
    "UNAUTHENTICATED": 401,
    "PERMISSION_DENIED": 403,
    "NOT_FOUND": 404,
    "ALREADY_EXISTS": 409,
    "RESOURCE_EXHAUSTED": 413,
    "CANCELLED": 499,
    "INTERNAL": 500,
    "UNKNOWN": 500,
    "UNIMPLEMENTED": 501,
    "UNAVAILABLE": 503,
    "DEADLINE_EXCEEDED": 504,
}


class RefusedError(LfdmExportError):
    """A request that goes no further.

    Attributes:
        code: name of gRPC's status.
        http_status: of HTTP's answer.
        closes: whether the connection is of no more use.
    """

    def __init__(self, code: str, sentence: str, *, http_status: int | None = None, closes: bool = False) -> None:
        """Say why."""
        super().__init__(sentence)
        self.code, self.closes = code, closes
        self.http_status = HTTP_STATUS.get(code, 500) if http_status is None else http_status


def forget(error: BaseException) -> None:
    """Let go what an error's traceback holds, which is the request: futures and frames that hold each other keep it."""
    chain: list[BaseException | None] = [error]
    while chain:
        one = chain.pop()
        if one is not None and one.__traceback__ is not None:
            one.__traceback__ = None
            chain += (one.__context__, one.__cause__)


def invalid(sentence: str) -> RefusedError:
    """The client's mistake."""
    return RefusedError("INVALID_ARGUMENT", sentence)


def too_large(sentence: str) -> RefusedError:
    """More than is read: what follows on the connection is not looked at."""
    return RefusedError("INVALID_ARGUMENT", sentence, http_status=413, closes=True)


def unavailable(sentence: str) -> RefusedError:
    """Not now; perhaps later."""
    return RefusedError("UNAVAILABLE", sentence)
