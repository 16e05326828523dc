"""A mirror job in copy-mode write-blocking: both disks have a write before it is answered, in turns with the copying."""

from __future__ import annotations

import asyncio

import pytest

from tests.support.active import BLOCKING, blocking, completed, completed_later, ended, in_step, write
from tests.support.fakes import settled
from tests.support.rig import BOUND, CHUNK, SIZE, Rig, hurry


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch)


# --- both disks before the answer --------------------------------------------------------------------------------------


async def test_write_is_answered_when_both_disks_have_it() -> None:
    rig = await in_step()
    rig.source.holding.add("pwrite")
    rig.target.holding.add("pwrite")
    assert not rig.device.pwrite_now(b"never inline", 0)
    writing = write(rig, b"new!", CHUNK)
    on_source = await rig.source.next()
    await settled()
    assert rig.target.named("pwrite")[8:] == [], "the source comes first"
    on_source.finish()
    on_target = await rig.target.next()
    assert (on_target.offset, on_target.length) == (CHUNK, 4)
    assert not writing.done()
    on_target.finish()
    await writing
    assert rig.target.data == rig.source.data
    assert rig.job.is_actively_synced
    assert rig.dirty() == set()
    await completed_later(rig)


@pytest.mark.parametrize(("offset", "length"), [(0, 1), (1, CHUNK), (CHUNK - 1, 2), (100, 3 * CHUNK), (SIZE - 1, 1), (0, SIZE)])
@pytest.mark.parametrize("kind", ["pwrite", "zero", "trim"])
async def test_any_range_of_a_synced_disk(kind: str, offset: int, length: int) -> None:
    rig = await in_step()
    match kind:
        case "pwrite":
            await rig.device.pwrite(b"x" * length, offset)
        case "zero":
            await rig.device.zero(offset, length)
        case _:
            await rig.device.trim(offset, length)
    assert rig.target.data == rig.source.data
    assert rig.job.is_actively_synced
    assert rig.dirty() == set()
    await completed(rig)


async def test_offset_counts_what_was_carried_over() -> None:
    rig = await in_step()
    await rig.device.pwrite(b"x" * 100, 0)
    assert rig.job.progress == (SIZE + 100, SIZE + 100)
    await ended(rig)


async def test_fua_is_the_sources_business() -> None:
    rig = await in_step()
    flushes = len(rig.target.named("flush"))
    await rig.device.pwrite(b"x", 0, 1)
    await rig.device.flush()
    assert len(rig.target.named("flush")) == flushes
    assert all(call.flags == 0 for call in rig.target.named("pwrite"))
    await ended(rig)


async def test_zeroes_where_the_target_is_zero_are_not_sent() -> None:
    rig = Rig(copy_mode=BLOCKING, target_is_zero=True)
    await rig.ready()
    await settled()
    await rig.device.zero(0, 3 * CHUNK)
    await rig.device.zero(5 * CHUNK + 7, 100)
    assert rig.target.named("zero") == rig.target.named("pwrite") == []
    await rig.device.pwrite(b"x", 5 * CHUNK)
    await rig.device.zero(5 * CHUNK, 1)
    await rig.device.zero(5 * CHUNK + 3, 1)
    assert rig.target.data == rig.source.data
    assert rig.job.is_actively_synced
    await ended(rig)


# --- with the copying --------------------------------------------------------------------------------------------------


async def test_write_waits_for_the_copy_of_its_chunk_and_for_no_other() -> None:
    rig = blocking(holding_target={"pwrite"}, requests=2)
    rig.start()
    first, second = [await rig.target.next() for _ in range(2)]
    waiting = write(rig, b"new!", second.offset)
    free = write(rig, b"new!", 6 * CHUNK)
    await free  # dirty and not being copied: left to the copying, so answered at once
    await settled()
    assert not waiting.done()
    assert rig.source.data[second.offset : second.offset + 4] == b"old!"
    first.finish()
    await settled()
    assert not waiting.done()
    rig.target.holding.clear()
    second.finish()
    await waiting
    await rig.release()
    await rig.until("BLOCK_JOB_READY")
    assert rig.target.data == rig.source.data
    await completed(rig)


async def test_what_is_planned_makes_way() -> None:
    """A whole run is taken at a time; a write waits for none of it that was not begun."""
    rig = blocking(holding_target={"pwrite"}, requests=1)
    rig.start()
    held = await rig.target.next()
    assert rig.dirty() == set()
    async with asyncio.timeout(BOUND):
        await rig.device.pwrite(b"new!", 3 * CHUNK + 5)
        whole = write(rig, b"W" * CHUNK, 5 * CHUNK)
        carried = await rig.target.next()
    assert (carried.offset, carried.length) == (5 * CHUNK, CHUNK)
    assert rig.dirty() == {3, 5}
    carried.finish()
    await whole
    assert rig.dirty() == {3}, "covered wholly, so in step"
    held.finish()
    await rig.release()
    await rig.until("BLOCK_JOB_READY")
    assert sorted(call.offset for call in rig.target.named("pwrite")) == [number * CHUNK for number in range(8)]
    assert rig.target.data == rig.source.data
    await completed(rig)


