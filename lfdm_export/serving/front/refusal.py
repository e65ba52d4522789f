"""Refusals of requests: one sentence and a status, in the form of Triton's own errors."""

from __future__ import annotations

from collections.abc import Mapping

from lfdm_export.errors import LfdmExportError

#: HTTP status per gRPC status. Source: Triton's `HttpCodeFromError`; google.rpc.Code for codes missing there.
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
    """A request that is not forwarded.

    Attributes:
        code: name of the gRPC status.
        http_status: the HTTP status.
        closes: whether the connection must be closed.
    """

    def __init__(self, code: str, sentence: str, *, http_status: int | None = None, closes: bool = False) -> None:
        """Say why."""
        super().__init__(sentence)
        self.code, self.closes = code, closes
        self.http_status = HTTP_STATUS.get(code, 500) if http_status is None else http_status


def forget(error: BaseException) -> None:
    """Drop an error's traceback: it holds the request, and cycles of futures and frames would keep it alive."""
    chain: list[BaseException | None] = [error]
    while chain:
        one = chain.pop()
        if one is not None and one.__traceback__ is not None:
            one.__traceback__ = None
            chain += (one.__context__, one.__cause__)


def invalid(sentence: str) -> RefusedError:
    """The refusal of an invalid request."""
    return RefusedError("INVALID_ARGUMENT", sentence)


def too_large(sentence: str) -> RefusedError:
    """The refusal of a body over the limit: the rest of it is not read."""
    return RefusedError("INVALID_ARGUMENT", sentence, http_status=413, closes=True)


def unavailable(sentence: str) -> RefusedError:
    """The refusal of a request that may succeed later."""
    return RefusedError("UNAVAILABLE", sentence)
