"""The copier: what travels, what is only zeroed, what need not be sent at all, and whose fault it is when it fails."""

from __future__ import annotations

import errno

import pytest

from nbdmirror.devices.memory import MemoryDevice
from nbdmirror.errors import DeviceError
from nbdmirror.extents import DATA, HOLE, ZERO, ExtentList
from nbdmirror.mirror.copier import MOST_ZERO, Copier, CopyOptions
from nbdmirror.mirror.plan import Unit, plan
from nbdmirror.mirror.progress import Progress
from nbdmirror.mirror.trouble import CopyFailed
from nbdmirror.mirror.zero_map import ZeroMap
from nbdmirror.protocol.constants import NO_HOLE
from nbdmirror.units import GiB, KiB, MiB
from tests.support.rig import HeldDisk, eio

CHUNK = 16 * KiB
SIZE = 8 * CHUNK


class Rigged:
    """A copier with its disks, its map and its account."""

    def __init__(self, *, size: int = SIZE, unmap: bool = True, use_extents: bool = True, request_size: int = CHUNK) -> None:
        self.source, self.target = HeldDisk(size, name="source"), HeldDisk(size, name="target")
        MemoryDevice.pwrite_now(self.target, b"t" * size, 0)
        self.map = ZeroMap(size, CHUNK)
        self.progress = Progress()
        options = CopyOptions(request_size=request_size, unmap=unmap, use_extents=use_extents)
        self.copier = Copier(self.source, self.target, self.map, self.progress, options)

    def fill(self, data: bytes, offset: int = 0) -> None:
        MemoryDevice.pwrite_now(self.source, data, offset)

    async def copy(self, offset: int = 0, length: int | None = None) -> list[Unit]:
        """Everything, as the job would do it."""
        length = self.source.size - offset if length is None else length
        extents = await self.copier.status(offset, length, length)
        units = list(plan(extents, self.copier.geometry(CHUNK)))
        for unit in units:
            await self.copier.carry_out(unit)
        return units

    def sent(self, name: str) -> list[tuple[int, int]]:
        return [(held.offset, held.length) for held in self.target.named(name)]


async def test_data_travels() -> None:
    rig = Rigged()
    rig.fill(b"d" * SIZE)
    await rig.copy()
    assert rig.target.data == rig.source.data
    assert rig.sent("pwrite") == [(at, CHUNK) for at in range(0, SIZE, CHUNK)]
    assert rig.progress == Progress(read=SIZE, sent=SIZE)


async def test_promised_zeroes_are_not_read() -> None:
    rig = Rigged()
    rig.fill(b"d" * CHUNK, CHUNK)
    await rig.copy()
    assert rig.target.data == rig.source.data
    assert rig.sent("zero") == [(0, CHUNK), (2 * CHUNK, SIZE - 2 * CHUNK)]
    assert rig.progress == Progress(read=CHUNK, sent=CHUNK, zeroed=SIZE - CHUNK)


async def test_zeroes_found_in_data_do_not_travel() -> None:
    rig = Rigged()
    rig.fill(bytes(CHUNK) + b"d" * 4096 + bytes(4096) + b"d" * 8192 + bytes(SIZE - 2 * CHUNK))
    await rig.copy()
    assert rig.target.data == rig.source.data
    assert rig.progress.read == SIZE
    # The chunk that begins with data is looked at by its first byte only: it travels whole.
    assert rig.sent("pwrite") == [(CHUNK, CHUNK)]
    assert rig.progress.zeroed == SIZE - CHUNK


async def test_zeroes_in_front_of_data_are_found_by_the_grain() -> None:
    rig = Rigged()
    rig.fill(bytes(4096) + b"d" * 4096 + bytes(8192))
    await rig.copy(0, CHUNK)
    assert rig.target.data[:CHUNK] == rig.source.data[:CHUNK]
    assert rig.sent("pwrite") == [(4096, 4096)]
    assert rig.sent("zero") == [(0, 4096), (8192, 8192)]


