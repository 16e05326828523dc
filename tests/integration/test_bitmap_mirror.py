"""Mirroring by bitmaps, round after round, over real files: what the bitmap counts after each step, for every way of using it
and every kind of failure, and that the deltas add up to the disk.

The scenario is that of the test that QEMU's users of bitmap mirrors rely on (64 MiB, chunks of 64 KiB): three groups of writes,
three mirrors, of which the first may fail, and writes during the second.
"""

from __future__ import annotations

import asyncio
import errno
import shutil
from typing import TYPE_CHECKING, Any, Final

import pytest

from nbdmirror.bitmap.dirty import DirtyBitmap
from nbdmirror.bitmap.named import NamedBitmap
from nbdmirror.commands.mirror import BlockdevMirror, MirrorCommands
from nbdmirror.devices.file import FileDevice
from nbdmirror.errors import DeviceError
from nbdmirror.inventory import Inventory, Node
from nbdmirror.units import KiB, MiB
from tests.support.mirroring import make_disk

if TYPE_CHECKING:
    from pathlib import Path

    from nbdmirror.jobs.job import Job

SIZE: Final = 64 * MiB
CHUNK: Final = 64 * KiB
# Offset, byte, length.
GROUPS: Final = [
    [(0, 0x49, CHUNK), (0x100000, 0x6C, CHUNK), (0x2000000, 0x6F, CHUNK), (0x3FF0000, 0x76, CHUNK)],
    [(0, 0x65, CHUNK), (0xF8000, 0x77, CHUNK), (0x2008000, 0x72, CHUNK), (0x3FE0000, 0x69, CHUNK)],
    [(0x10000, 0x74, CHUNK), (0xE8000, 0x69, CHUNK), (0x2018000, 0x6E, CHUNK), (0x3FE0000, 0x67, 2 * CHUNK)],
    [(0x10000, 0xAA, 3 * CHUNK), (0xD8000, 0xBB, CHUNK), (0x2028000, 0xCC, CHUNK), (0x3FC0000, 0xDD, CHUNK)],
]
# After W1, mirror 1, W2 during mirror 2, mirror 2, W3, mirror 3; then the length of mirror 3.
COUNTS: Final = {
    ("never", "simulated"): ([6, 6, 10, 10, 15, 15], 983040),
    ("never", "intermediate"): ([6, 6, 10, 10, 15, 15], 983040),
    ("never", "none"): ([6, 6, 10, 10, 15, 15], 983040),
    ("on-success", "simulated"): ([6, 6, 10, 0, 8, 0], 524288),
    ("on-success", "intermediate"): ([6, 6, 10, 0, 8, 0], 524288),
    ("on-success", "none"): ([6, 0, 7, 0, 8, 0], 524288),
    ("always", "simulated"): ([6, 0, 7, 0, 8, 0], 524288),
    ("always", "intermediate"): ([6, 5, 9, 0, 8, 0], 524288),
    ("always", "none"): ([6, 0, 7, 0, 8, 0], 524288),
}


class Faulty(FileDevice):
    """A file whose second read and those after it fail, while `reads_left` counts."""

    reads_left: int | None = None

    def pread_now(self, buffer: bytearray | memoryview, offset: int) -> bool:
        if self.reads_left is not None:
            if not self.reads_left:
                raise DeviceError(errno.EIO, "injected")
            self.reads_left -= 1
        return super().pread_now(buffer, offset)


