"""Sockets passed to a daemon as a service manager passes them: from file descriptor 3 on, with LISTEN_PID and its like.

with listening_unix(path) as sock, serving(disk, tcp=True, **passed(sock)) as daemon: ...
"""

from __future__ import annotations

import sys
from contextlib import contextmanager
from socket import AF_UNIX, socket
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

# Moves the file descriptors in its first argument to 3, 4 and so on, and runs the rest of them as the process it is.
_PASS: Final = """
import fcntl, os, sys
given = [int(fd) for fd in sys.argv[1].split()]
fds = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 100) for fd in given]
for fd in given:
    os.close(fd)
for number, fd in enumerate(fds, 3):
    os.dup2(fd, number)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(fds)))
os.environ.update(word.split("=", 1) for word in sys.argv[2].split())
os.execvp(sys.argv[3], sys.argv[3:])
"""


def passed(*sockets: socket, names: str | None = None, variables: Sequence[str] = ()) -> dict[str, Any]:
    """Arguments for `serving` and `run_cli`; `variables` are what LISTEN_PID and its like are to be instead, as NAME=VALUE."""
    fds = [each.fileno() for each in sockets]
    words = [*([] if names is None else [f"LISTEN_FDNAMES={names}"]), *variables]
    return {
        "prefix": [sys.executable, "-c", _PASS, " ".join(map(str, fds)), " ".join(words)],
        "pass_fds": fds,
    }


@contextmanager
def listening_unix(path: Path) -> Iterator[socket]:
    """A Unix socket that listens, and whose file outlives it."""
    with socket(AF_UNIX) as sock:
        sock.bind(str(path))
        sock.listen()
        yield sock


@contextmanager
def listening_tcp() -> Iterator[socket]:
    """A TCP socket that listens on a port of 127.0.0.1."""
    with socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        yield sock
