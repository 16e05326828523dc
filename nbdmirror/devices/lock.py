"""The lock that keeps a second daemon off a disk or a directory.

Rules:
1. It is flock(2) on what is open: exclusive for who writes, shared for who only reads. It is gone with the process.
2. It is advisory. Other programs heed it as far as they use it: udev leaves a block device alone that is locked, QEMU has locks
   of another kind. What an NBD server exports is locked by nobody here.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import stat
from pathlib import Path
from typing import Final

from nbdmirror.errors import StateError

# udev holds a shared lock for a fraction of a second while it looks at a block device that somebody has just closed.
_PATIENCE_SECONDS: Final = 1.0
_POLL_SECONDS: Final = 0.05


async def lock(fd: int, what: str, *, exclusive: bool) -> None:
    """Lock what is open as `fd`, until it is closed; raises StateError, which says who has it, and OSError."""
    patience = _PATIENCE_SECONDS if stat.S_ISBLK(os.fstat(fd).st_mode) else 0.0
    while not _try(fd, exclusive=exclusive):
        if patience <= 0:
            holder = _holder(fd)
            raise StateError(f"{what} is in use{f' by process {holder}' if holder else ''}: stop that first, or take another")
        await asyncio.sleep(_POLL_SECONDS)
        patience -= _POLL_SECONDS


def _try(fd: int, *, exclusive: bool) -> bool:
    try:
        fcntl.flock(fd, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _holder(fd: int) -> str:
    """The process that holds a lock on this file, `PID (COMMAND)`, as far as the kernel tells."""
    inode = os.fstat(fd).st_ino
    try:
        locks = Path("/proc/locks").read_text().splitlines()
    except OSError:
        return ""
    for line in locks:  # 1: FLOCK  ADVISORY  WRITE 1234 08:01:5678 0 EOF
        words = line.split()
        if len(words) >= 6 and words[1] == "FLOCK" and words[5].rpartition(":")[2] == str(inode) and int(words[4]) > 0:
            return f"{words[4]}{_command(words[4])}"
    return ""


def _command(pid: str) -> str:
    try:
        return f" ({Path('/proc', pid, 'comm').read_text().strip()})"
    except OSError:
        return ""
