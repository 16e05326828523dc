"""The filter node: who hears of a write and when, and what a drain holds up."""

from __future__ import annotations

import asyncio
import errno
from typing import TYPE_CHECKING

import pytest

from nbdmirror.devices.memory import MemoryDevice
from nbdmirror.devices.tracked import TrackedDevice
from nbdmirror.errors import DeviceError
from nbdmirror.protocol.constants import FUA, NO_HOLE
from tests.support.fakes import GatedDevice, Held, Listener, settled

if TYPE_CHECKING:
    from collections.abc import Coroutine

SIZE = 16384


def gated(*, writes_now: bool = False) -> tuple[GatedDevice, TrackedDevice, Listener]:
    below = GatedDevice(SIZE, writes_now=writes_now)
    device = TrackedDevice(below)
    listener = Listener(below)
    device.observe(listener)
    return below, device, listener


def change(device: TrackedDevice, kind: str) -> Coroutine[None, None, None]:
    """A write of one kind to bytes 4096..8191."""
    match kind:
        case "pwrite":
            return device.pwrite(b"x" * 4096, 4096, FUA)
        case "zero":
            return device.zero(4096, 4096, FUA | NO_HOLE)
        case _:
            return device.trim(4096, 4096, FUA)


async def begun(device: TrackedDevice, below: GatedDevice, kind: str = "pwrite") -> tuple[asyncio.Task[None], Held]:
    """A write that is in flight."""
    task = asyncio.create_task(change(device, kind))
    return task, await below.next()


# --- begin and end ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "flags"), [("pwrite", FUA), ("zero", FUA | NO_HOLE), ("trim", FUA)])
async def test_every_kind_of_write_is_announced_before_and_after(kind: str, flags: int) -> None:
    below, device, listener = gated()
    below.data[4096:8192] = b"o" * 4096
    task, held = await begun(device, below, kind)
    assert (held.name, held.offset, held.length, held.flags) == (kind, 4096, 4096, flags)
    assert listener.heard == [("begins", 4096, 4096)]
    held.finish()
    await task
    assert listener.heard == [("begins", 4096, 4096), ("ends", 4096, 4096)]
    after = b"x" if kind == "pwrite" else b"\0"
    assert listener.seen == [b"o" * 4096, after * 4096]


@pytest.mark.parametrize("kind", ["pwrite", "zero", "trim"])
async def test_write_that_failed_has_ended_too(kind: str) -> None:
    below, device, listener = gated()
    task, held = await begun(device, below, kind)
    held.fail(DeviceError(errno.ENOSPC, "gated"))
    with pytest.raises(DeviceError, match="No space left"):
        await task
    assert [what for what, _, _ in listener.heard] == ["begins", "ends"]
    async with device.drained():
        pass


async def test_end_is_heard_before_the_writer_goes_on() -> None:
    below, device, listener = gated()

    async def write() -> list[tuple[str, int, int]]:
        await device.pwrite(b"x", 0)
        return list(listener.heard)

    task = asyncio.create_task(write())
    (await below.next()).finish()
    assert await task == [("begins", 0, 1), ("ends", 0, 1)]


async def test_write_that_is_done_at_once() -> None:
    below, device, listener = gated(writes_now=True)
    assert device.pwrite_now(b"new", 100)
    assert listener.heard == [("begins", 100, 3), ("ends", 100, 3)]
    assert listener.seen == [bytes(3), b"new"]
    assert below.calls == []


async def test_write_that_can_not_be_done_at_once_is_announced_again_when_it_is() -> None:
    below, device, listener = gated()
    assert not device.pwrite_now(b"new", 100)
    assert [what for what, _, _ in listener.heard] == ["begins", "ends"]
    task = asyncio.create_task(device.pwrite(b"new", 100))
    (await below.next()).finish()
    await task
    assert [what for what, _, _ in listener.heard] == ["begins", "ends"] * 2


class BrokenDevice(MemoryDevice):
    def pwrite_now(self, data: bytes | bytearray | memoryview, offset: int) -> bool:
        raise DeviceError(errno.EIO, "broken")


async def test_write_at_once_that_fails_ends() -> None:
    device, listener = TrackedDevice(BrokenDevice(SIZE)), Listener()
    device.observe(listener)
    with pytest.raises(DeviceError):
        device.pwrite_now(b"x", 0)
    assert listener.heard == [("begins", 0, 1), ("ends", 0, 1)]


# --- observers -------------------------------------------------------------------------------------------------------


