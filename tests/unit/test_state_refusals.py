"""The state directory after crashes, and with files that can't be used: what is refused is left as it is. Real files."""

from __future__ import annotations

import os
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import pytest

from nbdmirror.bitmap.image import STATE_OFFSET, Sync
from nbdmirror.bitmap.store import OnInconsistent
from nbdmirror.devices.file import FileDevice
from nbdmirror.errors import UsageError
from nbdmirror.inventory import Node
from nbdmirror.state import BitmapRequest, StateOptions, set_up_bitmaps
from nbdmirror.units import MiB
from tests.support.stated import OTHER_BOOT, SIZE, change_state, everything, files, refusal, runs, served, stores_of
from tests.support.tools import make_disk

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return make_disk(tmp_path / "disk", SIZE)


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


# --- crashes ---------------------------------------------------------------------------------------------------------


async def crashed(disk: Path, state: Path, mode: Sync, **changes: Any) -> Path:
    """A bitmap `a` with its first chunk marked and flushed, whose host has crashed while its second region was on record."""
    async with served(disk, state, "a", sync=mode) as node:
        await node.device.pwrite(b"x", 0)
        await node.device.flush()
    (path,) = files(state)
    with path.open("r+b") as file:
        file.seek(8192)
        file.write(b"\2" if mode is Sync.INTENT else b"\0")
    change_state(path, **{"in_use": True, "boot_id": OTHER_BOOT, **changes})
    return path


@pytest.mark.parametrize("mode", [Sync.LAZY, Sync.BARRIER])
@pytest.mark.parametrize("changes", [{}, {"unsure": True}])
async def test_after_a_crash_of_the_host_it_is_inconsistent(
    disk: Path, state: Path, mode: Sync, changes: dict[str, bool], caplog: pytest.LogCaptureFixture
) -> None:
    await crashed(disk, state, mode, **changes)
    line = await refusal(disk, state, "a")
    assert "bitmap 'a' is inconsistent" in line
    assert "--on-inconsistent all-dirty" in line
    before = everything(state)
    async with served(disk, state) as node:
        (bitmap,) = node.bitmaps
        assert (bitmap.inconsistent, bitmap.recording, bitmap.persistent) == (True, False, True)
    assert "was in use when the host crashed: changes may be missing" in caplog.text
    assert everything(state) == before


async def test_inconsistent_bitmap_can_be_cleared(disk: Path, state: Path) -> None:
    await crashed(disk, state, Sync.LAZY)
    async with served(disk, state) as node:
        (bitmap,) = node.bitmaps
        bitmap.check_removable()
        node.bitmaps.clear(bitmap)
        await stores_of(node).settle(bitmap)
        await node.device.pwrite(b"x", MiB)
        assert not bitmap.inconsistent
    async with served(disk, state, "a") as node:
        assert runs(node, "a") == [(16, 17)]


async def test_inconsistent_bitmap_can_be_removed(disk: Path, state: Path) -> None:
    await crashed(disk, state, Sync.LAZY)
    async with served(disk, state) as node:
        (bitmap,) = node.bitmaps
        await stores_of(node).remove(bitmap)
        assert list(node.bitmaps) == []
    assert files(state) == []


@pytest.mark.parametrize("mode", [Sync.LAZY, Sync.BARRIER])
async def test_inconsistent_bitmap_can_be_taken_as_all_dirty(disk: Path, state: Path, mode: Sync) -> None:
    await crashed(disk, state, mode)
    async with served(disk, state, "a", on_inconsistent=OnInconsistent.ALL_DIRTY) as node:
        assert runs(node, "a") == [(0, 161)]
    async with served(disk, state, "a") as node:
        assert runs(node, "a") == [(0, 161)]


async def test_barrier_bitmap_can_be_taken_for_what_was_flushed(disk: Path, state: Path) -> None:
    await crashed(disk, state, Sync.BARRIER)
    async with served(disk, state, "a", on_inconsistent=OnInconsistent.FLUSHED) as node:
        assert runs(node, "a") == [(0, 1)]


async def test_lazy_bitmap_can_not_be_taken_for_what_was_flushed(disk: Path, state: Path) -> None:
    await crashed(disk, state, Sync.LAZY)
    assert "inconsistent" in await refusal(disk, state, "a", on_inconsistent=OnInconsistent.FLUSHED)


