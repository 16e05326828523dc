"""Comparing: every byte counts, and holes that both sides promise are not read."""

from __future__ import annotations

import asyncio
import gc
import random

import pytest

from nbdmirror.devices.memory import MemoryDevice
from nbdmirror.errors import DeviceError
from nbdmirror.extents import HOLE, ZERO, ExtentList
from nbdmirror.mirror.compare import Comparison, compare
from nbdmirror.units import GiB, KiB, MiB
from tests.support.fakes import settled
from tests.support.rig import HeldDisk, eio

SIZE = 3 * MiB + 513


def disk(*parts: tuple[int, bytes], size: int = SIZE) -> HeldDisk:
    made = HeldDisk(size)
    for offset, data in parts:
        MemoryDevice.pwrite_now(made, data, offset)
    return made


async def test_same() -> None:
    parts = [(0, b"a" * 5000), (2 * MiB - 1, b"xyz"), (SIZE - 1, b"e")]
    assert await compare(disk(*parts), disk(*parts)) == Comparison(None, 0, SIZE)


async def test_written_zeroes_equal_a_hole() -> None:
    assert await compare(disk((0, bytes(SIZE))), disk()) == Comparison(None, 0, SIZE)


@pytest.mark.parametrize("offset", [0, 1, MiB - 1, MiB, 2 * MiB + 77, SIZE - 1])
async def test_one_byte(offset: int) -> None:
    assert await compare(disk((offset, b"\1")), disk()) == Comparison(offset, 1, SIZE)
    assert await compare(disk(), disk((offset, b"\1"))) == Comparison(offset, 1, SIZE)


async def test_first_and_total_of_many() -> None:
    seed = random.randrange(2**32)
    chance = random.Random(seed)
    left, right = disk((0, chance.randbytes(SIZE))), disk((0, chance.randbytes(SIZE)))
    unlike = [at for at in range(SIZE) if left.data[at] != right.data[at]]
    assert await compare(left, right) == Comparison(unlike[0], len(unlike), SIZE), f"seed {seed}"


async def test_sizes_that_differ() -> None:
    longer = disk((5, b"x"), size=SIZE + 100)
    assert await compare(longer, disk((5, b"x"))) == Comparison(SIZE, 100, SIZE)
    assert await compare(disk((5, b"y")), longer) == Comparison(5, 101, SIZE)
    assert await compare(disk(size=0), disk(size=0)) == Comparison(None, 0, 0)
    assert await compare(disk(size=0), disk(size=7)) == Comparison(0, 7, 0)


async def test_common_holes_are_not_read() -> None:
    left, right = disk((64 * KiB, b"l" * 4096)), disk((2 * MiB, b"r" * 4096))
    assert (await compare(left, right)).differing == 8192
    read = {(held.offset, held.length) for held in left.named("pread")}
    assert read == {(64 * KiB, 4096), (2 * MiB, 4096)}
    assert {(held.offset, held.length) for held in right.named("pread")} == read


class Hollow(MemoryDevice):
    """All hole, of a size that no memory holds."""

    def __init__(self) -> None:
        super().__init__(0)
        self.size = 1024 * GiB

    async def extents(self, offset: int, length: int) -> ExtentList:
        extents = ExtentList(offset, length)
        extents.add(length, HOLE | ZERO)
        return extents


async def test_length_of_a_hole_does_not_matter() -> None:
    assert (await compare(Hollow(), Hollow())).first is None


@pytest.mark.parametrize("side", [0, 1])
async def test_disk_that_can_not_be_read(side: int) -> None:
    pair = [disk((0, b"x" * SIZE)), disk((0, b"x" * SIZE))]
    pair[side].broken["pread"] = eio()
    with pytest.raises(DeviceError):
        await compare(*pair)


async def test_failure_leaves_nothing_behind() -> None:
    """Many reads fail at once: each is seen, and none is still going on."""
    complaints: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: complaints.append(context))
    size = 64 * MiB
    pair = [disk((0, b"x" * size), size=size), disk((0, b"x" * size), size=size)]
    pair[0].holding = {"pread"}
    work = asyncio.ensure_future(compare(*pair))
    await settled()
    held = pair[0].named("pread")
    assert len(held) == 16
    for call in held[:-1]:
        call.fail(eio())
    with pytest.raises(DeviceError):
        await work
    await settled()
    gc.collect()
    assert complaints == []


async def test_reads_keep_to_the_blocks_of_each_disk() -> None:
    left, right = disk((5000, b"x"), size=MiB).with_blocks(512), disk(size=MiB).with_blocks(8192)
    assert await compare(left, right) == Comparison(5000, 1, MiB)
    for device in (left, right):
        for held in device.calls:
            assert held.offset % device.limits.minimum == held.length % device.limits.minimum == 0
