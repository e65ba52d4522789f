"""The server's ports: free ones are found, and ports in use are reported before anything is loaded."""

from __future__ import annotations

import errno
import socket
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from lfdm_export.errors import InputError

#: State of a listening socket in /proc/net/tcp.
_LISTENS = "0A"


def check_ports(host: str, ports: Mapping[str, int]) -> dict[str, int]:
    """The ports to listen on: the given ones if they are free, and free ones instead of 0.

    Another program may still take a port before the server does.

    Args:
        host: address that the server listens on.
        ports: ports by the name of their option.

    Raises:
        InputError: the host is not an address of this machine, or a port is in use, given twice or reserved.
    """
    given = [port for port in ports.values() if port]
    for option, port in ports.items():
        if port and given.count(port) > 1:
            raise InputError(f"{option} is {port}, as is another port; give each its own, or 0 for a free one")
    found: dict[str, int] = {}
    for option, port in ports.items():
        found[option] = _bind(host, option, port) if port else _free_port(host, option, {*given, *found.values()})
    return found


def _free_port(host: str, option: str, taken: set[int]) -> int:
    while (port := _bind(host, option, 0)) in taken:
        pass
    return port


def _bind(host: str, option: str, port: int) -> int:
    """The port that a socket gets when bound to `host` and `port`."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, _, _, address = min(found, key=lambda one: one[0] != socket.AF_INET)  # of "localhost": 127.0.0.1
        with socket.socket(family, kind) as listener:
            # As servers do: closing connections of an earlier server do not block the port.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(1)
            bound: int = listener.getsockname()[1]
            return bound
    except socket.gaierror as error:
        raise InputError(f"the host {host!r} is not an address ({error.strerror}); use one of this machine") from error
    except OSError as error:
        raise InputError(_why(error, host, option, port)) from error


def _why(error: OSError, host: str, option: str, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        holder = _holder(port) or "another program, such as another lfdm-serve"
        return f"the port {port} of {option} is taken by {holder}; end that, or give another port, or 0 for a free one"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"{host} is not an address of this machine; give --host one that is, or 0.0.0.0 for all"
    if error.errno == errno.EACCES:
        return f"the port {port} of {option} is reserved for root; give one of 1024 or more"
    return f"{host}:{port} of {option} cannot be listened on ({error.strerror}); give another port or --host"


def _holder(port: int) -> str:
    """The process that listens on a port, if Linux shows it to this user; else ""."""
    wanted = {f"socket:[{inode}]" for inode in _listening(port)}
    if not wanted:
        return ""
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        with suppress(OSError):  # another user's process, or one that has ended
            for descriptor in (process / "fd").iterdir():
                with suppress(OSError):
                    if str(descriptor.readlink()) in wanted:
                        name = (process / "comm").read_text(encoding="utf-8", errors="replace").strip()
                        return f"{name} (process {process.name})"
    return ""


def _listening(port: int) -> set[str]:
    """Inodes of the sockets that listen on a port. Source: proc(5), /proc/net/tcp."""
    inodes = set()
    for table in ("tcp", "tcp6"):
        with suppress(OSError):
            for line in Path("/proc/net", table).read_text(encoding="utf-8").splitlines()[1:]:
                fields = line.split()
                if fields[3] == _LISTENS and int(fields[1].rpartition(":")[2], 16) == port:
                    inodes.add(fields[9])
    return inodes
