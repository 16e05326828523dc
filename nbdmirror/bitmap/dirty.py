"""DirtyBitmap: one bit per chunk of a disk, set where the chunk is not known to be copied.

Rules:
1. A chunk is `granularity` bytes, a power of two of at least 512; the last one may reach past the end of the disk.
2. Marking rounds outward; nothing is ever unmarked that was not wholly named.
3. The number of dirty chunks is kept, not counted; a summary with one bit per BLOCK chunks keeps a search over a sparse
   bitmap short. A summary bit may be set over an empty block (it is cleared when a search finds that out), but is never
   clear over a dirty one.
4. `grown` is set whenever a chunk is newly marked: who makes the bits durable clears it first, and sees later if there is more.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Final

from bitarray import bitarray

from nbdmirror.errors import StateError
from nbdmirror.extents import ExtentList

if TYPE_CHECKING:
    from collections.abc import Iterator

# 4 KiB of bits per summary bit: a block is searched in 0.1 us per 256 bytes, and 16 TiB at 64 KiB are 8192 summary bits.
BLOCK: Final = 32768
_BLOCK_SHIFT: Final = 15

# Meta context qemu:dirty-bitmap:NAME, flag bit 0
DIRTY: Final = 1


def check_granularity(granularity: int) -> None:
    """Raises StateError for what no chunk can have."""
    if granularity < 512 or granularity & (granularity - 1):
        raise StateError("Granularity must be power of 2 and at least 512")


class DirtyBitmap:
    """The bits of a disk of `size` bytes. Chunks are numbered from 0; ranges of them are `[first, end)`.

    `bits`, where given, are used in place: little-endian, and whole bytes, so up to seven more than there are chunks.
    """

    __slots__ = ("_bits", "_shift", "_summary", "chunks", "count", "granularity", "grown", "size")

    def __init__(self, size: int, granularity: int, bits: bitarray | None = None) -> None:
        check_granularity(granularity)
        self.size = size
        self.granularity = granularity
        self._shift = granularity.bit_length() - 1
        self.chunks = (size + granularity - 1) >> self._shift
        self._bits = bitarray(self.chunks, endian="little") if bits is None else bits
        self.count = self._bits.count()
        self.grown = self.count > 0
        self._summary = bitarray((self.chunks + BLOCK - 1) >> _BLOCK_SHIFT, endian="little")
        self._summary.setall(self.grown)

    # --- by bytes --------------------------------------------------------------------------------------------------

    def span(self, offset: int, length: int) -> tuple[int, int]:
        """The chunks that a range of bytes touches."""
        return offset >> self._shift, min((offset + length - 1 >> self._shift) + 1, self.chunks)

    def span_within(self, offset: int, length: int) -> tuple[int, int]:
        """The chunks that a range of bytes covers wholly; the end of the disk completes the last one. May be empty."""
        first = (offset + self.granularity - 1) >> self._shift
        end = self.chunks if offset + length >= self.size else (offset + length) >> self._shift
        return first, max(first, end)

    def range_of(self, first: int, end: int) -> tuple[int, int]:
        """`(offset, length)` in bytes of a range of chunks, clipped at the end of the disk."""
        offset = first << self._shift
        return offset, min(end << self._shift, self.size) - offset

    def add(self, offset: int, length: int) -> None:
        """Mark what a range of bytes touches. Small writes to what is dirty already are the common case, and cost least."""
        first = offset >> self._shift
        if first != offset + length - 1 >> self._shift:
            self.add_chunks(*self.span(offset, length))
        elif not self._bits[first]:
            self.add_chunks(first, first + 1)

    def discard(self, offset: int, length: int) -> None:
        """Unmark the chunks that lie wholly in a range of bytes."""
        self.discard_chunks(*self.span_within(offset, length))

    @property
    def dirty_bytes(self) -> int:
        """Bytes of the disk that are marked: a chunk that reaches past the end counts by what is on the disk."""
        total = self.count << self._shift
        if self.chunks and self._bits[self.chunks - 1]:
            total -= (self.chunks << self._shift) - self.size
        return total

    def next_dirty(self, offset: int) -> tuple[int, int] | None:
        """The first dirty run, `(offset, length)` in bytes, that begins in the chunk of `offset` or later."""
        run = self.next_run(offset >> self._shift)
        return None if run is None else self.range_of(*run)

    def extents(self, offset: int, length: int, most: int | None = None) -> ExtentList:
        """The range, or its first `most` extents, as extents whose flag 1 says dirty."""
        extents = ExtentList(offset, length)
        end = offset + length
        for first, after in self.runs(*self.span(offset, length)):
            extents.add_until(min(first << self._shift, end), 0)
            if len(extents) == most:
                return extents
            extents.add_until(min(after << self._shift, end), DIRTY)
            if len(extents) == most:
                return extents
        extents.add_until(end, 0)
        return extents

    # --- by chunks -------------------------------------------------------------------------------------------------

    def add_chunks(self, first: int, end: int) -> None:
        """Mark `[first, end)`."""
        bits = self._bits
        if end - first == 1:
            if not bits[first]:
                bits[first] = 1
                self._summary[first >> _BLOCK_SHIFT] = 1
                self.count += 1
                self.grown = True
        elif end > first:
            new = end - first - bits.count(1, first, end)
            if not new:
                return
            self.count += new
            self.grown = True
            bits[first:end] = 1
            self._summary[first >> _BLOCK_SHIFT : (end - 1 >> _BLOCK_SHIFT) + 1] = 1

    def discard_chunks(self, first: int, end: int) -> None:
        """Unmark `[first, end)`."""
        if end > first:
            self.count -= self._bits.count(1, first, end)
            self._bits[first:end] = 0

    def is_dirty(self, chunk: int) -> bool:
        """Whether a chunk is marked."""
        return bool(self._bits[chunk])

    def mask_clean(self, bits: bitarray, first: int = 0) -> None:
        """Clear in `bits`, one per chunk from `first` on, what is dirty here."""
        bits &= ~self._bits[first : first + len(bits)]

    def next_run(self, start: int, limit: int | None = None) -> tuple[int, int] | None:
        """The first dirty run `[first, end)` with start <= first < limit, cut at `limit`; None when there is none."""
        limit = self.chunks if limit is None else limit
        bits, at = self._bits, start
        while at < limit:
            block = at >> _BLOCK_SHIFT
            if not self._summary[block]:
                block = self._summary.find(1, block)
                if block < 0:
                    return None
                at = block << _BLOCK_SHIFT
                continue
            end_of_block = min((block + 1) << _BLOCK_SHIFT, self.chunks)
            first = bits.find(1, at, min(end_of_block, limit))
            if first >= 0:
                end = bits.find(0, first, limit)
                return first, limit if end < 0 else end
            if at == block << _BLOCK_SHIFT and end_of_block <= limit:
                self._summary[block] = 0
            at = end_of_block
        return None

    def runs(self, start: int = 0, limit: int | None = None) -> Iterator[tuple[int, int]]:
        """Every dirty run in `[start, limit)`, in order."""
        run = self.next_run(start, limit)
        while run is not None:
            yield run
            run = self.next_run(run[1], limit)

    def clear(self) -> None:
        """Unmark everything."""
        self._bits.setall(0)
        self._summary.setall(0)
        self.count = 0

    def fill(self) -> None:
        """Mark everything."""
        self.add_chunks(0, self.chunks)

    # --- as a whole ------------------------------------------------------------------------------------------------

    def merge(self, other: DirtyBitmap) -> None:
        """Mark what is marked in `other`, a bitmap of a disk of the same size."""
        assert other.size == self.size, "bitmaps of disks of different sizes can't be merged"
        if other._shift > self._shift:
            for first, end in other.runs():
                self.add(*other.range_of(first, end))
            return
        self._bits[: self.chunks] |= _coarsened(other._bits[: other.chunks], self._shift - other._shift)
        self.count = self._bits.count()
        self.grown = True
        self._summary.setall(1)  # a search finds out where that is too much (rule 3)

    def snapshot(self) -> bitarray:
        """A copy of the bits, for `restore`."""
        return self._bits.copy()

    def restore(self, bits: bitarray) -> None:
        """Put a snapshot of this bitmap back."""
        self._bits[:] = bits
        self.count = bits.count()
        self.grown = True
        self._summary.setall(1)

    def counts(self, parts: int) -> list[int]:
        """How many chunks are dirty in each of so many parts of the disk, as equal as chunks allow; fewer parts than chunks."""
        parts = min(parts, self.chunks)
        edges = [self.chunks * part // parts for part in range(parts + 1)] if parts else []
        return [self._bits.count(1, first, end) for first, end in pairwise(edges)]

    def serialised(self) -> bytes:
        """The bits as QEMU has them in memory: 64-bit words, little-endian, at least one."""
        words = max(1, (self.chunks + 63) // 64)
        return self._bits.tobytes().ljust(words * 8, b"\0")

    def __repr__(self) -> str:
        return f"<DirtyBitmap {self.count}/{self.chunks} chunks of {self.granularity} bytes dirty>"


def _coarsened(bits: bitarray, doublings: int) -> bitarray:
    """One bit per 2**doublings bits, set where any of them is. Whole passes in C: runs may be many millions."""
    while doublings >= 3:
        packed = bitarray(endian="little")
        packed.pack(bits.tobytes())
        bits, doublings = packed, doublings - 3
    for _ in range(doublings):
        odd = bits[1::2]
        bits = bits[::2]
        odd.extend([0] * (len(bits) - len(odd)))
        bits |= odd
    return bits
