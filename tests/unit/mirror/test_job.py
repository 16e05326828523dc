"""The mirror job over disks in memory, every call of which the test holds: no write is lost, whenever it comes."""

from __future__ import annotations

import asyncio

import pytest

from nbdmirror.devices.memory import MemoryDevice
from nbdmirror.devices.tracked import TrackedDevice
from nbdmirror.errors import DeviceError, StateError
from nbdmirror.mirror.job import MirrorJob
from nbdmirror.mirror.options import MirrorOptions
from nbdmirror.units import MiB
from tests.support.fakes import settled
from tests.support.rig import CHUNK, SIZE, Rig, eio, hurry

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


# --- events ----------------------------------------------------------------------------------------------------------


async def test_full_sync_and_complete() -> None:
    rig = Rig(data=FULL)
    await rig.ready()
    assert rig.words == READY
    assert rig.of("BLOCK_JOB_READY") == {"type": "mirror", "device": "j", "len": SIZE, "offset": SIZE, "speed": 0}
    assert rig.target.data == rig.source.data == rig.target.durable
    await completed(rig)
    assert rig.words == READY + SUCCESS
    assert rig.of("BLOCK_JOB_COMPLETED") == {"type": "mirror", "device": "j", "len": SIZE, "offset": SIZE, "speed": 0}
    assert rig.ended
    assert not rig.device.is_drained


async def test_nothing_to_sync() -> None:
    rig = Rig(data=FULL, sync="none")
    await rig.ready()
    assert rig.words == READY
    assert (rig.of("BLOCK_JOB_READY")["len"], rig.of("BLOCK_JOB_READY")["offset"]) == (0, 0)
    await rig.device.pwrite(b"new", CHUNK)
    await completed(rig)
    assert rig.target.data == bytes(CHUNK) + (b"new" + FULL[3:CHUNK]) + bytes(SIZE - 2 * CHUNK)
    assert (rig.of("BLOCK_JOB_COMPLETED")["len"], rig.of("BLOCK_JOB_COMPLETED")["offset"]) == (CHUNK, CHUNK)


async def test_empty_disk() -> None:
    rig = Rig(0)
    await rig.ready()
    await completed(rig)
    assert rig.words == READY + SUCCESS


async def test_write_right_after_the_start_is_not_missed() -> None:
    rig = Rig(sync="none")
    rig.source.writes_now = True
    rig.start()
    assert rig.device.pwrite_now(b"new", 0)
    await rig.until("BLOCK_JOB_READY")
    assert rig.target.data[:3] == b"new"
    await completed(rig)


@pytest.mark.parametrize("target_size", [SIZE - 1, SIZE + 1])
async def test_sizes_that_differ(target_size: int) -> None:
    rig = Rig(target_size=target_size)
    rig.start()
    await rig.until("null")
    assert rig.words == ["created", "running", "aborting", "BLOCK_JOB_COMPLETED", "concluded", "null"]
    data = rig.of("BLOCK_JOB_COMPLETED")
    assert (data["len"], data["error"]) == (0, "Source and target image have different sizes")
    assert rig.target.calls == []
    await rig.device.pwrite(b"on", 0)


async def test_target_may_be_rounded_up_to_a_sector() -> None:
    rig = Rig(SIZE - 100, target_size=SIZE, data=FULL[: SIZE - 100])
    await rig.ready()
    await completed(rig)
    assert rig.target.data == FULL[: SIZE - 100] + bytes(100)
    assert rig.device.size == SIZE - 100


async def test_soft_cancel_when_ready_ends_in_step_without_pivot() -> None:
    rig = Rig(data=FULL)
    await rig.ready()
    await rig.device.pwrite(b"last", 0)
    rig.job.cancel_gently()
    with pytest.raises(StateError, match=r"^The active block job 'j' cannot be completed$"):
        rig.job.complete()
    await rig.until("null")
    assert rig.words == READY + SUCCESS
    assert rig.pivots == 0
    assert rig.target.durable == rig.source.data
    await rig.device.pwrite(b"mine", 0)
    assert rig.source.data[:4] == b"mine"
    assert rig.target.data[:4] == b"last"


async def test_soft_cancel_before_ready_is_a_hard_one() -> None:
    rig = Rig(data=FULL, holding_target={"pwrite"})
    rig.start()
    held = [await rig.target.next() for _ in range(4)]
    rig.job.cancel_gently()
    for call in held:
        call.finish()
    await rig.until("null")
    assert rig.words == ["created", "running", *CANCELLED]
    assert rig.differing() <= rig.dirty()


@pytest.mark.parametrize("sync", ["full", "none"])
async def test_hard_cancel_when_ready(sync: str) -> None:
    rig = Rig(data=FULL, sync=sync)  # type: ignore[arg-type]
    await rig.ready()
    rig.job.cancel()
    await rig.until("null")
    assert rig.words == READY + CANCELLED
    assert (rig.pivots, rig.job.was_cancelled, rig.job.error) == (0, True, "Operation canceled")


async def test_waiting_in_concluded() -> None:
    rig = Rig(data=FULL, auto_dismiss=False)
    await rig.ready()
    rig.job.complete()
    await rig.until("concluded")
    assert not rig.ended
    rig.job.dismiss()
    assert rig.words == READY + SUCCESS
    assert rig.ended


