"""What to do with a run of dirty chunks: a plain function of the source's block status.

Rules:
1. The run is cut into units of whole chunks (the end of the disk completes the last one). A unit is settled as one: a
   chunk is never part copied and part forgotten.
2. What the source promises to read as zero is never read: whole chunks of it become one Zero step, however long up to
   `most_zero`; the rest of a unit, at most `unit` bytes, is Copy and Zero steps as the extents say.
3. HOLE without ZERO promises nothing and is copied.
4. Steps keep to the target's alignment: a zero extent is shrunk to it, and what is cut off is copied.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from nbdmirror.units import round_down, round_up

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nbdmirror.extents import ExtentList


@dataclass(frozen=True, slots=True)
class Copy:
    """Read `length` bytes at `offset` and write them."""

    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Zero:
    """Make `length` bytes at `offset` read as zeroes."""

    offset: int
    length: int


Step = Copy | Zero


@dataclass(frozen=True, slots=True)
class Unit:
    """Whole chunks, `length` bytes from `offset` on, and the steps that bring them into step, in order of offset."""

    offset: int
    length: int
    steps: tuple[Step, ...]

    @property
    def end(self) -> int:
        """One past the last byte."""
        return self.offset + self.length

    @property
    def data_length(self) -> int:
        """Bytes that are read, and sent unless they turn out to be zeroes."""
        return sum(step.length for step in self.steps if isinstance(step, Copy))


@dataclass(frozen=True, slots=True)
class Geometry:
    """What a plan must keep to, all in bytes: the chunk, the most per unit and per zero step, the target's alignment."""

    granularity: int
    unit: int
    most_zero: int
    alignment: int
    size: int

    def chunk_start(self, offset: int) -> int:
        """The first chunk border at or after `offset`; the end of the disk is one."""
        return min(round_up(offset, self.granularity), self.size)

    def chunk_end(self, offset: int) -> int:
        """The last chunk border at or before `offset`; the end of the disk is one."""
        return offset if offset == self.size else round_down(offset, self.granularity)


def plan(extents: ExtentList, geometry: Geometry) -> Iterator[Unit]:
    """The units that bring the chunks wholly covered by `extents` into step. `extents` begins at a chunk border."""
    at = extents.offset
    end = geometry.chunk_end(extents.offset + extents.length)
    zeroes = [(extent.offset, min(extent.end, end)) for extent in extents if extent.is_zero and extent.offset < end]
    seen = 0
    for index, (start, stop) in enumerate(zeroes):
        first, last = geometry.chunk_start(start), geometry.chunk_end(stop)
        if first >= last:
            continue
        yield from _mixed(at, first, zeroes, seen, geometry)
        for offset in range(first, last, geometry.most_zero):
            length = min(geometry.most_zero, last - offset)
            yield Unit(offset, length, (Zero(offset, length),))
        at, seen = last, index
    yield from _mixed(at, end, zeroes, seen, geometry)


def _mixed(start: int, end: int, zeroes: list[tuple[int, int]], index: int, geometry: Geometry) -> Iterator[Unit]:
    """Units for `[start, end)`, in which no whole chunk is known to be zero; `zeroes[index]` is the first that may touch it."""
    while start < end:
        # Units end at multiples of their size, so later rounds ask for the same requests.
        stop = min(round_down(start + geometry.unit, geometry.unit), end)
        while index < len(zeroes) and zeroes[index][1] <= start:
            index += 1
        yield Unit(start, stop - start, tuple(_steps(start, stop, zeroes, index, geometry.alignment)))
        start = stop


def _steps(start: int, end: int, zeroes: list[tuple[int, int]], index: int, alignment: int) -> Iterator[Step]:
    at = start
    while index < len(zeroes) and zeroes[index][0] < end:
        first = max(round_up(zeroes[index][0], alignment), start)
        last = zeroes[index][1] if zeroes[index][1] >= end else round_down(zeroes[index][1], alignment)
        last = min(last, end)
        if first < last:
            if first > at:
                yield Copy(at, first - at)
            yield Zero(first, last - first)
            at = last
        index += 1
    if at < end:
        yield Copy(at, end - at)