async def test_every_observer_hears() -> None:
    below, device, first = gated(writes_now=True)
    second = Listener(below)
    device.observe(second)
    device.pwrite_now(b"x", 0)
    assert first.heard == second.heard == [("begins", 0, 1), ("ends", 0, 1)]


async def test_who_joins_hears_of_the_writes_in_flight() -> None:
    below, device, _ = gated()
    one = asyncio.create_task(device.pwrite(b"x" * 10, 0))
    held_one = await below.next()
    two = asyncio.create_task(device.zero(4096, 4096))
    held_two = await below.next()
    late = Listener(below)
    device.observe(late)
    assert late.heard == [("begins", 0, 10), ("begins", 4096, 4096)]
    held_two.finish()
    await two
    held_one.finish()
    await one
    assert late.heard[2:] == [("ends", 4096, 4096), ("ends", 0, 10)]


async def test_who_joins_hears_nothing_of_writes_that_are_over() -> None:
    below, device, _ = gated()
    task, held = await begun(device, below)
    held.finish()
    await task
    late = Listener()
    device.observe(late)
    assert late.heard == []


async def test_who_leaves_hears_nothing_more() -> None:
    below, device, listener = gated(writes_now=True)
    stays = Listener()
    device.observe(stays)
    task, held = await begun(device, below)
    device.forget(listener)
    held.finish()
    await task
    device.pwrite_now(b"x", 0)
    assert listener.heard == [("begins", 4096, 4096)]
    assert len(stays.heard) == 4


async def test_observer_that_leaves_while_it_listens() -> None:
    _, device, _ = gated(writes_now=True)

    class Once(Listener):
        def write_begins(self, offset: int, length: int) -> None:
            super().write_begins(offset, length)
            device.forget(self)

    once, after = Once(), Listener()
    device.observe(once)
    device.observe(after)
    device.pwrite_now(b"x", 0)
    device.pwrite_now(b"x", 0)
    assert [what for what, _, _ in once.heard if what == "begins"] == ["begins"]
    assert len(after.heard) == 4


# --- cancelled callers -----------------------------------------------------------------------------------------------


async def test_write_goes_on_when_its_caller_is_cancelled() -> None:
    below, device, listener = gated()
    task, held = await begun(device, below)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert listener.heard == [("begins", 4096, 4096)]
    late = Listener()
    device.observe(late)
    assert late.heard == [("begins", 4096, 4096)]
    drained = asyncio.Event()
    draining = asyncio.create_task(drain(device, drained))
    await settled()
    assert not drained.is_set()
    held.finish()
    await draining
    assert listener.heard == late.heard == [("begins", 4096, 4096), ("ends", 4096, 4096)]
    assert below.data[4096:8192] == b"x" * 4096


async def test_write_without_its_caller_may_fail() -> None:
    """Nobody is there to see the error, and nothing complains of that."""
    below, device, listener = gated()
    task, held = await begun(device, below)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    held.fail(DeviceError(errno.EIO, "gated"))
    await drain(device)
    assert len(listener.heard) == 2


async def drain(device: TrackedDevice, drained: asyncio.Event | None = None) -> None:
    async with device.drained():
        if drained is not None:
            drained.set()


# --- drains ----------------------------------------------------------------------------------------------------------


async def test_drain_waits_for_the_last_write_in_flight() -> None:
    below, device, listener = gated()
    one, held_one = await begun(device, below)
    two, held_two = await begun(device, below, "zero")
    drained = asyncio.Event()
    draining = asyncio.create_task(drain(device, drained))
    await settled()
    assert device.is_drained
    held_one.finish()
    await one
    await settled()
    assert not drained.is_set()
    held_two.finish()
    await two
    await draining
    assert drained.is_set()
    assert len(listener.heard) == 4
    assert not device.is_drained


@pytest.mark.parametrize("kind", ["pwrite", "zero", "trim"])
async def test_writes_wait_while_drained(kind: str) -> None:
    below, device, listener = gated(writes_now=True)
    async with device.drained():
        assert not device.pwrite_now(b"x", 0)
        task = asyncio.create_task(change(device, kind))
        await settled()
        assert below.calls == []
        assert listener.heard == []
    (await below.next()).finish()
    await task
    assert [what for what, _, _ in listener.heard] == ["begins", "ends"]
    assert device.pwrite_now(b"x", 0)


