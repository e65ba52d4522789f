"""The sockets of one server process, in a folder that only its user can enter; it opens no port."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from pathlib import Path

from lfdm_export.errors import ServerError

#: Maximum bytes of a socket's path. Source: unix(7), sun_path.
_MOST = 107


@dataclass(frozen=True)
class Sockets:
    """The sockets of one process.

    Attributes:
        folder: private, and empty before the process starts.
        http_port, grpc_port: ports of the front. The server itself does not listen there: they only identify it in a
            list of processes.
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
        return self.folder / f"grpc:{self.grpc_port}"  # Triton appends the port to the address

    @property
    def grpc_target(self) -> str:
        """The gRPC address of the server's socket."""
        return f"unix:{self._grpc}"

    def listened(self) -> bool:
        """Whether the server listens for gRPC."""
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(str(self._grpc)) == 0

    @property
    def metrics(self) -> Path:
        """The socket of the metrics page, over HTTP."""
        return self.folder / "metrics"

    def arguments(self) -> list[str]:
        """Arguments for `tritonserver`. HTTP is off: some inputs to its HTTP server can end the process."""
        return [
            "--allow-http=false",
            f"--http-port={self.http_port}",
            f"--grpc-address=unix:{self.folder / 'grpc'}",
            f"--grpc-port={self.grpc_port}",
            "--allow-metrics=true",
            f"--metrics-address=unix:{self.metrics}",
        ]
