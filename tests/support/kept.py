"""A disk whose calls are held, with a bitmap in a file whose calls are held: the test says what is done, and when."""

from __future__ import annotations

import asyncio
import random
from typing import Any

from nbdmirror.bitmap.guards import guard_of
from nbdmirror.bitmap.image import STATE_OFFSET, Head, State, Sync
from nbdmirror.bitmap.store import BitmapStore, OnInconsistent, recovered
from nbdmirror.inventory import Node
from nbdmirror.units import MiB
from tests.support.fakes import GatedDevice, Held, settled
from tests.support.volatile import VolatileFile

GRAIN = 4096
REGION = 4 * MiB
SIZE = 4 * REGION
HEAD = Head("b", SIZE, GRAIN, "disk", bytes(16), REGION)
BOOT, NEXT_BOOT = b"1" * 16, b"2" * 16


def state_in(file: VolatileFile) -> State:
    return State.decode(bytes(file.content[STATE_OFFSET : STATE_OFFSET + 512]))


class Kept:
    """A disk whose calls are held, with a bitmap in a file whose calls are held."""

    def __init__(self, mode: Sync, file: VolatileFile | None = None, boot_id: bytes = BOOT) -> None:
        self.mode = mode
        if file is None:
            made = bytearray(HEAD.file_length)
            made[STATE_OFFSET : STATE_OFFSET + 512] = State(0, True, True, mode, boot_id).encode()
            file = VolatileFile(bytes(made), random.Random(1))
        self.file = file
        self.state = state_in(file)
        self.bitmap = recovered(HEAD, self.state, self.file.content, boot_id, OnInconsistent.FAIL)
        self.disk = GatedDevice(SIZE, writes_now=True)
        self.node = Node("source", "file", self.disk)
        self.store = BitmapStore(self.file, HEAD, self.state, self.bitmap, sync_mode=mode, boot_id=boot_id)
        self.guard: Any = None

    async def up(self) -> Kept:
        await self.granting(self.store.start())
        self.guard = guard_of(self.store, self.mode, self.node.writes_in_flight)
        self.node.bitmaps.add(self.bitmap)
        if self.guard is not None:
            self.node.guard(self.guard)
        await self.granting(settled())
        return self

    @property
    def held(self) -> list[Held]:
        return [call for call in self.file.calls if not call._word.done()]

    async def granting(self, work: Any) -> Any:
        """Run it, and let the file do all it is asked to."""
        task = asyncio.ensure_future(work)
        while not task.done():
            for call in self.held:
                call.finish()
            await settled()
        return await task

    async def next(self, name: str) -> Held:
        """The one call that the file is held with."""
        await settled()
        (call,) = self.held
        assert call.name == name
        return call

    def durable(self, boot_id: bytes = NEXT_BOOT) -> set[int]:
        """The chunks that are marked at worst after a power cut, by their numbers."""
        content = b"".join(versions[0] for versions in self.file._versions)
        state = State.decode(content[STATE_OFFSET : STATE_OFFSET + 512])
        bitmap = recovered(HEAD, state, memoryview(bytearray(content)), boot_id, OnInconsistent.FLUSHED)
        return {chunk for first, end in bitmap.bits.runs() for chunk in range(first, end)}