@pytest.mark.parametrize("verb", ["complete", "finalize", "dismiss"])
async def test_verbs_that_come_too_early(verb: str) -> None:
    rig = Rig(data=FULL, holding_target={"pwrite"})
    rig.start()
    held = await rig.target.next()
    with pytest.raises(StateError, match=f"^Job 'j' in state 'running' cannot accept command verb '{verb}'$"):
        getattr(rig.job, verb)()
    rig.target.holding.clear()
    for call in rig.target.named("pwrite"):
        call.finish()
    assert held.name == "pwrite"
    await rig.until("BLOCK_JOB_READY")
    rig.job.cancel()
    await rig.until("null")


def test_granularity() -> None:
    for wrong in (0, 256, 128 * MiB):
        with pytest.raises(StateError, match=r"^Parameter 'granularity' expects a value in range \[512B, 64MB\]$"):
            MirrorOptions(granularity=wrong)
    with pytest.raises(StateError, match=r"^Parameter 'granularity' expects a power of 2$"):
        MirrorOptions(granularity=5000)


@pytest.mark.parametrize("side", ["source", "target"])
async def test_chunks_are_no_smaller_than_the_blocks_of_either_disk(side: str) -> None:
    rig = Rig(data=FULL, granularity=512)
    getattr(rig, side).with_blocks(2048)
    source = TrackedDevice(rig.source)
    job = MirrorJob("j", source, rig.target, rig.emit, pivot=rig.pivot, seal=rig.seal, options=MirrorOptions(granularity=512))
    assert job.state.dirty.granularity == 2048


# --- writes during the copy ------------------------------------------------------------------------------------------


async def test_write_during_the_copys_read_is_copied_again() -> None:
    rig = Rig(CHUNK, data=b"a" * CHUNK, holding_source={"pread"})
    rig.start()
    reading = await rig.source.next()  # it will return what is there now
    await rig.device.pwrite(b"b" * CHUNK, 0)
    rig.source.holding.clear()
    reading.finish()
    await rig.until("BLOCK_JOB_READY")
    assert rig.target.data == b"b" * CHUNK
    await completed(rig)


async def test_write_between_the_targets_answer_and_settling_is_copied_again() -> None:
    rig = Rig(CHUNK, data=b"a" * CHUNK, holding_target={"pwrite"})
    rig.source.writes_now = True
    rig.start()
    writing = await rig.target.next()
    rig.target.holding.clear()
    writing.finish()  # the task that waits for it has not run yet
    assert rig.device.pwrite_now(b"b" * CHUNK, 0)
    await rig.until("BLOCK_JOB_READY")
    assert rig.target.data == b"b" * CHUNK
    await completed(rig)


async def test_chunk_is_not_copied_while_it_is_written() -> None:
    rig = Rig(2 * CHUNK, data=b"a" * 2 * CHUNK, holding_source={"pwrite"})
    writing = write(rig, b"b" * CHUNK, 0)
    held = await rig.source.next()
    rig.start()
    await settled()
    await settled()
    assert {call.offset for call in rig.source.named("pread")} == {CHUNK}
    assert "ready" not in rig.words
    held.finish()
    await writing
    await rig.until("BLOCK_JOB_READY")
    assert rig.target.data == rig.source.data == b"b" * CHUNK + b"a" * CHUNK
    rig.source.holding.clear()
    await completed(rig)


async def test_status_that_is_out_of_date_is_not_acted_on() -> None:
    """The source said zero; then the guest wrote, before the unit was begun."""
    rig = Rig(4 * CHUNK, holding_source={"extents"})
    MemoryDevice.pwrite_now(rig.target, b"t" * 4 * CHUNK, 0)
    rig.start()
    asked = await rig.source.next()
    await rig.device.pwrite(b"new!", CHUNK)
    rig.source.holding.clear()
    asked.finish()
    await rig.until("BLOCK_JOB_READY")
    assert rig.target.data == rig.source.data
    await completed(rig)


@pytest.mark.parametrize("limit", [512, 3000, CHUNK, 3 * CHUNK + 1])
async def test_status_that_covers_only_a_part(limit: int) -> None:
    rig = Rig()
    for at in range(0, SIZE, 2 * CHUNK):
        MemoryDevice.pwrite_now(rig.source, b"data" * 1024, at)
    MemoryDevice.pwrite_now(rig.target, b"t" * SIZE, 0)
    rig.source.status_limit = limit
    await rig.ready()
    assert rig.target.data == rig.source.data
    await completed(rig)


async def test_rewritten_data_that_became_zero_is_zeroed_on_the_target() -> None:
    rig = Rig(data=FULL, target_is_zero=True)
    await rig.ready()
    await rig.device.zero(0, SIZE)
    await completed(rig)
    assert rig.target.data == bytes(SIZE)


async def test_trimmed_data_too() -> None:
    rig = Rig(data=FULL)
    await rig.ready()
    await rig.device.trim(0, SIZE)
    await completed(rig)
    assert rig.target.data == rig.source.data


async def test_write_that_failed_is_copied_as_what_it_left() -> None:
    rig = Rig(data=FULL)
    await rig.ready()
    rig.source.broken["pwrite"] = eio()
    with pytest.raises(DeviceError):
        await rig.device.pwrite(b"x" * CHUNK, 0)
    assert rig.source.data[: CHUNK // 2] == b"x" * (CHUNK // 2)
    await completed(rig)
    assert rig.target.data == rig.source.data
