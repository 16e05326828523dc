"""What of a guest's write goes to the target, and as which units: a plain function of what its chunks were before.

Rules:
1. What a write covers in part and was dirty before is left to the copying.
2. The rest of a target's block that it covers in part is read from the source, with the write: no block of the target is ever
   partly from the source and partly not. So a range that is not whole blocks is copied from the source instead of sent.
3. What is trimmed is copied in whole chunks, whatever the source holds there now.
4. Zeroes are sent as zeroes, but for the ends that are not whole blocks. No request is longer than a slow target answers soon.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from nbdmirror.mirror.plan import Copy, Unit, Zero
from nbdmirror.units import MiB, round_down, round_up

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nbdmirror.bitmap.dirty import DirtyBitmap
    from nbdmirror.bitmap.sync_state import ActiveWrite

# A link of 1 MiB/s answers this much data within the guest's patience; zeroes travel as numbers.
MOST_DATA: Final = 8 * MiB
MOST_ZERO: Final = 256 * MiB


def to_send(active: ActiveWrite, offset: int, length: int, dirty: DirtyBitmap) -> tuple[int, int]:
    """`(start, end)` in bytes of what is sent of a write of `length` bytes at `offset`; start >= end where nothing is."""
    start, end = offset, offset + length
    last = active.end - 1
    if not active.covers(active.first) and not active.is_fresh(active.first):
        start = sum(dirty.range_of(active.first, active.first + 1))
    if not active.covers(last) and not active.is_fresh(last):
        end = dirty.range_of(last, active.end)[0]
    return start, end


def aligned(start: int, end: int, block: int, size: int) -> tuple[int, int]:
    """The whole blocks that a range touches; the end of the disk completes the last one."""
    return round_down(start, block), min(round_up(end, block), size)


def copies(start: int, end: int) -> Iterator[Unit]:
    """Units that copy a range of whole blocks."""
    for at in range(start, end, MOST_DATA):
        length = min(MOST_DATA, end - at)
        yield Unit(at, length, (Copy(at, length),))


def zeroes(start: int, end: int, block: int, size: int) -> Iterator[Unit]:
    """Units that zero a range: what is whole blocks of it; the ends are copied."""
    first = round_up(start, block)
    last = end if end == size else round_down(end, block)
    if first >= last:
        yield from copies(*aligned(start, end, block, size))
        return
    if start < first:
        yield from copies(*aligned(start, first, block, size))
    for at in range(first, last, MOST_ZERO):
        length = min(MOST_ZERO, last - at)
        yield Unit(at, length, (Zero(at, length),))
    if last < end:
        yield from copies(*aligned(last, end, block, size))
