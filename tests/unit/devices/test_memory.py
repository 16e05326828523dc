from __future__ import annotations

import errno

import pytest

from nbdmirror.devices.memory import PAGE, MemoryDevice
from nbdmirror.errors import DeviceError, UsageError
from nbdmirror.extents import DATA, HOLE, ZERO
from nbdmirror.protocol.constants import NO_HOLE

HOLE_ZERO = HOLE | ZERO


async def status(device: MemoryDevice, offset: int = 0, length: int | None = None) -> list[tuple[int, int]]:
    extents = await device.extents(offset, device.size - offset if length is None else length)
    return [(extent.length, extent.flags) for extent in extents]


async def test_a_new_disk_is_one_hole_of_zeroes() -> None:
    device = MemoryDevice(3 * PAGE + 5)
    assert await status(device) == [(3 * PAGE + 5, HOLE_ZERO)]
    assert not any(device.data)


def test_now_methods_always_answer() -> None:
    device = MemoryDevice(2 * PAGE)
    assert device.pwrite_now(b"abc", PAGE - 1)
    buffer = bytearray(5)
    assert device.pread_now(buffer, PAGE - 2)
    assert buffer == b"\0abc\0"


async def test_written_pages_are_data_whatever_was_written() -> None:
    device = MemoryDevice(4 * PAGE)
    await device.pwrite(bytes(2), 2 * PAGE - 1)
    assert await status(device) == [(PAGE, HOLE_ZERO), (2 * PAGE, DATA), (PAGE, HOLE_ZERO)]


async def test_extents_are_cut_to_the_range() -> None:
    device = MemoryDevice(4 * PAGE)
    await device.pwrite(b"x", PAGE)
    assert await status(device, PAGE - 10, 20) == [(10, HOLE_ZERO), (10, DATA)]


async def test_zero_makes_holes_of_whole_pages_only() -> None:
    device = MemoryDevice(3 * PAGE + 5)
    await device.pwrite(b"x" * device.size, 0)
    await device.zero(PAGE - 1, device.size - PAGE + 1)
    assert device.data == b"x" * (PAGE - 1) + bytes(2 * PAGE + 6)
    assert await status(device) == [(PAGE, DATA), (2 * PAGE + 5, HOLE_ZERO)]


async def test_no_hole_allocates_every_page_that_is_touched() -> None:
    device = MemoryDevice(4 * PAGE)
    await device.pwrite(b"x", 0)
    await device.zero(PAGE - 1, 2 * PAGE, NO_HOLE)
    assert await status(device) == [(PAGE, DATA), (2 * PAGE, ZERO), (PAGE, HOLE_ZERO)]


async def test_trim_drops_whole_pages_and_nothing_else() -> None:
    device = MemoryDevice(3 * PAGE)
    await device.pwrite(b"x" * device.size, 0)
    await device.trim(1, 2 * PAGE)
    assert device.data == b"x" * PAGE + bytes(PAGE) + b"x" * PAGE
    assert await status(device) == [(PAGE, DATA), (PAGE, HOLE_ZERO), (PAGE, DATA)]
    await device.trim(1, 2)
    assert await status(device) == [(PAGE, DATA), (PAGE, HOLE_ZERO), (PAGE, DATA)]


async def test_read_only_refuses_every_change() -> None:
    device = MemoryDevice(PAGE, read_only=True)
    for change in (device.pwrite(b"x", 0), device.zero(0, 1), device.trim(0, 1)):
        with pytest.raises(DeviceError) as caught:
            await change
        assert caught.value.errno == errno.EPERM


def test_a_negative_size_is_refused() -> None:
    with pytest.raises(UsageError):
        MemoryDevice(-1)
