"""Any byte range over a disk of whole blocks: the model is a bytearray, and the disk below checks what it is asked."""

from __future__ import annotations

import asyncio
import errno
import random

import pytest

from nbdmirror.devices.aligned import AlignedDevice
from nbdmirror.devices.memory import MemoryDevice
from nbdmirror.errors import DeviceError
from nbdmirror.extents import DATA, ZERO, ExtentList
from nbdmirror.protocol.constants import FAST_ZERO, FUA, NO_HOLE
from tests.support.fakes import settled
from tests.support.rig import HeldDisk, eio

BLOCK = 512
SIZE = 16 * BLOCK


class Blocky(HeldDisk):
    """Takes whole blocks and the flags that belong to a call, and nothing else."""

    allowed = {"pwrite": FUA, "zero": FUA | NO_HOLE | FAST_ZERO, "trim": FUA}

    def __init__(self, *, block: int = BLOCK) -> None:
        super().__init__(SIZE)
        self.with_blocks(block)

    async def _hold(self, name: str, offset: int, length: int, flags: int = 0) -> None:
        if name != "flush":
            block = self.limits.minimum
            assert not offset % block, f"{name} at {offset}"
            assert not length % block, f"{name} of {length}"
            assert length > 0
            assert offset + length <= self.size
        assert not flags & ~self.allowed.get(name, 0), f"{name} with flags {flags}"
        await super()._hold(name, offset, length, flags)


def test_disk_that_takes_any_byte_is_left_alone() -> None:
    disk = MemoryDevice(SIZE)
    assert AlignedDevice.over(disk) is disk
    blocky = Blocky()
    over = AlignedDevice.over(blocky)
    assert (over.limits.minimum, over.size, over.capabilities) == (1, SIZE, blocky.capabilities)


@pytest.mark.parametrize("block", [512, 2048])
async def test_any_operations_are_those_of_a_plain_disk(block: int) -> None:
    seed = random.randrange(2**32)
    chance = random.Random(seed)
    below = Blocky(block=block)
    device, model = AlignedDevice(below), bytearray(SIZE)
    for _ in range(600):
        offset = chance.randrange(SIZE)
        length = min(chance.choice([1, 3, 511, 512, 513, 1024, 2500, SIZE]), SIZE - offset)
        if chance.random() < 0.5:
            offset = offset // block * block
        match chance.choice(["write", "zero", "read", "trim"]):
            case "write":
                data = chance.randbytes(length)
                await device.pwrite(data, offset, chance.choice([0, FUA]))
                model[offset : offset + length] = data
            case "zero":
                await device.zero(offset, length, chance.choice([0, FUA, NO_HOLE, FUA | NO_HOLE | FAST_ZERO]))
                model[offset : offset + length] = bytes(length)
            case "trim":
                before = bytes(below.data)
                await device.trim(offset, length, chance.choice([0, FUA]))
                assert below.data[:offset] == before[:offset], f"seed {seed}"
                assert below.data[offset + length :] == before[offset + length :], f"seed {seed}"
                model[:] = below.data
            case _:
                buffer = bytearray(length)
                await device.pread(buffer, offset)
                assert buffer == model[offset : offset + length], f"seed {seed}"
        assert below.data == model, f"seed {seed}"


@pytest.mark.parametrize("turn", range(20))
async def test_concurrent_writers_of_one_block_lose_nothing(turn: int) -> None:
    """Each writer has bytes of its own; the calls below finish in any order."""
    chance = random.Random(turn)
    below = Blocky()
    below.holding = {"pread", "pwrite", "zero"}
    device, model = AlignedDevice(below), bytearray(SIZE)
    places = chance.sample(range(0, 4 * BLOCK, 128), 14)
    work = []
    for number, offset in enumerate(places):
        length = chance.choice([1, 100, 128])
        if chance.random() < 0.2:
            work.append(asyncio.ensure_future(device.zero(offset, length)))
            continue
        data = bytes([number + 1]) * length
        model[offset : offset + length] = data
        work.append(asyncio.ensure_future(device.pwrite(data, offset)))
    for block in (5, 6, 7):
        model[block * BLOCK : (block + 1) * BLOCK] = b"w" * BLOCK
        work.append(asyncio.ensure_future(device.pwrite(b"w" * BLOCK, block * BLOCK)))
    for _ in range(2000):
        await settled()
        held = [call for call in below.calls if call.is_held]
        if not held:
            break
        chance.choice(held).finish()
    await asyncio.gather(*work)
    assert below.data == model


