"""Meta contexts: what an export can tell of its blocks, and the answer to a BLOCK_STATUS.

    base:allocation            HOLE and ZERO, from the disk
    qemu:allocation-depth      0 where nothing is allocated, 1 where something is, from the same answer of the disk
    qemu:dirty-bitmap:NAME     1 where the bitmap is dirty

Rules:
1. Every context answers for itself from the request's offset on, as far as it likes: extents of one context need not end
   where those of another do, and an answer may be shorter than the request. It has at least one extent.
2. With REQ_ONE it has exactly one, never longer than the request.
3. The disk is asked at most once per request, however many contexts follow from its answer.
4. An answer has at most MOST_EXTENTS extents, which its contexts share evenly: finding them takes time on the loop, and they
   take memory until they are sent. The text has clients expect up to 2^20 per context.
"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Final

from nbdmirror.extents import HOLE, ExtentList
from nbdmirror.protocol import constants as c
from nbdmirror.protocol.messages import Answer, Refusal, Request, StatusReply
from nbdmirror.units import MiB

if TYPE_CHECKING:
    from collections.abc import Mapping

    from nbdmirror.bitmap.dirty import DirtyBitmap
    from nbdmirror.devices.base import BlockDevice

# 3 us each to find in a bitmap that is dirty here and there: 12 ms on the loop at most, and 32 or 64 KiB to send.
MOST_EXTENTS: Final = 4096
# For one extent the disk is asked about 1 MiB, 64 MiB, 4 GiB: three questions at most for a classic request.
_FIRST_LOOK: Final = MiB
_LONGER_LOOK: Final = 64


def context_names(bitmaps: Mapping[str, DirtyBitmap], *, allocation_depth: bool = True) -> tuple[str, ...]:
    """The names of an export's meta contexts."""
    depth = (c.ALLOCATION_DEPTH,) if allocation_depth else ()
    return (c.BASE_ALLOCATION, *depth, *(c.DIRTY_BITMAP + name for name in bitmaps))


async def block_status(
    device: BlockDevice, bitmaps: Mapping[str, DirtyBitmap], contexts: Mapping[int, str], request: Request
) -> Answer:
    """The answer to a BLOCK_STATUS of `contexts` (names by id)."""
    if not contexts:
        return Refusal(c.EINVAL, "no meta context was negotiated")
    offset, length = request.offset, request.length
    most = 1 if request.flags & c.REQ_ONE else max(1, MOST_EXTENTS // len(contexts))
    allocation: ExtentList | None = None
    answers: list[tuple[int, ExtentList]] = []
    for number, name in contexts.items():
        if name.startswith(c.DIRTY_BITMAP):
            bitmap = bitmaps.get(name.removeprefix(c.DIRTY_BITMAP))
            if bitmap is None:
                return Refusal(c.EINVAL, f"there is no '{name}' any more")
            answers.append((number, bitmap.extents(offset, length, most)))
            continue
        if allocation is None:
            allocation = await _allocation(device, offset, length, most)
        extents = allocation_depth(allocation) if name == c.ALLOCATION_DEPTH else allocation
        answers.append((number, first_of(extents, most)))
    return StatusReply(answers)


async def _allocation(device: BlockDevice, offset: int, length: int, most: int) -> ExtentList:
    """The disk's extents; where one will do, without finding all that follow it.

    A client that walks a fragmented file extent by extent would otherwise have all of the rest looked up each time.
    """
    asked = length if most > 1 else min(length, _FIRST_LOOK)
    while True:
        extents = await device.extents(offset, asked)
        if len(extents) > 1 or extents.length < asked or asked == length:
            return extents
        asked = min(asked * _LONGER_LOOK, length)


def allocation_depth(extents: ExtentList) -> ExtentList:
    """Allocation as a depth: a raw disk has one layer, so a hole is 0 and all else 1."""
    depths = ExtentList(extents.offset, extents.length)
    for extent in extents:
        depths.add(extent.length, 0 if extent.flags & HOLE else 1)
    return depths


def first_of(extents: ExtentList, most: int) -> ExtentList:
    """The first `most` extents; the same list where it has no more."""
    if len(extents) <= most:
        return extents
    first = ExtentList(extents.offset, extents.length)
    for extent in islice(extents, most):
        first.add(extent.length, extent.flags)
    return first
