"""What a disk holds, known by checksums: one per chunk, so that a large disk fits into little memory.

Rules:
1. 16 bytes per chunk: all zero for a chunk of zeroes, however it came to be; all ones for a chunk whose content is not known;
   else the BLAKE2b of the content. A new disk is all zero and takes no memory.
2. A write of a part of a chunk keeps that chunk's bytes until all are known or others need the space (`_BUFFERED` in all, the
   longest untouched goes first). What lies around the part is known if the chunk was zero or is still kept; if not it
   is unknown until it is written, and a chunk that is given up with a gap is unknown as a whole.
3. After a trim the content is unknown, since a client may not count on anything there.
4. The digest is that of the whole disk, and there is none while a chunk is unknown. It depends on the size of the chunks.
"""

from __future__ import annotations

import hashlib
import mmap
import re
import threading
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_SUM: Final = 16  # bytes
_ZERO: Final = bytes(_SUM)
_UNKNOWN: Final = b"\xff" * _SUM
_RUNS: Final = re.compile(rb"((?:\0{16})+)|(?:(?!\0{16}).{16})+", re.DOTALL)
_BUFFERED: Final = 64 << 20  # bytes; a copier's requests in flight are far less


class _Part:
    """A chunk of which bytes are kept; of these, those that `known` has a 1 for."""

    def __init__(self, length: int, known: int) -> None:
        self.content = bytearray(length)
        self.known = bytearray([known]) * length

    @property
    def complete(self) -> bool:
        return 0 not in self.known


def _sum(content: bytes | bytearray) -> bytes:
    return hashlib.blake2b(content, digest_size=_SUM).digest() if content.strip(b"\0") else _ZERO


class Checksums:
    """A disk of `size` bytes. Any thread may call; offsets and lengths are in bytes."""

    def __init__(self, size: int, chunk: int) -> None:
        self.size, self.chunk = size, chunk
        self._sums = mmap.mmap(-1, max(1, -(-size // chunk)) * _SUM, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._parts: dict[int, _Part] = {}  # the longest untouched first
        self._lock = threading.Lock()

    def write(self, data: memoryview, offset: int) -> None:
        """Take note of content."""
        for number, start, length, at in self._pieces(offset, len(data)):
            content = bytes(data[at : at + length])
            if length == self._length(number):
                checksum = _sum(content)  # most of the work, and it lets others run
                with self._lock:
                    self._parts.pop(number, None)
                    self._set(number, 1, checksum)
            else:
                self._change(number, start, content, known=1)

    def zero(self, offset: int, length: int) -> None:
        """Take note of zeroes."""
        self._fill(offset, length, _ZERO, known=1)

    def forget(self, offset: int, length: int) -> None:
        """Take note that nothing is known."""
        self._fill(offset, length, _UNKNOWN, known=0)

    def read(self, buffer: memoryview, offset: int, recall: Callable[[memoryview, int], None]) -> bool:
        """Fill the buffer, by `recall` where there is only a checksum; whether all of it was known."""
        for number, start, length, at in self._pieces(offset, len(buffer)):
            piece = buffer[at : at + length]
            with self._lock:
                part, checksum = self._parts.get(number), self._get(number)
                if part and 0 not in part.known[start : start + length]:
                    piece[:] = part.content[start : start + length]
                elif part or checksum == _UNKNOWN:
                    return False
                elif checksum == _ZERO:
                    piece[:] = bytes(length)
                else:
                    recall(piece, offset + at)
        return True

    def extents(self, offset: int, length: int) -> Iterator[tuple[int, int, bool]]:
        """All of the range as (offset, length, reads as zeroes)."""
        first, end = offset // self.chunk, -(-(offset + length) // self.chunk)
        with self._lock:
            sums = self._sums[first * _SUM : end * _SUM]
        for run in _RUNS.finditer(sums):
            start = max(offset, (first + run.start() // _SUM) * self.chunk)
            stop = min(offset + length, (first + run.end() // _SUM) * self.chunk)
            yield start, stop - start, run[1] is not None

    def digest(self) -> tuple[str | None, int]:
        """The digest of the disk, and how many chunks are unknown, in which case there is none."""
        with self._lock:
            for number, part in self._parts.items():
                if part.complete:
                    self._set(number, 1, _sum(part.content))
            unknown = sum(self._sums[at : at + _SUM] == _UNKNOWN for at in self._candidates())
            digest = hashlib.blake2b(b"%d %d " % (self.size, self.chunk), digest_size=_SUM)
            digest.update(self._sums)
            return (None if unknown else digest.hexdigest()), unknown

    def _candidates(self) -> Iterator[int]:
        at = -1
        while (at := self._sums.find(_UNKNOWN, at + 1)) >= 0:
            if at % _SUM == 0:
                yield at
                at += _SUM - 1

    def _length(self, number: int) -> int:
        return min(self.chunk, self.size - number * self.chunk)

    def _pieces(self, offset: int, length: int) -> Iterator[tuple[int, int, int, int]]:
        """The chunks of a range as (number, start in the chunk, length, start in the range)."""
        at = 0
        while at < length:
            number, start = divmod(offset + at, self.chunk)
            count = min(self.chunk - start, length - at)
            yield number, start, count, at
            at += count

    def _get(self, number: int) -> bytes:
        return self._sums[number * _SUM : (number + 1) * _SUM]

    def _set(self, number: int, count: int, checksum: bytes) -> None:
        where, sums = slice(number * _SUM, (number + count) * _SUM), checksum * count
        if self._sums[where] != sums:  # pages that are only read take no memory
            self._sums[where] = sums

    def _fill(self, offset: int, length: int, checksum: bytes, known: int) -> None:
        first, last = -(-offset // self.chunk), (offset + length) // self.chunk
        if first >= last:  # no whole chunk
            for number, start, count, _ in self._pieces(offset, length):
                self._change(number, start, bytes(count), known)
            return
        with self._lock:
            for number in [number for number in self._parts if first <= number < last]:
                del self._parts[number]
            self._set(first, last - first, checksum)
        head, tail = first * self.chunk - offset, offset + length - last * self.chunk
        if head:
            self._change(first - 1, self.chunk - head, bytes(head), known)
        if tail > 0:
            self._change(last, 0, bytes(tail), known)

    def _change(self, number: int, start: int, content: bytes, known: int) -> None:
        with self._lock:
            part = self._parts.pop(number, None)
            if part is None:
                part = _Part(self._length(number), known=int(self._get(number) == _ZERO))
            self._parts[number] = part
            part.content[start : start + len(content)] = content
            part.known[start : start + len(content)] = bytes([known]) * len(content)
            self._set(number, 1, _UNKNOWN)
            while len(self._parts) * self.chunk > _BUFFERED:
                oldest = next(iter(self._parts))
                given_up = self._parts.pop(oldest)
                self._set(oldest, 1, _sum(given_up.content) if given_up.complete else _UNKNOWN)
