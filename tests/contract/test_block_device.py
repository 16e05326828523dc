"""What every BlockDevice does, whatever is behind it."""

from __future__ import annotations

import asyncio
import errno
import random
from typing import TYPE_CHECKING

import pytest

from nbdmirror.errors import DeviceError
from nbdmirror.protocol.constants import FAST_ZERO, FUA, NO_HOLE
from nbdmirror.units import round_down

if TYPE_CHECKING:
    from nbdmirror.devices.base import BlockDevice

KIB = 1024


async def read(device: BlockDevice, offset: int, length: int) -> bytearray:
    buffer = bytearray(b"\xee" * length)
    await device.pread(buffer, offset)
    return buffer


def pattern(length: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(length)


def tail(device: BlockDevice) -> tuple[int, int]:
    """Offset and length of the last, odd bytes: as unaligned as the device takes them."""
    unit = device.limits.minimum
    start = round_down(device.size - 2 * max(unit, 100), unit) + (1 if unit == 1 else 0)
    return start, device.size - start


async def test_a_fresh_disk_reads_as_zeroes_to_its_last_byte(device: BlockDevice) -> None:
    assert await read(device, 0, device.size) == bytes(device.size)


async def test_what_is_written_is_read_and_nothing_else_changes(device: BlockDevice) -> None:
    data = pattern(96 * KIB)
    await device.pwrite(data, 32 * KIB)
    assert await read(device, 0, 192 * KIB) == bytes(32 * KIB) + data + bytes(64 * KIB)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
async def test_any_kind_of_data_and_a_view_as_buffer(device: BlockDevice, kind: type) -> None:
    await device.pwrite(kind(pattern(4096)), 4096)
    buffer = bytearray(3 * 4096)
    await device.pread(memoryview(buffer)[4096:8192], 4096)
    assert buffer == bytes(4096) + pattern(4096) + bytes(4096)


async def test_the_last_odd_bytes(device: BlockDevice) -> None:
    start, length = tail(device)
    await device.pwrite(pattern(length), start)
    assert await read(device, start, length) == pattern(length)
    await device.zero(start, length)
    assert await read(device, start, length) == bytes(length)
    extents = await device.extents(start, length)
    assert extents.offset == start
    assert 0 < extents.length <= length


@pytest.mark.parametrize("flags", [0, FUA, NO_HOLE, FUA | NO_HOLE])
async def test_zero(device: BlockDevice, flags: int) -> None:
    data = pattern(256 * KIB)
    await device.pwrite(data, 0)
    await device.zero(64 * KIB, 128 * KIB, flags)
    assert await read(device, 0, 256 * KIB) == data[: 64 * KIB] + bytes(128 * KIB) + data[192 * KIB :]


async def test_fast_zero_is_done_or_refused_with_enotsup(device: BlockDevice) -> None:
    data = pattern(64 * KIB)
    await device.pwrite(data, 0)
    try:
        await device.zero(0, len(data), FAST_ZERO)
    except DeviceError as refusal:
        assert refusal.errno == errno.ENOTSUP  # noqa: PT017  refusing is as good as doing
        assert await read(device, 0, len(data)) == data
    else:
        assert device.capabilities.fast_zero
        assert not any(await read(device, 0, len(data)))


async def test_a_write_with_fua_then_a_flush(device: BlockDevice) -> None:
    await device.pwrite(pattern(4096), 0, FUA)
    await device.flush()
    assert await read(device, 0, 4096) == pattern(4096)


async def test_trim_touches_nothing_outside(device: BlockDevice) -> None:
    data = pattern(256 * KIB)
    await device.pwrite(data, 0)
    await device.trim(64 * KIB, 128 * KIB, FUA)
    assert await read(device, 0, 64 * KIB) == data[: 64 * KIB]
    assert await read(device, 192 * KIB, 64 * KIB) == data[192 * KIB :]
    await device.pwrite(data, 0)
    assert await read(device, 0, 256 * KIB) == data


async def test_cache_is_a_hint(device: BlockDevice) -> None:
    await device.cache(0, 64 * KIB)


async def walk(device: BlockDevice) -> list[tuple[int, int, bool]]:
    """`(offset, end, zero)` of the whole disk, always making progress and never leaving the range."""
    found, offset = [], 0
    while offset < device.size:
        extents = await device.extents(offset, device.size - offset)
        assert extents.offset == offset
        assert 0 < extents.length <= device.size - offset
        for extent in extents:
            found.append((extent.offset, extent.end, extent.is_zero))
            offset = extent.end
    return found


async def test_extents_promise_zeroes_only_where_they_are(device: BlockDevice) -> None:
    data = pattern(128 * KIB)
    await device.pwrite(data, 256 * KIB)
    await device.pwrite(data, 640 * KIB)
    await device.zero(640 * KIB, 64 * KIB)
    await device.flush()
    for offset, end, zero in await walk(device):
        assert not zero or not any(await read(device, offset, end - offset))


async def test_extents_know_a_hole_from_data(device: BlockDevice) -> None:
    if not device.capabilities.extents:
        assert [extent.flags for extent in await device.extents(0, device.size)] == [0]
        return
    await device.pwrite(pattern(128 * KIB), 512 * KIB)
    await device.flush()
    assert (await device.extents(0, 512 * KIB))[0].is_zero
    data = await device.extents(512 * KIB, 64 * KIB)
    assert [(extent.offset, extent.length, extent.flags) for extent in data] == [(512 * KIB, 64 * KIB, 0)]


async def test_now_means_done_when_it_says_so(device: BlockDevice) -> None:
    await device.pwrite(pattern(4096), 0)
    if device.pwrite_now(pattern(4096, 2), 4096):
        assert await read(device, 4096, 4096) == pattern(4096, 2)
    buffer = bytearray(4096)
    if device.pread_now(buffer, 0):
        assert buffer == pattern(4096)


async def work_on_a_region(device: BlockDevice, model: bytearray, start: int, end: int, chance: random.Random) -> None:
    """Random operations on one's own region, each checked against the model."""
    unit = device.limits.minimum
    for _ in range(60):
        offset = start + round_down(chance.randrange(end - start), unit)
        length = min(max(round_down(chance.randrange(1, 40_000), unit), unit), end - offset)
        flags = chance.choice((0, 0, 0, FUA))
        match chance.choice(("read", "write", "zero", "no hole", "trim", "flush", "extents")):
            case "read":
                assert await read(device, offset, length) == model[offset : offset + length]
            case "write":
                model[offset : offset + length] = data = chance.randbytes(length)
                await device.pwrite(data, offset, flags)
            case "zero":
                model[offset : offset + length] = bytes(length)
                await device.zero(offset, length, flags)
            case "no hole":
                model[offset : offset + length] = bytes(length)
                await device.zero(offset, length, flags | NO_HOLE)
            case "trim":  # undefined afterwards, so it is written again
                await device.trim(offset, length, flags)
                model[offset : offset + length] = data = chance.randbytes(length)
                await device.pwrite(data, offset)
            case "flush":
                await device.flush()
            case _:
                for extent in await device.extents(offset, length):
                    assert not extent.is_zero or not any(model[extent.offset : extent.end])


@pytest.mark.parametrize("seed", range(3))
async def test_concurrent_operations_match_a_model(device: BlockDevice, seed: int) -> None:
    model = bytearray(device.size)
    workers = 8
    step = round_down(device.size // workers, 512)
    bounds = [index * step for index in range(workers)] + [device.size]
    async with asyncio.TaskGroup() as group:
        for index in range(workers):
            chance = random.Random(seed * workers + index)
            group.create_task(work_on_a_region(device, model, bounds[index], bounds[index + 1], chance))
    await device.flush()
    assert await read(device, 0, device.size) == model


async def test_closing_twice_is_closing(device: BlockDevice) -> None:
    await device.aclose()
    await device.aclose()


async def test_repr_and_name_tell_what_it_is(device: BlockDevice) -> None:
    assert device.name
    assert device.name in repr(device)
    assert str(device.size) in repr(device)
