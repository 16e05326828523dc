"""A mirror whose target is lost: it waits, the guest does not, and nothing is believed that a crash may have undone."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from nbdmirror.devices.memory import MemoryDevice
from nbdmirror.mirror import pace, trouble
from nbdmirror.mirror.options import CopyMode
from nbdmirror.mirror.record import Keep
from nbdmirror.mirror.trouble import OnError
from tests.support.fakes import settled
from tests.support.rig import BOUND, CHUNK, SIZE, Rig, eio, hurry

if TYPE_CHECKING:
    from collections.abc import Callable

FULL = b"old!" * (SIZE // 4)
MODES = list(CopyMode)


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch)


def linked(**options: Any) -> Rig:
    rig = Rig(**{"data": FULL, "linked": True, **options})
    rig.target.durable = bytes(rig.target.data)
    return rig


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(BOUND):
        while not condition():
            await asyncio.sleep(0.001)


async def guest_writes(rig: Rig, data: bytes = b"guest", offset: int = 0) -> None:
    """A write succeeds at once."""
    async with asyncio.timeout(BOUND):
        await rig.device.pwrite(data, offset)


async def completes(rig: Rig) -> None:
    """The job hands over, and the target has everything even if it crashes then."""
    rig.job.complete()
    await rig.until("null")
    assert rig.job.error is None
    assert rig.pivots == 1
    assert rig.target.durable == rig.source.data
    assert "BLOCK_JOB_ERROR" not in rig.words


async def in_step(mode: CopyMode, **options: Any) -> Rig:
    rig = linked(copy_mode=mode, **options)
    await rig.ready()
    await until(lambda: rig.job.is_actively_synced or mode is CopyMode.BACKGROUND)
    return rig


@pytest.mark.parametrize("mode", MODES)
async def test_lost_before_ready(mode: CopyMode) -> None:
    rig = linked(copy_mode=mode, holding_target={"pwrite"})
    rig.start()
    (await rig.target.next()).finish()
    await rig.target.next()
    rig.link.lose()
    await rig.until("paused")
    assert rig.job.statistics()["x-phase"] == "reconnecting"
    assert rig.job.is_paused
    assert rig.job.io_status == "ok"
    await guest_writes(rig, b"1", 0)
    await guest_writes(rig, b"2", SIZE - 1)
    assert len(rig.dirty()) == SIZE // CHUNK, "what had arrived was not flushed"
    rig.target.holding.clear()
    rig.link.restore()
    await rig.until("BLOCK_JOB_READY")
    assert rig.job.statistics()["x-outages"] == 1
    await completes(rig)
    assert rig.words.count("paused") == 1


@pytest.mark.parametrize("mode", MODES)
async def test_lost_after_ready(mode: CopyMode) -> None:
    rig = await in_step(mode)
    await guest_writes(rig, b"lost", CHUNK)
    await until(lambda: rig.target.data == rig.source.data)
    rig.link.lose()
    assert not rig.job.is_actively_synced
    await rig.until("standby")
    assert rig.dirty() == {1}, "nothing else was unflushed"
    before = len(rig.target.calls)
    await guest_writes(rig, b"away", 2 * CHUNK)
    assert len(rig.target.calls) == before
    sent = rig.job.counters.sent
    rig.link.restore()
    await rig.until("ready", 2)
    await until(lambda: rig.target.data == rig.source.data)
    assert rig.job.counters.sent - sent == 2 * CHUNK
    if mode is CopyMode.WRITE_BLOCKING:
        await until(lambda: rig.job.is_actively_synced)
        await guest_writes(rig, b"both", 3 * CHUNK)
        assert rig.target.data == rig.source.data
    await completes(rig)


@pytest.mark.parametrize("mode", MODES)
async def test_write_on_its_way_when_the_target_is_lost(mode: CopyMode) -> None:
    rig = await in_step(mode)
    rig.target.holding.add("pwrite")
    writing = asyncio.ensure_future(guest_writes(rig))
    await rig.target.next()
    rig.link.lose()
    await writing
    await rig.until("standby")
    assert rig.dirty() == {0}
    rig.target.holding.clear()
    rig.link.restore()
    await completes(rig)


@pytest.mark.parametrize("mode", MODES)
async def test_zeroing_that_was_lost_is_done_again(mode: CopyMode) -> None:
    """The target had data there. It zeroed that, said so, and crashed: what it has now is the data."""
    rig = linked(copy_mode=mode, data=b"")
    MemoryDevice.pwrite_now(rig.target, FULL, 0)
    rig.target.durable = FULL
    rig.target.holding.add("flush")
    rig.start()
    await rig.target.next()
    assert rig.target.data == bytes(SIZE)
    rig.link.lose()
    assert rig.target.data == FULL
    await rig.until("paused")
    rig.target.holding.clear()
    rig.link.restore()
    await rig.until("BLOCK_JOB_READY")
    await completes(rig)


async def test_answer_that_is_heard_after_the_loss_proves_no_zeroes() -> None:
    rig = linked(data=b"", holding_target={"zero"})
    MemoryDevice.pwrite_now(rig.target, FULL, 0)
    rig.target.durable = FULL
    rig.start()
    held = await rig.target.next()
    rig.target.holding.clear()
    held.finish()
    while any(rig.target.data):
        await asyncio.sleep(0)
    rig.link.revert()
    await rig.until("BLOCK_JOB_READY")
    await completes(rig)


async def test_flush_that_succeeds_although_a_session_was_lost_meanwhile() -> None:
    rig = linked(holding_target={"flush"})
    rig.start()
    held = await rig.target.next()
    rig.target.holding.clear()
    rig.link.revert()
    held.finish()
    await rig.until("BLOCK_JOB_READY")
    assert rig.target.durable == rig.source.data
    await completes(rig)


@pytest.mark.parametrize("call", ["pwrite", "flush"])
async def test_lost_while_the_guest_is_held(call: str) -> None:
    rig = await in_step(CopyMode.BACKGROUND)
    rig.target.holding.add(call)
    await guest_writes(rig, b"last", 0)
    rig.job.complete()
    await rig.target.next()
    if call == "flush":
        await until(lambda: rig.device.is_drained)
    rig.link.lose()
    await rig.until("standby")
    assert not rig.device.is_drained
    await guest_writes(rig, b"later", CHUNK)
    rig.target.holding.clear()
    rig.link.restore()
    await rig.until("null")
    assert rig.pivots == 1
    assert rig.target.durable == rig.source.data


async def test_complete_while_lost_is_done_later() -> None:
    rig = await in_step(CopyMode.BACKGROUND)
    rig.link.lose()
    await rig.until("standby")
    rig.job.complete()
    await guest_writes(rig)
    assert rig.job.status == "standby"
    rig.link.restore()
    await rig.until("null")
    assert rig.pivots == 1
    assert rig.target.durable == rig.source.data


async def test_cancel_of_either_kind_while_lost() -> None:
    rig = await in_step(CopyMode.BACKGROUND, keep=Keep.LIVE, marked=[0, 1])
    rig.link.lose()
    await rig.until("standby")
    await guest_writes(rig, b"x", 3 * CHUNK)
    rig.job.cancel_gently()
    await settled()
    assert rig.job.status == "standby", "it ends in step, so it waits"
    rig.job.cancel()
    await rig.until("null")
    assert rig.job.was_cancelled
    assert rig.recorded() >= {3}
    assert rig.link.on_lost is None
    assert rig.link.reconnect_delay == 20


async def test_pause_and_resume_while_lost() -> None:
    rig = await in_step(CopyMode.BACKGROUND)
    rig.link.lose()
    await rig.until("standby")
    rig.job.pause()
    rig.link.restore()
    await settled()
    assert rig.job.status == "standby"
    rig.job.resume()
    await rig.until("ready", 2)
    await completes(rig)


# --- an end to waiting -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [0, 0.01])
async def test_waiting_ends_in_the_policy(seconds: float) -> None:
    rig = linked(reconnect_seconds=seconds, holding_target={"pwrite"})
    rig.start()
    await rig.target.next()
    rig.link.lose()
    await rig.until("null")
    assert rig.of("BLOCK_JOB_ERROR") == {"device": "j", "operation": "write", "action": "report"}
    assert rig.job.error == "Transport endpoint is not connected"
    assert ("paused" in rig.words) == bool(seconds)
    assert rig.dirty() >= rig.differing()
    await guest_writes(rig)


async def test_stopped_job_waits_again_when_resumed() -> None:
    rig = linked(reconnect_seconds=0.01, on_target_error=OnError.STOP)
    await rig.ready()
    rig.link.lose()
    await guest_writes(rig)
    await rig.until("BLOCK_JOB_ERROR")
    await rig.until("standby", 2)
    assert rig.job.io_status == "failed"
    rig.job.resume()
    await until(lambda: rig.job.statistics()["x-phase"] == "reconnecting")
    rig.link.restore()
    await rig.until("ready", 3)
    assert rig.words.count("BLOCK_JOB_ERROR") == 1
    rig.job.complete()
    await rig.until("null")
    assert rig.target.durable == rig.source.data


async def test_ignored_loss_is_made_up_for_when_the_link_is_back() -> None:
    rig = linked(reconnect_seconds=0.01, on_target_error=OnError.IGNORE)
    await rig.ready()
    rig.link.lose()
    await guest_writes(rig)
    await rig.until("BLOCK_JOB_ERROR")
    rig.link.restore()
    await until(lambda: rig.target.data == rig.source.data)
    rig.link.lose()
    await rig.until("standby", 2)
    rig.link.restore()
    rig.job.complete()
    await rig.until("null")
    assert rig.target.durable == rig.source.data


async def test_another_export_is_no_target() -> None:
    rig = await in_step(CopyMode.BACKGROUND)
    rig.link.lose()
    await rig.until("standby")
    await guest_writes(rig)
    rig.link.fail()
    await rig.until("null")
    assert rig.job.error == "Stale file handle"


async def test_error_of_the_target_itself_is_one_still() -> None:
    rig = await in_step(CopyMode.BACKGROUND)
    rig.target.broken["pwrite"] = eio()
    await guest_writes(rig)
    await rig.until("null")
    assert rig.job.error == "Input/output error"


async def test_lost_while_it_waits_to_be_finalized() -> None:
    rig = linked(auto_finalize=False, pending_seconds=0.01)
    await rig.ready()
    rig.job.complete()
    await rig.until("BLOCK_JOB_PENDING")
    await until(lambda: not rig.device.is_drained)
    rig.link.lose()
    await guest_writes(rig)
    rig.job.finalize()
    await rig.until("null")
    assert rig.job.error == "Transport endpoint is not connected"
    assert rig.pivots == 0


# --- silence ---------------------------------------------------------------------------------------------------------


async def test_silent_target_holds_one_write_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trouble, "FIRST_WAIT", 0)
    rig = await in_step(CopyMode.WRITE_BLOCKING)
    rig.target.holding.add("pwrite")
    monkeypatch.setattr(pace, "PATIENCE_SECONDS", 0.01)
    await guest_writes(rig, b"1", 0)
    assert len(rig.target.named("pwrite")) == SIZE // CHUNK + 1
    monkeypatch.setattr(pace, "PATIENCE_SECONDS", 1000)
    await guest_writes(rig, b"2", 2 * CHUNK)
    assert rig.job.status == "ready"
    await rig.release()
    await until(lambda: rig.job.is_actively_synced)
    await completes(rig)


async def test_silent_target_lets_the_guest_go_on_while_it_completes(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = await in_step(CopyMode.BACKGROUND)
    monkeypatch.setattr(pace, "PATIENCE_SECONDS", 0.01)
    rig.target.holding.add("flush")
    rig.job.complete()
    await rig.target.next()
    await rig.target.next()
    assert not rig.device.is_drained, "the next flush is tried with the guest free"
    await guest_writes(rig)
    monkeypatch.setattr(pace, "PATIENCE_SECONDS", 1000)
    await rig.release()
    await rig.until("null")
    assert rig.pivots == 1
    assert rig.target.durable == rig.source.data
