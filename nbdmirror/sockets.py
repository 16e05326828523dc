"""Listening sockets that a daemon owns: bound safely, refused clearly, removed at the end.

Rules:
1. A Unix socket's file has its mode from the moment it exists, and a socket that somebody answers on is never taken over; one
   that nobody answers on is left over from a killed daemon and is replaced.
2. Every refusal names the path or address and says what to do: a UsageError where the path itself can't be, a ListenError
   where something is in the way.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
from contextlib import suppress
from pathlib import Path
from typing import Final

from nbdmirror.errors import ListenError, UsageError

# sockaddr_un's sun_path holds 108 bytes, the closing NUL included.
MAX_SOCKET_PATH: Final = 107
_BACKLOG: Final = 1024


def listen_unix(path: str, mode: int = 0o600) -> socket.socket:
    """A listening Unix socket at `path`, non-blocking."""
    if not path:
        raise UsageError("the path of a socket can't be empty")
    if len(os.fsencode(path)) > MAX_SOCKET_PATH:
        raise UsageError(f"the socket path '{path}' is longer than {MAX_SOCKET_PATH} bytes; use a shorter one")
    _remove_stale(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o777 & ~mode)
    try:
        sock.bind(path)
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        raise ListenError(f"socket '{path}'", error.strerror) from None
    finally:
        os.umask(before)
    sock.setblocking(False)
    return sock


def _remove_stale(path: str) -> None:
    try:
        is_socket = stat.S_ISSOCK(Path(path).stat().st_mode)
    except FileNotFoundError:
        return
    except OSError as error:
        raise ListenError(f"socket '{path}'", error.strerror) from None
    if not is_socket:
        raise ListenError(f"socket '{path}'", "a file of that name exists and is not a socket")
    probe = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    probe.setblocking(False)
    try:
        probe.connect(path)
    except ConnectionRefusedError:
        with suppress(FileNotFoundError):
            Path(path).unlink()
        return
    except OSError as error:
        if error.errno != errno.EAGAIN:  # EAGAIN: somebody listens, and is busy
            raise ListenError(f"socket '{path}'", error.strerror) from None
    finally:
        probe.close()
    raise ListenError(f"socket '{path}'", "another process is listening there; stop it or choose another path")


def remove_unix(path: str) -> None:
    """Remove a socket's file, if it is still there."""
    with suppress(FileNotFoundError):
        Path(path).unlink()


# What a Unix socket may hold on its way: with the kernel's 208 KiB, 64 KiB reads were served at 0.6 times the rate, and a copy
# to a local server took a tenth longer. TCP sizes its own buffers, and better.
_UNIX_SEND_BUFFER: Final = 4 * 1024 * 1024


def widen_unix_send_buffer(fd: int) -> None:
    """Let a connected Unix socket hold a few large messages; any other socket is left as it is."""
    with socket.socket(fileno=os.dup(fd)) as sock:
        if sock.family == socket.AF_UNIX:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _UNIX_SEND_BUFFER)


def listen_tcp(host: str, port: int) -> socket.socket:
    """A listening TCP socket, IPv4 or IPv6 by `host`, non-blocking; port 0 lets the kernel choose."""
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        raise ListenError(f"'{host}'", error.strerror) from None
    family, kind, proto, _, address = found[0]
    sock = socket.socket(family, kind, proto)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        raise ListenError(f"{host} port {port}", error.strerror) from None
    sock.setblocking(False)
    return sock
