"""How a client connects to its server: address, TLS, token, limits and retries."""

from __future__ import annotations

import ipaddress
import os
import re
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lfdm_export.errors import InputError, MissingDependencyError
from lfdm_export.files.names import user_path
from lfdm_export.wording import not_default

Compression = Literal["gzip", "deflate"]

#: Triton's default gRPC port.
GRPC_PORT = 8001
#: Characters of a token in an HTTP header. Source: RFC 9110, field values, without spaces and control characters.
_TOKEN = re.compile(r"[\x21-\x7e]+")
_HEADER = re.compile(r"[a-z0-9_.-]+")


@dataclass(frozen=True)
class Tls:
    """TLS encryption and certificates.

    Attributes:
        root_certificates: PEM file of the trusted certificate authorities; None uses gRPC's list of public ones.
        private_key: PEM file of the client's key, where the server requires client certificates.
        certificate_chain: PEM file of the client's certificate, together with `private_key`.
        server_name: name in the server's certificate, where it differs from the address.
    """

    root_certificates: str | os.PathLike[str] | None = None
    private_key: str | os.PathLike[str] | None = None
    certificate_chain: str | os.PathLike[str] | None = None
    server_name: str | None = None

    def __post_init__(self) -> None:
        """Check that key and certificate are given together.

        Raises:
            InputError: one is given without the other.
        """
        if (self.private_key is None) != (self.certificate_chain is None):
            raise InputError("a client's private key and its certificate belong together; give both, or neither")

    def credentials(self) -> Any:
        """Return gRPC's channel credentials.

        Raises:
            InputError: a file cannot be read.
        """
        grpc = import_grpc()
        parts = (self.root_certificates, self.private_key, self.certificate_chain)
        return grpc.ssl_channel_credentials(*(None if path is None else _pem(path) for path in parts))


@dataclass(frozen=True)
class Retry:
    """When a request is retried: only if the server was unavailable and had not answered.

    The pause before attempt n + 1 is drawn from 0.5 … 1 times ``first_pause * 2^(n - 1)``, at most `longest_pause`: 4
    to 8 seconds in all. In this time a server reloads a model whose process has died.

    Attributes:
        attempts: total number of attempts; 1 disables retries.
        first_pause: first pause, in seconds.
        longest_pause: longest pause, in seconds.
    """

    attempts: int = 5
    first_pause: float = 0.5
    longest_pause: float = 8.0

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            InputError: a value is out of range.
        """
        if self.attempts < 1:
            raise InputError(f"attempts is {self.attempts}, expected 1 or more")
        if not 0 <= self.first_pause <= self.longest_pause:
            raise InputError(
                f"first_pause is {self.first_pause}, longest_pause {self.longest_pause}, expected 0 or more, in order"
            )

    def pause(self, attempt: int, draw: float) -> float:
        """Return the seconds to wait after attempt number `attempt` (from 1), for a `draw` in [0, 1]."""
        whole = min(self.longest_pause, self.first_pause * 2.0 ** (attempt - 1))
        return whole * (0.5 + 0.5 * draw)


@dataclass(frozen=True, repr=False)
class Settings:
    """Settings of a connection, except the address.

    Attributes:
        tls: TLS settings; None uses plain text.
        token: sent as ``authorization: Bearer TOKEN``; never shown or logged.
        headers: sent with every request, names in lower case; never shown or logged.
        plain_token: allow a token or headers over plain text to another machine, e.g. where a service mesh encrypts.
        timeout: seconds per request, all attempts included; the default of requests without a deadline.
        retry: policy of retries.
        compression: compression of requests; also accepted for responses.
        max_message_bytes: largest request or response. A clip of 40 frames of 128 x 128 has 2 MB, 4.5 MB with all
            outputs.
        keepalive: seconds between pings on an idle connection; None disables pings. gRPC servers close connections that
            ping more often than they allow (by default every 300 s).
        concurrency: samples of one batch requested concurrently.
    """

    tls: Tls | None = None
    token: str | None = field(default=None, repr=False)
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    plain_token: bool = False
    timeout: float = 300.0
    retry: Retry = field(default_factory=Retry)
    compression: Compression | None = None
    max_message_bytes: int = 256 << 20
    keepalive: float | None = None
    concurrency: int = 16

    def __post_init__(self) -> None:
        """Check ranges and characters.

        Raises:
            InputError: a value is invalid; the message never contains the value of a token or header.
        """
        if self.token is not None and not _TOKEN.fullmatch(self.token):
            raise InputError("the token is empty or holds spaces or other characters that a header cannot carry")
        for name, value in self.headers.items():
            if (
                not _HEADER.fullmatch(name)
                or name.startswith("grpc-")
                or not value.isprintable()
                or not value.isascii()
            ):
                raise InputError(
                    f"the header {name!r} cannot be sent: its name must be of a-z, 0-9, _ . -, its value ASCII"
                )
        if not self.timeout > 0:
            raise InputError(f"timeout is {self.timeout}, expected seconds above 0")
        if self.compression not in (None, "gzip", "deflate"):
            raise InputError(f"compression is {self.compression!r}, expected gzip, deflate or none")
        if not 1 << 20 <= self.max_message_bytes < 1 << 31:
            raise InputError(f"max_message_bytes is {self.max_message_bytes}, expected 1 MiB to 2 GiB")
        if self.keepalive is not None and self.keepalive < 1:
            raise InputError(f"keepalive is {self.keepalive}, expected 1 second or more, or none")
        if self.concurrency < 1:
            raise InputError(f"concurrency is {self.concurrency}, expected 1 or more")

    def __repr__(self) -> str:
        return not_default(self)

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Return the headers sent with every request."""
        token = () if self.token is None else (("authorization", f"Bearer {self.token}"),)
        return (*token, *self.headers.items())

    def grpc_compression(self) -> Any:
        """Return gRPC's constant for the compression."""
        kinds = import_grpc().Compression
        return {None: kinds.NoCompression, "gzip": kinds.Gzip, "deflate": kinds.Deflate}[self.compression]

    def channel_options(self, address: str) -> list[tuple[str, Any]]:
        """Return the options of gRPC channels.

        Args:
            address: HOST:PORT of the server.
        """
        options: list[tuple[str, Any]] = [
            ("grpc.max_send_message_length", self.max_message_bytes),
            ("grpc.max_receive_message_length", self.max_message_bytes),
            # Reconnects to a restarted server within `longest_pause`; gRPC's default waits up to 120 s.
            ("grpc.initial_reconnect_backoff_ms", 200),
            ("grpc.max_reconnect_backoff_ms", 2000),
        ]
        if not uses_proxy(address):
            options.append(("grpc.enable_http_proxy", 0))
        if self.keepalive is not None:
            options += [
                ("grpc.keepalive_time_ms", round(self.keepalive * 1000)),
                ("grpc.http2.max_pings_without_data", 0),
            ]
        if self.tls is not None and self.tls.server_name is not None:
            options.append(("grpc.ssl_target_name_override", self.tls.server_name))
        return options

    def check_address(self, address: str) -> str:
        """Return the address as gRPC expects it.

        Raises:
            InputError: the address is invalid, or a token would be sent to it in plain text.
        """
        scheme, slashes, rest = address.partition("://")
        if slashes:
            raise InputError(
                f"{address} begins with {scheme}://, expected the server's gRPC port as HOST:PORT; "
                f"try {rest.partition('/')[0].partition(':')[0] or 'HOST'}:{GRPC_PORT}"
            )
        host, colon, port = address.rpartition(":")
        if not colon or not host or not port.isdecimal() or not 0 < int(port) < 65536 or "/" in address:
            raise InputError(f"{address!r} is not HOST:PORT; give the gRPC port, such as localhost:{GRPC_PORT}")
        if self.tls is None and (self.token or self.headers) and not self.plain_token and not _is_loopback(host):
            raise InputError(
                f"the token would travel to {host} in plain text; use TLS, or allow it where the network encrypts"
            )
        return address


