"""The mirror job in trouble: disks that fail, targets that never answer, guests that never stop.

Whatever happens, the guest goes on, the job ends with a text, and what is not on the target is still marked.
"""

from __future__ import annotations

import asyncio
import errno

import pytest

from nbdmirror.devices.memory import MemoryDevice
from nbdmirror.errors import DeviceError
from nbdmirror.mirror import pace
from tests.support.fakes import settled
from tests.support.rig import BOUND, CHUNK, SIZE, Rig, eio, hurry

FULL = b"old!" * (SIZE // 4)
CANCELLED = ["aborting", "BLOCK_JOB_CANCELLED", "concluded", "null"]
FAILED = ["BLOCK_JOB_ERROR", "aborting", "BLOCK_JOB_COMPLETED", "concluded", "null"]


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch)


async def guest_goes_on(rig: Rig) -> None:
    """A write is done at once, on the source."""
    async with asyncio.timeout(BOUND):
        await rig.device.pwrite(b"guest", 0)
    assert rig.source.data[:5] == b"guest"
    assert not rig.device.is_drained
    assert rig.pivots == 0
    await rig.release()


def check_failed(rig: Rig, operation: str, text: str = "Input/output error") -> None:
    assert rig.words[-len(FAILED) :] == FAILED
    assert rig.of("BLOCK_JOB_ERROR") == {"device": "j", "operation": operation, "action": "report"}
    assert rig.of("BLOCK_JOB_COMPLETED")["error"] == text == rig.job.error
    assert rig.job.error_detail == f"held: {text}"
    assert not rig.job.was_cancelled
    assert rig.words.count("BLOCK_JOB_ERROR") == 1
    assert rig.differing() <= rig.dirty()


@pytest.mark.parametrize("step", range(0, 8, 3))
@pytest.mark.parametrize(("side", "call", "operation"), [("source", "pread", "read"), ("target", "pwrite", "write")])
async def test_copy_that_fails_ends_the_job(side: str, call: str, operation: str, step: int) -> None:
    rig = Rig(data=FULL, **{f"holding_{side}": {call}})  # type: ignore[arg-type]
    disk = getattr(rig, side)
    rig.start()
    for _ in range(step):
        (await disk.next()).finish()
    failing = await disk.next()
    failing.fail(eio())
    disk.holding.clear()
    await rig.release()
    await rig.until("null")
    check_failed(rig, operation)
    assert failing.offset // CHUNK in rig.dirty()
    await guest_goes_on(rig)


async def test_failed_chunk_is_marked_before_anybody_hears_of_it() -> None:
    rig = Rig(data=FULL)
    rig.target.broken["pwrite"] = DeviceError(errno.ENOSPC, "held")
    marked: list[set[int]] = []
    emit = rig.emit

    def hear(event: str, data: dict[str, object]) -> None:
        if event == "BLOCK_JOB_ERROR":
            marked.append(rig.dirty())
        emit(event, data)

    rig.job._emit = hear
    rig.start()
    await rig.until("null")
    check_failed(rig, "write", "No space left on device")
    assert 0 in marked[0]


@pytest.mark.parametrize("when", ["before ready", "after ready", "completing"])
async def test_flush_that_fails_ends_the_job(when: str) -> None:
    rig = Rig(data=FULL)
    if when == "before ready":
        rig.target.broken["flush"] = eio()
        rig.start()
        await rig.until("null")
        assert "ready" not in rig.words
    else:
        await rig.ready()
        rig.target.broken["flush"] = eio()
        await rig.device.pwrite(b"x", 0)
        if when == "completing":
            rig.job.complete()
        else:
            rig.job.cancel_gently()
        await rig.until("null")
    check_failed(rig, "write")
    assert rig.dirty(), "what was not flushed is not known to be there"
    await guest_goes_on(rig)


async def test_target_that_fails_when_ready() -> None:
    rig = Rig(data=FULL)
    await rig.ready()
    rig.target.broken["pwrite"] = eio()
    await rig.device.pwrite(b"new", 2 * CHUNK)
    await rig.until("null")
    check_failed(rig, "write")
    assert rig.dirty() == {2}
    await guest_goes_on(rig)


