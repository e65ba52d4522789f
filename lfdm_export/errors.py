"""Every error that the toolkit raises on purpose.

A message is one sentence that says what went wrong, what was found, what was expected and
what to do about it. Commands print it as it is, without a traceback.
"""


class LfdmExportError(Exception):
    """Base of all errors raised on purpose; its text is meant for the user."""


class CheckpointError(LfdmExportError):
    """A checkpoint file cannot be read, or is of the wrong kind."""


class InputError(LfdmExportError, ValueError):
    """An argument, image, clip, label or embedding from the caller cannot be used."""


class BundleError(LfdmExportError):
    """A bundle is missing, incomplete, altered, or has another format version."""


class ExportError(LfdmExportError):
    """A model cannot be exported as requested."""


class EngineError(LfdmExportError):
    """An engine cannot be built or run on this machine."""


def not_finite(what: str) -> EngineError:
    """The error for NaN or infinite results of an engine; `what` gives them: "step 3 of 10 gave"."""
    return EngineError(
        f"{what} values that are not finite; the weights or the engine are at fault: check the bundle with lfdm-verify"
    )


class ParityError(LfdmExportError):
    """An export differs from its reference by more than its tolerance."""


class ServerError(LfdmExportError):
    """A server failed to serve a request, or sent an invalid response.

    Attributes:
        code: name of the gRPC status, such as "INTERNAL".
        request_id: ID of the request; "" if there is none.
    """

    def __init__(self, message: str, code: str = "UNKNOWN", request_id: str = "") -> None:
        """Store the message, the status and the request ID."""
        super().__init__(message)
        self.code, self.request_id = code, request_id


class ServerUnavailableError(ServerError):
    """The server is not running or accepts no more requests now; the same request can be sent again later."""


class DeadlineError(ServerError, TimeoutError):
    """A request was not answered in time."""


class AuthenticationError(ServerError):
    """The server, or a proxy before it, rejects the caller's token or certificate."""


class MissingDependencyError(LfdmExportError, ImportError):
    """A requested feature needs an optional package that is not installed."""

    def __init__(self, package: str, purpose: str, extra: str) -> None:
        """Name the package, what needs it, and the extra of this project that installs it."""
        super().__init__(
            f"{purpose} needs the package {package!r}, which is not installed; "
            f"install it with: pip install 'lfdm-export[{extra}]'"
        )
        self.package, self.extra = package, extra
