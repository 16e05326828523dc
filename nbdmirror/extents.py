"""What block status says of a range: extents, the guarded list that holds them, and the search for zeroes in data.

Rules:
1. HOLE and ZERO are two facts (`base:allocation` of the NBD protocol): a hole need not read as zeroes, zeroes need not be a
   hole. Only ZERO promises content.
2. An ExtentList covers its range from its offset on, without gaps or overlaps; neighbours of equal flags are one extent.
3. It may stop short of the range it was made for, but never goes past it: what a peer says beyond is clipped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from nbdmirror.errors import ProtocolError

if TYPE_CHECKING:
    from collections.abc import Iterator

DATA: Final = 0
HOLE: Final = 1
ZERO: Final = 2


@dataclass(frozen=True, slots=True)
class Extent:
    """`length` bytes from `offset` on (bytes, both) that share `flags` (HOLE and ZERO, or a meta context's own bits)."""

    offset: int
    length: int
    flags: int

    @property
    def end(self) -> int:
        """One past the last byte."""
        return self.offset + self.length

    @property
    def is_zero(self) -> bool:
        """Whether the bytes are promised to read as zeroes."""
        return bool(self.flags & ZERO)

    def __repr__(self) -> str:
        words = "|".join(word for bit, word in ((HOLE, "HOLE"), (ZERO, "ZERO")) if self.flags & bit)
        return f"<Extent {self.offset:#x}+{self.length} {words or 'DATA' if self.flags < 4 else hex(self.flags)}>"


class ExtentList:
    """The extents of `[offset, offset + limit)`, added in order, merged and clipped as they come."""

    __slots__ = ("_extents", "_limit", "_next", "offset")

    def __init__(self, offset: int, limit: int) -> None:
        self.offset = offset
        self._next = offset
        self._limit = offset + limit
        self._extents: list[Extent] = []

    @classmethod
    def all_data(cls, offset: int, length: int) -> ExtentList:
        """The answer of a disk that knows nothing of its holes: safe, always true."""
        extents = cls(offset, length)
        extents.add(length, DATA)
        return extents

    def add(self, length: int, flags: int) -> None:
        """Append `length` bytes of `flags`; what lies past the range is clipped. Raises ProtocolError for an empty extent."""
        if length <= 0:
            raise ProtocolError(f"an extent of {length} bytes at offset {self._next}")
        length = min(length, self._limit - self._next)
        if length <= 0:
            return
        last = self._extents[-1] if self._extents else None
        if last is not None and last.flags == flags:
            self._extents[-1] = Extent(last.offset, last.length + length, flags)
        else:
            self._extents.append(Extent(self._next, length, flags))
        self._next += length

    def add_until(self, end: int, flags: int) -> None:
        """Append everything up to `end`, if anything is left before it."""
        if end > self._next:
            self.add(end - self._next, flags)

    @property
    def length(self) -> int:
        """Bytes covered so far."""
        return self._next - self.offset

    @property
    def is_complete(self) -> bool:
        """Whether the whole range is covered."""
        return self._next == self._limit

    def __iter__(self) -> Iterator[Extent]:
        return iter(self._extents)

    def __len__(self) -> int:
        return len(self._extents)

    def __getitem__(self, index: int) -> Extent:
        return self._extents[index]

    def __repr__(self) -> str:
        return f"ExtentList({self._extents!r})"


_ZEROES: Final = bytes(1024 * 1024)


def is_zero(data: bytearray, start: int, end: int) -> bool:
    """Whether `data[start:end]` is all zeroes. One comparison per MiB in C, which ends at the first byte that differs."""
    while end - start > len(_ZEROES):
        if not data.startswith(_ZEROES, start, start + len(_ZEROES)):
            return False
        start += len(_ZEROES)
    return data.startswith(_ZEROES[: end - start], start, end)


def zero_runs(data: bytearray, length: int, grain: int, start: int = 0) -> list[tuple[int, int, bool]]:
    """Cut `data[start:start + length]` into runs `(first, end, zero)`, looking for zeroes `grain` bytes at a time."""
    runs: list[tuple[int, int, bool]] = []
    grain_of_zeroes = _ZEROES[:grain] if grain <= len(_ZEROES) else bytes(grain)
    stop = start + length
    for first in range(start, stop, grain):
        end = min(first + grain, stop)
        zero = data.startswith(grain_of_zeroes if end - first == grain else grain_of_zeroes[: end - first], first, end)
        if runs and runs[-1][2] == zero:
            runs[-1] = (runs[-1][0], end, zero)
        else:
            runs.append((first, end, zero))
    return runs
