"""A mirror job whose disks fail, under each error policy: what failed is marked, said once, and copied in the end."""

from __future__ import annotations

import asyncio
import errno
from typing import Any

import pytest

from nbdmirror.errors import DeviceError, StateError
from nbdmirror.mirror import trouble
from nbdmirror.mirror.trouble import OnError
from tests.support.fakes import settled
from tests.support.rig import BOUND, CHUNK, SIZE, Rig, eio, hurry

FULL = b"old!" * (SIZE // 4)
READY = ["created", "running", "ready", "BLOCK_JOB_READY"]
SUCCESS = ["waiting", "pending", "BLOCK_JOB_COMPLETED", "concluded", "null"]
CANCELLED = ["aborting", "BLOCK_JOB_CANCELLED", "concluded", "null"]
FAILED = ["BLOCK_JOB_ERROR", "aborting", "BLOCK_JOB_COMPLETED", "concluded", "null"]
STOP = OnError.STOP
SIDES = [("source", "pread", "read"), ("target", "pwrite", "write")]


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch)


def rig_with(policy: OnError, **more: Any) -> Rig:
    return Rig(data=FULL, on_source_error=policy, on_target_error=policy, **more)


async def completed(rig: Rig) -> None:
    rig.job.complete()
    await rig.until("null")
    assert rig.job.error is None
    assert rig.target.data == rig.source.data


# --- stop ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("side", "call", "operation"), SIDES)
@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC])
async def test_stop_pauses_until_resumed(side: str, call: str, operation: str, error: int) -> None:
    rig = rig_with(STOP)
    disk = getattr(rig, side)
    disk.broken[call] = DeviceError(error, "held")
    rig.start()
    await rig.until("paused")
    assert rig.words == ["created", "running", "BLOCK_JOB_ERROR", "paused"], "one event, however many requests failed"
    assert rig.of("BLOCK_JOB_ERROR") == {"device": "j", "operation": operation, "action": "stop"}
    assert rig.job.io_status == ("nospace" if error == errno.ENOSPC else "failed")
    assert rig.job.is_paused
    assert rig.differing() <= rig.dirty()
    offset, calls = rig.job.progress[0], (len(rig.source.calls), len(rig.target.calls))
    await rig.device.pwrite(b"more", 0)
    for _ in range(3):
        rig.job.wake()
        await settled()
    assert rig.job.progress[0] == offset
    assert (len(rig.source.calls), len(rig.target.calls)) == (calls[0] + 1, calls[1]), "nothing but the guest's write"
    del disk.broken[call]
    rig.job.resume()
    assert rig.job.io_status == "ok"
    await rig.until("BLOCK_JOB_READY")
    await completed(rig)


async def test_each_pause_has_one_event() -> None:
    rig = rig_with(STOP)
    rig.target.broken["pwrite"] = eio()
    rig.start()
    for episode in range(1, 4):
        await rig.until("paused", episode)
        assert rig.words.count("BLOCK_JOB_ERROR") == episode
        rig.job.resume()
        await rig.until("running", episode + 1)
    rig.job.cancel()
    await rig.until("null")


async def test_stop_when_ready_is_standby() -> None:
    rig = rig_with(STOP)
    await rig.ready()
    rig.target.broken["pwrite"] = eio()
    await rig.device.pwrite(b"new", 2 * CHUNK)
    await rig.until("standby")
    assert rig.words == [*READY, "BLOCK_JOB_ERROR", "standby"]
    assert rig.dirty() == {2}
    with pytest.raises(StateError, match=r"^The block job for device 'j' is currently paused$"):
        rig.job.cancel_gently()
    rig.target.broken.clear()
    rig.job.resume()
    await rig.until("ready", 2)
    await completed(rig)


@pytest.mark.parametrize("is_ready", [False, True])
async def test_force_cancel_of_a_stopped_job(is_ready: bool) -> None:
    rig = rig_with(STOP)
    if is_ready:
        await rig.ready()
    rig.target.broken["pwrite"] = eio()
    if is_ready:
        await rig.device.pwrite(b"new", 0)
    else:
        rig.start()
    await rig.until("standby" if is_ready else "paused")
    with pytest.raises(StateError, match=r"^The block job for device 'j' is currently paused$"):
        rig.job.cancel_gently()
    rig.job.cancel()
    await rig.until("null")
    assert rig.words[-5:] == ["ready" if is_ready else "running", *CANCELLED]
    assert rig.differing() <= rig.dirty()