async def test_target_that_fails_while_the_guest_is_held() -> None:
    rig = Rig(data=FULL, holding_source={"pwrite"})
    await rig.ready()
    writing = asyncio.create_task(rig.device.pwrite(b"last", 0))
    held = await rig.source.next()
    rig.job.complete()
    await settled()
    assert rig.device.is_drained
    late = asyncio.create_task(rig.device.pwrite(b"late", CHUNK))
    rig.target.broken["pwrite"] = eio()
    rig.source.holding.clear()
    held.finish()
    await rig.until("null")
    await asyncio.gather(writing, late)
    assert rig.words[-len(FAILED) :] == FAILED
    assert rig.source.data[CHUNK : CHUNK + 4] == b"late"
    assert {0} <= rig.dirty()
    await guest_goes_on(rig)


async def test_fault_of_ours_in_a_copy_ends_the_job(caplog: pytest.LogCaptureFixture) -> None:
    rig = Rig(data=FULL)

    async def broken(_unit: object) -> None:
        raise ZeroDivisionError

    rig.job._copier.carry_out = broken  # type: ignore[method-assign,assignment]
    rig.start()
    await rig.until("null")
    assert rig.job.error_detail == "internal error: Input/output error"
    assert "ZeroDivisionError" in caplog.text
    assert len(rig.dirty()) == 8
    await guest_goes_on(rig)


# --- a disk that never answers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("requests", [1, 4, 16])
async def test_cancel_does_not_wait_for_a_target_that_does_not_answer(requests: int) -> None:
    rig = Rig(data=FULL, holding_target={"pwrite"}, requests=requests)
    rig.start()
    await rig.target.next()
    await settled()
    rig.job.cancel()
    await rig.until("null")
    assert rig.words == ["created", "running", *CANCELLED]
    assert len(rig.dirty()) == 8
    await guest_goes_on(rig)


@pytest.mark.parametrize("call", ["extents", "flush"])
async def test_cancel_does_not_wait_for_questions_to_the_target(call: str) -> None:
    rig = Rig(data=FULL, holding_target={call})
    rig.start()
    await rig.target.next()
    rig.job.cancel()
    await rig.until("null")
    assert rig.words == ["created", "running", *CANCELLED]
    await guest_goes_on(rig)


async def test_cancel_does_not_wait_for_the_sources_status() -> None:
    rig = Rig(data=FULL, holding_source={"extents"})
    rig.start()
    await rig.source.next()
    rig.job.cancel()
    await rig.until("null")
    assert rig.words == ["created", "running", *CANCELLED]
    assert len(rig.dirty()) == 8
    await guest_goes_on(rig)


@pytest.mark.parametrize("verb", ["complete", "cancel_gently"])
async def test_cancel_while_completing_lets_the_guest_go_on(verb: str) -> None:
    rig = Rig(data=FULL)
    await rig.ready()
    rig.target.holding.add("flush")
    getattr(rig.job, verb)()
    flushing = await rig.target.next()
    late = asyncio.create_task(rig.device.pwrite(b"late", 0))
    await settled()
    assert not late.done()
    rig.job.cancel()
    await rig.until("null")
    await late
    assert rig.words[4:] == CANCELLED
    assert rig.source.data[:4] == b"late"
    assert flushing.name == "flush"
    await guest_goes_on(rig)


async def test_cancel_that_comes_with_the_last_answer_still_counts() -> None:
    rig = Rig(data=FULL)
    await rig.ready()
    rig.target.holding.add("flush")
    rig.job.complete()
    flushing = await rig.target.next()
    flushing.finish()
    rig.job.cancel()
    await rig.until("null")
    assert rig.words[4:] == CANCELLED
    await guest_goes_on(rig)


async def test_cancel_does_not_wait_for_a_guests_write() -> None:
    rig = Rig(data=FULL, holding_source={"pwrite"})
    await rig.ready()
    writing = asyncio.create_task(rig.device.pwrite(b"slow", 0))
    held = await rig.source.next()
    rig.job.complete()
    await settled()
    assert rig.device.is_drained
    rig.job.cancel()
    await rig.until("null")
    assert not rig.device.is_drained
    held.finish()
    rig.source.holding.clear()
    await writing
    await guest_goes_on(rig)


async def test_cancel_of_a_job_that_can_not_pause() -> None:
    rig = Rig(data=FULL, holding_target={"pwrite"})
    rig.start()
    await rig.target.next()
    rig.job.pause()
    await settled()
    assert rig.words == ["created", "running"]
    rig.job.cancel()
    await rig.until("null")
    assert rig.words == ["created", "running", *CANCELLED]
    await guest_goes_on(rig)


