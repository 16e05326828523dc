"""The filter node's guards: what may hold a write, fail it, and act before it is answered."""

from __future__ import annotations

import asyncio
import errno
from typing import TYPE_CHECKING

import pytest

from nbdmirror.devices.memory import MemoryDevice
from nbdmirror.devices.tracked import TrackedDevice, Write, WriteKind
from nbdmirror.errors import DeviceError
from nbdmirror.inventory import Inventory, Node
from nbdmirror.protocol.constants import FUA, NO_HOLE
from tests.support.fakes import GatedDevice, Held, Listener, settled

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

SIZE = 16384


class HoldingGuard:
    """Lets writes pass only below `open_below`; its other calls wait for the test's word."""

    def __init__(self, open_below: int = 0) -> None:
        self.open_below = open_below
        self.writes: list[Write] = []
        self.calls: asyncio.Queue[Held] = asyncio.Queue()

    def passes(self, offset: int, length: int) -> bool:
        return offset + length <= self.open_below

    async def before(self, write: Write) -> None:
        self.writes.append(write)
        await self._hold("before", write.offset, write.length)

    async def after(self, write: Write) -> None:
        await self._hold("after", write.offset, write.length)

    async def before_flush(self) -> None:
        await self._hold("before_flush", 0, 0)

    async def _hold(self, name: str, offset: int, length: int) -> None:
        held = Held(name, offset, length)
        self.calls.put_nowait(held)
        await held.wait()

    async def next(self, name: str) -> Held:
        held = await self.calls.get()
        assert held.name == name
        return held


def guarded(*, writes_now: bool = False, open_below: int = 0) -> tuple[GatedDevice, TrackedDevice, Listener, HoldingGuard]:
    below = GatedDevice(SIZE, writes_now=writes_now)
    device, listener, guard = TrackedDevice(below), Listener(below), HoldingGuard(open_below)
    device.observe(listener)
    device.guard(guard)
    return below, device, listener, guard


def words(listener: Listener) -> list[str]:
    return [what for what, _, _ in listener.heard]


async def test_write_that_every_guard_lets_pass_is_done_at_once() -> None:
    below, device, listener, guard = guarded(writes_now=True, open_below=4096)
    other = HoldingGuard(open_below=2048)
    device.guard(other)
    assert device.pwrite_now(b"x" * 2048, 0)
    assert words(listener) == ["begins", "ends"]
    assert not device.pwrite_now(b"x", 2048)  # the second guard's
    assert not device.pwrite_now(b"x", 4096)  # both
    assert words(listener) == ["begins", "ends"]
    assert guard.calls.empty()
    assert other.calls.empty()
    assert below.data[2048] == 0


@pytest.mark.parametrize(
    ("change", "kind", "flags"),
    [
        (lambda device: device.pwrite(b"x" * 4096, 4096, FUA), WriteKind.PWRITE, FUA),
        (lambda device: device.zero(4096, 4096, NO_HOLE), WriteKind.ZERO, NO_HOLE),
        (lambda device: device.trim(4096, 4096, FUA), WriteKind.TRIM, FUA),
    ],
)
async def test_guard_comes_between_the_mark_and_the_disk_and_before_the_answer(
    change: Callable[[TrackedDevice], Coroutine[None, None, None]], kind: WriteKind, flags: int
) -> None:
    below, device, listener, guard = guarded()
    task = asyncio.create_task(change(device))
    held = await guard.next("before")
    assert words(listener) == ["begins"]
    assert below.calls == []
    (write,) = guard.writes
    assert (write.kind, write.offset, write.length, write.flags) == (kind, 4096, 4096, flags)
    assert write.fua == bool(flags & FUA)
    assert bytes(write.data) == (b"x" * 4096 if kind is WriteKind.PWRITE else b"")
    held.finish()
    (done := await below.next()).finish()
    assert (done.name, done.offset, done.length, done.flags) == (kind.value, 4096, 4096, flags)
    held = await guard.next("after")
    await settled()
    assert words(listener) == ["begins"]
    assert not task.done()
    held.finish()
    await task
    assert words(listener) == ["begins", "ends"]


