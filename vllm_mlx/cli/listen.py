"""The listening socket, taken before anything slow starts."""

from __future__ import annotations

import errno
import os
import socket

from vllm_mlx.core.errors import ConfigError

BACKLOG = 2048


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens on `host`:`port` (0 lets the system choose the port).

    It listens at once, not only when the server is ready: two sockets can be bound to one port, not listen on it.

    Raises:
        ConfigError: the port is taken or may not be used, or the host is not an address of this machine.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"--host: {host!r} is not an address of this machine") from error
    family, kind, protocol, _, address = found[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise ConfigError(_explain(error, host, port)) from error
    return listener


def url_of(listener: socket.socket) -> str:
    """The address that a client on this machine uses, such as http://127.0.0.1:8000."""
    host, port = listener.getsockname()[:2]
    if host == "0.0.0.0":
        host = "127.0.0.1"
    elif host == "::":
        host = "::1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _explain(error: OSError, host: str, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"--port: {port} is already in use on {host}; stop what uses it, or choose another port"
    if error.errno == errno.EACCES:
        return f"--port: {port} needs more rights than this user has; choose one from 1024 up"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"--host: {host!r} is not an address of this machine"
    reason = os.strerror(error.errno) if error.errno else str(error)
    return f"--host, --port: cannot listen on {host}:{port}: {reason}"
