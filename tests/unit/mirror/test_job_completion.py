"""How a mirror job hands over, and how it pauses: the last write before the drain, and the first one held by it."""

from __future__ import annotations

import asyncio

import pytest

from nbdmirror.errors import StateError
from tests.support.fakes import settled
from tests.support.rig import CHUNK, SIZE, Rig, hurry

FULL = b"old!" * (SIZE // 4)
READY = ["created", "running", "ready", "BLOCK_JOB_READY"]
SUCCESS = ["waiting", "pending", "BLOCK_JOB_COMPLETED", "concluded", "null"]
CANCELLED = ["aborting", "BLOCK_JOB_CANCELLED", "concluded", "null"]
FAILED = ["BLOCK_JOB_ERROR", "aborting", "BLOCK_JOB_COMPLETED", "concluded", "null"]


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch)


async def completed(rig: Rig) -> None:
    rig.job.complete()
    await rig.until("null")
    assert rig.pivots == 1
    assert rig.job.error is None


def write(rig: Rig, data: bytes, offset: int) -> asyncio.Task[None]:
    return asyncio.create_task(rig.device.pwrite(data, offset))


# --- completion ------------------------------------------------------------------------------------------------------


async def test_write_just_before_the_drain_is_on_the_target() -> None:
    rig = Rig(data=FULL)
    rig.source.writes_now = True
    await rig.ready()
    rig.job.complete()
    assert rig.device.pwrite_now(b"last", 5)
    await rig.until("null")
    assert rig.target.data[5:9] == b"last"
    assert rig.target.durable == rig.source.data


async def test_write_in_flight_is_waited_for_and_copied() -> None:
    rig = Rig(data=FULL, holding_source={"pwrite"})
    await rig.ready()
    writing = write(rig, b"slow", 0)
    held = await rig.source.next()
    rig.job.complete()
    await settled()
    assert rig.pivots == 0
    held.finish()
    await writing
    await rig.until("null")
    assert rig.target.data[:4] == b"slow"


async def test_write_held_by_the_drain_lands_on_the_target() -> None:
    rig = Rig(data=FULL)
    await rig.ready()
    rig.target.holding.add("flush")
    rig.job.complete()
    flushing = await rig.target.next()
    assert rig.device.is_drained
    late = write(rig, b"late", 0)
    await settled()
    assert not late.done()
    assert not rig.device.pwrite_now(b"now", 9)
    flushing.finish()
    await rig.until("null")
    await late
    assert rig.source.data == FULL
    assert rig.target.data[:4] == b"late"
    assert rig.target.data[4:] == FULL[4:]


async def test_target_is_flushed_before_the_pivot() -> None:
    rig = Rig(data=FULL)
    await rig.ready()
    await rig.device.pwrite(b"last", 0)
    seen: list[bytes] = []

    def pivot() -> None:
        seen.append(rig.target.durable)
        rig.pivot()

    rig.job._pivot = pivot
    await completed(rig)
    assert seen == [bytes(rig.source.data)]


async def test_target_is_not_flushed_where_that_was_not_wanted() -> None:
    rig = Rig(data=FULL, flush=False)
    await rig.ready()
    await completed(rig)
    assert rig.target.named("flush") == []


async def test_pending_holds_the_drain_until_finalized() -> None:
    rig = Rig(data=FULL, auto_finalize=False)
    await rig.ready()
    rig.job.complete()
    await rig.until("BLOCK_JOB_PENDING")
    late = write(rig, b"late", 0)
    await settled()
    assert rig.device.is_drained
    assert not late.done()
    assert rig.pivots == 0
    assert rig.of("BLOCK_JOB_PENDING") == {"type": "mirror", "id": "j"}
    rig.job.finalize()
    await rig.until("null")
    await late
    assert rig.words == [*READY, "waiting", "pending", "BLOCK_JOB_PENDING", *SUCCESS[2:]]
    assert rig.target.data[:4] == b"late"
    assert rig.source.data == FULL


async def test_cancel_while_pending_lets_the_guest_go_on_with_the_source() -> None:
    rig = Rig(data=FULL, auto_finalize=False)
    await rig.ready()
    rig.job.complete()
    await rig.until("BLOCK_JOB_PENDING")
    late = write(rig, b"late", 0)
    await settled()
    rig.job.cancel()
    await rig.until("null")
    await late
    assert rig.words == [*READY, "waiting", "pending", "BLOCK_JOB_PENDING", *CANCELLED]
    assert rig.pivots == 0
    assert rig.source.data[:4] == b"late"
    assert rig.target.data == FULL


async def test_pivot_that_fails_ends_the_job_and_lets_the_guest_go_on() -> None:
    rig = Rig(data=FULL)
    await rig.ready()

    def refuse() -> None:
        raise StateError("Operation not permitted")

    rig.job._pivot = refuse
    rig.job.complete()
    await rig.until("null")
    assert rig.words == [*READY, "waiting", "pending", *FAILED[1:]]
    await rig.device.pwrite(b"on", 0)
    assert rig.source.data[:2] == b"on"


# --- pausing ---------------------------------------------------------------------------------------------------------


async def test_pause_finishes_what_is_in_flight_and_stands_still() -> None:
    rig = Rig(data=FULL, holding_target={"pwrite"}, requests=2)
    rig.start()
    held = [await rig.target.next() for _ in range(2)]
    rig.job.pause()
    await settled()
    assert "paused" not in rig.words
    held[0].finish()
    await settled()
    assert "paused" not in rig.words
    held[1].finish()
    await rig.until("paused")
    offset, begun = rig.job.progress[0], len(rig.target.calls)
    assert offset == 2 * CHUNK
    await rig.device.pwrite(b"more", 0)
    for _ in range(3):
        rig.job.wake()
        await settled()
    assert (rig.job.progress[0], len(rig.target.calls)) == (offset, begun)
    rig.target.holding.clear()
    rig.job.resume()
    await rig.until("BLOCK_JOB_READY")
    assert rig.words == ["created", "running", "paused", "running", "ready", "BLOCK_JOB_READY"]
    assert rig.target.data == rig.source.data
    await completed(rig)


async def test_writes_during_standby_are_copied_after_it() -> None:
    rig = Rig(data=FULL)
    await rig.ready()
    rig.job.pause()
    await rig.until("standby")
    await rig.device.pwrite(b"during", 0)
    await settled()
    assert rig.target.data == FULL
    with pytest.raises(StateError, match=r"^The block job for device 'j' is currently paused$"):
        rig.job.cancel_gently()
    rig.job.complete()
    await settled()
    assert rig.words[-1] == "standby"
    rig.job.resume()
    await rig.until("null")
    assert rig.words == [*READY, "standby", "ready", *SUCCESS]
    assert rig.target.data == rig.source.data
    assert rig.pivots == 1


@pytest.mark.parametrize("is_ready", [False, True])
async def test_hard_cancel_while_paused_wakes_first(is_ready: bool) -> None:
    rig = Rig(data=FULL, holding_target=() if is_ready else {"pwrite"}, requests=1)
    if is_ready:
        await rig.ready()
        rig.job.pause()
    else:
        rig.start()
        held = await rig.target.next()
        rig.job.pause()
        held.finish()
    await rig.until("standby" if is_ready else "paused")
    rig.job.cancel()
    await rig.until("null")
    assert rig.words[-5:] == ["ready" if is_ready else "running", *CANCELLED]
    assert rig.differing() <= rig.dirty()
