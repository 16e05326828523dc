"""MappedFile: a file in memory, shared with the page cache, and the few calls that make parts of it durable.

Rules:
1. What is stored into `content` is in the page cache at once, and survives the death of this process at any time.
2. The file has all its blocks from the beginning: a full file system shows when the file is made, not as SIGBUS later. (File
   systems that copy on write may need room for every change; the directory of the state should not be on a full one.)
3. Pages are locked in memory where that is permitted, so that the kernel never has to read them again: a read that fails
   could only end the process, and after a failed write the file has old content.
4. After a write-back that failed the kernel takes pages for clean: `distrust` makes the next `sync` hand them all to it again.
5. Of `write_through` one call at a time is under way, in the order of the calls, even if nobody waits for it any more: older
   content never comes after newer.
6. The mapping goes when the last user of `content` lets go of it; nobody has to say when.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import logging
import mmap
import os
from typing import TYPE_CHECKING, Final

from nbdmirror.bitmap.image import PAGE

if TYPE_CHECKING:
    from pathlib import Path

_log: Final = logging.getLogger(__name__)

_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.msync.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.mlock.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_MS_SYNC: Final = 4


class MappedFile:
    """An open file of a fixed length. Construct it with `open` or `create`; any method may raise OSError."""

    def __init__(self, fd: int, path: Path) -> None:
        self.path = path
        self._fd = fd
        self._map = mmap.mmap(fd, 0, mmap.MAP_SHARED | mmap.MAP_POPULATE)
        self.content = memoryview(self._map)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._distrusted = False
        self._lock = asyncio.Lock()
        if _libc.mlock(self._address, len(self.content)):
            reason = os.strerror(ctypes.get_errno())
            _log.warning("cannot lock %d bytes for '%s' in memory: %s (see RLIMIT_MEMLOCK)", len(self.content), path, reason)

    @classmethod
    def open(cls, path: Path) -> MappedFile:
        """Open a file that is there."""
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            return cls(fd, path)
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def create(cls, path: Path, length: int, pieces: dict[int, bytes]) -> MappedFile:
        """Make a file of zeroes with these `pieces`, by their offsets. It appears under its name complete and durable."""
        made = path.with_name(f"{path.name}.new")
        fd = os.open(made, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            os.posix_fallocate(fd, 0, length)
            for offset, piece in pieces.items():
                os.pwrite(fd, piece, offset)
            os.fsync(fd)
            made = made.rename(path)
            sync_directory(path.parent)
            return cls(fd, path)
        except BaseException:
            os.close(fd)
            made.unlink(missing_ok=True)
            raise

    def head(self, offset: int = 0) -> bytes:
        """A page of the file."""
        return bytes(self.content[offset : offset + PAGE])

    def has_lost(self) -> bool:
        """Whether the file system has failed to write this file back, since anybody last heard of that."""
        try:
            os.fsync(self._fd)
        except OSError:
            return True
        return False

    async def write_through(self, offset: int, data: bytes) -> None:
        """Durable when it returns."""
        task = asyncio.ensure_future(self._in_order(offset, data))
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        await asyncio.shield(task)

    async def _in_order(self, offset: int, data: bytes) -> None:
        async with self._lock:
            await asyncio.to_thread(self._write_through, offset, data)

    def _write_through(self, offset: int, data: bytes) -> None:
        if os.pwritev(self._fd, (data,), offset, os.RWF_DSYNC) != len(data):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    async def sync(self, offset: int, length: int) -> None:
        """Make durable what this range of `content`, which begins with a page, has when this is called."""
        if self._distrusted:
            for at in range(offset, offset + length, PAGE):
                self.content[at] = self.content[at]
        await asyncio.to_thread(self._sync, offset, length)
        self._distrusted = False

    def distrust(self) -> None:
        """What was written back before may be lost: let the next sync write everything (rule 4)."""
        self._distrusted = True

    def _sync(self, offset: int, length: int) -> None:
        before = offset % mmap.PAGESIZE  # the system's pages may be larger than the file's
        if length and _libc.msync(self._address + offset - before, before + length, _MS_SYNC):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))

    def remove(self) -> None:
        """Take its name away, durably."""
        self.path.unlink()
        sync_directory(self.path.parent)

    def close(self) -> None:
        """Close the file; idempotent. What is mapped stays until nobody uses it."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def sync_directory(path: Path) -> None:
    """Make its entries durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
