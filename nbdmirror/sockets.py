"""Listening sockets that a daemon owns: bound safely, refused clearly, removed at the end.

Rules:
1. A Unix socket's file has its mode from the moment it exists; the process's umask, which threads share, stays as it is.
2. A socket that somebody answers on is never taken over; one that nobody answers on is left over from a killed daemon and
   is replaced. From looking at it to listening in its place the directory is locked: of several daemons that find the same
   leftover, one wins, and the others are told who.
3. At the end a file is removed only if it is still ours, and while we still listen: until then nobody else may
   replace it, nor can a new file get its inode number.
4. Every refusal names the path or address and says what to do: a UsageError where the path itself can't be, a ListenError
   where something is in the way.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import struct
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from nbdmirror.errors import ListenError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

# sockaddr_un's sun_path holds 108 bytes, the closing NUL included.
MAX_SOCKET_PATH: Final = 107
# Given to the loops as well, which listen once more with a backlog of their own.
BACKLOG: Final = 1024
# For the loops' servers: from 3.13 on they remove a Unix socket's file by themselves, that of a socket they were given too.
KEEP_FILE: Final[dict[str, Any]] = {"cleanup_socket": False} if sys.version_info >= (3, 13) else {}

_MODE: Final = 0o600
# Others hold a directory's lock for as long as a bind takes, in milliseconds.
_LOCK_SECONDS: Final = 5.0
_UCRED: Final = struct.Struct("3i")  # of SO_PEERCRED: pid, uid, gid
# <linux/vm_sockets.h>: VMADDR_CID_LOCAL, which Python has no name for. A machine without a CID, or one that does not tell it,
# reaches itself so.
_VSOCK_LOOPBACK: Final = 1
# What a Unix socket may hold on its way: with the kernel's 208 KiB, 64 KiB reads were served at 0.6 times the rate, and a copy
# to a local server took a tenth longer. TCP sizes its own buffers, and better.
_UNIX_SEND_BUFFER: Final = 4 * 1024 * 1024


class ServerSocket:
    """A listening socket, non-blocking. `path` is that of its file, where that is ours to remove."""

    def __init__(self, sock: socket.socket, path: str | None = None) -> None:
        sock.setblocking(False)
        self.sock: Final = sock
        # Absolute, for wherever the daemon stands at the end.
        self._path = None if path is None else Path(path).absolute()
        self._identity = None if self._path is None else _identity(self._path)

    def remove_file(self) -> None:
        """Remove what is in the file system, if it is still ours; to be called before the socket is closed (rule 3)."""
        if self._path is not None and _identity(self._path) == self._identity:
            with suppress(OSError):
                self._path.unlink()
        self._path = None

    def close(self) -> None:
        """Remove the file and close. Idempotent."""
        self.remove_file()
        self.sock.close()


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.lstat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def for_loop(sock: socket.socket) -> socket.socket:
    """The socket as event loops take it: to them a vsock is as good as a Unix socket, if only it says that it is one."""
    if sock.family in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX):
        return sock
    return socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, fileno=sock.detach())


# --- Unix ------------------------------------------------------------------------------------------------------------


def listen_unix(path: str) -> ServerSocket:
    """Listen on a Unix socket at `path`, which only its owner may connect to."""
    if not path:
        raise UsageError("the path of a socket can't be empty")
    if len(os.fsencode(path)) > MAX_SOCKET_PATH:
        raise UsageError(f"the socket path '{path}' is longer than {MAX_SOCKET_PATH} bytes; use a shorter one")
    with _locked_directory_of(path):
        _remove_stale(path)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            os.fchmod(sock.fileno(), _MODE)  # Linux makes the file with the mode that the socket has when it is bound
            sock.bind(path)
            sock.listen(BACKLOG)
        except OSError as error:
            sock.close()
            raise _refusal(path, error.strerror or str(error)) from None
        return ServerSocket(sock, path)


@contextmanager
def _locked_directory_of(path: str) -> Iterator[None]:
    """Keep other daemons from the directory (rule 2)."""
    try:
        fd = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)  # noqa: PTH120
    except OSError as error:
        raise _refusal(path, error.strerror or str(error)) from None
    try:
        deadline = time.monotonic() + _LOCK_SECONDS
        while not _try_lock(fd, path):
            if time.monotonic() > deadline:
                raise _refusal(path, "another process keeps its directory locked; choose another one")
            time.sleep(0.01)
        yield
    finally:
        os.close(fd)


def _try_lock(fd: int, path: str) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:  # a network file system, for one
        raise _refusal(path, f"its directory can't be locked ({error.strerror}); choose one like /run") from None
    return True


def _remove_stale(path: str) -> None:
    try:
        is_socket = stat.S_ISSOCK(Path(path).lstat().st_mode)
    except FileNotFoundError:
        return
    except OSError as error:
        raise _refusal(path, error.strerror or str(error)) from None
    if not is_socket:
        raise _refusal(path, "a file of that name exists and is not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            with suppress(FileNotFoundError):
                Path(path).unlink()
            return
        except OSError as error:
            if error.errno != errno.EAGAIN:  # EAGAIN: somebody listens, and is busy
                raise _refusal(path, error.strerror or str(error)) from None
        raise _refusal(path, f"{_listener_behind(probe)} is listening there; stop it or choose another path")


def _listener_behind(probe: socket.socket) -> str:
    """Who listens at the other end, as far as the kernel tells."""
    pid = 0
    with suppress(OSError):
        pid, _, _ = _UCRED.unpack(probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    if pid <= 0:  # not connected, or of a container that we can't see into
        return "another process"
    with suppress(OSError):
        return f"process {pid} ({Path(f'/proc/{pid}/comm').read_text(errors='replace').strip()})"
    return f"process {pid}"


def _refusal(path: str, reason: str) -> ListenError:
    return ListenError(f"socket '{path}'", reason)


def widen_unix_send_buffer(fd: int) -> None:
    """Let a connected Unix socket hold a few large messages; any other socket is left as it is."""
    sock = socket.socket(fileno=fd)
    try:
        if sock.family == socket.AF_UNIX:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _UNIX_SEND_BUFFER)
    finally:
        sock.detach()  # the descriptor is the caller's; a copy of it can't be had where the process is out of them


# --- TCP and vsock ---------------------------------------------------------------------------------------------------


def listen_tcp(host: str, port: int) -> ServerSocket:
    """Listen on TCP, IPv4 or IPv6 by `host`; port 0 lets the kernel choose."""
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        raise ListenError(f"'{host}'", error.strerror) from None
    family, kind, proto, _, address = found[0]
    sock = socket.socket(family, kind, proto)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise ListenError(f"{host} port {port}", error.strerror) from None
    return ServerSocket(sock)


def listen_vsock(cid: int | None, port: int) -> ServerSocket:
    """Listen on a vsock, for every CID of this machine where `cid` is None."""
    where = f"vsock port {port}" if cid is None else f"vsock {cid}:{port}"
    try:
        sock = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    except OSError as error:
        remedy = "this kernel has no vsock: load vhost_vsock on a virtual machine's host, or vsock_loopback"
        raise ListenError(where, f"{error.strerror}; {remedy}") from None
    try:
        sock.bind((socket.VMADDR_CID_ANY if cid is None else cid, port))
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise ListenError(where, error.strerror) from None
    return ServerSocket(sock)


def vsock_cid(sock: socket.socket) -> int:
    """The CID that others reach a listening vsock by."""
    cid = int(sock.getsockname()[0])
    if cid != socket.VMADDR_CID_ANY:
        return cid
    with suppress(OSError), Path("/dev/vsock").open("rb") as device:
        own = int.from_bytes(fcntl.ioctl(device, socket.IOCTL_VM_SOCKETS_GET_LOCAL_CID, bytes(4)), sys.byteorder)
        if own != socket.VMADDR_CID_ANY:
            return own
    return _VSOCK_LOOPBACK
