"""Disks and listeners that a test holds in its hands."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from nbdmirror.devices.memory import MemoryDevice


@dataclass(eq=False)
class Held:
    """A call that waits for the test's word."""

    name: str
    offset: int
    length: int
    flags: int = 0
    _word: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    def finish(self) -> None:
        """Let it be done."""
        self._word.set_result(None)

    def fail(self, error: Exception) -> None:
        """Let it fail."""
        self._word.set_exception(error)

    async def wait(self) -> None:
        await self._word


class GatedDevice(MemoryDevice):
    """A disk in memory whose writes, zeroes, trims and flushes change nothing until the test lets them.

    writing = asyncio.create_task(device.pwrite(b"x", 0))
    (await device.next()).finish()
    await writing

    `writes_now` says whether `pwrite_now` takes writes; those are never held.
    """

    def __init__(self, size: int, *, name: str = "gated", writes_now: bool = False) -> None:
        super().__init__(size, name=name)
        self.writes_now = writes_now
        self.calls: list[Held] = []
        self._arrived: asyncio.Queue[Held] = asyncio.Queue()

    async def next(self) -> Held:
        """The next call that has arrived."""
        return await self._arrived.get()

    async def _hold(self, name: str, offset: int, length: int, flags: int = 0) -> None:
        held = Held(name, offset, length, flags)
        self.calls.append(held)
        self._arrived.put_nowait(held)
        await held.wait()

    def pwrite_now(self, data: bytes | bytearray | memoryview, offset: int) -> bool:
        return self.writes_now and super().pwrite_now(data, offset)

    async def pwrite(self, data: bytes | bytearray | memoryview, offset: int, flags: int = 0) -> None:
        await self._hold("pwrite", offset, len(data), flags)
        MemoryDevice.pwrite_now(self, data, offset)

    async def zero(self, offset: int, length: int, flags: int = 0) -> None:
        await self._hold("zero", offset, length, flags)
        await super().zero(offset, length, flags)

    async def trim(self, offset: int, length: int, flags: int = 0) -> None:
        await self._hold("trim", offset, length, flags)
        await super().trim(offset, length, flags)

    async def flush(self) -> None:
        await self._hold("flush", 0, 0)


class Listener:
    """A WriteObserver that keeps what it heard, and what the disk held of the range at that time."""

    def __init__(self, disk: MemoryDevice | None = None) -> None:
        self._disk = disk
        self.heard: list[tuple[str, int, int]] = []
        self.seen: list[bytes] = []

    def write_begins(self, offset: int, length: int) -> None:
        self._hear("begins", offset, length)

    def write_ends(self, offset: int, length: int) -> None:
        self._hear("ends", offset, length)

    def _hear(self, what: str, offset: int, length: int) -> None:
        self.heard.append((what, offset, length))
        if self._disk is not None:
            self.seen.append(bytes(self._disk.data[offset : offset + length]))


async def settled() -> None:
    """Let everything run that can run, until it waits for something else."""
    for _ in range(10):
        await asyncio.sleep(0)
