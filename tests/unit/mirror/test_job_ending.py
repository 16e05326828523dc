"""The end of a mirror job: bounded holds of the guest, a target that does not answer, waiting to be finalized, no pivot."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from nbdmirror.devices.memory import MemoryDevice
from nbdmirror.errors import StateError
from nbdmirror.mirror import pace
from nbdmirror.mirror.options import CopyMode
from nbdmirror.mirror.record import Keep
from nbdmirror.mirror.trouble import OnError
from tests.support.fakes import settled
from tests.support.rig import BOUND, CHUNK, SIZE, Rig, eio, hurry

OLD = b"old!" * (SIZE // 4)
SUCCESS = ["waiting", "pending", "BLOCK_JOB_COMPLETED", "concluded", "null"]
CANCELLED = ["aborting", "BLOCK_JOB_CANCELLED", "concluded", "null"]


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch)


async def guest_goes_on(rig: Rig, data: bytes = b"guest", offset: int = 0) -> None:
    async with asyncio.timeout(BOUND):
        await rig.device.pwrite(data, offset)


async def ready(**more: Any) -> Rig:
    rig = Rig(data=OLD, **more)
    await rig.ready()
    return rig


# --- the hold is bounded -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", ["flush", "pwrite"])
@pytest.mark.parametrize("policy", [OnError.REPORT, OnError.STOP, OnError.IGNORE])
async def test_target_that_does_not_answer_holds_no_guest(
    monkeypatch: pytest.MonkeyPatch, frozen: str, policy: OnError
) -> None:
    monkeypatch.setattr(pace, "PATIENCE_SECONDS", 0.02)
    rig = await ready(on_target_error=policy, holding_source={"pwrite"} if frozen == "pwrite" else ())
    if frozen == "pwrite":  # nothing is left before the drain, and something in it
        writing = asyncio.create_task(rig.device.pwrite(b"last", 0))
        held = await rig.source.next()
    rig.target.holding.add(frozen)
    rig.job.complete()
    await settled()
    assert rig.device.is_drained
    if frozen == "pwrite":
        rig.source.holding.clear()
        held.finish()
        await writing
    await rig.until("BLOCK_JOB_ERROR")
    assert rig.of("BLOCK_JOB_ERROR")["operation"] == "write"
    assert "no answer from the target" in rig.job.statistics()["x-last-error"]["text"]
    await guest_goes_on(rig)
    assert rig.source.data[:5] == b"guest"
    if policy is OnError.REPORT:
        await rig.until("null")
        assert rig.job.error == "Connection timed out"
        await rig.release()
        return
    await rig.release()
    if policy is OnError.STOP:
        await rig.until("standby")
        rig.job.resume()
    await rig.until("null")
    assert rig.words[-5:] == SUCCESS
    assert rig.pivots == 1
    assert rig.target.data == rig.source.data


async def test_slow_target_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """What arrives during a hold is progress: the guest is let go, and the end begins anew."""
    monkeypatch.setattr(pace, "PATIENCE_SECONDS", 0.05)
    rig = await ready(holding_source={"pwrite"}, requests=1)
    writing = asyncio.create_task(rig.device.pwrite(b"L" * SIZE, 0))
    held = await rig.source.next()
    rig.target.holding.add("pwrite")
    rig.job.complete()
    await settled()
    rig.source.holding.clear()
    held.finish()
    await writing
    late = asyncio.create_task(rig.device.pwrite(b"late", 0))
    (await rig.target.next()).finish()
    async with asyncio.timeout(BOUND):
        await late
    assert rig.source.data[:4] == b"late"
    assert "BLOCK_JOB_ERROR" not in rig.words
    await rig.release()
    await rig.until("null")
    assert rig.pivots == 1
    assert rig.target.data == rig.source.data


async def test_write_of_the_guest_that_does_not_end_holds_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "PATIENCE_SECONDS", 0.02)
    rig = await ready(holding_source={"pwrite"})
    stuck = asyncio.create_task(rig.device.pwrite(b"stuck", 0))
    held = await rig.source.next()
    rig.job.complete()
    rig.source.holding.clear()
    await settled()
    await guest_goes_on(rig, b"guest", CHUNK)
    assert rig.source.data[CHUNK : CHUNK + 5] == b"guest"
    assert "BLOCK_JOB_ERROR" not in rig.words
    held.finish()
    await stuck
    await rig.until("null")
    assert rig.target.data == rig.source.data


async def test_pause_in_the_end_lets_the_guest_go() -> None:
    rig = await ready()
    rig.target.holding.add("flush")
    rig.job.complete()
    flushing = await rig.target.next()
    rig.job.pause()
    flushing.finish()
    await rig.until("standby")
    assert not rig.device.is_drained
    await guest_goes_on(rig)
    rig.target.holding.clear()
    rig.job.resume()
    await rig.until("null")
    assert rig.words[-6:] == ["ready", *SUCCESS]
    assert rig.target.data == rig.source.data


async def test_guest_that_never_stops_does_not_put_the_end_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every read of the source is answered by a write, so that there is always something left."""
    monkeypatch.setattr(pace, "SMALL", CHUNK)
    rig = await ready()
    rig.source.writes_now = True
    rig.source.holding.add("pread")
    assert rig.device.pwrite_now(b"first", 0)
    held = await rig.source.next()
    rig.job.complete()
    for turn in range(200):
        written = rig.device.pwrite_now(b"%8d" % turn, held.offset)
        held.finish()
        if not written:
            break
        async with asyncio.timeout(BOUND):
            held = await rig.source.next()
    else:
        pytest.fail("the guest is never held")
    await rig.release()
    await rig.until("null")
    assert rig.pivots == 1
    assert rig.target.data == rig.source.data


