"""Access control: one token for all clients, and TLS."""

from __future__ import annotations

import hmac
import logging
import os
import re
import ssl
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lfdm_export.errors import InputError
from lfdm_export.files.names import user_path
from lfdm_export.serving.front.refusal import RefusedError

logger = logging.getLogger(__name__)

#: Characters allowed in a header. Source: RFC 9110, field values, without spaces and control characters.
_TOKEN = re.compile(rb"[\x21-\x7e]{1,4096}")
_MOST = 1 << 16


@dataclass(frozen=True)
class Access:
    """What clients must present.

    Attributes:
        token: required of each request; None accepts requests without a token.
        certificate, key: paths of the server's PEM files; None for plain text.
    """

    token: bytes | None = field(default=None, repr=False)
    certificate: str | None = None
    key: str | None = field(default=None, repr=False)

    def check(self, header: str | bytes | None) -> None:
        """Compare the token of a request in constant time.

        Args:
            header: the value of ``authorization``.

        Raises:
            RefusedError: the token is missing or wrong.
        """
        if self.token is None:
            return
        given = (header or b"") if not isinstance(header, str) else header.encode("utf-8", "replace")
        scheme, _, token = given.partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(token.strip(), self.token):
            raise RefusedError(
                "UNAUTHENTICATED", "this server requires a token; send the header 'authorization: Bearer TOKEN'"
            )

    def ssl_context(self) -> ssl.SSLContext | None:
        """The TLS context for HTTP; None for plain text.

        Raises:
            InputError: a file cannot be used.
        """
        if self.certificate is None or self.key is None:
            return None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            context.load_cert_chain(self.certificate, self.key, _no_passphrase)
        except OSError as error:  # includes ssl.SSLError
            raise InputError(
                f"{self.certificate} and {self.key} are not a certificate with its key ({error.strerror or error}); "
                "give two PEM files that belong together"
            ) from error
        return context

    def grpc_credentials(self) -> Any:
        """The server credentials for gRPC; None for plain text.

        Raises:
            InputError: a file cannot be read.
        """
        if self.certificate is None or self.key is None:
            return None
        import grpc

        return grpc.ssl_server_credentials([(_read(self.key), _read(self.certificate))])


def read_access(token_file: str | None, certificate: str | None, key: str | None) -> Access:
    """Read the token file, and check the TLS files.

    Raises:
        InputError: a file cannot be read, or holds no token.
    """
    paths = [None if name is None else str(user_path(name)) for name in (certificate, key)]
    found = Access(None if token_file is None else _token(user_path(token_file)), *paths)
    found.ssl_context()  # a wrong file is reported at once
    return found


def _no_passphrase() -> str:
    """Refuse a key with a passphrase, for which OpenSSL would wait at the terminal."""
    raise InputError(
        "the private key is encrypted, and a server has nobody to enter its passphrase; write it without: "
        "openssl pkey -in KEY -out PLAIN, of mode 0600"
    )


def _token(path: Path) -> bytes:
    token = _read(path).strip()
    if not _TOKEN.fullmatch(token):
        raise InputError(
            f"{path} holds no token, expected one line of 1 to 4096 printable characters without spaces; write one "
            f"with: openssl rand -hex 32 > {path}"
        )
    if path.stat().st_mode & 0o004:
        logger.warning("every user of this machine can read the token in %s; protect it with: chmod 600", path)
    return token


def _read(path: str | os.PathLike[str]) -> bytes:
    try:
        with Path(path).open("rb") as stream:
            return stream.read(_MOST)
    except OSError as error:
        raise InputError(f"{os.fspath(path)} cannot be read ({error.strerror}); check the path") from error