async def test_grain_is_no_finer_than_the_targets_blocks() -> None:
    rig = Rigged()
    rig.target.with_blocks(8192)
    rig.fill(bytes(4096) + b"d" * 4096 + bytes(8192))
    await rig.copy(0, CHUNK)
    assert rig.target.data[:CHUNK] == rig.source.data[:CHUNK]
    assert rig.sent("pwrite") == [(0, 8192)]
    assert rig.sent("zero") == [(8192, 8192)]


async def test_zeroes_are_not_sent_where_the_target_reads_zero() -> None:
    rig = Rigged()
    await rig.target.zero(0, SIZE)
    rig.map.set_zero(0, SIZE)
    rig.target.calls.clear()
    rig.fill(b"d" * 100, 3 * CHUNK)
    await rig.copy()
    assert rig.target.data == rig.source.data
    assert rig.sent("pwrite") == [(3 * CHUNK, 4096)]
    assert rig.sent("zero") == []
    assert rig.progress == Progress(read=4096, sent=4096, skipped=SIZE - 4096)


async def test_chunk_that_got_data_is_zeroed_again() -> None:
    rig = Rigged()
    rig.map.set_zero(0, SIZE)
    await rig.target.zero(0, SIZE)
    rig.fill(b"d" * SIZE)
    await rig.copy()
    await rig.source.zero(0, SIZE)
    rig.target.calls.clear()
    await rig.copy()
    assert rig.target.data == bytes(SIZE)
    assert rig.progress.skipped == 0
    assert rig.sent("zero") == [(0, SIZE)]
    rig.target.calls.clear()
    await rig.copy()
    assert rig.target.calls == []
    assert rig.progress.skipped == SIZE


async def test_data_that_fails_leaves_nothing_known() -> None:
    rig = Rigged()
    rig.map.set_zero(0, SIZE)
    await rig.target.zero(0, SIZE)
    rig.fill(b"d" * CHUNK)
    rig.target.broken["pwrite"] = eio()
    with pytest.raises(CopyFailed):
        await rig.copy(0, CHUNK)
    assert rig.target.data[0] == ord("d")
    await rig.source.zero(0, SIZE)
    await rig.copy(0, CHUNK)
    assert rig.target.data == bytes(SIZE)


async def test_zeroing_that_fails_teaches_nothing() -> None:
    rig = Rigged()
    rig.target.broken["zero"] = eio()
    with pytest.raises(CopyFailed) as caught:
        await rig.copy()
    assert caught.value.operation == "write"
    rig.target.broken.clear()
    await rig.copy()
    assert rig.target.data == bytes(SIZE)
    assert rig.progress == Progress(zeroed=SIZE)


@pytest.mark.parametrize(("unmap", "flags"), [(True, 0), (False, NO_HOLE)])
async def test_holes_are_made_only_where_wanted(unmap: bool, flags: int) -> None:
    rig = Rigged(unmap=unmap)
    await rig.copy()
    assert [held.flags for held in rig.target.named("zero")] == [flags]


@pytest.mark.parametrize(("side", "call", "operation"), [("source", "pread", "read"), ("target", "pwrite", "write")])
async def test_failure_names_its_side(side: str, call: str, operation: str) -> None:
    rig = Rigged()
    rig.fill(b"d" * SIZE)
    getattr(rig, side).broken[call] = DeviceError(errno.ENOSPC, side)
    with pytest.raises(CopyFailed) as caught:
        await rig.copy()
    assert (caught.value.operation, caught.value.cause.errno) == (operation, errno.ENOSPC)
    assert rig.progress.sent == 0


async def test_unit_fails_only_when_all_its_requests_have_ended() -> None:
    rig = Rigged()
    rig.fill(bytes(4096) + b"d" * 4096 + bytes(8192))
    rig.target.broken["zero"] = eio()
    with pytest.raises(CopyFailed):
        await rig.copy(0, CHUNK)
    assert rig.target.data[4096:8192] == b"d" * 4096
    assert rig.progress.sent == 4096