async def test_rate_limit_holds_no_chunk() -> None:
    rig = blocking(speed=1)
    rig.start()
    await settled()
    async with asyncio.timeout(BOUND):
        await rig.device.pwrite(b"W" * CHUNK, 5 * CHUNK)
    assert 5 not in rig.dirty()
    rig.job.set_speed(0)
    await rig.until("BLOCK_JOB_READY")
    await completed(rig)


async def test_status_that_is_waited_for_makes_way() -> None:
    """The whole run is taken while its status is asked for; then what a write waits for is not even begun."""
    rig = blocking(holding_source={"extents"}, holding_target={"pwrite"}, requests=1)
    rig.start()
    asking = await rig.source.next()
    writing = write(rig, b"W" * CHUNK, 2 * CHUNK)
    await settled()
    assert rig.source.data[2 * CHUNK : 2 * CHUNK + 1] == b"o", "the run is taken"
    rig.source.holding.clear()
    asking.finish()
    await settled()
    assert rig.source.data[2 * CHUNK : 2 * CHUNK + 1] == b"W"
    assert {call.offset for call in rig.target.calls if call.is_held} == {0, 2 * CHUNK}
    await rig.release()
    await writing
    await rig.until("BLOCK_JOB_READY")
    assert rig.target.data == rig.source.data
    await completed(rig)


async def test_turn_that_comes_while_status_is_asked_for_is_not_missed() -> None:
    rig = await in_step(sync="none", holding_source={"pwrite", "extents"})
    first = write(rig, b"1", 0)
    held = await rig.source.next()
    rig.job.state.active_is_late(rig.job.state._active[0])  # so its chunk is dirty, and waited for in line
    rig.job.wake()
    await settled()
    assert rig.job._transfer.is_in_line
    rig.job.state.dirty.add_chunks(1, 2)
    rig.job.wake()
    asking = await rig.source.next()
    second = write(rig, b"2", CHUNK)
    await settled()
    held.finish()
    await first
    asking.finish()
    blocked = await rig.source.next()
    await settled()
    assert (blocked.name, blocked.offset) == ("pwrite", CHUNK)
    assert [call.offset for call in rig.source.named("pread")] == [0], "nothing else would wake it"
    await rig.release()
    await second
    rig.job.cancel()
    await rig.until("null")


async def test_chunk_is_not_copied_while_it_is_written() -> None:
    rig = blocking(holding_source={"pwrite"})
    writing = None
    rig.start()
    writing = write(rig, b"new!", 0)
    held = await rig.source.next()
    await settled()
    assert 0 not in {call.offset for call in rig.source.named("pread")}
    held.finish()
    await writing
    await rig.until("BLOCK_JOB_READY")
    assert rig.target.data == rig.source.data
    rig.source.holding.clear()
    await completed(rig)


async def test_writes_that_overlap_take_turns() -> None:
    rig = await in_step()
    rig.target.holding.add("pwrite")
    one = write(rig, b"1" * 2 * CHUNK, 0)
    other = write(rig, b"2" * 2 * CHUNK, CHUNK)
    apart = write(rig, b"3", 7 * CHUNK)
    third = write(rig, b"4", CHUNK + 9)
    first = await rig.target.next()
    await settled()
    assert {call.offset for call in rig.target.calls if call.is_held} == {0, 7 * CHUNK}
    first.finish()
    await one
    rig.target.holding.clear()
    await rig.release()
    async with asyncio.timeout(BOUND):
        await asyncio.gather(other, apart, third)
    assert rig.source.data[CHUNK + 9 : CHUNK + 10] == b"4"
    assert rig.target.data == rig.source.data
    assert rig.job.is_actively_synced
    await completed(rig)


async def test_many_overlapping_writes_do_not_wait_for_each_other_for_ever() -> None:
    rig = blocking()
    rig.start()
    writes = [
        write(rig, bytes([number]) * (1 + number * 977 % (3 * CHUNK)), number * 1511 % (SIZE - 3 * CHUNK))
        for number in range(90)
    ]
    async with asyncio.timeout(BOUND):
        await asyncio.gather(*writes)
    await rig.until("BLOCK_JOB_READY")
    await settled()
    assert rig.target.data == rig.source.data
    assert rig.job.is_actively_synced
    await completed(rig)


# --- blocks of the target ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pwrite", "zero", "trim"])
@pytest.mark.parametrize(
    ("offset", "length"), [(100, 5), (0, 512), (511, 1026), (CHUNK - 1, 2), (SIZE - 300, 300), (1024, 1024)]
)
async def test_target_with_larger_blocks(kind: str, offset: int, length: int) -> None:
    rig = blocking()
    rig.target.with_blocks(1024)
    rig.job = type(rig.job)("j", rig.device, rig.target, rig.emit, pivot=rig.pivot, seal=rig.seal, options=rig.job.options)
    await rig.ready()
    await settled()
    match kind:
        case "pwrite":
            await rig.device.pwrite(b"x" * length, offset)
        case "zero":
            await rig.device.zero(offset, length)
        case _:
            await rig.device.trim(offset, length)
    assert rig.target.data == rig.source.data
    assert rig.job.is_actively_synced
    assert all(call.offset % 1024 == call.length % 1024 == 0 for call in rig.target.named("pwrite") + rig.target.named("zero"))
    filled = rig.job.statistics()["x-bytes-filled"]
    first, end = offset // 1024 * 1024, -(-(offset + length) // 1024) * 1024
    assert filled == (end - first - length if kind == "pwrite" else 0)
    await ended(rig)