async def test_guard_fails_a_write_before_it_reaches_the_disk() -> None:
    below, device, listener, guard = guarded()
    task = asyncio.create_task(device.pwrite(b"x", 0))
    (await guard.next("before")).fail(DeviceError(errno.ENOSPC, "guard"))
    with pytest.raises(DeviceError, match="No space left"):
        await task
    assert below.calls == []
    assert words(listener) == ["begins", "ends"]
    assert device.in_flight == 0


async def test_guard_fails_a_write_that_was_done() -> None:
    below, device, listener, guard = guarded()
    task = asyncio.create_task(device.pwrite(b"x", 0))
    (await guard.next("before")).finish()
    (await below.next()).finish()
    (await guard.next("after")).fail(DeviceError(errno.EIO, "guard"))
    with pytest.raises(DeviceError, match="Input/output"):
        await task
    assert below.data[:1] == b"x"
    assert words(listener) == ["begins", "ends"]


async def test_write_that_failed_below_has_no_after() -> None:
    below, device, _, guard = guarded()
    task = asyncio.create_task(device.pwrite(b"x", 0))
    (await guard.next("before")).finish()
    (await below.next()).fail(DeviceError(errno.EIO, "disk"))
    with pytest.raises(DeviceError):
        await task
    await settled()
    assert guard.calls.empty()


async def test_drain_waits_for_a_write_that_a_guard_holds() -> None:
    below, device, _, guard = guarded()
    task = asyncio.create_task(device.pwrite(b"x", 0))
    held = await guard.next("before")
    assert list(device.writes_in_flight()) == [(0, 1)]
    drained = asyncio.Event()

    async def drain() -> None:
        async with device.drained():
            drained.set()

    draining = asyncio.create_task(drain())
    held.finish()
    (await below.next()).finish()
    held = await guard.next("after")
    await settled()
    assert not drained.is_set()
    held.finish()
    await asyncio.gather(task, draining)


async def test_write_that_a_guard_holds_goes_on_when_its_caller_is_cancelled() -> None:
    below, device, listener, guard = guarded()
    task = asyncio.create_task(device.pwrite(b"x", 0))
    held = await guard.next("before")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    held.finish()
    (await below.next()).finish()
    (await guard.next("after")).finish()
    await settled()
    assert below.data[:1] == b"x"
    assert words(listener) == ["begins", "ends"]


async def test_write_has_the_guards_of_its_beginning() -> None:
    below, device, _, guard = guarded()
    late = HoldingGuard()
    task = asyncio.create_task(device.pwrite(b"x", 0))
    held = await guard.next("before")
    device.guard(late)
    device.unguard(guard)
    held.finish()
    (await below.next()).finish()
    (await guard.next("after")).finish()
    await task
    assert late.calls.empty()
    task = asyncio.create_task(device.pwrite(b"y", 0))
    (await late.next("before")).finish()
    (await below.next()).finish()
    (await late.next("after")).finish()
    await task
    assert guard.calls.empty()


async def test_guards_do_their_part_before_a_flush_goes_below() -> None:
    below, device, _, guard = guarded()
    task = asyncio.create_task(device.flush())
    held = await guard.next("before_flush")
    await settled()
    assert below.calls == []
    held.finish()
    (await below.next()).finish()
    await task
    task = asyncio.create_task(device.flush())
    (await guard.next("before_flush")).fail(DeviceError(errno.EIO, "guard"))
    with pytest.raises(DeviceError):
        await task
    assert len(below.calls) == 1


async def test_guards_stay_with_their_disk_when_a_job_pivots() -> None:
    inventory = Inventory()
    source, target = (inventory.add_node(Node(name, "file", MemoryDevice(SIZE))) for name in ("source", "target"))
    of_source, of_target = HoldingGuard(), HoldingGuard(open_below=4096)
    source.guard(of_source)
    target.guard(of_target)
    client = source.device
    async with client.drained():
        inventory.pivot(source, target)
    assert client.pwrite_now(b"x", 0)  # to the target now, whose guard lets it pass
    assert not client.pwrite_now(b"x", 4096)
    assert not source.device.pwrite_now(b"x", 0)
    target.unguard(of_target)
    assert client.pwrite_now(b"x", 4096)