async def test_without_extents_everything_is_read() -> None:
    rig = Rigged(use_extents=False)
    await rig.copy()
    assert rig.source.named("extents") == []
    assert rig.progress == Progress(read=SIZE, zeroed=SIZE)
    assert rig.target.data == bytes(SIZE)


class OneByOne(HeldDisk):
    """Tells its status in pieces of 512 bytes."""

    async def extents(self, offset: int, length: int) -> ExtentList:
        await self._hold("extents", offset, length)
        extents = ExtentList(offset, min(length, 512))
        extents.add(512, ZERO if offset // 512 % 2 else DATA)
        return extents


async def test_status_is_asked_for_until_it_covers_a_chunk_but_not_for_ever() -> None:
    source = OneByOne(SIZE)
    copier = Copier(source, HeldDisk(SIZE), ZeroMap(SIZE, CHUNK), Progress(), CopyOptions())
    extents = await copier.status(0, SIZE, 4096)
    assert extents.length == 4096
    assert len(extents) == 8
    big = 64 * KiB
    extents = await copier.status(0, SIZE, big)
    assert extents.length >= big
    assert not extents[len(extents) - 1].is_zero
    assert len(source.named("extents")) <= 8 + 64


async def test_target_tells_what_it_reads_as_zero() -> None:
    rig = Rigged()
    await rig.target.zero(0, 3 * CHUNK)
    await rig.copier.learn_zeroes()
    assert rig.map.reads_zero(0, 3 * CHUNK)
    assert not rig.map.reads_zero(3 * CHUNK, 1)


class Holes(HeldDisk):
    """Says HOLE, but promises nothing of what it reads."""

    async def extents(self, offset: int, length: int) -> ExtentList:
        extents = ExtentList(offset, length)
        extents.add(length, HOLE)
        return extents


async def test_hole_of_the_target_is_not_known_to_be_zero() -> None:
    zero_map = ZeroMap(SIZE, CHUNK)
    await Copier(HeldDisk(SIZE), Holes(SIZE), zero_map, Progress(), CopyOptions()).learn_zeroes()
    assert not zero_map.reads_zero(0, 1)


def test_geometry_is_whole_chunks() -> None:
    copier = Rigged(request_size=3 * CHUNK + 5).copier
    bounds = copier.geometry(CHUNK)
    assert (bounds.unit, bounds.most_zero, bounds.alignment, bounds.size) == (3 * CHUNK, MOST_ZERO, 1, SIZE)
    bounds = copier.geometry(64 * MiB)
    assert bounds.unit == 64 * MiB
    assert copier.geometry(GiB).most_zero == GiB


async def test_short_zeroes_among_data_are_no_data() -> None:
    """However many: to a target that is not known to be zero they travel as zeroes, else not at all."""
    length, block = 256 * KiB, 4 * KiB
    for known_zero in (False, True):
        rig = Rigged(size=length, request_size=length)
        rig.fill((bytes(block) + b"d" * block) * 32)
        if known_zero:
            MemoryDevice.pwrite_now(rig.target, bytes(length), 0)
            rig.map.set_zero(0, length)
        await rig.copy()
        assert rig.target.data == rig.source.data
        assert rig.sent("pwrite") == [(offset, block) for offset in range(block, length, 2 * block)]


async def test_little_is_in_flight_to_a_target_that_answers_quickly() -> None:
    rig = Rigged()
    rig.fill(b"d" * SIZE)
    assert rig.copier.buffer < CopyOptions().buffer, "before anything is known"
    await rig.copy()
    assert rig.copier.buffer < CopyOptions().buffer


def test_all_that_is_allowed_is_in_flight_to_a_target_that_is_far_away() -> None:
    rig = Rigged()
    for _ in range(8):
        rig.copier.note_write(0.05)
    assert rig.copier.buffer == CopyOptions().buffer
    rig.copier.note_write(0.001)
    assert rig.copier.buffer < CopyOptions().buffer
