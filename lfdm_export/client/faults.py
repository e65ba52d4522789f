"""Converts gRPC statuses into this project's errors, with the server's messages, and decides about retries."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from lfdm_export.client.settings import Retry
from lfdm_export.errors import (
    AuthenticationError,
    DeadlineError,
    InputError,
    LfdmExportError,
    ServerError,
    ServerUnavailableError,
)
from lfdm_export.protocol.contract import (
    DEADLINE_MESSAGE,
    DRAINING_MESSAGE,
    QUEUE_FULL_MESSAGE,
    RELOADED_MESSAGE,
    RequestCancelledError,
)

#: Prefixes that Triton adds to a model's error message.
_WRAPPING = re.compile(r"^(\[request id: [^\]]*\]\s*|\[StatusCode\.\w+\]\s*|in ensemble '[^']*',\s*)+", re.IGNORECASE)
_STATUS = re.compile(r"\[([A-Z_]+)\] ")
# gRPC's messages, in lower case, where nothing answers, …
_REFUSED = ("failed to connect", "connection refused", "no route to host", "network is unreachable")
_NO_NAME = ("dns resolution", "name resolution", "could not contact dns", "domain name not found", "getaddrinfo")
_BROKEN = (
    "socket closed",
    "connection reset",
    "broken pipe",
    "endpoint closing",
    "goaway",
    "stream removed",
    "parsing http/2",
)
# … and where the TLS settings do not match.
_NOT_TRUSTED = ("certificate_verify_failed", "certificate verify failed", "hostname verification", "peer name")
_NOT_TLS = ("wrong_version_number", "wrong version number")
_HANDSHAKE = ("handshake", "ssl_error")


@dataclass(frozen=True)
class Fault:
    """How a failed RPC ended.

    Attributes:
        code: name of the gRPC status, such as "UNAVAILABLE".
        details: message of the status.
        again: whether a retry of the same request is safe and may help.
        error: error to raise if there is no retry.
    """

    code: str
    details: str
    again: bool
    error: LfdmExportError


def read_fault(code: str, details: str, *, address: str, tls: bool, request_id: str, answered: bool) -> Fault:
    """Classify a status other than OK.

    Args:
        code: name of the gRPC status.
        details: message of the status.
        address: address of the server.
        tls: whether the client uses TLS.
        request_id: ID of the request; "" for none.
        answered: whether a part of the response had arrived.
    """
    sentence = plain_sentence(details)
    again = False
    error: LfdmExportError
    if code == "INVALID_ARGUMENT":
        error = InputError(sentence or f"{address} refused the request without saying why")
    elif code == "CANCELLED":
        error = RequestCancelledError(sentence or f"the request {request_id} was cancelled")
    elif code == "DEADLINE_EXCEEDED":
        error = DeadlineError(
            f"{address} did not answer in time; allow more time, or look at the server's load", code, request_id
        )
    elif sentence.startswith(DEADLINE_MESSAGE):
        error = DeadlineError(sentence, code, request_id)
    elif code in ("UNAUTHENTICATED", "PERMISSION_DENIED"):
        error = AuthenticationError(
            f"{address} refused access ({sentence or code}); give a valid token or client certificate", code, request_id
        )
    elif code == "UNAVAILABLE" or RELOADED_MESSAGE in sentence:
        error, again = _unavailable(sentence, address=address, tls=tls, request_id=request_id)
    elif code == "RESOURCE_EXHAUSTED" and "message larger than max" in sentence:
        error = ServerError(f"{sentence}; raise max_message_bytes, or request fewer outputs", code, request_id)
    elif code == "NOT_FOUND" or (code == "UNIMPLEMENTED" and not sentence):
        error = ServerError(
            f"{address} does not serve the model ({sentence or code}); start lfdm-serve there", code, request_id
        )
    else:
        error = ServerError(f"{address} failed: {sentence or code}", code, request_id)
    return Fault(code, sentence, again and not answered, error)


def _unavailable(sentence: str, *, address: str, tls: bool, request_id: str) -> tuple[ServerError, bool]:
    """Return the error for UNAVAILABLE, and whether a retry may help."""

    def says(fragments: tuple[str, ...]) -> bool:
        return any(fragment in sentence.lower() for fragment in fragments)

    def hopeless(message: str) -> tuple[ServerError, bool]:
        return ServerError(message, "UNAVAILABLE", request_id), False

    def perhaps_later(message: str) -> tuple[ServerError, bool]:
        return ServerUnavailableError(message, "UNAVAILABLE", request_id), True

    if says(_NOT_TRUSTED):
        return hopeless(
            f"the certificate of {address} is not trusted or names another server; "
            "give the authority that signed it, or the name that it carries"
        )
    if tls and says(_NOT_TLS):
        return hopeless(f"{address} does not speak TLS; leave TLS out, or give the port that does")
    if tls and says(_HANDSHAKE):
        return hopeless(
            f"the TLS handshake with {address} failed; check that it speaks TLS, "
            "and whether it requires a client certificate that it trusts"
        )
    if says(_NO_NAME):
        return perhaps_later(f"{address} is not known by that name; check the address")
    if says(_BROKEN):
        hint = (
            "; if it requires a client certificate, give one"
            if tls
            else "; if it uses TLS, switch on TLS, and give its gRPC port, not that of HTTP"
        )
        return perhaps_later(f"the connection to {address} was lost{hint}")
    if says(("too many pings",)):
        return hopeless(f"{address} closes connections that ping so often; set a longer keepalive, or none")
    if says(_REFUSED):
        return perhaps_later(f"no server answers at {address}; start one with lfdm-serve, or give another address")
    return perhaps_later(f"{address} is not available: {sentence or 'it did not say why'}")


def stream_status(message: str) -> tuple[str, str]:
    """Split the error of a stream, such as ``[INVALID_ARGUMENT] steps is 0``, into status and message.

    Triton's own messages and some of this project's have no status in front.
    """
    sentence = plain_sentence(message)
    tagged = _STATUS.match(sentence)
    if tagged:
        return tagged[1], sentence[tagged.end() :]
    later = sentence.startswith((DEADLINE_MESSAGE, QUEUE_FULL_MESSAGE, DRAINING_MESSAGE))
    return "UNAVAILABLE" if later else "UNKNOWN", sentence


def plain_sentence(details: str) -> str:
    """Return a server's message on one line, without the prefixes that Triton adds."""
    return _WRAPPING.sub("", " ".join(details.split()))


@dataclass
class Attempts:
    """Counts the attempts of one request and the time left.

    Attributes:
        retry: policy of retries.
        seconds: timeout of all attempts together.
        clock, draw: sources of time and randomness; replaced in tests.
    """

    retry: Retry
    seconds: float
    clock: Callable[[], float] = time.monotonic
    draw: Callable[[], float] = random.random
    made: int = 0
    end: float = field(init=False)

    def __post_init__(self) -> None:
        """Start the clock.

        Raises:
            InputError: `seconds` leaves no time.
        """
        if not self.seconds > 0:
            raise InputError(f"the deadline is {self.seconds}, expected seconds above 0")
        self.end = self.clock() + self.seconds

    def begin(self) -> float:
        """Start an attempt; returns the seconds left for it, above 0."""
        self.made += 1
        return max(self.end - self.clock(), 1e-3)

    def pause_after(self, fault: Fault) -> float:
        """Return the seconds to wait before the next attempt.

        Raises:
            LfdmExportError: `fault.error`, if no attempt is left.
        """
        if fault.again and self.made < self.retry.attempts:
            pause = self.retry.pause(self.made, self.draw())
            if self.clock() + pause < self.end:
                return pause
        raise fault.error
