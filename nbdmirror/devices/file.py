"""FileDevice: a raw disk image or a Linux block device.

Rules:
1. What can wait for a disk runs in the device's own threads; the event loop only does what the page cache answers at once.
2. Reads try the page cache (RWF_NOWAIT). Small writes go into it inline, but their latency is watched: when the kernel
   makes them wait (dirty throttling, a slow disk) writes move to the threads and come back after a quiet time, which is
   long enough that this disk holds the loop up for a hundredth of the time at most. A process that was merely preempted is
   no stalled disk: it did not give the processor up by itself, and the kernel counts the two apart. A write that is stuck
   in a thread already, or a zeroing or trimming, which may lock the file against all others, keeps them there, too.
3. Zeroing prefers holes, then unwritten extents, then written zeroes; with FAST_ZERO the last is refused with ENOTSUP
   before anything has changed. NO_HOLE keeps the range allocated.
4. The size is what it was when the device was opened; nothing here grows or shrinks a file.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import resource
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Final, TypeVar

from nbdmirror.devices import linux
from nbdmirror.devices.base import BlockDevice, Capabilities, Limits
from nbdmirror.devices.identity import identity_of_block_device, identity_of_file
from nbdmirror.devices.lock import lock
from nbdmirror.errors import DeviceError
from nbdmirror.extents import DATA, HOLE, ZERO, ExtentList
from nbdmirror.protocol.constants import FAST_ZERO, FUA, NO_HOLE
from nbdmirror.units import MiB, round_down, round_up

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

T = TypeVar("T")

# A copy of 1 MiB between page cache and buffer takes about 0.2 ms: the longest that one request may hold the loop.
INLINE_MAX: Final = MiB
# A write into the page cache takes microseconds; one that takes this long was made to wait, or this process was preempted.
# For as long as _WATCH_SECONDS after it the kernel is asked before and after each write whether the thread has slept in it
# (1 us a write), and one that is as slow because of that moves the writes to the threads.
_STALL_SECONDS: Final = 0.005
_WATCH_SECONDS: Final = 2.0
_QUIET_SECONDS: Final = 1.0
# Nothing but a disk makes a write take this long; and as many times as long is the quiet time after a stall.
_CERTAIN_SECONDS: Final = 0.05
_QUIET_PER_STALL: Final = 100
# Threads per device: as many requests wait for the disk at a time, and a queue depth of 16 keeps one busy.
_THREADS: Final = 16
# One extents answer takes at most so many lseek pairs (about 0.6 us each), however fragmented the file.
_MAX_EXTENTS: Final = 16384
_ZEROES: Final = bytes(MiB)
_UNSUPPORTED: Final = frozenset((errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL, errno.ENOSYS, errno.ENODEV))


class FileDevice(BlockDevice):
    """A raw file or block device, opened. Construct it with `open`."""

    def __init__(self, fd: int, path: str, *, read_only: bool) -> None:
        self._fd = fd
        self.name = path
        status = os.fstat(fd)
        self.is_block = stat.S_ISBLK(status.st_mode)
        self.size = linux.block_device_size(fd) if self.is_block else status.st_size
        self._sector = linux.block_device_sector(fd) if self.is_block else 1
        rotational = self.is_block and linux.block_device_is_rotational(fd)
        self.limits = Limits(maximum_zero=2**62)
        self.capabilities = Capabilities(read_only=read_only, extents=not self.is_block, rotational=rotational)
        # tmpfs refuses RWF_NOWAIT (seen with Linux 6.18) and needs it least: its data is in memory already.
        self._read_flags = 0 if linux.lives_in_memory(fd) else os.RWF_NOWAIT
        self._reads_inline = True
        self._watched_until = 0.0
        self._stalled_until = 0.0
        # When what is in the threads was begun, oldest first; and how many of those lock the file.
        self._writing: dict[int, float] = {}
        self._tokens = itertools.count()
        self._locking = 0
        self._executor = ThreadPoolExecutor(_THREADS, thread_name_prefix=f"disk {path}")

    @classmethod
    def open(cls, path: str | Path, *, read_only: bool = False) -> FileDevice:
        """Open a raw file or block device; raises DeviceError where that is not possible."""
        name = os.fspath(path)
        try:
            fd = os.open(name, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC)
        except OSError as error:
            raise DeviceError.of(error, f"cannot open '{name}'") from None
        try:
            mode = os.fstat(fd).st_mode
            if stat.S_ISDIR(mode):
                raise DeviceError(errno.EISDIR, f"cannot open '{name}'")
            if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
                raise DeviceError(errno.ENOTBLK, f"cannot open '{name}', which is neither a file nor a block device")
            if not read_only and stat.S_ISBLK(mode) and linux.block_device_is_read_only(fd):
                raise DeviceError(errno.EROFS, f"cannot open '{name}' for writing")
            return cls(fd, name, read_only=read_only)
        except OSError as error:
            os.close(fd)
            raise DeviceError.of(error, f"cannot open '{name}'") from None
        except DeviceError:
            os.close(fd)
            raise

    # --- at once ---------------------------------------------------------------------------------------------------

    def pread_now(self, buffer: bytearray | memoryview, offset: int) -> bool:
        """Fill `buffer` from the page cache; False when any byte of it is not there."""
        if not self._reads_inline or len(buffer) > INLINE_MAX or (self._locking and self.is_block):
            return False  # the kernel's lock is not for reads of a file, but for those of a block device
        try:
            return os.preadv(self._fd, (buffer,), offset, self._read_flags) == len(buffer)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP:
                self._reads_inline = False
                return False
            raise self._failed(error, "reading", offset) from None

    def pwrite_now(self, data: bytes | bytearray | memoryview, offset: int) -> bool:
        """Write into the page cache, unless a recent write was made to wait there."""
        if len(data) > INLINE_MAX:
            return False
        before = time.monotonic()
        if before < self._stalled_until or (self._writing and self._is_stuck(before)):
            return False
        slept = _times_slept() if before < self._watched_until else None
        try:
            done = os.pwrite(self._fd, data, offset)
        except OSError as error:
            raise self._failed(error, "writing", offset) from None
        after = time.monotonic()
        took = after - before
        if took > _STALL_SECONDS:
            if took > _CERTAIN_SECONDS or (slept is not None and _times_slept() > slept):
                self._stalled_until = after + max(_QUIET_SECONDS, _QUIET_PER_STALL * took)
            self._watched_until = after + _WATCH_SECONDS
        return done == len(data)

    def _is_stuck(self, now: float) -> bool:
        """Whether an inline write might have to wait for what is in the threads."""
        return self._locking > 0 or now - next(iter(self._writing.values())) > _STALL_SECONDS

    # --- in threads ------------------------------------------------------------------------------------------------

    async def _in_thread(self, what: str, offset: int, work: Callable[[], T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, work)
        except OSError as error:
            raise self._failed(error, what, offset) from None
        except RuntimeError:  # the executor has been shut down
            raise DeviceError(errno.ESHUTDOWN, f"{what} {self.name}") from None

    async def _write_in_thread(self, what: str, offset: int, work: Callable[[], None]) -> None:
        token = next(self._tokens)
        self._writing[token] = time.monotonic()
        try:
            await self._in_thread(what, offset, work)
        finally:
            del self._writing[token]

    async def _lock_in_thread(self, what: str, offset: int, work: Callable[[], None]) -> None:
        self._locking += 1
        try:
            await self._write_in_thread(what, offset, work)
        finally:
            self._locking -= 1

    def _failed(self, error: OSError, what: str, offset: int) -> DeviceError:
        return DeviceError.of(error, f"{what} {self.name} at offset {offset}")

    async def pread(self, buffer: bytearray | memoryview, offset: int) -> None:
        """See BlockDevice. A file that has been cut short fails with EIO."""
        await self._in_thread("reading", offset, lambda: self._read_all(buffer, offset))

    def _read_all(self, buffer: bytearray | memoryview, offset: int) -> None:
        view = memoryview(buffer)
        while view:
            count = os.preadv(self._fd, (view,), offset)
            if count == 0:
                raise OSError(errno.EIO, "the file has become shorter")
            view, offset = view[count:], offset + count

    async def pwrite(self, data: bytes | bytearray | memoryview, offset: int, flags: int = 0) -> None:
        """See BlockDevice. FUA is one system call: a write that syncs just its own range."""
        how = os.RWF_DSYNC if flags & FUA else 0
        await self._write_in_thread("writing", offset, lambda: self._write_all(data, offset, how))

    def _write_all(self, data: bytes | bytearray | memoryview, offset: int, how: int = 0) -> None:
        view = memoryview(data)
        while view:
            count = os.pwritev(self._fd, (view,), offset, how)
            view, offset = view[count:], offset + count

    async def zero(self, offset: int, length: int, flags: int = 0) -> None:
        """See BlockDevice."""
        await self._lock_in_thread("zeroing", offset, lambda: self._zero(offset, length, flags))

    def _zero(self, offset: int, length: int, flags: int) -> None:
        if self.is_block:
            self._zero_block(offset, length, flags)
        elif flags & NO_HOLE or not self._try_fallocate(linux.FALLOC_PUNCH_HOLE, offset, length):
            self._zero_allocated(offset, length, flags)
        if flags & FUA:
            os.fdatasync(self._fd)

    def _zero_allocated(self, offset: int, length: int, flags: int) -> None:
        if self._try_fallocate(linux.FALLOC_ZERO_RANGE, offset, length):
            return
        # tmpfs lacks ZERO_RANGE, but a punched range can be allocated again, and reads as zeroes then. That clears every page,
        # and where it is not possible (ext2) the content has gone by the time that is known: never with FAST_ZERO.
        punch = linux.FALLOC_PUNCH_HOLE
        if not flags & FAST_ZERO and self._try_fallocate(punch, offset, length) and self._try_fallocate(0, offset, length):
            return
        self._write_zeroes(offset, length, flags)

    def _zero_block(self, offset: int, length: int, flags: int) -> None:
        """Whole sectors by the kernel, the unaligned ends by writing."""
        start, end = round_up(offset, self._sector), round_down(offset + length, self._sector)
        if start >= end:
            self._write_zeroes(offset, length, 0)
            return
        if flags & NO_HOLE or not self._try_fallocate(linux.FALLOC_PUNCH_HOLE, start, end - start):
            if flags & FAST_ZERO:
                # BLKZEROOUT may write every sector, and does not tell.
                raise OSError(errno.ENOTSUP, "zeroing is not fast here")
            linux.block_zero_out(self._fd, start, end - start)
        if start > offset:
            self._write_zeroes(offset, start - offset, 0)
        if end < offset + length:
            self._write_zeroes(end, offset + length - end, 0)

    def _try_fallocate(self, mode: int, offset: int, length: int) -> bool:
        try:
            linux.fallocate(self._fd, mode | linux.FALLOC_KEEP_SIZE, offset, length)
        except OSError as error:
            if error.errno in _UNSUPPORTED:
                return False
            raise
        return True

    def _write_zeroes(self, offset: int, length: int, flags: int) -> None:
        if flags & FAST_ZERO:
            raise OSError(errno.ENOTSUP, "zeroing is not fast here")
        while length > 0:
            piece = min(length, len(_ZEROES))
            self._write_all(memoryview(_ZEROES)[:piece], offset)
            offset, length = offset + piece, length - piece

    async def trim(self, offset: int, length: int, flags: int = 0) -> None:
        """See BlockDevice; a disk that can't discard ignores it."""
        await self._lock_in_thread("trimming", offset, lambda: self._trim(offset, length, flags))

    def _trim(self, offset: int, length: int, flags: int) -> None:
        if not self.is_block:
            self._try_fallocate(linux.FALLOC_PUNCH_HOLE, offset, length)
        else:
            start, end = round_up(offset, self._sector), round_down(offset + length, self._sector)
            try:
                if start < end:
                    linux.block_discard(self._fd, start, end - start)
            except OSError as error:
                if error.errno not in _UNSUPPORTED:
                    raise
        if flags & FUA:
            os.fdatasync(self._fd)

    async def flush(self) -> None:
        """See BlockDevice."""
        await self._in_thread("flushing", 0, lambda: os.fdatasync(self._fd))

    async def cache(self, offset: int, length: int) -> None:
        """See BlockDevice: the kernel's readahead."""
        await self._in_thread("caching", offset, lambda: os.posix_fadvise(self._fd, offset, length, os.POSIX_FADV_WILLNEED))

    async def extents(self, offset: int, length: int) -> ExtentList:
        """See BlockDevice: SEEK_DATA and SEEK_HOLE; a block device, or a file system without them, is all data."""
        if self.is_block:
            return ExtentList.all_data(offset, length)
        return await self._in_thread("asking the extents of", offset, lambda: self._extents(offset, length))

    def _extents(self, offset: int, length: int) -> ExtentList:
        extents, at, end = ExtentList(offset, length), offset, offset + length
        while at < end and len(extents) < _MAX_EXTENTS:
            try:
                data = os.lseek(self._fd, at, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                data = end  # no data up to the end of the file
            if data > at:
                extents.add(data - at, HOLE | ZERO)
            if data >= end:
                break
            at = os.lseek(self._fd, data, os.SEEK_HOLE)
            extents.add_until(at, DATA)  # nothing, where it has become a hole in between: look again
        return extents

    def identity(self) -> str:
        """See BlockDevice."""
        identify = identity_of_block_device if self.is_block else identity_of_file
        return identify(self._fd, self.name)

    async def lock(self) -> None:
        """See BlockDevice: for itself, or with others that only read."""
        try:
            await lock(self._fd, f"'{self.name}'", exclusive=not self.capabilities.read_only)
        except OSError as error:
            raise self._failed(error, "locking", 0) from None

    async def aclose(self) -> None:
        """Wait for what the threads are doing, then close."""
        if self._fd < 0:
            return
        await asyncio.get_running_loop().run_in_executor(None, self._executor.shutdown)
        os.close(self._fd)
        self._fd = -1


def _times_slept() -> int:
    """How often this thread has given the processor up to wait for something."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw
