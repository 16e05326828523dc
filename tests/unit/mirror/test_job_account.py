"""The mirror job's account of its work, and the rate limit."""

from __future__ import annotations

import errno

import pytest

from nbdmirror.devices.memory import MemoryDevice
from nbdmirror.errors import DeviceError
from tests.support.fakes import settled
from tests.support.rig import CHUNK, SIZE, Rig, eio, hurry

FULL = b"old!" * (SIZE // 4)


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch)


async def completed(rig: Rig) -> None:
    rig.job.complete()
    await rig.until("null")
    assert rig.job.error is None


async def test_len_grows_with_what_is_rewritten() -> None:
    rig = Rig(data=FULL)
    await rig.ready()
    assert rig.job.progress == (SIZE, SIZE)
    rig.job.pause()
    await rig.until("standby")
    await rig.device.pwrite(b"x" * CHUNK, CHUNK // 2)
    assert rig.job.progress == (SIZE, SIZE + 2 * CHUNK)
    assert rig.job.statistics()["x-dirty-bytes"] == 2 * CHUNK
    rig.job.resume()
    await completed(rig)
    assert rig.job.progress == (SIZE + 2 * CHUNK, SIZE + 2 * CHUNK)


async def test_account_of_a_hollow_disk() -> None:
    rig = Rig(data=b"d" * CHUNK, target_is_zero=True)
    await rig.ready()
    expected = {
        "x-phase": "follow",
        "x-converges": True,
        "x-bytes-read": CHUNK,
        "x-bytes-sent": CHUNK,
        "x-bytes-zeroed": 0,
        "x-bytes-skipped": SIZE - CHUNK,
        "x-bytes-filled": 0,
        "x-dirty-bytes": 0,
        "x-in-flight": 0,
        "x-errors": 0,
    }
    assert rig.job.statistics() == expected
    assert rig.target.named("zero") == []
    assert rig.target.named("extents") == []
    await completed(rig)


async def test_target_that_tells_no_extents_is_zeroed_everywhere() -> None:
    rig = Rig()
    rig.target.broken["extents"] = DeviceError(errno.EINVAL, "held")
    MemoryDevice.pwrite_now(rig.target, FULL, 0)
    await rig.ready()
    assert rig.target.data == bytes(SIZE)
    await completed(rig)


async def test_source_that_tells_no_extents_is_copied() -> None:
    rig = Rig(data=b"d" * CHUNK)
    MemoryDevice.pwrite_now(rig.target, FULL, 0)
    rig.source.broken["extents"] = eio()
    await rig.ready()
    assert rig.target.data == rig.source.data
    await completed(rig)


async def test_rate_limit_is_kept_and_can_be_lifted() -> None:
    rig = Rig(data=FULL, speed=1)
    rig.start()
    await settled()
    assert len(rig.target.named("pwrite")) == 1  # the next one would be due in an hour
    rig.job.set_speed(2)
    await settled()
    assert 1 <= len(rig.target.named("pwrite")) <= 2
    rig.job.set_speed(0)
    await rig.until("BLOCK_JOB_READY")
    assert rig.of("BLOCK_JOB_READY")["speed"] == 0
    await completed(rig)


@pytest.mark.parametrize("verb", ["pause", "cancel"])
async def test_what_waits_for_the_rate_limit_can_be_stopped(verb: str) -> None:
    rig = Rig(data=FULL, speed=1)
    rig.start()
    await settled()
    getattr(rig.job, verb)()
    if verb == "pause":
        await rig.until("paused")
        rig.job.cancel()
    await rig.until("null")
    assert rig.differing() <= rig.dirty()
    assert len(rig.dirty()) == 7


@pytest.mark.parametrize(("request_size", "buffer", "most"), [(CHUNK, 2 * CHUNK, 2), (CHUNK, 1, 1), (2 * CHUNK, 5 * CHUNK, 2)])
async def test_data_in_flight_is_bounded(request_size: int, buffer: int, most: int) -> None:
    rig = Rig(data=FULL, holding_target={"pwrite"}, requests=16, request_size=request_size, buffer=buffer)
    rig.start()
    await rig.target.next()
    await settled()
    held = [call for call in rig.target.calls if call.is_held]
    assert len(held) == most
    assert sum(call.length for call in held) <= max(buffer, CHUNK)
    await rig.release()
    await rig.until("BLOCK_JOB_READY")
    await completed(rig)
