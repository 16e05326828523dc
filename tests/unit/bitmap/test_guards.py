"""The guards and the store below them, step by step: what waits for what, and who shares."""

from __future__ import annotations

import asyncio
import errno
from typing import TYPE_CHECKING, Any

import pytest

from nbdmirror.bitmap import guards
from nbdmirror.bitmap.guards import BarrierGuard, IntentGuard, guard_of
from nbdmirror.bitmap.image import State, Sync, Worth
from nbdmirror.errors import DeviceError
from nbdmirror.protocol.constants import FUA
from tests.support.failing import failed
from tests.support.fakes import settled
from tests.support.kept import BOOT, GRAIN, NEXT_BOOT, REGION, Kept, state_in
from tests.support.volatile import broken

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@pytest.fixture(autouse=True)
async def _guards_end(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    """No checkpoint comes by itself, and every guard that was made ends."""
    made: list[IntentGuard] = []
    init = IntentGuard.__init__

    def noting(self: IntentGuard, *args: Any) -> None:
        made.append(self)
        init(self, *args)

    monkeypatch.setattr(IntentGuard, "__init__", noting)
    monkeypatch.setattr(guards, "CHECKPOINT_SECONDS", 3600)
    yield
    for guard in made:
        await guard.aclose()


async def test_lazy_has_no_guard() -> None:
    assert guard_of(Kept(Sync.LAZY).store, Sync.LAZY, list) is None


# --- barrier ---------------------------------------------------------------------------------------------------------


async def test_flush_makes_the_bits_durable_before_the_disk() -> None:
    kept = await Kept(Sync.BARRIER).up()
    device = kept.node.device
    assert device.pwrite_now(b"x", 0)
    flush = asyncio.create_task(device.flush())
    call = await kept.next("sync")
    assert kept.disk.calls == []
    call.finish()
    await settled()
    assert kept.durable() == {0}
    (await kept.disk.next()).finish()
    await flush


async def test_flush_without_new_marks_asks_nothing_of_the_file() -> None:
    kept = await Kept(Sync.BARRIER).up()
    device = kept.node.device
    device.pwrite_now(b"x", 0)
    flush = asyncio.create_task(device.flush())
    (await kept.next("sync")).finish()
    (await kept.disk.next()).finish()
    await flush
    device.pwrite_now(b"y", 1)
    flush = asyncio.create_task(device.flush())
    (await kept.disk.next()).finish()
    await flush
    assert len([call for call in kept.file.calls if call.name == "sync"]) == 2  # one of them when it was taken into use


async def test_flushes_share_a_sync_that_begins_after_them() -> None:
    kept = await Kept(Sync.BARRIER).up()
    device = kept.node.device
    device.pwrite_now(b"x", 0)
    first = asyncio.create_task(device.flush())
    sync = await kept.next("sync")
    device.pwrite_now(b"x", REGION)
    others = [asyncio.create_task(device.flush()) for _ in range(3)]
    await settled()
    sync.finish()
    sync = await kept.next("sync")
    assert len(kept.disk.calls) == 1  # the first one's
    sync.finish()
    await settled()
    assert kept.held == []
    for _ in range(4):
        (await kept.disk.next()).finish()
    await asyncio.gather(first, *others)


@pytest.mark.parametrize("flags", [0, FUA])
async def test_write_waits_for_its_bit_if_it_is_to_be_durable(flags: int) -> None:
    kept = await Kept(Sync.BARRIER).up()
    write = asyncio.create_task(kept.node.device.zero(0, 1, flags))
    if flags:
        call = await kept.next("sync")
        assert kept.disk.calls == []
        call.finish()
        await settled()
        assert kept.durable() == {0}
    (await kept.disk.next()).finish()
    await write
    assert kept.held == []


async def test_sync_that_failed_fails_the_flush_and_is_made_in_full_the_next_time(caplog: pytest.LogCaptureFixture) -> None:
    kept = await Kept(Sync.BARRIER).up()
    device = kept.node.device
    device.pwrite_now(b"x", 0)
    flush = asyncio.create_task(device.flush())
    (await kept.next("sync")).fail(OSError(errno.EIO, "x"))
    error = await failed(flush)
    assert error.errno == errno.EIO
    assert str(error) == "cannot record in bitmap 'b' in 'volatile': Input/output error"
    assert caplog.messages == [str(error)]
    assert kept.disk.calls == []
    await kept.granting(settled())
    assert state_in(kept.file).worth(BOOT) is Worth.FLUSHED
    assert kept.file.distrusted
    flush = asyncio.create_task(device.flush())
    (await kept.next("sync")).finish()
    await settled()
    assert kept.durable() == {0}
    await kept.granting(settled())
    assert state_in(kept.file).worth(BOOT) is Worth.EXACT
    (await kept.disk.next()).finish()
    await flush


async def test_disabled_bitmap_holds_up_nobody() -> None:
    kept = await Kept(Sync.BARRIER).up()
    kept.node.bitmaps.stop_recording(kept.bitmap)
    await kept.granting(settled())
    write = asyncio.create_task(kept.node.device.zero(0, 1, FUA))
    (await kept.disk.next()).finish()
    await write
    assert kept.bitmap.bits.count == 0


# --- intent ----------------------------------------------------------------------------------------------------------


async def on_record(kept: Kept, *offsets: int) -> None:
    for offset in offsets:
        write = asyncio.create_task(kept.node.device.pwrite(b"x", offset))
        (await kept.next("write_through")).finish()
        (await kept.disk.next()).finish()
        await write


async def test_first_write_to_a_region_waits_for_the_record_and_later_ones_are_done_at_once() -> None:
    kept = await Kept(Sync.INTENT).up()
    device = kept.node.device
    assert not device.pwrite_now(b"x", 0)
    write = asyncio.create_task(device.pwrite(b"x", 0))
    call = await kept.next("write_through")
    assert kept.disk.calls == []
    call.finish()
    await settled()
    assert kept.durable() == set(range(REGION // GRAIN))
    (await kept.disk.next()).finish()
    await write
    assert device.pwrite_now(b"x", REGION - 1)
    assert not device.pwrite_now(b"xx", REGION - 1)
    assert kept.held == []


async def test_first_writes_at_the_same_time_share_a_commit() -> None:
    kept = await Kept(Sync.INTENT).up()
    device = kept.node.device
    first = asyncio.create_task(device.pwrite(b"x", 0))
    call = await kept.next("write_through")
    others = [asyncio.create_task(device.pwrite(b"x", offset)) for offset in (REGION, REGION + 5, 2 * REGION)]
    await settled()
    call.finish()
    call = await kept.next("write_through")
    assert len(kept.disk.calls) == 1
    call.finish()
    await settled()
    assert kept.held == []
    assert len(kept.disk.calls) == 4
    for _ in range(4):
        (await kept.disk.next()).finish()
    await asyncio.gather(first, *others)


@pytest.mark.parametrize(("error", "number"), [("ENOSPC", "ENOSPC"), ("EDQUOT", "ENOSPC"), ("EIO", "EIO"), ("EROFS", "EIO")])
async def test_write_that_could_not_be_put_on_record_fails_and_the_disk_has_nothing_of_it(error: str, number: str) -> None:
    kept = await Kept(Sync.INTENT).up()
    write = asyncio.create_task(kept.node.device.pwrite(b"x", 0))
    (await kept.next("write_through")).fail(OSError(getattr(errno, error), error))
    assert (await failed(write)).errno == getattr(errno, number)
    assert kept.disk.calls == []
    assert not kept.bitmap.inconsistent
    write = asyncio.create_task(kept.node.device.pwrite(b"x", 0))
    (await kept.next("write_through")).finish()
    (await kept.disk.next()).finish()
    await write


async def test_writer_that_gives_up_leaves_the_commit_to_the_others() -> None:
    kept = await Kept(Sync.INTENT).up()
    device = kept.node.device
    first, second = (asyncio.create_task(device.pwrite(b"x", 0)) for _ in range(2))
    call = await kept.next("write_through")
    first.cancel()
    await settled()
    call.finish()
    for _ in range(2):
        (await kept.disk.next()).finish()
    await second
    assert first.cancelled()


async def test_guard_that_lets_go_finishes_what_is_under_way_and_holds_nobody() -> None:
    kept = await Kept(Sync.INTENT).up()
    device = kept.node.device
    writes = [asyncio.create_task(device.pwrite(b"x", offset)) for offset in (0, REGION)]
    call = await kept.next("write_through")
    kept.node.unguard(kept.guard)
    ending = asyncio.create_task(kept.guard.aclose())
    await settled()
    assert not ending.done()
    call.finish()
    await ending
    for _ in writes:
        (await kept.disk.next()).finish()
    await asyncio.gather(*writes)
    assert kept.held == []
    assert device.pwrite_now(b"x", 2 * REGION)


async def test_checkpoint_takes_idle_regions_off_the_record_once_their_bits_are_durable() -> None:
    kept = await Kept(Sync.INTENT).up()
    await on_record(kept, 0, REGION)
    await kept.guard.checkpoint()  # both were touched: nothing to do
    assert kept.held == []
    assert kept.node.device.pwrite_now(b"x", REGION)
    checkpoint = asyncio.create_task(kept.guard.checkpoint())
    call = await kept.next("sync")
    assert kept.durable() == set(range(2 * REGION // GRAIN))
    call.finish()
    (await kept.next("write_through")).finish()
    await checkpoint
    assert kept.durable() == {0, *range(REGION // GRAIN, 2 * REGION // GRAIN)}
    assert not kept.node.device.pwrite_now(b"x", 0)
    assert kept.node.device.pwrite_now(b"x", REGION)


async def test_region_stays_on_record_while_a_write_to_it_is_in_flight() -> None:
    """However long it takes: the bitmap may be cleared meanwhile, and the mark that is set again then is not durable."""
    kept = await Kept(Sync.INTENT).up()
    write = asyncio.create_task(kept.node.device.pwrite(b"x", 0))
    (await kept.next("write_through")).finish()
    held = await kept.disk.next()
    for _ in range(3):
        await kept.granting(kept.guard.checkpoint())
    kept.node.bitmaps.clear(kept.bitmap)
    assert kept.durable() == set(range(REGION // GRAIN))
    held.finish()
    await write
    for _ in range(2):
        await kept.granting(kept.guard.checkpoint())
    assert kept.durable() == {0}


async def test_checkpoint_that_fails_leaves_the_regions_on_record(caplog: pytest.LogCaptureFixture) -> None:
    kept = await Kept(Sync.INTENT).up()
    await on_record(kept, 0)
    await kept.guard.checkpoint()
    for _ in range(2):
        checkpoint = asyncio.create_task(kept.guard.checkpoint())
        (await kept.next("sync")).fail(broken())
        await failed(checkpoint)
        await kept.granting(settled())
        assert kept.durable() == set(range(REGION // GRAIN))
    assert len(caplog.messages) == 1
    await kept.granting(kept.guard.checkpoint())
    await kept.granting(settled())
    assert kept.durable() == {0}


async def test_checkpoints_come_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guards, "CHECKPOINT_SECONDS", 0.001)
    kept = await Kept(Sync.INTENT).up()
    await on_record(kept, 0)

    async def off_the_record() -> None:
        while kept.guard.regions.on_record:
            await asyncio.sleep(0.001)

    await asyncio.wait_for(kept.granting(off_the_record()), 10)
    await kept.granting(kept.guard.aclose())


async def test_enabling_is_settled_when_the_flag_and_what_is_in_flight_are_durable() -> None:
    kept = await Kept(Sync.INTENT).up()
    kept.node.bitmaps.stop_recording(kept.bitmap)
    await kept.granting(kept.guard.settle())
    write = asyncio.create_task(kept.node.device.pwrite(b"x", 0))
    held = await kept.disk.next()
    assert kept.durable() == set()
    kept.node.bitmaps.record(kept.bitmap)
    await kept.granting(kept.guard.settle())
    assert kept.durable() == set(range(REGION // GRAIN))
    assert State.decode(kept.file._versions[1][0]).recording
    held.finish()
    await write


async def test_disabled_bitmap_records_no_regions() -> None:
    kept = await Kept(Sync.INTENT).up()
    kept.node.bitmaps.stop_recording(kept.bitmap)
    await kept.granting(kept.guard.settle())
    assert kept.node.device.pwrite_now(b"x", 0)
    write = asyncio.create_task(kept.node.device.pwrite(b"x", 0))
    (await kept.disk.next()).finish()
    await write
    assert kept.held == []
    assert not State.decode(kept.file._versions[1][0]).recording


# --- the end, and coming back ----------------------------------------------------------------------------------------


async def test_orderly_end_is_exact_on_any_host() -> None:
    kept = await Kept(Sync.INTENT).up()
    await on_record(kept, 0, 2 * REGION)
    await kept.guard.aclose()
    await kept.granting(kept.store.close())
    assert kept.durable() == {0, 2 * REGION // GRAIN}
    again = await Kept(Sync.LAZY, kept.file.after_power_cut(), NEXT_BOOT).up()
    assert again.bitmap.bits.count == 2
    assert again.state.generation == 1


async def test_end_that_fails_leaves_the_file_in_use() -> None:
    kept = await Kept(Sync.LAZY).up()
    assert kept.node.device.pwrite_now(b"x", 0)
    closing = asyncio.create_task(kept.store.close())
    (await kept.next("sync")).fail(broken())
    await kept.granting(failed(closing))
    assert state_in(kept.file).worth(BOOT) is Worth.NOTHING


async def test_inconsistent_bitmap_is_not_touched_until_it_is_cleared() -> None:
    crashed = (await Kept(Sync.LAZY).up()).file.after_power_cut()
    kept = await Kept(Sync.INTENT, crashed, NEXT_BOOT).up()
    assert kept.bitmap.inconsistent
    assert kept.node.device.pwrite_now(b"x", 0)
    await kept.store.close()
    assert kept.file.calls == []
    kept.node.bitmaps.clear(kept.bitmap)
    assert kept.bitmap.recording
    await kept.granting(kept.guard.settle())
    assert State.decode(kept.file._versions[1][0]).worth(NEXT_BOOT) is Worth.EXACT
    assert not kept.node.device.pwrite_now(b"x", 0)


async def test_next_daemon_does_not_trust_what_had_failed_to_be_written_back() -> None:
    """The kernel takes those pages for clean: they are handed to it again before any region goes off the record."""
    kept = await Kept(Sync.INTENT).up()
    await on_record(kept, 0)
    await kept.guard.checkpoint()
    checkpoint = asyncio.create_task(kept.guard.checkpoint())
    (await kept.next("sync")).fail(broken())
    await failed(checkpoint)
    await kept.granting(settled())
    file = kept.file.after_kill()
    file.distrusted = state_in(file).unsure
    await Kept(Sync.INTENT, file).up()
    assert 0 in Kept(Sync.INTENT, file.after_power_cut(), NEXT_BOOT).durable()


async def test_failure_to_take_it_into_use_is_told() -> None:
    kept = Kept(Sync.LAZY)
    start = asyncio.create_task(kept.store.start())
    (await kept.next("sync")).finish()
    (await kept.next("write_through")).fail(OSError(errno.ENOSPC, "x"))
    with pytest.raises(DeviceError, match="No space left"):
        await start


async def test_barrier_guard_is_a_guard_of_its_own() -> None:
    assert isinstance(guard_of(Kept(Sync.BARRIER).store, Sync.BARRIER, list), BarrierGuard)
