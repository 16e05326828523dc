"""Regions: which coarse regions of a disk are durably on record as changing, so that a write may go ahead.

After a power cut the bits in the file are those of some time since the last checkpoint, page by page. What makes a superset of
them is this record: a chunk counts as dirty when its bit is set or its region is on record. The rules:

1. A write goes to the disk only when every region that it touches is on record: a commit that has *succeeded* wrote its bit.
2. A region is withdrawn only when, in this order: (a) nothing has touched it since the last checkpoint and no write to it is
   in flight, (b) then all bits were made durable, (c) and nothing has touched it meanwhile. So its bits say all there is.
3. From its withdrawal on, a region has to be put on record anew before it is written, even if the commit that withdraws it
   fails: nobody knows then what is in the file.
4. Of commits only one is under way at a time, and each writes everything that was wanted before it began.

`_covered` is the fast path, one test per write: the regions on record that were touched since the last checkpoint. The first
touch of a region after a checkpoint takes the slow path, but waits for nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from bitarray import bitarray

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_PAGE: Final = 4096
_PAGE_BITS: Final = _PAGE * 8


class Regions:
    """The regions, `region_size` bytes each, of a disk of `size` bytes. Numbered from 0; ranges of them are `[first, end)`."""

    def __init__(self, size: int, region_size: int) -> None:
        self._shift = region_size.bit_length() - 1
        self.count = -(-size // region_size)
        length = -(-self.count // _PAGE_BITS) * _PAGE_BITS
        self._image = bitarray(length, endian="little")  # what the next commit writes
        self._recorded = bitarray(length, endian="little")  # what is durable, and is not to be withdrawn
        self._covered = bitarray(length, endian="little")
        self._changed: tuple[int, int] | None = None  # the pages of the image that the file may not have lie in [first, end)
        self._committing: tuple[bitarray, tuple[int, int]] | None = None

    def span(self, offset: int, length: int) -> tuple[int, int]:
        """The regions that a range of bytes touches."""
        return offset >> self._shift, (offset + length - 1 >> self._shift) + 1

    # --- writes ----------------------------------------------------------------------------------------------------

    def passes(self, offset: int, length: int) -> bool:
        """Whether a write of a range of bytes may go ahead; if so, it counts as a touch (rules 1 and 2)."""
        first = offset >> self._shift
        if first == offset + length - 1 >> self._shift and self._covered[first]:
            return True
        end = (offset + length - 1 >> self._shift) + 1
        if self._recorded.find(0, first, end) >= 0:
            return False
        self._covered[first:end] = 1
        return True

    def want(self, offset: int, length: int) -> None:
        """Put the regions of a range of bytes on record with the next commit."""
        first, end = self.span(offset, length)
        self._image[first:end] = 1
        self._has_changed(first // _PAGE_BITS, (end - 1) // _PAGE_BITS + 1)

    def _has_changed(self, first: int, end: int) -> None:
        if self._changed is not None:
            first, end = min(first, self._changed[0]), max(end, self._changed[1])
        self._changed = first, end

    # --- commits ---------------------------------------------------------------------------------------------------

    def commit_begins(self) -> tuple[int, bytes] | None:
        """What has to be written durably, `(offset in the map, content)`; None when the file has everything."""
        assert self._committing is None, "a commit is under way"
        if self._changed is None:
            return None
        first, end = self._changed
        self._changed = None
        self._committing = self._image.copy(), (first, end)
        return first * _PAGE, self._image[first * _PAGE_BITS : end * _PAGE_BITS].tobytes()

    def commit_ends(self) -> None:
        """It has succeeded. What was withdrawn since it began stays so."""
        assert self._committing is not None, "no commit is under way"
        written, _ = self._committing
        self._committing = None
        self._recorded |= written & self._image

    def commit_fails(self) -> None:
        """It has failed: the file may have any of it."""
        assert self._committing is not None, "no commit is under way"
        _, pages = self._committing
        self._committing = None
        self._has_changed(*pages)

    # --- checkpoints -----------------------------------------------------------------------------------------------

    def idle(self, in_flight: Iterable[tuple[int, int]]) -> bitarray:
        """The regions that nothing has touched since the last checkpoint, and that none of these writes is to (rule 2a)."""
        idle = self._recorded & ~self._covered
        for offset, length in in_flight:
            first, end = self.span(offset, length)
            idle[first:end] = 0
        return idle

    def withdraw(self, idle: bitarray) -> None:
        """Let the next commit take these off the record, but for those that were touched meanwhile (rule 2c)."""
        gone = idle & ~self._covered
        self._recorded &= ~gone
        self._image &= ~gone
        for first, end in _runs(gone):
            self._has_changed(first // _PAGE_BITS, (end - 1) // _PAGE_BITS + 1)

    def next_epoch(self) -> None:
        """A checkpoint is over: count touches anew."""
        self._covered.setall(0)

    @property
    def on_record(self) -> int:
        """How many regions a power cut would leave all dirty."""
        return self._recorded.count()


def recorded_ranges(content: bytes | memoryview, size: int, region_size: int) -> Iterator[tuple[int, int]]:
    """The ranges `(offset, length)` in bytes, clipped at the end of the disk, whose regions are on record in a map."""
    regions = bitarray(endian="little")
    regions.frombytes(bytes(content))
    for first, end in _runs(regions):
        offset = first * region_size
        if offset < size:
            yield offset, min(end * region_size, size) - offset


def _runs(bits: bitarray) -> Iterator[tuple[int, int]]:
    at = 0
    while (first := bits.find(1, at)) >= 0:
        end = bits.find(0, first)
        at = len(bits) if end < 0 else end
        yield first, at