async def test_failure_does_not_wait_for_what_does_not_answer() -> None:
    rig = Rig(data=FULL, holding_target={"pwrite"})
    rig.start()
    (await rig.target.next()).fail(eio())
    await rig.until("null")
    check_failed(rig, "write")
    await guest_goes_on(rig)


async def test_writes_until_the_job_has_ended_are_marked() -> None:
    rig = Rig(data=FULL, holding_target={"pwrite"}, requests=1)
    rig.start()
    (await rig.target.next()).finish()
    await rig.target.next()
    rig.job.cancel()
    await settled()
    await rig.device.pwrite(b"new", 0)
    await rig.until("null")
    assert rig.differing() <= rig.dirty()
    assert 0 in rig.dirty()
    await rig.release()


# --- a guest that writes faster than is copied -----------------------------------------------------------------------


async def test_guest_that_does_not_stop_is_held_for_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every read of the source is answered by a write, so that nothing converges by itself."""
    monkeypatch.setattr(pace, "CLOSE_IN_SECONDS", 1e9)
    monkeypatch.setattr(pace, "HOLD_SECONDS", 1e6)
    rig = Rig(data=FULL, holding_source={"pread"})
    rig.source.writes_now = True
    rig.start()
    while not rig.device.is_drained:
        async with asyncio.timeout(BOUND):
            held = await rig.source.next()
        if rig.device.pwrite_now(b"%8d" % len(rig.source.calls), held.offset):
            assert len(rig.source.calls) < 1000
        held.finish()
    assert "ready" not in rig.words
    await rig.release()
    await rig.until("BLOCK_JOB_READY")
    assert not rig.device.is_drained
    rig.job.complete()
    await rig.until("null")
    assert rig.target.data == rig.source.data


async def test_slow_target_does_not_hold_the_guest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "CLOSE_IN_SECONDS", 1e9)
    monkeypatch.setattr(pace, "HOLD_SECONDS", 0.001)
    rig = Rig(data=FULL)
    rig.start()
    # Held back it stops answering, and with every chunk written again there is no other way to converge.
    drained = rig.device.drained

    def stop_answering() -> object:
        rig.target.holding.add("pwrite")
        return drained()

    rig.device.drained = stop_answering  # type: ignore[method-assign,assignment]
    rewriting = asyncio.create_task(keep_rewriting(rig))
    await rig.target.next()
    await settled()
    async with asyncio.timeout(BOUND):
        await rig.device.pwrite(b"guest", 0)
    rewriting.cancel()
    await asyncio.gather(rewriting, return_exceptions=True)
    rig.job.cancel()
    await rig.until("null")
    await guest_goes_on(rig)


async def keep_rewriting(rig: Rig) -> None:
    number = 0
    while True:
        number += 1
        MemoryDevice.pwrite_now(rig.source, b"%8d" % number, 0)
        for offset in range(0, SIZE, CHUNK):
            await rig.device.pwrite(b"%8d" % number, offset)
        await asyncio.sleep(0)


async def test_rate_limit_does_not_lengthen_a_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(data=FULL, sync="none")
    await rig.ready()
    rig.job.pause()
    await rig.until("standby")
    await rig.device.pwrite(FULL[::-1], 0)
    rig.job.set_speed(1)
    monkeypatch.setattr(rig.job, "_pause_wanted", False)
    async with asyncio.timeout(BOUND):
        await rig.job._transfer.sweep_held(1e18, 0)
    assert rig.target.data == rig.source.data
    monkeypatch.undo()
    rig.job.cancel()
    await rig.until("null")


async def test_turn_that_ends_with_requests_in_flight_is_not_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "HOLD_SECONDS", 0.1)
    monkeypatch.setattr(pace, "CLOSE_IN_TURNS", 1)
    rig = Rig(data=FULL, holding_target={"pwrite"}, requests=16)
    rig.job.state.dirty.fill()
    async with asyncio.timeout(BOUND):
        assert not await rig.job._convergence._close_in()
    assert len(rig.target.named("pwrite")) == 8, "all of it was begun"
    assert not rig.device.is_drained
    await rig.release()
    assert rig.job.state.is_synced


async def test_job_that_is_to_pause_holds_no_guest_turn_after_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "CLOSE_IN_TURNS", 10**9)
    monkeypatch.setattr(pace, "CLOSING_IN", 2)
    rig = Rig(data=FULL)
    rig.job.state.dirty.fill()
    rig.job._pause_wanted = True
    async with asyncio.timeout(BOUND):
        assert not await rig.job._convergence._close_in()
    assert rig.target.calls == []
