"""A mirror job in copy-mode write-blocking whose disks fail or do not answer, or whose mode is changed: no guest suffers."""

from __future__ import annotations

import asyncio

import pytest

from nbdmirror.errors import DeviceError
from nbdmirror.mirror import pace
from nbdmirror.mirror.trouble import OnError
from tests.support.active import BACKGROUND, BLOCKING, OLD, blocking, completed, ended, in_step, write
from tests.support.fakes import settled
from tests.support.rig import BOUND, CHUNK, Rig, eio, hurry


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch)


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