async def test_after_a_crash_of_the_host_regions_on_record_are_dirty(disk: Path, state: Path) -> None:
    await crashed(disk, state, Sync.INTENT)
    async with served(disk, state, "a") as node:  # the mode of then counts
        assert runs(node, "a") == [(0, 1), (64, 128)]
    async with served(disk, state, "a") as node:
        assert runs(node, "a") == [(0, 1), (64, 128)]


# --- what is refused -------------------------------------------------------------------------------------------------


def cut_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 4096)


def lengthen(path: Path) -> None:
    os.truncate(path, path.stat().st_size + 4096)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def write_at(offset: int, data: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(data)

    return write


def a_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (cut_short, "it has 12288 bytes instead of 16384"),
        (lengthen, "it has 20480 bytes instead of 16384"),
        (empty, "no bitmap of nbdmirror"),
        (write_at(0, b"QFI\xfb"), "no bitmap of nbdmirror"),
        (write_at(8, b"\2"), "version 2"),
        (write_at(1000, b"x"), "checksum of its head"),
        (write_at(STATE_OFFSET + 10, b"x"), "checksum of its state"),
        (write_at(12288, b"\xff"), "checksum of its bits"),
        (write_at(8192, b"\xff"), "regions on record"),
        (a_directory, "Is a directory"),
    ],
)
@pytest.mark.parametrize("read_only", [False, True])
async def test_damaged_file_keeps_the_disk_from_being_served(
    disk: Path, state: Path, damage: Callable[[Path], None], reason: str, read_only: bool
) -> None:
    async with served(disk, state, "a", "b") as node:
        await node.device.pwrite(b"x", 0)
    damage(files(state)[1])
    line = await refusal(disk, state, read_only=read_only)
    assert line.startswith(f"'{files(state)[1]}' can't be used: ")
    assert reason in line
    assert "move it away" in line


async def test_other_size_is_refused(disk: Path, state: Path) -> None:
    async with served(disk, state, "a"):
        pass
    os.truncate(disk, SIZE + 512)
    assert f"of a disk of {SIZE} bytes, and '{disk}' has {SIZE + 512}" in await refusal(disk, state)


async def test_bitmap_of_another_disk_is_left_alone_and_keeps_its_name(disk: Path, state: Path, tmp_path: Path) -> None:
    async with served(disk, state, "a"):
        pass
    before = everything(state)
    other = make_disk(tmp_path / "other", SIZE)
    line = await refusal(other, state, "a")
    assert "Bitmap already exists: a" in line
    assert "is of another disk" in line
    async with served(other, state, "b") as node:
        assert [bitmap.name for bitmap in node.bitmaps] == ["b"]
    assert everything(state).items() >= before.items()


async def test_two_disks_that_are_served_may_have_bitmaps_of_one_name(disk: Path, state: Path, tmp_path: Path) -> None:
    async with served(disk, state, "a") as node:
        second = Node("second", "file", FileDevice.open(make_disk(tmp_path / "other", SIZE)))
        await stores_of(node).create(second, "a")
        await second.device.pwrite(b"x", 0)
        assert (runs(node, "a"), runs(second, "a")) == ([], [(0, 1)])
        await second.disk.aclose()
    assert len(files(state)) == 2


async def test_other_granularity_than_asked_for(disk: Path, state: Path) -> None:
    async with served(disk, state, "a"):
        pass
    node = Node("source", "file", FileDevice.open(disk))
    async with AsyncExitStack() as stack:
        stack.push_async_callback(node.disk.aclose)
        with pytest.raises(UsageError, match="granularity of 65536, not 4096"):
            await set_up_bitmaps(stack, node, StateOptions(str(state), (BitmapRequest("a", 4096),)))


async def test_directory_has_one_daemon_that_writes_or_some_that_read(disk: Path, state: Path, tmp_path: Path) -> None:
    other = make_disk(tmp_path / "other", SIZE)
    async with served(disk, state, "a"):
        for read_only in (False, True):
            line = await refusal(other, state, read_only=read_only)
            assert f"the state directory '{state}' is in use by process {os.getpid()} (" in line
    async with served(disk, state, read_only=True), served(disk, state, read_only=True):
        assert "is in use" in await refusal(other, state)


async def test_directory_that_can_not_be_used(disk: Path, tmp_path: Path) -> None:
    for missing in (tmp_path / "no" / "state", disk):
        with pytest.raises(UsageError, match="cannot use the state directory"):
            async with served(disk, missing):
                pass