# --- waiting to be finalized -------------------------------------------------------------------------------------------


async def pending(rig: Rig, verb: str = "complete") -> None:
    getattr(rig.job, verb)()
    await rig.until("BLOCK_JOB_PENDING")
    await guest_goes_on(rig)
    assert rig.source.data[:5] == b"guest"
    assert rig.job.status == "pending"


@pytest.mark.parametrize("mode", CopyMode)
@pytest.mark.parametrize(
    ("verb", "pivots", "seals"), [("complete", 1, 0), ("complete_in_place", 0, 1), ("cancel_gently", 0, 0)]
)
async def test_pending_holds_the_guest_for_a_time(mode: CopyMode, verb: str, pivots: int, seals: int) -> None:
    rig = await ready(auto_finalize=False, pending_seconds=0.01, copy_mode=mode)
    await pending(rig, verb)
    await rig.device.pwrite(b"more", 3 * CHUNK)
    rig.target.holding.add("flush")
    rig.job.finalize()
    flushing = await rig.target.next()
    assert rig.device.is_drained
    late = asyncio.create_task(rig.device.pwrite(b"late", CHUNK))
    await settled()
    in_step = bytes(rig.source.data)
    assert rig.target.data == in_step
    rig.target.holding.clear()
    flushing.finish()
    await rig.until("null")
    await late
    assert rig.words[-3:] == SUCCESS[2:]
    assert (rig.pivots, rig.seals) == (pivots, seals)
    assert rig.target.durable == in_step
    assert (rig.target if pivots else rig.source).data[CHUNK : CHUNK + 4] == b"late"


async def test_finalized_in_time_holds_all_along() -> None:
    rig = await ready(auto_finalize=False, pending_seconds=BOUND)
    rig.job.complete()
    await rig.until("BLOCK_JOB_PENDING")
    assert rig.device.is_drained
    rig.job.finalize()
    await rig.until("null")
    assert rig.pivots == 1


@pytest.mark.parametrize("when", ["before", "after"])
async def test_cancel_of_a_pending_job_that_let_the_guest_go(when: str) -> None:
    rig = await ready(auto_finalize=False, pending_seconds=0.01, keep=Keep.LIVE)
    await pending(rig)
    if when == "after":
        rig.target.holding.add("pwrite")
        rig.job.finalize()
        await rig.target.next()
    rig.job.cancel()
    await rig.until("null")
    assert rig.words[-4:] == CANCELLED
    assert rig.pivots == 0
    assert rig.recorded() == {0}
    assert not rig.device.is_drained
    await rig.release()


@pytest.mark.parametrize("policy", OnError)
async def test_failure_of_a_pending_job_ends_it(policy: OnError) -> None:
    rig = await ready(auto_finalize=False, pending_seconds=0.01, on_target_error=policy)
    await pending(rig)
    rig.target.broken["pwrite"] = eio()
    rig.job.finalize()
    await rig.until("null")
    assert rig.words[-5:] == ["BLOCK_JOB_ERROR", "aborting", "BLOCK_JOB_COMPLETED", "concluded", "null"]
    assert rig.of("BLOCK_JOB_ERROR")["action"] == "report"
    assert rig.pivots == 0
    assert rig.dirty() == {0}
    await guest_goes_on(rig)


async def test_pending_job_whose_target_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = await ready(auto_finalize=False, pending_seconds=0.01)
    await pending(rig)
    monkeypatch.setattr(pace, "PATIENCE_SECONDS", 0.02)
    rig.target.holding.add("flush")
    rig.job.finalize()
    await rig.until("null")
    assert rig.job.error == "Connection timed out"
    assert rig.pivots == 0
    await guest_goes_on(rig)
    await rig.release()


# --- how it ends -------------------------------------------------------------------------------------------------------


async def test_complete_in_place() -> None:
    rig = await ready()
    await rig.device.pwrite(b"last", 0)
    rig.job.complete_in_place()
    for refused in (rig.job.complete,):
        with pytest.raises(StateError, match=r"^The active block job 'j' cannot be completed$"):
            refused()
    rig.job.complete_in_place()
    await rig.until("null")
    assert rig.words[-5:] == SUCCESS
    assert (rig.pivots, rig.seals) == (0, 1)
    assert rig.target.durable == rig.source.data


async def test_soft_cancel_after_complete_does_not_change_the_end() -> None:
    rig = await ready()
    rig.target.holding.add("flush")
    rig.job.complete()
    rig.job.cancel_gently()
    (await rig.target.next()).finish()
    await rig.until("null")
    assert rig.words[-5:] == SUCCESS
    assert rig.pivots == 1


async def test_writes_are_only_marked_until_the_target_is_known() -> None:
    """What the target tells of its zeroes must not be older than what was carried over."""
    rig = Rig(data=OLD, copy_mode=CopyMode.WRITE_BLOCKING, holding_target={"extents"})
    MemoryDevice.pwrite_now(rig.source, bytes(SIZE), 0)
    rig.start()
    asking = await rig.target.next()
    for mode in (CopyMode.BACKGROUND, CopyMode.WRITE_BLOCKING):
        rig.job.change(mode)
    await rig.device.pwrite(b"E" * CHUNK, 2 * CHUNK)
    assert rig.target.named("pwrite") == []
    asking.finish()
    await rig.until("BLOCK_JOB_READY")
    await rig.device.zero(2 * CHUNK, CHUNK)
    assert rig.target.data == rig.source.data
    rig.job.cancel()
    await rig.until("null")