async def test_whole_block_waits_for_a_part_of_it_that_is_being_changed() -> None:
    below = Blocky()
    below.holding = {"pread"}
    device = AlignedDevice(below)
    part = asyncio.ensure_future(device.pwrite(b"part", 10))
    reading = await below.next()
    whole = asyncio.ensure_future(device.pwrite(b"w" * BLOCK, 0))
    await settled()
    assert not whole.done()
    reading.finish()
    await asyncio.gather(part, whole)
    assert below.data[:BLOCK] == b"w" * BLOCK


async def test_part_of_a_block_waits_for_the_whole_one_that_is_being_written() -> None:
    below = Blocky()
    below.holding = {"pwrite"}
    device = AlignedDevice(below)
    whole = asyncio.ensure_future(device.pwrite(b"w" * BLOCK, 0))
    writing = await below.next()
    part = asyncio.ensure_future(device.pwrite(b"part", 10))
    await settled()
    assert below.named("pread") == []
    below.holding.clear()
    writing.finish()
    await asyncio.gather(part, whole)
    assert below.data[:16] == b"w" * 10 + b"part" + b"ww"


async def test_whole_blocks_do_not_wait_for_each_other() -> None:
    below = Blocky()
    below.holding = {"pwrite"}
    device = AlignedDevice(below)
    writes = [asyncio.ensure_future(device.pwrite(b"w" * BLOCK, at)) for at in range(0, SIZE, BLOCK)]
    await settled()
    held = [call for call in below.calls if call.is_held]
    assert len(held) == 16
    for call in held:
        call.finish()
    await asyncio.gather(*writes)


@pytest.mark.parametrize("call", ["pread", "pwrite"])
async def test_failure_lets_others_go_on(call: str) -> None:
    below = Blocky()
    device = AlignedDevice(below)
    below.broken[call] = eio()
    for offset in (0, 3):
        if call == "pwrite" or offset:
            with pytest.raises(DeviceError):
                await device.pwrite(b"x" * BLOCK, offset)
    below.broken.clear()
    await device.pwrite(b"y" * BLOCK, 3)
    assert below.data[3 : 3 + BLOCK] == b"y" * BLOCK


async def test_fast_zero_is_refused_before_anything_has_changed() -> None:
    below = Blocky()
    device = AlignedDevice(below)
    await device.pwrite(b"x" * SIZE, 0)
    below.broken["zero"] = DeviceError(errno.ENOTSUP, "held")
    with pytest.raises(DeviceError):
        await device.zero(100, 2 * BLOCK, FAST_ZERO)
    assert below.data == b"x" * SIZE


class Coarse(Blocky):
    """Says of each block something else, in pieces that end where they like."""

    async def extents(self, offset: int, length: int) -> ExtentList:
        await self._hold("extents", offset, length)
        extents = ExtentList(offset, length)
        while not extents.is_complete:
            extents.add(300, ZERO if extents.length // 300 % 2 else DATA)
        return extents


@pytest.mark.parametrize(("offset", "length"), [(0, SIZE), (5, 7), (400, 600), (511, 2), (SIZE - 1, 1)])
async def test_status_is_cut_to_the_range(offset: int, length: int) -> None:
    extents = await AlignedDevice(Coarse()).extents(offset, length)
    assert extents.offset == offset
    assert extents.length == length
    assert next(extent.offset for extent in extents) == offset
    start = offset // BLOCK * BLOCK
    for extent in extents:
        assert extent.is_zero == bool((extent.offset - start) // 300 % 2)


async def test_the_rest_passes() -> None:
    below = Blocky()
    device = AlignedDevice(below)
    await device.cache(5, 7)
    await device.flush()
    await device.aclose()
    assert [held.name for held in below.calls] == ["flush"]
