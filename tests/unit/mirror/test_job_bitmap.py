"""A mirror job that works by a named bitmap: what the bitmap holds at every moment, and after every kind of end."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from nbdmirror.devices.memory import MemoryDevice
from nbdmirror.mirror import flusher, pace
from nbdmirror.mirror.record import Keep
from nbdmirror.mirror.trouble import OnError
from tests.support.fakes import settled
from tests.support.rig import CHUNK, SIZE, Rig, eio, hurry

if TYPE_CHECKING:
    from collections.abc import Iterable

OLD = b"old!" * (SIZE // 4)
LIVE, ALWAYS, ON_SUCCESS, NEVER = Keep.LIVE, Keep.ALWAYS, Keep.ON_SUCCESS, Keep.NEVER


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch)
    monkeypatch.setattr(pace, "CHECKPOINT_SECONDS", 1e6)


def rig_with(keep: Keep, marked: Iterable[int] = (1, 2, 5), **more: Any) -> Rig:
    """The target is as the source was before the marked chunks were written."""
    marked = set(marked)
    rig = Rig(data=OLD, keep=keep, marked=marked, requests=1, **more)
    MemoryDevice.pwrite_now(rig.target, OLD, 0)
    rig.target.durable = bytes(rig.target.data)
    for chunk in marked:
        MemoryDevice.pwrite_now(rig.source, b"new!" * (CHUNK // 4), chunk * CHUNK)
    return rig


async def ended(rig: Rig) -> None:
    await rig.until("null")
    assert rig.bitmap.users == []
    assert rig.bitmap.recording


@pytest.mark.parametrize("keep", Keep)
async def test_only_what_is_marked_is_copied(keep: Keep) -> None:
    rig = rig_with(keep)
    rig.start()
    assert rig.bitmap.users == ["job j"]
    assert rig.job.progress == (0, 3 * CHUNK)
    await rig.until("BLOCK_JOB_READY")
    assert rig.of("BLOCK_JOB_READY") == {"type": "mirror", "device": "j", "len": 3 * CHUNK, "offset": 3 * CHUNK, "speed": 0}
    assert sorted(call.offset // CHUNK for call in rig.target.named("pwrite")) == [1, 2, 5]
    assert rig.target.named("extents") == []
    rig.job.cancel_gently()
    await ended(rig)
    assert rig.target.durable == rig.source.data
    assert rig.recorded() == ({1, 2, 5} if keep is NEVER else set())


async def test_granularity_is_the_bitmaps() -> None:
    rig = rig_with(LIVE, granularity=512, marked=())
    assert rig.job.state.dirty.granularity == 512


@pytest.mark.parametrize("keep", Keep)
async def test_bitmap_records_on_and_after_the_job(keep: Keep) -> None:
    rig = rig_with(keep, marked=())
    await rig.ready()
    rig.job.pause()
    await rig.until("standby")
    await rig.device.pwrite(b"during", 3 * CHUNK)
    assert rig.recorded() == {3}
    rig.job.resume()
    await rig.until("ready", 2)
    rig.job.cancel_gently()
    await ended(rig)
    assert rig.recorded() == ({3} if keep is NEVER else set())
    await rig.device.pwrite(b"after", 4 * CHUNK)
    assert 4 in rig.recorded()


async def test_live_bitmap_shrinks_with_each_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "CHECKPOINT_BYTES", 2 * CHUNK)
    rig = rig_with(LIVE, marked=range(8), holding_target={"pwrite", "flush"})
    rig.start()
    for _ in range(2):
        (await rig.target.next()).finish()
        await settled()
        assert len(rig.recorded()) == 8, "what was copied is not durable"
    held = {call.name: call for call in rig.target.calls if call.is_held}
    assert set(held) == {"pwrite", "flush"}, "copying goes on beside the flush"
    await rig.device.pwrite(b"again", 0)
    held["pwrite"].finish()
    await settled()
    held["flush"].finish()
    await settled()
    assert rig.recorded() == {0, *range(2, 8)}, "1 is durable; 0 was written again; 2 came after the flush began"
    await rig.release()
    await rig.until("BLOCK_JOB_READY")
    assert rig.recorded() == set()
    rig.job.cancel()
    await ended(rig)


async def test_live_bitmap_is_flushed_off_when_nothing_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = rig_with(LIVE, marked=())
    await rig.ready()
    await rig.device.pwrite(b"x", 0)
    await settled()
    assert rig.target.data == rig.source.data
    assert rig.recorded() == {0}
    monkeypatch.setattr(pace, "CHECKPOINT_SECONDS", 0)
    rig.job.wake()
    while rig.recorded():
        await asyncio.sleep(0)
    assert rig.target.durable == rig.source.data
    rig.job.cancel()
    await ended(rig)


async def test_write_in_flight_at_the_start_is_not_lost() -> None:
    rig = rig_with(LIVE, marked=(), holding_source={"pwrite"})
    writing = asyncio.create_task(rig.device.pwrite(b"slow", 6 * CHUNK))
    held = await rig.source.next()
    rig.bitmap.bits.clear()
    rig.start()
    assert rig.dirty() == {6}
    await settled()
    assert "ready" not in rig.words
    held.finish()
    await writing
    await rig.until("BLOCK_JOB_READY")
    assert rig.target.data == rig.source.data
    rig.job.cancel()
    await ended(rig)


@pytest.mark.parametrize(("keep", "left"), [(LIVE, {2, 5}), (ALWAYS, {2, 5}), (ON_SUCCESS, {1, 2, 5}), (NEVER, {1, 2, 5})])
@pytest.mark.parametrize("end", ["cancel", "read fails", "write fails"])
async def test_what_is_left_after_a_failure(keep: Keep, left: set[int], end: str) -> None:
    side = "source" if end == "read fails" else "target"
    rig = rig_with(keep, **{f"holding_{side}": {"pread" if side == "source" else "pwrite"}})
    disk = getattr(rig, side)
    rig.start()
    (await disk.next()).finish()
    second = await disk.next()
    if end == "cancel":
        rig.job.cancel()
        await settled()
        second.fail(eio())
    else:
        second.fail(eio())
    disk.holding.clear()
    await ended(rig)
    assert rig.recorded() == left
    assert rig.differing() <= rig.recorded()
    assert rig.words[-4] == "aborting"


@pytest.mark.parametrize("keep", [LIVE, ALWAYS])
async def test_next_job_resumes_where_a_failed_one_ended(keep: Keep) -> None:
    rig = rig_with(keep)
    rig.target.broken["pwrite"] = eio()
    rig.start()
    await ended(rig)
    again = Rig(data=bytes(rig.source.data), keep=LIVE, marked=rig.recorded())
    MemoryDevice.pwrite_now(again.target, rig.target.data, 0)
    await again.ready()
    assert again.target.data == rig.source.data
    again.job.cancel_gently()
    await ended(again)


@pytest.mark.parametrize("keep", [LIVE, ALWAYS])
async def test_what_can_not_be_flushed_is_left(keep: Keep) -> None:
    rig = rig_with(keep)
    rig.target.broken["flush"] = eio()
    rig.start()
    await ended(rig)
    assert rig.recorded() == {1, 2, 5}


async def test_target_that_does_not_answer_the_last_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flusher, "_LAST_SECONDS", 0.01)
    rig = rig_with(LIVE, holding_target={"flush"})
    rig.start()
    flushing = await rig.target.next()
    rig.job.cancel()
    await ended(rig)
    assert rig.recorded() == {1, 2, 5}
    assert flushing.name == "flush"
    await rig.release()


@pytest.mark.parametrize("keep", [LIVE, ALWAYS])
@pytest.mark.parametrize("policy", [OnError.REPORT, OnError.STOP])
async def test_flush_that_fails_beside_the_copying(monkeypatch: pytest.MonkeyPatch, keep: Keep, policy: OnError) -> None:
    monkeypatch.setattr(pace, "CHECKPOINT_BYTES", CHUNK)
    rig = rig_with(keep, holding_target={"pwrite"}, on_target_error=policy)
    rig.target.broken["flush"] = eio()
    rig.start()
    (await rig.target.next()).finish()
    await settled()
    if keep is ALWAYS:
        assert rig.target.named("flush") == [], "nothing to gain from it"
    else:
        assert rig.words.count("BLOCK_JOB_ERROR") == 1
        assert 1 in rig.dirty()
    await rig.release()
    if policy is OnError.STOP:
        await rig.until("paused")
        rig.job.cancel()
    await ended(rig)
    assert rig.recorded() == {1, 2, 5}


async def test_pivot_leaves_nothing_in_the_bitmap_of_the_source() -> None:
    rig = rig_with(LIVE, marked=[1])
    await rig.ready()
    await rig.device.pwrite(b"last", 0)
    rig.job.complete()
    await ended(rig)
    assert rig.pivots == 1
    assert rig.recorded() == set()


@pytest.mark.parametrize("keep", Keep)
async def test_cancel_while_pending(keep: Keep) -> None:
    rig = rig_with(keep, auto_finalize=False)
    await rig.ready()
    rig.job.complete()
    await rig.until("BLOCK_JOB_PENDING")
    late = asyncio.create_task(rig.device.pwrite(b"late", 7 * CHUNK))
    assert rig.bitmap.users == ["job j"]
    rig.job.cancel()
    await ended(rig)
    await late
    assert rig.recorded() == ({7} if keep in (LIVE, ALWAYS) else {1, 2, 5, 7})


async def test_disabled_bitmap_gets_what_was_not_copied() -> None:
    """Its own bits were copied; what the guest wrote meanwhile was not, and nobody else would know."""
    rig = rig_with(ALWAYS)
    rig.bitmaps.stop_recording(rig.bitmap)
    await rig.ready()
    rig.job.pause()
    await rig.until("standby")
    await rig.device.pwrite(b"x", 6 * CHUNK)
    rig.job.cancel()
    await rig.until("null")
    assert rig.recorded() == {6}


@pytest.mark.parametrize("keep", Keep)
async def test_flush_that_ends_after_the_job_takes_nothing_off(keep: Keep) -> None:
    rig = rig_with(keep, marked=[])
    await rig.ready()
    rig.job.cancel()
    await ended(rig)
    await rig.device.pwrite(b"unheard of", 0)
    assert rig.job.record is not None
    rig.job.record.retire([(0, 8)])
    assert rig.recorded() == {0}
