"""The commands about jobs: what they are told through the registry, and what they answer."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from nbdmirror.bitmap.dirty import DirtyBitmap
from nbdmirror.bitmap.named import NamedBitmap
from nbdmirror.commands.job import JobCommands
from nbdmirror.commands.mirror import MirrorCommands
from nbdmirror.devices.memory import MemoryDevice
from nbdmirror.errors import InactiveError, NbdMirrorError, NotFoundError
from nbdmirror.inventory import Inventory, Node
from nbdmirror.qmp.messages import Version
from nbdmirror.qmp.registry import Registry
from nbdmirror.units import KiB

SIZE = 256 * KiB
MIRROR = {"job-id": "j", "device": "source", "target": "target", "sync": "full"}


class Site:
    """An inventory with two disks, asked as a control client asks."""

    def __init__(self) -> None:
        self.inventory = Inventory()
        for name in ("source", "target"):
            self.inventory.add_node(Node(name, "file", MemoryDevice(SIZE)))
        self.registry = Registry(Version(10, 1, 0, "test"))
        self.events: list[tuple[str, dict[str, Any]]] = []
        JobCommands(self.inventory).register(self.registry)
        MirrorCommands(self.inventory, lambda event, data: self.events.append((event, data))).register(self.registry)

    async def ask(self, command: str, **arguments: Any) -> Any:
        return await self.registry.dispatch(command, {name.replace("_", "-"): value for name, value in arguments.items()})

    async def refused(self, command: str, arguments: dict[str, Any]) -> str:
        with pytest.raises(NbdMirrorError) as caught:
            await self.registry.dispatch(command, arguments)
        assert not self.inventory.jobs or command != "blockdev-mirror"
        return str(caught.value)

    async def info(self) -> dict[str, Any]:
        (info,) = await self.ask("query-block-jobs")
        return dict(info)

    async def started(self, **more: Any) -> None:
        await self.registry.dispatch("blockdev-mirror", {**MIRROR, **{k.replace("_", "-"): v for k, v in more.items()}})

    async def until(self, key: str, value: object) -> None:
        async with asyncio.timeout(5):
            while (await self.info())[key] != value:
                await asyncio.sleep(0.001)

    async def gone(self) -> None:
        async with asyncio.timeout(5):
            while self.inventory.jobs:
                await asyncio.sleep(0.001)


async def test_change_of_the_copy_mode() -> None:
    site = Site()
    await site.started()
    await site.until("ready", value=True)
    info = await site.info()
    assert (info["actively-synced"], info["x-copy-mode"], info["io-status"]) == (False, "background", "ok")
    for _ in range(2):
        await site.ask("block-job-change", id="j", type="mirror", copy_mode="write-blocking")
    await site.until("actively-synced", value=True)
    await site.ask("block-job-change", id="j", type="mirror", copy_mode="background")
    await site.ask("job-complete", id="j")
    await site.gone()


async def test_change_that_is_refused() -> None:
    site = Site()
    change = {"id": "j", "type": "mirror", "copy-mode": "background"}
    with pytest.raises(InactiveError, match=r"^Block job 'j' not found$"):
        await site.registry.dispatch("block-job-change", change)
    await site.started()
    assert (
        await site.refused("block-job-change", {**change, "type": "backup"})
        == "Parameter 'type' does not accept value 'backup'"
    )
    assert (
        await site.refused("block-job-change", {**change, "copy-mode": "never"})
        == "Parameter 'copy-mode' does not accept value 'never'"
    )
    await site.ask("job-cancel", id="j")
    await site.gone()


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"buf-size": -1}, "Invalid parameter 'buf-size'"),
        ({"granularity": 100}, "Parameter 'granularity' expects a value in range [512B, 64MB]"),
        ({"on-target-error": "panic"}, "Parameter 'on-target-error' does not accept value 'panic'"),
        ({"copy-mode": "sometimes"}, "Parameter 'copy-mode' does not accept value 'sometimes'"),
        ({"bitmap": "b"}, "Dirty bitmap 'b' not found"),
        ({"sync": "incremental"}, "Must provide a valid bitmap name for 'incremental' sync mode"),
        ({"sync": "top", "bitmap": "b", "bitmap-mode": "always"}, "Sync mode 'full' not supported with bitmap."),
        ({"bitmap-mode": "never"}, "Cannot specify bitmap sync mode without a bitmap"),
        ({"x-pending-timeout": -1}, "Parameter 'x-pending-timeout' expects a non-negative value"),
    ],
)
async def test_mirror_that_is_refused(more: dict[str, Any], text: str) -> None:
    assert await Site().refused("blockdev-mirror", {**MIRROR, **more}) == text


async def test_bitmap_is_busy_while_the_job_lives() -> None:
    site = Site()
    source = site.inventory.node("source")
    bitmap = NamedBitmap("b", DirtyBitmap(SIZE, 64 * KiB))
    source.bitmaps.add(bitmap)
    await source.device.pwrite(b"x", 0)
    await site.started(bitmap="b")
    assert bitmap.busy
    await site.until("ready", value=True)
    assert ((await site.info())["len"], bitmap.bits.count) == (64 * KiB, 0)
    site.inventory.add_node(Node("other", "file", MemoryDevice(SIZE)))
    await site.ask("block-job-cancel", device="j")
    await site.gone()
    assert not bitmap.busy
    assert bitmap.recording


async def test_first_what_was_refused_leaves_the_bitmap_alone() -> None:
    site = Site()
    bitmap = NamedBitmap("b", DirtyBitmap(SIZE, 64 * KiB))
    site.inventory.node("source").bitmaps.add(bitmap)
    assert await site.refused("blockdev-mirror", {**MIRROR, "bitmap": "b", "job-id": "1j"}) == "Invalid job ID '1j'"
    assert not bitmap.busy


@pytest.mark.parametrize("command", ["job-complete", "block-job-complete"])
async def test_complete_without_pivot(command: str) -> None:
    site = Site()
    await site.started()
    await site.until("ready", value=True)
    await site.ask(command, **{"id" if command == "job-complete" else "device": "j", "x-pivot": False})
    await site.gone()
    assert site.inventory.node("source").sealed
    with pytest.raises(NotFoundError):
        await site.ask("job-complete", id="j")