def uses_proxy(address: str) -> bool:
    """Whether a connection may use the proxy named in the environment.

    Connections to this machine, and to what NO_PROXY or no_proxy lists by name, domain or HOST:PORT, do not use it.
    gRPC reads only no_proxy, and also supports address ranges there.

    Args:
        address: HOST:PORT of the server.
    """
    host = address.rpartition(":")[0].strip("[]")
    return not (_is_loopback(host) or urllib.request.proxy_bypass(host) or urllib.request.proxy_bypass(address))


def token_from_environment(name: str) -> str:
    """Return the token in an environment variable.

    Raises:
        InputError: the variable holds no token.
    """
    value = os.environ.get(name, "").strip()
    if not value:
        raise InputError(f"the environment variable {name} is not set or empty; put the token into it")
    return value


def import_grpc() -> Any:
    """Return the module `grpc`, which Triton's client requires too.

    Raises:
        MissingDependencyError: gRPC is not installed.
    """
    try:
        import grpc
    except ImportError:
        raise MissingDependencyError("tritonclient[grpc]", "talking to a server", "client") from None
    return grpc


def import_protocol() -> tuple[Any, Any]:
    """Return Triton's protobuf messages and gRPC stubs: `service_pb2`, `service_pb2_grpc`.

    Raises:
        MissingDependencyError: the packages are not installed.
    """
    try:
        from tritonclient.grpc import service_pb2, service_pb2_grpc
    except (ImportError, RuntimeError):  # tritonclient raises RuntimeError without gRPC
        raise MissingDependencyError("tritonclient[grpc]", "talking to a server", "client") from None
    return service_pb2, service_pb2_grpc


def _pem(path: str | os.PathLike[str]) -> bytes:
    try:
        data = user_path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{os.fspath(path)} cannot be read: {error.strerror}; give a PEM file") from error
    if b"-----BEGIN" not in data:
        raise InputError(f"{os.fspath(path)} is not a PEM file, expected one with a line -----BEGIN …")
    return data


def _is_loopback(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        name = host.rstrip(".").lower()  # Source: RFC 6761, 6.3
        return name == "localhost" or name.endswith(".localhost")
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback
