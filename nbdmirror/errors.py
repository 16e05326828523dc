"""Every exception that nbdmirror raises on purpose.

    NbdMirrorError
    ├── UsageError        the command line or the configuration is wrong: exit status 2
    ├── ProtocolError     the peer broke its protocol: its connection is dropped
    ├── ListenError       a socket can't be listened on: taken, not permitted, no such directory
    ├── DeviceError       a disk, or a remote disk, failed: carries the errno
    ├── StateError        asked for at the wrong time, or of something that does not take it
    ├── NotFoundError     no node, export or job of that name
    │   └── InactiveError     the same of a block job, which QMP reports in a class of its own
    ├── qmp.QmpError      an error of the control language itself, with its class
    └── cli.DaemonError   the daemon can't be reached, or went away

Rules:
1. Whose fault it was is the type. Anything else that is raised is our bug.
2. An error does not translate itself. `DeviceError.errno` becomes an NBD error in `server.export` alone, any of these a QMP
   class in `qmp.monitor` alone, and an exit status in `cli` alone.
3. The text names the thing that failed and, where there is one, the remedy. It is written for the user, on one line.
"""

from __future__ import annotations

import errno as _errno
import os


class NbdMirrorError(Exception):
    """The root: catch this to catch everything that is expected to go wrong."""


class UsageError(NbdMirrorError):
    """Wrong usage or configuration; nothing was started and nothing was written."""


class ProtocolError(NbdMirrorError):
    """The peer sent what its protocol forbids; the connection can't go on."""


class ListenError(NbdMirrorError):
    """A socket can't be listened on, for a reason outside the program: `where` is the socket, `reason` that."""

    def __init__(self, where: str, reason: str | None) -> None:
        self.where = where
        self.reason = reason or "it is not possible"
        super().__init__(f"cannot listen on {where}: {self.reason}")


class StateError(NbdMirrorError):
    """The request is well formed but can't be taken now, or not by this object."""


class NotFoundError(NbdMirrorError):
    """Nothing of that name exists."""


class InactiveError(NotFoundError):
    """No block job of that name is active."""


class DeviceError(NbdMirrorError):
    """A disk or a remote disk failed.

    `errno` is the operating system's number (EIO where nothing better is known), `context` says what was tried on what.
    """

    def __init__(self, errno: int, context: str = "") -> None:
        self.errno = errno or _errno.EIO
        self.context = context
        super().__init__(f"{context}: {self.reason}" if context else self.reason)

    @property
    def reason(self) -> str:
        """The errno in words, as the operating system has them."""
        return os.strerror(self.errno)

    @classmethod
    def of(cls, error: OSError, context: str) -> DeviceError:
        """The same failure as an `OSError`, said of `context`."""
        return cls(error.errno or _errno.EIO, context)
