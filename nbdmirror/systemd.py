"""What a service manager and its service owe each other: sockets that are passed (sd_listen_fds(3)), news (sd_notify(3)).

Rules:
1. Sockets are ours only if LISTEN_PID says so. They are closed on exec and the variables are removed, so that
   no child takes them for its own.
2. A socket says by its name in LISTEN_FDNAMES what it is for: `nbd`, `control` or `metrics`. One alone needs no name.
   Whatever can't be served is refused by its number, before anything listens.
3. What was passed belongs to who passed it: a Unix socket's file is not removed at the end.
4. News are sent and forgotten: a service manager that does not listen is no reason to stop.
"""

from __future__ import annotations

import os
import re
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from nbdmirror.errors import UsageError
from nbdmirror.sockets import ServerSocket

if TYPE_CHECKING:
    from collections.abc import MutableMapping

_FIRST_FD: Final = 3  # SD_LISTEN_FDS_START
_VARIABLES: Final = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PIDFDID")
_NBD: Final = "nbd"
_CONTROL: Final = "control"
_METRICS: Final = "metrics"
# Where libnbd makes the socket of a captive server. Nothing else tells it from a service manager with one socket.
_LIBNBD: Final = re.compile(r".*/libnbd\w{6}/sock")


@dataclass(frozen=True, slots=True)
class Activated:
    """The sockets that were passed, by purpose.

    `is_captive` says that a client has started us for itself, as libnbd does for `[ COMMAND ]`: standard output is its own.
    """

    nbd: tuple[ServerSocket, ...] = ()
    control: tuple[ServerSocket, ...] = ()
    metrics: tuple[ServerSocket, ...] = ()
    is_captive: bool = False

    def __bool__(self) -> bool:
        return bool(self.nbd or self.control or self.metrics)


def take_sockets(environment: MutableMapping[str, str]) -> Activated:
    """The sockets that were passed to this process; takes their variables out of `environment`. Raises UsageError."""
    pid, count, names, _ = (environment.pop(name, "") for name in _VARIABLES)
    if pid != str(os.getpid()):
        return Activated()
    if not (count.isdecimal() and count.isascii() and int(count)):
        raise UsageError(f"LISTEN_FDS is '{count}', which is no number of sockets")
    fds = range(_FIRST_FD, _FIRST_FD + int(count))
    purposes = _purposes(len(fds), names)
    found: dict[str, list[ServerSocket]] = {_NBD: [], _CONTROL: [], _METRICS: []}
    for fd, purpose in zip(fds, purposes, strict=True):
        found[purpose].append(ServerSocket(_listening_socket(fd, purpose)))
    is_captive = len(fds) == 1 and _LIBNBD.fullmatch(str(found[purposes[0]][0].sock.getsockname())) is not None
    return Activated(tuple(found[_NBD]), tuple(found[_CONTROL]), tuple(found[_METRICS]), is_captive)


def _purposes(count: int, names: str) -> list[str]:
    """What each socket is for (rule 2)."""
    given = names.split(":") if names else [""] * count
    if len(given) != count:
        raise UsageError(f"LISTEN_FDS passes {count} sockets and LISTEN_FDNAMES names {len(given)}: '{names}'")
    if count == 1 and _is_no_name(given[0]):
        return [_NBD]
    for fd, name in enumerate(given, _FIRST_FD):
        if name not in (_NBD, _CONTROL, _METRICS):
            raise UsageError(
                f"socket {fd} that was passed is named '{name}': "
                f"name it {_NBD}, {_CONTROL} or {_METRICS} (FileDescriptorName= of systemd)"
            )
    return given


def _is_no_name(name: str) -> bool:
    """Whether nobody chose it: sd_listen_fds_with_names(3) has "unknown", systemd the name of the socket's unit."""
    return name in ("", "unknown") or name.endswith(".socket")


def _listening_socket(fd: int, purpose: str) -> socket.socket:
    try:
        os.set_inheritable(fd, False)
        sock = socket.socket(fileno=fd)
    except OSError as error:
        raise UsageError(f"file descriptor {fd}, passed as a socket for {purpose}: {error.strerror}") from None
    try:
        _check(sock, purpose)
    except UsageError:
        sock.close()
        raise
    return sock


def _check(sock: socket.socket, purpose: str) -> None:
    what = f"socket {sock.fileno()}, passed for {purpose},"
    if sock.type != socket.SOCK_STREAM or not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        raise UsageError(f"{what} is not a stream socket that listens; pass one of ListenStream= with Accept=no")
    if purpose == _CONTROL and sock.family != socket.AF_UNIX:
        raise UsageError(f"{what} is not a Unix socket: who reaches the control socket owns the disk")
    if sock.family not in (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6, socket.AF_VSOCK):
        raise UsageError(f"{what} is neither a Unix socket nor TCP nor a vsock")
    if purpose == _NBD and sock.family == socket.AF_UNIX and not isinstance(sock.getsockname(), str):
        raise UsageError(f"{what} has an abstract name, which no NBD URI can say; give it a path")


def notify_reloading() -> None:
    """Say that a reload begins; READY=1 ends it."""
    notify(f"RELOADING=1\nMONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")


def notify(state: str) -> None:
    """Tell the service manager, if there is one."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        sock.sendto(state.encode(), "\0" + address[1:] if address.startswith("@") else address)