@pytest.mark.parametrize("verb", ["complete", "cancel_gently"])
@pytest.mark.parametrize("then", ["resume", "cancel"])
async def test_flush_that_fails_in_the_end_lets_the_guest_go_on(verb: str, then: str) -> None:
    rig = rig_with(STOP)
    await rig.ready()
    rig.target.broken["flush"] = eio()
    getattr(rig.job, verb)()
    await rig.until("standby")
    assert rig.words == [*READY, "BLOCK_JOB_ERROR", "standby"]
    assert rig.of("BLOCK_JOB_ERROR") == {"device": "j", "operation": "write", "action": "stop"}
    assert not rig.device.is_drained
    await rig.device.pwrite(b"guest", 0)
    assert rig.source.data[:5] == b"guest"
    rig.target.broken.clear()
    getattr(rig.job, then)()
    await rig.until("null")
    assert rig.words[5:] == ["standby", "ready", *(CANCELLED if then == "cancel" else SUCCESS)]
    if then == "resume":
        assert rig.target.durable == rig.source.data
        assert rig.pivots == (verb == "complete")


async def test_copy_that_fails_while_the_guest_is_held_lets_it_go() -> None:
    rig = rig_with(STOP, holding_source={"pwrite"})
    await rig.ready()
    writing = asyncio.create_task(rig.device.pwrite(b"last", 0))
    held = await rig.source.next()
    rig.job.complete()
    await settled()
    assert rig.device.is_drained
    rig.target.broken["pwrite"] = eio()
    rig.source.holding.clear()
    held.finish()
    await rig.until("standby")
    await writing
    assert not rig.device.is_drained
    await rig.device.pwrite(b"more", CHUNK)
    rig.target.broken.clear()
    rig.job.resume()
    await rig.until("null")
    assert rig.target.data == rig.source.data
    assert rig.pivots == 1


@pytest.mark.parametrize("policy", [OnError.ENOSPC, OnError.AUTO])
async def test_enospc_stops_where_space_is_missing_only(policy: OnError) -> None:
    rig = rig_with(policy)
    rig.target.broken["pwrite"] = DeviceError(errno.ENOSPC, "held")
    rig.start()
    await rig.until("paused")
    assert rig.job.io_status == "nospace"
    rig.target.broken["pwrite"] = eio()
    rig.job.resume()
    await rig.until("null")
    assert rig.words[-5:] == FAILED
    assert rig.of("BLOCK_JOB_ERROR")["action"] == "report"


# --- ignore ----------------------------------------------------------------------------------------------------------


def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trouble, "FIRST_WAIT", 0.001)
    monkeypatch.setattr(trouble, "LONGEST_WAIT", 0.01)


@pytest.mark.parametrize(("side", "call", "operation"), SIDES)
async def test_ignore_goes_on_until_it_works(monkeypatch: pytest.MonkeyPatch, side: str, call: str, operation: str) -> None:
    quick(monkeypatch)
    rig = rig_with(OnError.IGNORE)
    disk = getattr(rig, side)
    disk.broken[call] = eio()
    rig.start()
    await rig.until("BLOCK_JOB_ERROR", 4)
    assert rig.of("BLOCK_JOB_ERROR") == {"device": "j", "operation": operation, "action": "ignore"}
    assert rig.job.io_status == "ok"
    del disk.broken[call]
    await rig.until("BLOCK_JOB_READY")
    assert set(rig.words[:-2]) == {"created", "running", "BLOCK_JOB_ERROR"}
    await completed(rig)


async def test_ignoring_is_no_hot_loop() -> None:
    rig = rig_with(OnError.IGNORE)
    rig.target.broken["pwrite"] = eio()
    rig.start()
    await rig.until("BLOCK_JOB_ERROR")
    for _ in range(20):
        await settled()
    assert rig.words.count("BLOCK_JOB_ERROR") == 1
    assert len(rig.target.named("pwrite")) <= rig.job.options.copy.requests
    rig.job.cancel()
    await rig.until("null")
    assert rig.words[-4:] == CANCELLED


@pytest.mark.parametrize("verb", ["complete", "cancel_gently"])
async def test_flush_that_is_ignored_in_the_end(monkeypatch: pytest.MonkeyPatch, verb: str) -> None:
    quick(monkeypatch)
    rig = rig_with(OnError.IGNORE)
    await rig.ready()
    rig.target.broken["flush"] = eio()
    getattr(rig.job, verb)()
    await rig.until("BLOCK_JOB_ERROR", 3)
    async with asyncio.timeout(BOUND):
        await rig.device.pwrite(b"guest", 0)
    assert rig.source.data[:5] == b"guest"
    rig.target.broken.clear()
    await rig.until("null")
    assert rig.words[-5:] == SUCCESS
    assert rig.target.durable[:5] == b"guest"


async def test_flush_that_fails_before_ready_and_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch)
    rig = rig_with(OnError.IGNORE, sync="none")
    rig.target.broken["flush"] = eio()
    rig.start()
    await rig.until("BLOCK_JOB_ERROR", 3)
    assert "ready" not in rig.words
    rig.target.broken.clear()
    await rig.until("BLOCK_JOB_READY")
    rig.job.cancel()
    await rig.until("null")
