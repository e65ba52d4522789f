"""Every error that the toolkit raises on purpose.

A message is one sentence that says what went wrong, what was found, what was expected and
what to do about it. Commands print it as it is, without a traceback.
"""


class LfdmExportError(Exception):
    """Base of all errors raised on purpose; its text is meant for the user."""


class CheckpointError(LfdmExportError):
    """A checkpoint file cannot be read, or is not what it is used as."""


class InputError(LfdmExportError, ValueError):
    """An argument, image, clip, label or embedding from the caller cannot be used."""


class BundleError(LfdmExportError):
    """A bundle is missing, incomplete, altered, or of another format version."""


class ExportError(LfdmExportError):
    """A model cannot be exported as asked."""


class EngineError(LfdmExportError):
    """An engine cannot be built or run on this machine."""


class ParityError(LfdmExportError):
    """An export differs from its reference by more than its tolerance."""


class ServerError(LfdmExportError):
    """A server failed to serve a request, or answered what it should not.

    Attributes:
        code: name of the gRPC status, such as "INTERNAL".
        request_id: of the request, where there was one.
    """

    def __init__(self, message: str, code: str = "UNKNOWN", request_id: str = "") -> None:
        """Say what happened, and to which request."""
        super().__init__(message)
        self.code, self.request_id = code, request_id


class ServerUnavailableError(ServerError):
    """No server is there, or it takes no more requests now; the same request may be sent again later."""


class DeadlineError(ServerError, TimeoutError):
    """A request was not answered in time."""


class AuthenticationError(ServerError):
    """The server, or what stands before it, does not accept the caller's token or certificate."""


class MissingDependencyError(LfdmExportError, ImportError):
    """An optional package is needed for what was asked, and is not installed."""

    def __init__(self, package: str, purpose: str, extra: str) -> None:
        """Name the package, what needs it, and the extra of this project that brings it."""
        super().__init__(
            f"{purpose} needs the package {package!r}, which is not installed; "
            f"install it with: pip install 'lfdm-export[{extra}]'"
        )
        self.package, self.extra = package, extra
