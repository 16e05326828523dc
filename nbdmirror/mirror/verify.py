"""Verifying what is believed: chunks that are on record nowhere are compared, and those that differ are dirty again.

Rules:
1. A chunk that the guest writes meanwhile is dirty by that, so it does not matter what is read of it.
2. What can't be read on either side has not been verified, and counts as differing.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Final

from nbdmirror.errors import DeviceError
from nbdmirror.mirror.compare import read_range
from nbdmirror.units import MiB

if TYPE_CHECKING:
    from nbdmirror.bitmap.dirty import DirtyBitmap
    from nbdmirror.bitmap.sync_state import SyncState
    from nbdmirror.devices.base import BlockDevice

_log: Final = logging.getLogger(__name__)

_PIECE: Final = MiB


async def verify(source: BlockDevice, target: BlockDevice, state: SyncState, record: DirtyBitmap | None) -> None:
    """Mark in `state`, and in `record` first, what differs of the chunks that `state` has nothing of."""
    step = max(1, _PIECE // state.dirty.granularity)
    for first, end in list(state.idle_runs()):
        for at in range(first, end, step):
            for chunk in await _differing(source, target, state.dirty, at, min(at + step, end)):
                if record is not None:
                    record.add_chunks(chunk, chunk + 1)
                state.dirty.add_chunks(chunk, chunk + 1)


async def _differing(source: BlockDevice, target: BlockDevice, dirty: DirtyBitmap, first: int, end: int) -> list[int]:
    offset, length = dirty.range_of(first, end)
    try:
        left, right = await asyncio.gather(read_range(source, offset, length), read_range(target, offset, length))
    except DeviceError as error:
        _log.warning("not verified, so copied again: %s", error)
        return list(range(first, end))
    if left == right:
        return []
    size = dirty.granularity
    return [first + number for number, at in enumerate(range(0, length, size)) if left[at : at + size] != right[at : at + size]]
