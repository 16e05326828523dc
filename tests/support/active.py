"""What the tests of write-blocking mirrors share: the rig in that mode, and ways to end it."""

from __future__ import annotations

import asyncio
from typing import Any

from nbdmirror.mirror.options import CopyMode
from tests.support.fakes import settled
from tests.support.rig import SIZE, Rig

OLD = b"old!" * (SIZE // 4)
BLOCKING, BACKGROUND = CopyMode.WRITE_BLOCKING, CopyMode.BACKGROUND


def blocking(**more: Any) -> Rig:
    return Rig(data=OLD, copy_mode=BLOCKING, **more)


async def in_step(**more: Any) -> Rig:
    """READY, and actively synced."""
    rig = blocking(**more)
    rig.source.writes_now = True
    await rig.ready()
    await settled()
    assert rig.job.is_actively_synced
    return rig


def write(rig: Rig, data: bytes, offset: int) -> asyncio.Task[None]:
    return asyncio.create_task(rig.device.pwrite(data, offset))


async def ended(rig: Rig) -> None:
    """Cancelled, whatever it waits for."""
    await rig.release()
    if rig.job.error is None:
        rig.job.cancel()
    await rig.until("null")
    assert not rig.device.is_drained
    assert rig.differing() <= rig.dirty()


async def completed(rig: Rig) -> None:
    rig.job.complete()
    await rig.until("null")
    assert rig.pivots == 1
    assert rig.job.error is None


async def completed_later(rig: Rig) -> None:
    await rig.release()
    await completed(rig)