async def test_writes_wait_already_while_the_drain_begins() -> None:
    below, device, _ = gated(writes_now=True)
    task, held = await begun(device, below)
    draining = asyncio.create_task(drain(device))
    await settled()
    assert not device.pwrite_now(b"x", 0)
    later = asyncio.create_task(device.pwrite(b"y", 0))
    await settled()
    assert len(below.calls) == 1
    held.finish()
    await asyncio.gather(task, draining)
    (await below.next()).finish()
    await later


async def test_nested_drains_end_with_the_outermost() -> None:
    below, device, _ = gated()
    async with device.drained():
        async with device.drained():
            task = asyncio.create_task(device.pwrite(b"x", 0))
        await settled()
        assert device.is_drained
        assert below.calls == []
    (await below.next()).finish()
    await task


async def test_write_that_was_let_go_waits_for_a_drain_that_came_first() -> None:
    """Two drains on each other's heels: between them the write is free to go, but has not run yet."""
    below, device, _ = gated()
    async with device.drained():
        task = asyncio.create_task(device.pwrite(b"x", 0))
        await settled()
    async with device.drained():
        await settled()
        assert below.calls == []
    (await below.next()).finish()
    await task


async def test_cancelled_drain_lets_writes_go() -> None:
    below, device, _ = gated()
    task, held = await begun(device, below)
    draining = asyncio.create_task(drain(device))
    await settled()
    draining.cancel()
    with pytest.raises(asyncio.CancelledError):
        await draining
    assert not device.is_drained
    second, held_second = await begun(device, below)
    for each in (held, held_second):
        each.finish()
    await asyncio.gather(task, second)


async def test_drain_ends_with_an_error_inside() -> None:
    _, device, _ = gated()
    with pytest.raises(DeviceError):
        async with device.drained():
            raise DeviceError(errno.EIO, "inside")
    assert not device.is_drained


async def test_cancelled_write_that_waited_was_never_there() -> None:
    below, device, listener = gated()
    async with device.drained():
        task = asyncio.create_task(device.pwrite(b"x", 0))
        await settled()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    await drain(device)
    assert listener.heard == []
    assert below.calls == []


async def test_reads_and_flushes_pass_while_drained() -> None:
    below, device, _ = gated()
    below.data[:4] = b"data"
    buffer, now = bytearray(4), bytearray(4)
    async with device.drained():
        await device.pread(buffer, 0)
        assert device.pread_now(now, 0)
        await device.cache(0, 4)
        assert (await device.extents(0, SIZE)).is_complete
        flushing = asyncio.create_task(device.flush())
        held = await below.next()
        assert held.name == "flush"
        held.finish()
        await flushing
    assert buffer == now == b"data"


# --- exchanging the disk below ---------------------------------------------------------------------------------------


async def test_what_waited_goes_to_the_new_disk() -> None:
    old, device, listener = gated()
    new = GatedDevice(SIZE + 4096, name="new", writes_now=True)
    new.data[:3] = b"new"
    async with device.drained():
        task = asyncio.create_task(device.pwrite(b"x", 10))
        await settled()
        device.replace_below(new)
    (await new.next()).finish()
    await task
    assert old.calls == []
    assert new.data[10:11] == b"x"
    assert device.below is new
    assert (device.name, device.size) == ("new", SIZE)
    buffer = bytearray(3)
    assert device.pread_now(buffer, 0)
    assert buffer == b"new"
    assert device.pwrite_now(b"y", 20)
    assert new.data[20:21] == b"y"
    assert len(listener.heard) == 4


async def test_disk_below_is_only_exchanged_while_drained() -> None:
    below, device, _ = gated()
    with pytest.raises(AssertionError, match="while drained"):
        device.replace_below(MemoryDevice(SIZE))
    task, held = await begun(device, below)
    draining = asyncio.create_task(drain(device))
    await settled()
    with pytest.raises(AssertionError, match="in flight"):
        device.replace_below(MemoryDevice(SIZE))
    held.finish()
    await asyncio.gather(task, draining)


async def test_smaller_disk_is_refused() -> None:
    _, device, _ = gated()
    async with device.drained():
        with pytest.raises(AssertionError, match="smaller"):
            device.replace_below(MemoryDevice(SIZE - 1))


class ClosableDevice(MemoryDevice):
    closed = False

    async def aclose(self) -> None:
        self.closed = True


async def test_closing_closes_the_disk_below() -> None:
    below = ClosableDevice(SIZE)
    await TrackedDevice(below).aclose()
    assert below.closed
