"""A mirror job in copy-mode write-blocking: both disks have a write before it is answered, and no guest suffers for it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from nbdmirror.errors import DeviceError
from nbdmirror.mirror import pace
from nbdmirror.mirror.options import CopyMode
from nbdmirror.mirror.trouble import OnError
from tests.support.fakes import settled
from tests.support.rig import BOUND, CHUNK, SIZE, Rig, eio, hurry

OLD = b"old!" * (SIZE // 4)
BLOCKING, BACKGROUND = CopyMode.WRITE_BLOCKING, CopyMode.BACKGROUND


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch)


def blocking(**more: Any) -> Rig:
    return Rig(data=OLD, copy_mode=BLOCKING, **more)


async def in_step(**more: Any) -> Rig:
    """READY, and actively synced."""
    rig = blocking(**more)
    rig.source.writes_now = True
    await rig.ready()
    await settled()
    assert rig.job.is_actively_synced
    return rig


def write(rig: Rig, data: bytes, offset: int) -> asyncio.Task[None]:
    return asyncio.create_task(rig.device.pwrite(data, offset))


async def ended(rig: Rig) -> None:
    """Cancelled, whatever it waits for."""
    await rig.release()
    if rig.job.error is None:
        rig.job.cancel()
    await rig.until("null")
    assert not rig.device.is_drained
    assert rig.differing() <= rig.dirty()


async def completed(rig: Rig) -> None:
    rig.job.complete()
    await rig.until("null")
    assert rig.pivots == 1
    assert rig.job.error is None


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


async def completed_later(rig: Rig) -> None:
    await rig.release()
    await completed(rig)


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
    rig = blocking(holding_source={"extents"})
    rig.start()
    asking = await rig.source.next()
    writing = write(rig, b"W" * CHUNK, 2 * CHUNK)
    await settled()
    assert not writing.done(), "the run was taken"
    rig.target.holding.add("pwrite")
    rig.source.holding.clear()
    asking.finish()
    await settled()
    await rig.release()
    await writing
    await rig.until("BLOCK_JOB_READY")
    assert rig.target.data == rig.source.data
    await completed(rig)


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


# --- trouble -----------------------------------------------------------------------------------------------------------


async def test_failed_write_of_the_source_is_marked_and_not_carried_over() -> None:
    rig = await in_step()
    sent = len(rig.target.named("pwrite"))
    rig.source.holding.add("pwrite")
    writing = write(rig, b"x" * CHUNK, 0)
    (await rig.source.next()).fail(eio())
    rig.job.pause()
    with pytest.raises(DeviceError):
        await writing
    assert rig.dirty() == {0}
    assert not rig.job.is_actively_synced
    await rig.until("standby")
    assert len(rig.target.named("pwrite")) == sent
    rig.job.resume()
    await rig.until("ready", 2)
    await completed(rig)
    assert rig.target.data[:CHUNK] == b"x" * (CHUNK // 2) + OLD[CHUNK // 2 : CHUNK]


@pytest.mark.parametrize("policy", OnError)
async def test_target_that_fails_fails_no_guest(policy: OnError) -> None:
    rig = await in_step(on_target_error=policy)
    rig.target.broken["pwrite"] = eio()
    await rig.device.pwrite(b"new!", CHUNK + 7)
    assert rig.source.data[CHUNK + 7 : CHUNK + 11] == b"new!"
    assert not rig.job.is_actively_synced
    assert rig.dirty() == {1}
    action = {OnError.STOP: "stop", OnError.IGNORE: "ignore"}.get(policy, "report")
    assert rig.of("BLOCK_JOB_ERROR") == {"device": "j", "operation": "write", "action": action}
    if action != "report":
        tries = len(rig.target.named("pwrite"))
        await rig.device.pwrite(b"more", 0)
        assert len(rig.target.named("pwrite")) == tries, "the target is left alone meanwhile"
    rig.target.broken.clear()
    if policy is OnError.STOP:
        await rig.until("standby")
        rig.job.resume()
        await rig.until("ready", 2)
    if action != "report":
        while not rig.job.is_actively_synced:
            await asyncio.sleep(0.001)
        assert rig.target.data == rig.source.data
    await ended(rig)


async def test_flush_that_fails_is_an_error_of_the_target() -> None:
    rig = await in_step(on_target_error=OnError.STOP)
    await rig.device.pwrite(b"x", 0)
    rig.target.broken["flush"] = eio()
    rig.job.cancel_gently()
    await rig.until("standby")
    assert not rig.job.is_actively_synced
    assert 0 in rig.dirty()
    await ended(rig)


@pytest.mark.parametrize("policy", [OnError.REPORT, OnError.STOP, OnError.IGNORE])
async def test_target_that_does_not_answer_holds_no_guest_for_ever(monkeypatch: pytest.MonkeyPatch, policy: OnError) -> None:
    monkeypatch.setattr(pace, "PATIENCE_SECONDS", 0.01)
    rig = await in_step(on_target_error=policy)
    rig.target.holding.add("pwrite")
    async with asyncio.timeout(BOUND):
        await rig.device.pwrite(b"new!", 0)
    assert rig.words.count("BLOCK_JOB_ERROR") == 1
    assert "no answer from 'target'" in rig.job.statistics()["x-last-error"]["text"]
    assert not rig.job.is_actively_synced
    assert 0 in rig.dirty()
    async with asyncio.timeout(BOUND):
        await rig.device.pwrite(b"2nd!", 0)
    assert [call.offset for call in rig.target.calls if call.is_held] == [0], "nothing else goes to this chunk meanwhile"
    if policy is OnError.REPORT:
        await rig.until("null")
        await rig.release()
        return
    await rig.release()
    if policy is OnError.STOP:
        await rig.until("standby")
        rig.job.resume()
    while not rig.job.is_actively_synced:
        await asyncio.sleep(0.001)
    assert rig.target.data == rig.source.data
    await ended(rig)


async def test_copy_that_does_not_end_holds_no_guest_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "PATIENCE_SECONDS", 0.01)
    rig = blocking(holding_target={"pwrite"}, requests=1, on_target_error=OnError.STOP)
    rig.start()
    await rig.target.next()
    async with asyncio.timeout(BOUND):
        await rig.device.pwrite(b"new!", 0)
    assert rig.words.count("BLOCK_JOB_ERROR") == 1
    await rig.release()
    await rig.until("paused")
    rig.job.resume()
    await rig.until("BLOCK_JOB_READY")
    assert rig.target.data == rig.source.data
    await ended(rig)


async def test_cancel_with_a_write_on_its_way() -> None:
    rig = await in_step()
    rig.target.holding.add("pwrite")
    writing = write(rig, b"new!", 0)
    await rig.target.next()
    rig.job.cancel()
    await rig.until("null")
    async with asyncio.timeout(BOUND):
        await writing
    assert rig.dirty() == {0}
    await rig.release()


async def test_write_that_is_on_the_source_when_the_job_ends_goes_nowhere_else() -> None:
    rig = await in_step()
    rig.source.holding.add("pwrite")
    writing = write(rig, b"new!", 0)
    held = await rig.source.next()
    rig.job.cancel()
    await rig.until("null")
    sent = len(rig.target.calls)
    held.finish()
    await writing
    assert len(rig.target.calls) == sent
    rig.source.holding.clear()


async def test_complete_with_writes_on_their_way() -> None:
    rig = await in_step()
    rig.target.holding.add("pwrite")
    writes = [write(rig, bytes([65 + number]) * CHUNK, number * CHUNK // 2) for number in range(6)]
    await rig.target.next()
    rig.job.complete()
    await settled()
    late = write(rig, b"late", 7 * CHUNK)
    await rig.release()
    await asyncio.gather(*writes)
    await rig.until("null")
    await late
    assert rig.target.data[7 * CHUNK : 7 * CHUNK + 4] == b"late"
    assert rig.target.data[: 7 * CHUNK] == rig.source.data[: 7 * CHUNK]


# --- changing the mode -------------------------------------------------------------------------------------------------


async def test_to_write_blocking_and_back() -> None:
    rig = Rig(data=OLD)
    rig.source.writes_now = True
    await rig.ready()
    assert rig.device.pwrite_now(b"1", 0)
    assert not rig.job.is_actively_synced
    for _ in range(2):
        rig.job.change(BLOCKING)
    while not rig.job.is_actively_synced:
        await asyncio.sleep(0)
    assert rig.target.data == rig.source.data
    assert not rig.device.pwrite_now(b"2", 0)
    await rig.device.pwrite(b"2", 0)
    assert rig.target.data == rig.source.data
    for _ in range(2):
        rig.job.change(BACKGROUND)
    assert rig.job.is_actively_synced, "until something is written"
    assert rig.device.pwrite_now(b"3", 0)
    assert not rig.job.is_actively_synced
    assert rig.target.data[:1] == b"2"
    await completed(rig)
    assert rig.target.data == rig.source.data


async def test_write_in_flight_at_the_change_is_copied_later() -> None:
    rig = Rig(data=OLD, holding_source={"pwrite"})
    await rig.ready()
    before = write(rig, b"a" * CHUNK, 0)
    held = await rig.source.next()
    rig.job.change(BLOCKING)
    rig.source.holding.clear()
    await rig.device.pwrite(b"b" * CHUNK, 0)
    assert rig.target.data[:1] == b"b"
    assert rig.dirty() == {0}, "which of them the source has in the end is not known"
    held.finish()
    await before
    while not rig.job.is_actively_synced:
        await asyncio.sleep(0)
    assert rig.target.data == rig.source.data
    assert rig.source.data[:1] == b"a"
    await completed(rig)


async def test_change_back_with_a_write_on_its_way() -> None:
    rig = await in_step()
    rig.target.holding.add("pwrite")
    active = write(rig, b"a" * CHUNK, 0)
    held = await rig.target.next()
    rig.job.change(BACKGROUND)
    await rig.device.pwrite(b"p" * CHUNK, 0)
    rig.target.holding.clear()
    held.finish()
    await active
    await completed(rig)
    assert rig.target.data[:CHUNK] == b"p" * CHUNK


async def test_pause_marks_and_resume_catches_up() -> None:
    rig = await in_step()
    rig.job.pause()
    await rig.device.pwrite(b"p", 0)
    await rig.until("standby")
    assert rig.dirty() == {0}
    assert not rig.job.is_actively_synced
    offset = rig.job.progress[0]
    await rig.device.pwrite(b"q", CHUNK)
    assert rig.job.progress[0] == offset
    rig.job.resume()
    while not rig.job.is_actively_synced:
        await asyncio.sleep(0)
    assert rig.target.data == rig.source.data
    await ended(rig)


async def test_constant_load_does_not_keep_the_job_from_being_ready() -> None:
    """There is always a write in flight, but nothing is behind."""
    rig = blocking()
    stop = asyncio.Event()

    async def load(number: int) -> None:
        count = 0
        while not stop.is_set():
            count += 1
            await rig.device.pwrite(b"%8d" % count, number * CHUNK // 2)
            await asyncio.sleep(0)

    loads = [asyncio.create_task(load(number)) for number in range(16)]
    await rig.ready()
    async with asyncio.timeout(BOUND):
        while not rig.job.is_actively_synced:
            await asyncio.sleep(0)
    stop.set()
    await asyncio.gather(*loads)
    assert rig.target.data == rig.source.data
    await completed(rig)