class Site:
    """A disk with a bitmap, mirrored to one file after another."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.inventory = Inventory()
        self.events: list[tuple[str, dict[str, Any]]] = []
        self._changed = asyncio.Event()
        self.mirrors = MirrorCommands(self.inventory, self.emit)
        self.path = make_disk(directory / "disk", SIZE)
        self.disk = Faulty.open(str(self.path))
        self.source = self.inventory.add_node(Node("source", "file", self.disk))

    def emit(self, event: str, data: dict[str, Any]) -> None:
        self.events.append((event, data))
        self._changed.set()

    async def until(self, word: str) -> dict[str, Any]:
        """Wait for an event or a status that has not been seen yet; everything before it is forgotten."""
        async with asyncio.timeout(20):
            while True:
                while self.events:
                    event, data = self.events.pop(0)
                    if word in (event, data.get("status")):
                        return data
                self._changed.clear()
                await self._changed.wait()

    async def write(self, group: int) -> None:
        for offset, byte, length in GROUPS[group]:
            await self.source.device.pwrite(bytes([byte]) * length, offset)

    def add_bitmap(self, name: str, granularity: int = CHUNK) -> NamedBitmap:
        bitmap = NamedBitmap(name, DirtyBitmap(SIZE, granularity))
        self.source.bitmaps.add(bitmap)
        return bitmap

    def content(self, name: str) -> bytes:
        return (self.directory / name).read_bytes()

    def copy_of(self, base: str, name: str) -> str:
        """A new file with the content of another."""
        shutil.copyfile(self.directory / base, self.directory / name)
        return name

    async def start(self, target: str, **arguments: Any) -> Job:
        """A job to a file; it ends in PENDING before it is finalized."""
        path = self.directory / target
        if not path.exists():
            make_disk(path, SIZE)
        self.inventory.add_node(Node(target, "file", FileDevice.open(str(path))))
        self.mirrors.blockdev_mirror(
            BlockdevMirror(job_id=target, device="source", target=target, auto_finalize=False, x_requests=1, **arguments)
        )
        return self.inventory.jobs[target]

    async def finish(self, job: Job) -> None:
        """Ready, then ended as a copy of this moment."""
        job.cancel_gently()
        await self.until("BLOCK_JOB_PENDING")
        job.finalize()
        await self.until("null")
        assert job.error is None
        await self.inventory.remove_node(job.id)

    async def full(self, target: str) -> None:
        """A reference: everything is copied."""
        job = await self.start(target, sync="full")
        data = await self.until("BLOCK_JOB_READY")
        assert (data["len"], data["offset"]) == (SIZE, SIZE)
        await self.finish(job)

    async def aclose(self) -> None:
        for node in list(self.inventory.nodes):
            await self.inventory.remove_node(node)


async def first_mirror(site: Site, mode: str, failure: str) -> None:
    if failure == "intermediate":
        site.disk.reads_left = 1
    job = await site.start("bsync1", sync="bitmap", bitmap="bitmap0", bitmap_mode=mode)
    if failure == "intermediate":
        assert (await site.until("BLOCK_JOB_ERROR")) == {"device": "bsync1", "operation": "read", "action": "report"}
        data = await site.until("BLOCK_JOB_COMPLETED")
        assert (data["len"], data["offset"], data["error"]) == (6 * CHUNK, CHUNK, "Input/output error")
        await site.until("null")
        site.disk.reads_left = None
    else:
        data = await site.until("BLOCK_JOB_READY")
        assert (data["len"], data["offset"]) == (6 * CHUNK, 6 * CHUNK)
        if failure == "none":
            await site.finish(job)
            return
        job.complete()
        await site.until("BLOCK_JOB_PENDING")
        job.cancel()
        data = await site.until("BLOCK_JOB_CANCELLED")
        assert (data["len"], data["offset"]) == (6 * CHUNK, 6 * CHUNK)
        await site.until("null")
    await site.inventory.remove_node("bsync1")


@pytest.mark.parametrize(("mode", "failure"), COUNTS)
async def test_counts_of_three_rounds(tmp_path: Path, mode: str, failure: str) -> None:
    site = Site(tmp_path)
    counts = []
    await site.write(0)
    await site.full("fmirror0")
    bitmap = site.add_bitmap("bitmap0")
    await site.write(1)
    counts.append(bitmap.bits.count)
    await site.full("fmirror1")

    site.copy_of("fmirror0", "bsync1")
    await first_mirror(site, mode, failure)
    counts.append(bitmap.bits.count)
    assert (bitmap.busy, bitmap.recording) == (False, True)
    assert (site.content("bsync1") == site.content("fmirror1")) == (failure != "intermediate")

    await site.full("fmirror2")
    site.copy_of("bsync1" if failure == "none" or mode == "always" else "fmirror1", "bsync2")
    job = await site.start("bsync2", sync="bitmap", bitmap="bitmap0", bitmap_mode=mode)
    await site.until("BLOCK_JOB_READY")
    await site.write(2)
    counts.append(bitmap.bits.count)
    assert (bitmap.busy, bitmap.recording) == (True, True)
    await site.finish(job)
    counts.append(bitmap.bits.count)
    assert site.content("bsync2") != site.content("fmirror2"), "it has the writes during the job, too"
    assert site.content("bsync2") == site.content("disk")

    await site.write(3)
    counts.append(bitmap.bits.count)
    await site.full("fmirror3")
    site.copy_of("bsync2", "bsync3")
    job = await site.start("bsync3", sync="bitmap", bitmap="bitmap0", bitmap_mode=mode)
    data = await site.until("BLOCK_JOB_READY")
    expected, length = COUNTS[mode, failure]
    assert (data["len"], data["offset"]) == (length, length)
    await site.finish(job)
    counts.append(bitmap.bits.count)
    assert counts == expected
    assert site.content("bsync3") == site.content("fmirror3") == site.content("disk")
    await site.aclose()


# --- the bitmap itself as the working bitmap, in the three ways that scripts use it ------------------------------------


async def failing(site: Site, target: str, bitmap: str) -> None:
    """A job that copies one chunk and then fails."""
    site.disk.reads_left = 1
    await site.start(target, sync="full", bitmap=bitmap)
    await site.until("BLOCK_JOB_COMPLETED")
    await site.until("null")
    site.disk.reads_left = None
    await site.inventory.remove_node(target)


async def succeeding(site: Site, target: str, bitmap: str, *, writing: int | None = None) -> None:
    job = await site.start(target, sync="full", bitmap=bitmap)
    await site.until("BLOCK_JOB_READY")
    if writing is not None:
        await site.write(writing)
    await site.finish(job)


def twin(site: Site, bitmap: NamedBitmap, name: str) -> NamedBitmap:
    """As add (disabled), merge and enable in one transaction: nothing runs in between."""
    copy = site.add_bitmap(name)
    for first, end in bitmap.bits.runs():
        copy.bits.add_chunks(first, end)
    return copy


@pytest.mark.parametrize("fails", [False, True])
async def test_always_by_passing_the_bitmap(tmp_path: Path, fails: bool) -> None:
    site = Site(tmp_path)
    await site.write(0)
    await site.full("base")
    bitmap = site.add_bitmap("b")
    await site.write(1)
    site.copy_of("base", "delta")
    if fails:
        await failing(site, "delta", "b")
        assert bitmap.bits.count == 5
        await site.write(2)
        assert bitmap.bits.count == 9
    await succeeding(site, "delta", "b", writing=3)
    assert bitmap.bits.count == 0
    assert site.content("delta") == site.content("disk")
    await site.aclose()


@pytest.mark.parametrize("fails", [False, True])
async def test_never_by_passing_a_copy(tmp_path: Path, fails: bool) -> None:
    site = Site(tmp_path)
    await site.full("base")
    bitmap = site.add_bitmap("b")
    await site.write(1)
    site.copy_of("base", "delta")
    for attempt in ("failing", "succeeding") if fails else ("succeeding",):
        copy = twin(site, bitmap, "c")
        await (failing if attempt == "failing" else succeeding)(site, "delta", "c")
        site.source.bitmaps.remove(copy)
        assert bitmap.bits.count == 6
    assert site.content("delta") == site.content("disk")
    await site.aclose()


@pytest.mark.parametrize("fails", [False, True])
async def test_on_success_by_a_copy_that_comes_back(tmp_path: Path, fails: bool) -> None:
    site = Site(tmp_path)
    await site.full("base")
    bitmap = site.add_bitmap("b")
    await site.write(1)
    site.copy_of("base", "delta")
    copy = twin(site, bitmap, "c")
    if fails:
        await failing(site, "delta", "c")
        await site.write(2)
        site.source.bitmaps.remove(copy)
        assert bitmap.bits.count == 10
        copy = twin(site, bitmap, "c")
    await succeeding(site, "delta", "c", writing=3)
    async with site.source.device.drained():  # as a transaction: clear b, merge c into b, remove c
        site.source.bitmaps.clear(bitmap)
        for first, end in copy.bits.runs():
            bitmap.bits.add_chunks(first, end)
        site.source.bitmaps.remove(copy)
    assert bitmap.bits.count == 0
    assert site.content("delta") == site.content("disk")
    await site.write(2)
    assert bitmap.bits.count == 7
    await succeeding(site, "delta", "b")
    assert site.content("delta") == site.content("disk")
    await site.aclose()
