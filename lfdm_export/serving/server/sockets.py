"""Where one server process listens: sockets in a folder that only its user can enter, and no port at all."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lfdm_export.errors import ServerError

#: Bytes of a socket's path. Source: unix(7), sun_path.
_MOST = 107


@dataclass(frozen=True)
class Sockets:
    """The sockets of one process.

    Attributes:
        folder: private, and empty before the process starts.
        http_port, grpc_port: those of the front. Nothing listens there for the server: they tell people which server is
            whose in a list of processes.
    """

    folder: Path
    http_port: int
    grpc_port: int

    def __post_init__(self) -> None:
        """Check the length of the paths.

        Raises:
            ServerError: the folder's path is too long for a socket.
        """
        if len(bytes(self._grpc)) > _MOST:
            raise ServerError(
                f"the folder for temporary files makes a socket's path longer than {_MOST} bytes ({self._grpc}); "
                "name a shorter one with TMPDIR"
            )

    @property
    def _grpc(self) -> Path:
        return self.folder / f"grpc:{self.grpc_port}"  # Triton puts the port behind what it takes for an address

    @property
    def grpc_target(self) -> str:
        """What gRPC calls the server's socket."""
        return f"unix:{self._grpc}"

    @property
    def metrics(self) -> Path:
        """The socket of the page of metrics, over HTTP."""
        return self.folder / "metrics"

    def arguments(self) -> list[str]:
        """For `tritonserver`. HTTP is off: what it reads could end the server."""
        return [
            "--allow-http=false",
            f"--http-port={self.http_port}",
            f"--grpc-address=unix:{self.folder / 'grpc'}",
            f"--grpc-port={self.grpc_port}",
            "--allow-metrics=true",
            f"--metrics-address=unix:{self.metrics}",
        ]
