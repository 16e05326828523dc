"""Meta contexts: each context's own extents, their bounds, and what REQ_ONE means to them."""

from __future__ import annotations

import pytest

from nbdmirror.bitmap.dirty import DirtyBitmap
from nbdmirror.devices.memory import MemoryDevice
from nbdmirror.extents import DATA, HOLE, ZERO, ExtentList
from nbdmirror.protocol import constants as c
from nbdmirror.protocol.messages import Opened, Refusal, Request, StatusReply
from nbdmirror.server import contexts
from nbdmirror.server.buffers import BufferPool
from nbdmirror.server.export import Export, OpenExport
from nbdmirror.units import GiB, KiB, TiB

SIZE = 256 * KiB
NAMES = {1: c.BASE_ALLOCATION, 2: c.ALLOCATION_DEPTH, 3: "qemu:dirty-bitmap:b"}


class Asked(MemoryDevice):
    """Counts how often it was asked, and says what the test wants."""

    def __init__(self, size: int = SIZE, *runs: tuple[int, int]) -> None:
        super().__init__(0)
        self.size = size
        self.runs = runs
        self.times = 0

    async def extents(self, offset: int, length: int) -> ExtentList:
        self.times += 1
        extents, at = ExtentList(offset, length), 0
        for size, flags in self.runs:
            at += size
            extents.add_until(min(at, offset + length), flags)
        return extents


def opened(device: MemoryDevice, bitmaps: dict[str, DirtyBitmap], names: dict[int, str] | None = None) -> OpenExport:
    export = Export("disk", device, bitmaps=bitmaps)
    opened = Opened(export.info(), True, NAMES if names is None else names, extended=True)
    return OpenExport(export, opened, BufferPool())


async def ask(target: OpenExport, offset: int, length: int, flags: int = 0) -> dict[int, list[tuple[int, int]]]:
    request = Request(c.CMD_BLOCK_STATUS, flags, 1, offset, length)
    assert target.serve_now(request) is None
    answer = await target.serve(request)
    assert isinstance(answer, StatusReply)
    for _, extents in answer.extents:
        assert extents.offset == offset
    return {number: [(each.length, each.flags) for each in extents] for number, extents in answer.extents}


RUNS = ((64 * KiB, DATA), (64 * KiB, ZERO), (64 * KiB, HOLE | ZERO), (64 * KiB, HOLE))


def test_export_offers_its_contexts_in_order() -> None:
    bitmaps = {"b": DirtyBitmap(SIZE, 4096)}
    export = Export("disk", MemoryDevice(SIZE), bitmaps=bitmaps)
    assert export.info().contexts == tuple(NAMES.values())
    bitmaps["later"] = bitmaps.pop("b")
    assert export.info().contexts[2:] == ("qemu:dirty-bitmap:later",)
    assert Export("disk", MemoryDevice(SIZE)).info().contexts == (c.BASE_ALLOCATION, c.ALLOCATION_DEPTH)


async def test_extents_differ_by_context() -> None:
    bitmap = DirtyBitmap(SIZE, 4096)
    bitmap.add(5000, 1)
    device = Asked(SIZE, *RUNS)
    assert await ask(opened(device, {"b": bitmap}), 0, SIZE) == {
        1: [(64 * KiB, 0), (64 * KiB, 2), (64 * KiB, 3), (64 * KiB, 1)],
        2: [(128 * KiB, 1), (128 * KiB, 0)],
        3: [(4096, 0), (4096, 1), (SIZE - 8192, 0)],
    }
    assert device.times == 1


async def test_only_granted_contexts_are_answered_and_the_disk_is_not_asked_in_vain() -> None:
    device = Asked(SIZE, *RUNS)
    target = opened(device, {"b": DirtyBitmap(SIZE, 4096)}, {7: "qemu:dirty-bitmap:b"})
    assert await ask(target, 512, 1000) == {7: [(1000, 0)]}
    assert device.times == 0


async def test_one_extent_each_no_longer_than_the_request() -> None:
    bitmap = DirtyBitmap(SIZE, 4096)
    bitmap.add(0, 3 * 4096)
    target = opened(Asked(SIZE, *RUNS), {"b": bitmap})
    assert await ask(target, 0, SIZE, c.REQ_ONE) == {1: [(64 * KiB, 0)], 2: [(128 * KiB, 1)], 3: [(3 * 4096, 1)]}
    assert await ask(target, 4096, 4096, c.REQ_ONE) == {1: [(4096, 0)], 2: [(4096, 1)], 3: [(4096, 1)]}
    assert await ask(target, 3 * 4096 - 1, 2, c.REQ_ONE) == {1: [(2, 0)], 2: [(2, 1)], 3: [(1, 1)]}


async def test_no_context_and_lost_bitmap() -> None:
    request = Request(c.CMD_BLOCK_STATUS, 0, 1, 0, SIZE)
    assert await opened(MemoryDevice(SIZE), {}, {}).serve(request) == Refusal(c.EINVAL, "no meta context was negotiated")
    bitmaps = {"b": DirtyBitmap(SIZE, 4096)}
    target = opened(MemoryDevice(SIZE), bitmaps)
    del bitmaps["b"]
    assert await target.serve(request) == Refusal(c.EINVAL, "there is no 'qemu:dirty-bitmap:b' any more")


async def test_answers_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert contexts.MOST_EXTENTS <= 1 << 20
    monkeypatch.setattr(contexts, "MOST_EXTENTS", 9)
    bitmap = DirtyBitmap(SIZE, 4096)
    for at in range(1, 64, 2):
        bitmap.add(at * 4096, 1)
    device = Asked(SIZE, *((512, at % 2) for at in range(512)))
    answer = await ask(opened(device, {"b": bitmap}), 0, SIZE)
    assert answer == {
        1: [(512, 0), (512, 1), (512, 0)],
        2: [(512, 1), (512, 0), (512, 1)],
        3: [(4096, 0), (4096, 1), (4096, 0)],
    }
    alone = await ask(opened(device, {}, {1: c.BASE_ALLOCATION}), 0, SIZE)
    assert alone == {1: [(512, at % 2) for at in range(9)]}
    monkeypatch.setattr(contexts, "MOST_EXTENTS", 2)
    assert [len(each) for each in (await ask(opened(device, {"b": bitmap}), 0, SIZE)).values()] == [1, 1, 1]


async def test_large_ranges_are_one_extent() -> None:
    size = 8 * TiB
    device = Asked(size, (size, HOLE | ZERO))
    target = opened(device, {"b": DirtyBitmap(size, 1 << 20)})
    most = 4 * GiB - 1
    assert await ask(target, 5 * TiB + 3, most) == {1: [(most, 3)], 2: [(most, 0)], 3: [(most, 0)]}
    assert await ask(target, 0, size) == {1: [(size, 3)], 2: [(size, 0)], 3: [(size, 0)]}


@pytest.mark.parametrize("most", [1, 2, 3, 4, 5, 6, 100])
@pytest.mark.parametrize("start", [0, 4096, 8192, 100])
def test_first_extents_of_a_bitmap_are_those_of_the_whole_answer(most: int, start: int) -> None:
    bitmap = DirtyBitmap(SIZE, 4096)
    bitmap.add(0, 1)
    bitmap.add(8192, 8192)
    bitmap.add(SIZE - 1, 1)
    whole = list(bitmap.extents(start, SIZE - start))
    assert list(bitmap.extents(start, SIZE - start, most)) == whole[:most]
