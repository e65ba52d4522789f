"""Options of the server."""

from __future__ import annotations

from dataclasses import dataclass, replace

from lfdm_export.errors import InputError
from lfdm_export.serving.server.ports import check_ports


@dataclass(frozen=True)
class ServerOptions:
    """Options with which a server is started.

    Attributes:
        host: address to listen on.
        http_port, grpc_port, metrics_port: ports to listen on; 0 chooses a free one.
        start_timeout: seconds until all models must be ready.
        drain_timeout: seconds that requests in flight may take when the server is stopped.
        token_file: file with the token required of each request; None accepts requests without a token.
        tls_certificate, tls_key: PEM files, for TLS on the HTTP and gRPC ports; None for plain text.
        trace_file: file for traces of requests; None turns tracing off.
        trace_rate: one request in `trace_rate` is traced.
        verbose: log the server's whole output.
        arguments: more arguments for `tritonserver`.
    """

    host: str = "127.0.0.1"
    http_port: int = 8000
    grpc_port: int = 8001
    metrics_port: int = 8002
    start_timeout: float = 600.0
    drain_timeout: float = 60.0
    token_file: str | None = None
    tls_certificate: str | None = None
    tls_key: str | None = None
    trace_file: str | None = None
    trace_rate: int = 1
    verbose: bool = False
    arguments: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            InputError: a value is out of range, or a certificate comes without its key.
        """
        for name in ("http_port", "grpc_port", "metrics_port"):
            if not 0 <= getattr(self, name) <= 65535:
                raise InputError(f"{name} is {getattr(self, name)}, expected 0 to 65535")
        for name, least in (("start_timeout", 1), ("drain_timeout", 0), ("trace_rate", 1)):
            if not getattr(self, name) >= least:
                raise InputError(f"{name} is {getattr(self, name)}, expected {least} or more")
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise InputError("the server's certificate and its private key belong together; give both, or neither")

    def with_ports(self) -> ServerOptions:
        """A copy with free ports instead of 0.

        Raises:
            InputError: a port is in use, or the host is not an address of this machine.
        """
        http, grpc, metrics = "--http-port", "--grpc-port", "--metrics-port"  # their names in messages
        ports = check_ports(self.host, {http: self.http_port, grpc: self.grpc_port, metrics: self.metrics_port})
        return replace(self, http_port=ports[http], grpc_port=ports[grpc], metrics_port=ports[metrics])
