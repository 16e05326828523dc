"""A disk with a volatile cache, for crashes: what a drive, a RAID controller or a host's page cache does to unflushed writes.

Rules:
1. A file is the stable storage. A sector that is written goes to the file at once or, with probability `volatile`, into the
   cache, until it is flushed or written back by a later write. So nothing is left to do in a crash: killed at whatever
   moment, the file has all that was flushed and, sector by sector, a part of the rest.
2. What is kept is decided by the seed, the sector and how many writes it has had, not by time or threads.
3. A sector is whole: after a crash it holds the content of one moment, as disks promise.
4. Without volatile probability there is no cache: everything goes straight to the file.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import threading
from collections import deque
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

_SECTOR: Final = 4096
_HOLE: Final = bytes(_SECTOR)  # this very object, in the cache: to be punched
_ZEROES: Final = memoryview(bytes(1 << 20))


def chance(*what: object) -> float:
    """A number in [0, 1) that `what` decides."""
    return int.from_bytes(hashlib.blake2b(repr(what).encode(), digest_size=6).digest()) / 2**48


_fallocate = ctypes.CDLL(None, use_errno=True).fallocate
_fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_KEEP_SIZE_AND_PUNCH_HOLE: Final = 3


class Disk:
    """Stable storage, a file, behind a volatile cache of sectors. Any thread may call."""

    def __init__(self, fd: int, seed: int, volatile: float) -> None:
        self.size = os.lseek(fd, 0, os.SEEK_END)
        self._fd, self._seed, self._volatile = fd, seed, volatile
        self._cache: dict[int, bytes] = {}
        self._writes: dict[int, int] = {}  # of each sector, so far: the same sector may fare otherwise next time
        self._lock = threading.Lock()

    @property
    def unflushed(self) -> int:
        """How many sectors a crash now would lose."""
        return len(self._cache)

    def read(self, buffer: memoryview, offset: int) -> None:
        """Fill the buffer."""
        with self._lock:
            done = 0
            while done < len(buffer) and (count := os.preadv(self._fd, [buffer[done:]], offset + done)):
                done += count
            buffer[done:] = bytes(len(buffer) - done)
            for sector in self._cached(offset, len(buffer)):
                at = sector * _SECTOR
                low, high = max(at, offset), min(at + _SECTOR, offset + len(buffer))
                buffer[low - offset : high - offset] = self._cache[sector][low - at : high - at]

    def write(self, data: memoryview, offset: int) -> None:
        """Write; durable some time, or after a flush."""
        self._change(offset, len(data), lambda low, high: data[low:high])

    def punch(self, offset: int, length: int) -> None:
        """Zeroes, as a hole."""
        self._change(offset, length, None)

    def _change(self, offset: int, length: int, data: Callable[[int, int], memoryview] | None) -> None:
        with self._lock:
            if not self._volatile:
                self._store(offset, length, data(0, length) if data else None)
                return
            done = 0
            while done < length:
                sector, skipped = divmod(offset + done, _SECTOR)
                count = min(_SECTOR - skipped, length - done)
                content = _HOLE
                if data or count < _SECTOR:
                    whole = bytearray(
                        self._cache.get(sector) or os.pread(self._fd, _SECTOR, sector * _SECTOR).ljust(_SECTOR, b"\0")
                    )
                    whole[skipped : skipped + count] = data(done, done + count) if data else bytes(count)
                    content = bytes(whole)
                self._put(sector, content)
                done += count

    def _put(self, sector: int, content: bytes) -> None:
        number = self._writes[sector] = self._writes.get(sector, 0) + 1
        self._cache[sector] = content
        if chance(self._seed, "sector", sector, number) >= self._volatile:
            self._write_back(sector)

    def _write_back(self, sector: int) -> None:
        content, at = self._cache.pop(sector), sector * _SECTOR
        length = min(_SECTOR, self.size - at)
        self._store(at, length, None if content is _HOLE else memoryview(content)[:length])

    def _store(self, offset: int, length: int, data: memoryview | None) -> None:
        if data is None and not _fallocate(self._fd, _KEEP_SIZE_AND_PUNCH_HOLE, offset, length):
            return
        done = 0  # and not every file system can punch: zeroes are as good
        while done < length:
            piece = _ZEROES[: length - done] if data is None else data[done:]
            done += os.pwrite(self._fd, piece, offset + done)

    def zero(self, offset: int, length: int) -> None:
        """Zeroes that stay allocated."""
        for at in range(offset, offset + length, len(_ZEROES)):
            self.write(_ZEROES[: offset + length - at], at)

    def flush(self, offset: int, length: int) -> None:
        """Make durable what was written to the range."""
        with self._lock:
            for sector in self._cached(offset, length):
                self._write_back(sector)
            os.fdatasync(self._fd)

    def _cached(self, offset: int, length: int) -> list[int]:
        first, last = offset // _SECTOR, (offset + length - 1) // _SECTOR
        candidates = range(first, last + 1) if last - first < len(self._cache) else sorted(self._cache)
        return [sector for sector in candidates if first <= sector <= last and sector in self._cache]

    def extents(self, offset: int, length: int) -> list[tuple[int, int, bool]]:
        """All of the range as (offset, length, is a hole)."""
        found, at, end = [], offset, offset + length
        with self._lock:
            cached = deque(at for at in self._cached(offset, length) if self._cache[at] is not _HOLE)
            while at < end:
                while cached and (cached[0] + 1) * _SECTOR <= at:
                    cached.popleft()
                nearest = cached[0] * _SECTOR if cached else end
                if nearest <= at:
                    stop, hole = nearest + _SECTOR, False
                elif (data := self._seek(at, os.SEEK_DATA)) > at:
                    stop, hole = min(data, nearest), True
                else:
                    stop, hole = self._seek(at, os.SEEK_HOLE), False
                stop = min(stop, end)
                found.append((at, stop - at, hole))
                at = stop
        return found

    def _seek(self, offset: int, whence: int) -> int:
        try:
            return os.lseek(self._fd, offset, whence)
        except OSError as error:
            if error.errno != errno.ENXIO:  # nothing but a hole to the end
                raise
            return self.size

    def resize(self, size: int) -> None:
        """Change the size, with everything flushed; raises OSError."""
        self.flush(0, self.size)
        with self._lock:
            os.ftruncate(self._fd, size)
            self.size = size
