"""The state directory: what comes back, what is made and removed. Real files."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
import time
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import pytest

from nbdmirror.bitmap.image import Head, Sync
from nbdmirror.bitmap.mapped import MappedFile
from nbdmirror.devices.file import FileDevice
from nbdmirror.errors import DeviceError, StateError, UsageError
from nbdmirror.inventory import Inventory, Node
from nbdmirror.state import BitmapRequest, StateOptions, set_up_bitmaps
from nbdmirror.units import GiB, KiB, MiB, TiB
from tests.support.fakes import GatedDevice, settled
from tests.support.stated import SIZE, everything, files, runs, served, stores_of
from tests.support.tools import make_disk

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return make_disk(tmp_path / "disk", SIZE)


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


# --- coming back -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", list(Sync))
async def test_bits_come_back(disk: Path, state: Path, mode: Sync) -> None:
    async with served(disk, state, "a", "b", sync=mode) as node:
        await node.device.pwrite(b"x" * MiB, MiB)
        await node.device.zero(SIZE - 1, 1)
    assert [path.name.split("-")[0] for path in files(state)] == ["a", "b"]
    async with served(disk, state, sync=mode) as node:
        assert runs(node, "a") == runs(node, "b") == [(16, 32), (160, 161)]
        for bitmap in node.bitmaps:
            assert (bitmap.persistent, bitmap.recording, bitmap.inconsistent, bitmap.read_only) == (True, True, False, False)
        await node.device.pwrite(b"x", 0)
        assert runs(node, "a")[0] == (0, 1)


async def test_flags_come_back(disk: Path, state: Path) -> None:
    async with served(disk, state, "a") as node:
        (bitmap,) = node.bitmaps
        node.bitmaps.stop_recording(bitmap)
        await stores_of(node).settle(bitmap)
    async with served(disk, state, "a") as node:
        (bitmap,) = node.bitmaps
        assert not bitmap.recording
        await node.device.pwrite(b"x", 0)
        assert bitmap.bits.count == 0


async def test_any_name_and_any_granularity(disk: Path, state: Path) -> None:
    names = {"a/../b": 512, "\0\n": 2 * GiB, "ä" * 511: 64 * KiB, "x" * 1023: 4096, ".": 4096}
    async with served(disk, state) as node:
        for name, granularity in names.items():
            await stores_of(node).create(node, name, granularity)
        await node.device.pwrite(b"x", SIZE - 1)
    assert len(files(state)) == len(names)
    async with served(disk, state) as node:
        assert {bitmap.name: bitmap.bits.granularity for bitmap in node.bitmaps} == names
        assert all(bitmap.bits.count == 1 for bitmap in node.bitmaps)


async def test_disk_that_is_only_read_shows_its_bitmaps_and_changes_nothing(disk: Path, state: Path) -> None:
    async with served(disk, state, "a") as node:
        await node.device.pwrite(b"x", 0)
    before = everything(state)
    async with served(disk, state, "a", read_only=True) as node, served(disk, state, "a", read_only=True):
        (bitmap,) = node.bitmaps
        assert bitmap.read_only
        assert runs(node, "a") == [(0, 1)]
        with pytest.raises(StateError, match="readonly"):
            bitmap.check_modifiable()
        with pytest.raises(StateError, match="read-only"):
            await stores_of(node).create(node, "b")
    assert everything(state) == before
    with pytest.raises(UsageError, match="no bitmap 'b' yet"):
        async with served(disk, state, "b", read_only=True):
            pass


async def test_disk_without_bytes(tmp_path: Path, state: Path) -> None:
    empty = make_disk(tmp_path / "empty", 0)
    for _ in range(2):
        async with served(empty, state, "a", sync=Sync.INTENT) as node:
            assert runs(node, "a") == []


async def test_moved_disk_keeps_its_bitmaps_where_the_file_system_can_tell(disk: Path, state: Path, tmp_path: Path) -> None:
    async with served(disk, state, "a") as node:
        await node.device.pwrite(b"x", 0)
        if "generation" not in node.disk.identity():
            pytest.skip("no inode generations here")
    moved = disk.rename(tmp_path / "moved")
    async with served(moved, state, "a") as node:
        assert runs(node, "a") == [(0, 1)]


# --- making and removing ---------------------------------------------------------------------------------------------


async def test_names_are_taken_once(disk: Path, state: Path) -> None:
    async with served(disk, state, "a") as node:
        stores = stores_of(node)
        made = await asyncio.gather(*(stores.create(node, "b") for _ in range(3)), return_exceptions=True)
        assert sorted(str(each) for each in made if isinstance(each, Exception)) == ["Bitmap already exists: b"] * 2
        wrong = [("a", 512, "already exists"), ("", 512, "empty"), ("x" * 1024, 512, "too long"), ("c", 7, "power of 2")]
        for name, granularity, reason in wrong:
            with pytest.raises(StateError, match=reason):
                await stores.create(node, name, granularity)
    assert len(files(state)) == 2


async def test_removed_bitmap_is_gone(disk: Path, state: Path) -> None:
    async with served(disk, state, "a", "b", sync=Sync.INTENT) as node:
        bitmap = node.bitmaps.get("a")
        assert bitmap is not None
        await stores_of(node).remove(bitmap)
        assert [each.name for each in node.bitmaps] == ["b"]
        assert len(node.guards) == 1
        await node.device.pwrite(b"x", 0)
        again = await stores_of(node).create(node, "a", 512)
        assert again.bits.count == 0
    assert len(files(state)) == 2


async def test_disk_that_is_closed_takes_its_bitmaps_along(disk: Path, state: Path) -> None:
    async with served(disk, state, sync=Sync.INTENT) as node:
        stores = stores_of(node)
        for number in range(2):
            again = Node("again", "file", FileDevice.open(disk))
            await stores.load_all(again)
            assert len(list(again.bitmaps)) == number
            if number == 0:
                await stores.create(again, "a")
                await again.device.pwrite(b"x", 0)
                twice = Node("twice", "file", FileDevice.open(disk))
                with pytest.raises(StateError, match="for another node of the same disk"):
                    await stores.load_all(twice)
                await twice.disk.aclose()
            assert runs(again, "a") == [(0, 1)]
            await stores.release(again)
            await again.disk.aclose()


async def test_bitmap_joins_while_nothing_is_in_flight(disk: Path, state: Path) -> None:
    async with served(disk, state, sync=Sync.INTENT) as node:
        below = GatedDevice(SIZE, name="another disk")
        other = Node("other", "file", below)
        early = asyncio.create_task(other.device.pwrite(b"x", 0))
        held = await below.next()
        creating = asyncio.create_task(stores_of(node).create(other, "a"))
        async with asyncio.timeout(10):
            while not other.device.is_drained:
                await asyncio.sleep(0)
        late = asyncio.create_task(other.device.pwrite(b"x", MiB))
        await settled()
        assert not creating.done()
        held.finish()
        await early
        await creating
        (await below.next()).finish()
        await late
        assert runs(other, "a") == [(16, 17)]


async def test_no_room_is_told_and_leaves_nothing(disk: Path, state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    async with served(disk, state) as node:
        monkeypatch.setattr(os, "posix_fallocate", full)
        with pytest.raises(DeviceError, match=r"cannot create '.*' for bitmap 'a': No space left"):
            await stores_of(node).create(node, "a")
        assert list(node.bitmaps) == []
    assert files(state) == []


async def test_draft_of_a_daemon_that_was_killed_is_in_nobodys_way(disk: Path, state: Path) -> None:
    async with served(disk, state, "a"):
        pass
    (path,) = files(state)
    draft = path.rename(f"{path}.new")
    async with served(disk, state, "a") as node:
        assert runs(node, "a") == []
    assert not draft.exists()
    assert path.exists()


async def test_guards_follow_their_disk(disk: Path, state: Path, tmp_path: Path) -> None:
    async with served(disk, state, "a", sync=Sync.INTENT) as node:
        inventory = Inventory()
        target = Node("target", "file", FileDevice.open(make_disk(tmp_path / "target", SIZE)))
        client = node.device
        async with client.drained():
            inventory.pivot(node, target)
        await client.pwrite(b"x", 0)
        assert runs(node, "a") == []
        await node.device.pwrite(b"x", 0)
        assert runs(node, "a") == [(0, 1)]
        await target.disk.aclose()


async def test_without_a_directory_bitmaps_are_in_memory(disk: Path) -> None:
    async with AsyncExitStack() as stack:
        node = Node("source", "file", FileDevice.open(disk))
        stack.push_async_callback(node.disk.aclose)
        assert await set_up_bitmaps(stack, node, StateOptions(None, (BitmapRequest("a", 512), BitmapRequest("b")))) is None
        assert {each.name: (each.bits.granularity, each.persistent) for each in node.bitmaps} == {
            "a": (512, False),
            "b": (65536, False),
        }


# --- the file below --------------------------------------------------------------------------------------------------


async def test_writes_through_are_in_order_even_if_nobody_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = MappedFile.create(tmp_path / "f", 8192, {0: b"head"})
    assert bytes(file.content[:5]) == b"head\0"
    begun, go_on, write = [], threading.Event(), os.pwritev

    def slow(fd: int, buffers: tuple[bytes], offset: int, flags: int) -> int:
        begun.append(bytes(buffers[0]))
        assert go_on.wait(10)
        return write(fd, buffers, offset, flags)

    monkeypatch.setattr(os, "pwritev", slow)
    older, newer = (asyncio.create_task(file.write_through(4096, content)) for content in (b"older", b"newer"))
    while not begun:
        await asyncio.sleep(0)
    older.cancel()
    await settled()
    assert begun == [b"older"]
    go_on.set()
    await newer
    assert bytes(file.content[4096:4101]) == b"newer"
    file.close()
    file.close()


async def test_what_is_not_trusted_is_written_again(tmp_path: Path) -> None:
    class Noting:
        def __init__(self, content: memoryview) -> None:
            self.content, self.stored = content, []  # type: tuple[memoryview, list[int]]

        def __getitem__(self, at: int) -> int:
            return self.content[at]

        def __setitem__(self, at: int, value: int) -> None:
            assert self.content[at] == value
            self.stored.append(at)

    file = MappedFile.create(tmp_path / "f", 4 * 4096, {4096: b"x"})
    noting = Noting(file.content)
    file.content = noting  # type: ignore[assignment]
    await file.sync(4096, 2 * 4096)
    assert noting.stored == []
    file.distrust()
    for _ in range(2):
        await file.sync(4096, 2 * 4096)
    assert noting.stored == [4096, 8192]
    assert not file.has_lost()
    file.close()


async def test_large_bitmap_is_there_at_once(tmp_path: Path, state: Path) -> None:
    """16 TiB at 64 KiB: 32 MiB of bits. The bound only catches what would take that long in earnest."""
    disk = tmp_path / "disk"
    with disk.open("wb") as file:
        try:
            os.truncate(file.fileno(), 16 * TiB - 4096)
        except OSError:
            pytest.skip("no files of this size here")
    async with served(disk, state, "a") as node:
        (bitmap,) = node.bitmaps
        bitmap.bits.add(8 * TiB, 8 * TiB - 4096)
    assert files(state)[0].stat().st_blocks * 512 >= 32 * MiB
    began = time.monotonic()
    async with served(disk, state, "a") as node:
        took = time.monotonic() - began
        assert runs(node, "a") == [(1 << 27, 1 << 28)]
    print(f"loaded in {took:.3f} s")
    assert took < 5


def test_files_are_what_their_heads_say(disk: Path, state: Path) -> None:
    async def go() -> None:
        async with served(disk, state, "a"):
            pass

    asyncio.run(go())
    (path,) = files(state)
    head = Head.decode(path.read_bytes()[:4096])
    assert (head.name, head.size, head.granularity) == ("a", SIZE, 65536)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.stat().st_size == head.file_length
