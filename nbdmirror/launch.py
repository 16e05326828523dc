"""How a daemon is started: in the background, under a parent that it must not outlive, with a pid file, telling who waits.

Rules:
1. Who starts a daemon in the background gets its READY line and status 0, or what it said and the status that it ended with:
   never silence. Once READY it keeps no terminal and no pipe open; only an stderr that is a file stays, for that is a log.
2. Who starts one that nobody waits for any more does not get one: it ends instead of becoming READY.
"""

from __future__ import annotations

import fcntl
import os
import stat
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from nbdmirror.errors import StateError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator


def keep_stdio() -> None:
    """See to it that the first three file descriptors are taken: a disk that got one of them would get what is printed."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free, which is this one


def into_background() -> int:
    """Go on in a child process, and return, there, the file descriptor for `tell_background`; the caller's process ends.

    To be called before there are threads or an event loop.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child:
        os.close(writer)
        raise SystemExit(_wait_for_ready(reader, child))
    os.close(reader)
    return writer


def _wait_for_ready(reader: int, child: int) -> int:
    with open(reader, "rb") as pipe:
        line = pipe.readline()
    if line.endswith(b"\n"):
        with suppress(BrokenPipeError):
            os.write(1, line)
        return 0
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status if status >= 0 else 128 - status


def tell_background(fd: int, line: str) -> None:
    """Leave terminal and pipes behind, and pass the READY line to who waits for it."""
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for each in (0, 1, 2):
        if each < 2 or not stat.S_ISREG(os.fstat(each).st_mode):
            os.dup2(null, each)
    os.close(null)
    try:
        write_line(fd, line)
    except BrokenPipeError:
        raise StateError("whoever started this daemon has gone") from None


def write_line(fd: int, line: str) -> None:
    """Write a whole line to a file descriptor, and close it. Raises OSError."""
    with open(fd, "wb") as file:
        file.write(line.encode())


def check_writable(fd: int) -> None:
    """Raises UsageError for a file descriptor that can't be written to."""
    try:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise UsageError(f"cannot write to --ready-fd {fd}: it is open for reading only")
    except OSError as error:
        raise UsageError(f"cannot write to --ready-fd {fd}: {error.strerror}") from None


def open_parent() -> int:
    """A file descriptor that becomes readable when the parent process ends; raises UsageError where that can't be known.

    PR_SET_PDEATHSIG would fire when the *thread* that started us ends. Who has lost its parent before this is called
    belongs to init, or, out of our sight, to a subreaper.
    """
    parent = os.getppid()
    if parent > 1:
        with suppress(OSError):
            fd = os.pidfd_open(parent)
            if os.getppid() == parent:
                return fd
            os.close(fd)
    raise UsageError("--exit-with-parent: the parent process has gone already, or is init, which is never outlived")


@contextmanager
def pid_file(path: str) -> Iterator[None]:
    """Have the process id in a file while the context lasts."""
    try:
        Path(path).write_text(f"{os.getpid()}\n")
    except OSError as error:
        raise UsageError(f"cannot write the pid file '{path}': {error.strerror}") from None
    file = Path(path).absolute()
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
