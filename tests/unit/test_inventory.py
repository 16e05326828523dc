"""Nodes, exports and jobs by name: texts, what is in use, and what a pivot exchanges."""

from __future__ import annotations

import asyncio
import errno
from typing import TYPE_CHECKING, Any, cast

import pytest

from nbdmirror.commands.block import BlockCommands
from nbdmirror.commands.job import JobCommands
from nbdmirror.commands.mirror import BlockdevMirror, DriveMirror, MirrorCommands
from nbdmirror.devices.file import FileDevice
from nbdmirror.devices.memory import MemoryDevice
from nbdmirror.errors import DeviceError, InactiveError, NotFoundError, StateError
from nbdmirror.inventory import Inventory, Node
from nbdmirror.server.export import Export
from nbdmirror.server.nbd_server import BlockExport
from tests.support.fakes import GatedDevice, settled
from tests.support.rig import HeldDisk

if TYPE_CHECKING:
    from pathlib import Path

    from nbdmirror.devices.base import BlockDevice
    from nbdmirror.jobs.job import Job

SIZE = 8192


class Closing(MemoryDevice):
    closed = False

    async def aclose(self) -> None:
        self.closed = True


class Rigged:
    """An inventory with a node that is exported, and the commands over it."""

    def __init__(self, source: BlockDevice | None = None) -> None:
        self.inventory = Inventory()
        self.source = self.add("source", source)
        self.export = Export("", self.source.device)
        self.inventory.exports["default"] = BlockExport("default", self.export, "nbd+unix:///?socket=/s")
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.mirrors = MirrorCommands(self.inventory, lambda event, data: self.events.append((event, data)))
        self.blocks = BlockCommands(self.inventory)

    def add(self, name: str, disk: BlockDevice | None = None, *, implicit: bool = False) -> Node:
        return self.inventory.add_node(Node(name, "file", disk or Closing(SIZE), implicit=implicit))

    async def ended(self, job_id: str) -> None:
        async with asyncio.timeout(5):
            await self.inventory.jobs[job_id].join()
        await settled()


@pytest.mark.parametrize("name", ["", "1a", "-a", "#a", "a b", "ä"])
def test_bad_name(name: str) -> None:
    with pytest.raises(StateError) as caught:
        Rigged().add(name)
    assert str(caught.value) == f"Invalid node-name: '{name}'"


def test_name_that_is_too_long() -> None:
    rig = Rigged()
    rig.add("a" * 31)
    with pytest.raises(StateError, match=r"^Node name too long$"):
        rig.add("a" * 32)


def test_name_that_is_taken() -> None:
    rig = Rigged()
    with pytest.raises(StateError, match=r"^Duplicate nodes with node-name='source'$"):
        rig.add("source")


def test_names_of_our_own_are_never_the_users() -> None:
    rig = Rigged()
    names = [rig.inventory.implicit_name() for _ in range(3)]
    assert len(set(names)) == 3
    for name in names:
        rig.add(name, implicit=True)
        with pytest.raises(StateError):
            rig.inventory.check_node_name(name)


async def test_what_is_not_there() -> None:
    inventory = Inventory()
    with pytest.raises(NotFoundError, match=r"^Cannot find device='x' nor node-name='x'$"):
        inventory.node("x")
    with pytest.raises(NotFoundError, match=r"^Failed to find node with node-name='x'$"):
        await inventory.remove_node("x")
    with pytest.raises(NotFoundError, match=r"^Job not found$") as plain:
        inventory.job("x")
    assert not isinstance(plain.value, InactiveError)
    with pytest.raises(InactiveError, match=r"^Block job 'x' not found$"):
        inventory.block_job("x")


async def test_node_in_use_is_not_removed() -> None:
    rig = Rigged()
    with pytest.raises(StateError, match=r"^Node source is in use$"):
        await rig.inventory.remove_node("source")
    other = rig.add("other")
    other.users.add("mirror target")
    with pytest.raises(StateError, match=r"^Node other is in use$"):
        await rig.inventory.remove_node("other")
    other.users.clear()
    await rig.inventory.remove_node("other")
    assert cast("Closing", other.disk).closed
    assert "other" not in rig.inventory.nodes


async def test_node_with_a_write_in_flight_is_not_removed() -> None:
    """As a client leaves behind that was hung up on."""
    rig = Rigged()
    disk = GatedDevice(SIZE)
    other = rig.add("other", disk)
    writing = asyncio.create_task(other.device.pwrite(b"x", 0))
    held = await disk.next()
    with pytest.raises(StateError, match=r"^Node other is in use$"):
        await rig.inventory.remove_node("other")
    held.finish()
    await writing
    await rig.inventory.remove_node("other")


async def test_pivot_exchanges_the_disks_under_the_filter() -> None:
    rig = Rigged()
    target = rig.add("target")
    device = rig.source.device
    async with device.drained():
        rig.inventory.pivot(rig.source, target)
    assert rig.export.device is device is target.device
    assert rig.inventory.node_of(rig.export.device) is target
    assert rig.inventory.is_exported(target)
    assert not rig.inventory.is_exported(rig.source)
    await device.pwrite(b"new", 0)
    assert cast("Closing", target.disk).data[:3] == b"new"
    await rig.source.device.pwrite(b"old", 0)
    assert cast("Closing", rig.source.disk).data[:3] == b"old"


async def test_target_with_blocks_still_takes_any_byte() -> None:
    rig = Rigged()
    target = rig.add("target", HeldDisk(SIZE).with_blocks(512))
    async with rig.source.device.drained():
        rig.inventory.pivot(rig.source, target)
    await rig.export.device.pwrite(b"odd", 511)
    assert cast("HeldDisk", target.disk).data[511:514] == b"odd"
    assert rig.export.device.limits.minimum == 1


def test_jobs() -> None:
    inventory = Inventory()

    class Fake:
        id = "j"

    job = cast("Job", Fake())
    inventory.add_job(job)
    assert inventory.job("j") is inventory.block_job("j") is job
    with pytest.raises(StateError, match=r"^Job ID 'j' already in use$"):
        inventory.add_job(job)
    inventory.forget_job(job)
    assert list(inventory.history) == [job]
    for _ in range(100):
        inventory.add_job(job)
        inventory.forget_job(job)
    assert len(inventory.history) == 64


# --- who may mirror what ---------------------------------------------------------------------------------------------


async def test_mirror_and_complete_between_two_nodes() -> None:
    rig = Rigged()
    target = rig.add("target")
    rig.mirrors.blockdev_mirror(BlockdevMirror(job_id="j", device="source", target="target", sync="full"))
    assert (rig.source.users, target.users) == ({"mirror source"}, {"mirror target"})
    while not rig.inventory.jobs["j"].is_ready:
        await asyncio.sleep(0)
    await rig.export.device.pwrite(b"last", 0)
    rig.inventory.jobs["j"].complete()
    await rig.ended("j")
    assert (rig.source.users, target.users) == (set(), set())
    assert cast("Closing", target.disk).data[:4] == b"last"
    assert not cast("Closing", target.disk).closed
    await rig.inventory.remove_node("source")
    assert cast("Closing", rig.source.disk).closed


async def test_completing_in_place_seals_the_source() -> None:
    rig = Rigged()
    target = rig.add("target")
    rig.mirrors.blockdev_mirror(BlockdevMirror(job_id="j", device="source", target="target", sync="full"))
    while not rig.inventory.jobs["j"].is_ready:
        await asyncio.sleep(0)
    await rig.export.device.pwrite(b"last", 0)
    JobCommands(rig.inventory).job_complete("j", x_pivot=False)
    await rig.ended("j")
    assert rig.export.device is rig.source.device
    assert rig.export.read_only
    assert rig.source.is_read_only
    assert cast("Closing", target.disk).data == cast("Closing", rig.source.disk).data
    for write in (rig.export.device.pwrite(b"x", 0), rig.export.device.zero(0, 1), rig.export.device.trim(0, 1)):
        with pytest.raises(DeviceError) as caught:
            await write
        assert caught.value.errno == errno.EPERM
    with pytest.raises(DeviceError):
        rig.export.device.pwrite_now(b"x", 0)
    buffer = bytearray(4)
    await rig.export.device.pread(buffer, 0)
    assert buffer == b"last"
    await rig.export.device.flush()
    rig.add("third")
    rig.inventory.exports.clear()
    with pytest.raises(StateError, match=r"^Block node is read-only$"):
        rig.mirrors.blockdev_mirror(BlockdevMirror(job_id="k", device="third", target="source", sync="full"))


@pytest.mark.parametrize(
    ("device", "target", "text"),
    [
        ("source", "other", "Need a root block node"),
        ("third", "target", "block device is in use by block job: mirror"),
        ("target", "other", "block device is in use by block job: mirror"),
        ("third", "source", "block device is in use by block job: mirror"),
        ("third", "third", "Can't mirror node into itself"),
        ("nothing", "other", "Cannot find device='nothing' nor node-name='nothing'"),
        ("third", "nothing", "Cannot find device='nothing' nor node-name='nothing'"),
        ("third", "shown", "Node shown is in use by an export, and would be changed under its clients"),
        ("third", "fixed", "Block node is read-only"),
    ],
)
async def test_mirrors_that_would_disturb_each_other(device: str, target: str, text: str) -> None:
    rig = Rigged()
    rig.inventory.exports["shown"] = BlockExport("shown", Export("shown", rig.add("shown").device), "")
    rig.add("fixed", MemoryDevice(SIZE, read_only=True))
    for name in ("target", "other", "third"):
        rig.add(name)
    rig.mirrors.blockdev_mirror(BlockdevMirror(job_id="j", device="source", target="target", sync="full", speed=1))
    with pytest.raises((StateError, NotFoundError)) as caught:
        rig.mirrors.blockdev_mirror(BlockdevMirror(job_id="k", device=device, target=target, sync="full"))
    assert str(caught.value) == text
    assert list(rig.inventory.jobs) == ["j"]
    rig.inventory.jobs["j"].cancel()
    await rig.ended("j")


@pytest.mark.parametrize("job_id", [None, "1j", "j"])
async def test_ids_that_can_not_be(job_id: str | None) -> None:
    rig = Rigged()
    for name in ("target", "third", "other"):
        rig.add(name)
    rig.mirrors.blockdev_mirror(BlockdevMirror(job_id="j", device="source", target="target", sync="none"))
    with pytest.raises(StateError):
        rig.mirrors.blockdev_mirror(BlockdevMirror(job_id=job_id, device="third", target="other", sync="none"))
    assert rig.inventory.node("third").users == rig.inventory.node("other").users == set()
    rig.inventory.jobs["j"].cancel()
    await rig.ended("j")


async def test_target_that_still_works_for_a_job_that_has_ended() -> None:
    rig = Rigged(HeldDisk(SIZE))
    disk = HeldDisk(SIZE, holding={"pwrite"})
    target = rig.add("target", disk)
    late = asyncio.ensure_future(target.device.pwrite(b"late", 0))
    held = await disk.next()
    with pytest.raises(StateError, match="still works on requests"):
        rig.mirrors.blockdev_mirror(BlockdevMirror(job_id="j", device="source", target="target", sync="full"))
    held.finish()
    await late
    rig.mirrors.blockdev_mirror(BlockdevMirror(job_id="j", device="source", target="target", sync="full"))
    rig.inventory.jobs["j"].cancel()
    await rig.ended("j")


async def test_file_by_another_name_is_the_same_file(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(SIZE))
    (tmp_path / "link").symlink_to(path)
    rig = Rigged(FileDevice.open(path))
    with pytest.raises(StateError, match=r"^Can't mirror node into itself$"):
        await rig.mirrors.drive_mirror(
            DriveMirror(job_id="j", device="source", target=str(tmp_path / "link"), sync="full", mode="existing")
        )
    assert list(rig.inventory.nodes) == ["source"]
    await rig.source.disk.aclose()


async def test_target_opened_for_the_job_is_closed_with_it(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(SIZE))
    rig = Rigged()
    await rig.mirrors.drive_mirror(DriveMirror(job_id="j", device="source", target=str(path), sync="full", mode="existing"))
    assert set(rig.inventory.nodes) == {"source", "#node001"}
    rig.inventory.jobs["j"].cancel()
    await rig.ended("j")
    assert set(rig.inventory.nodes) == {"source"}


async def test_two_targets_of_one_name_at_once(tmp_path: Path) -> None:
    rig = Rigged()
    rig.add("third")
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(bytes(SIZE))

    def mirror(job_id: str, device: str, path: str) -> asyncio.Future[None]:
        target = str(tmp_path / path)
        wanted = DriveMirror(job_id=job_id, device=device, target=target, node_name="same", sync="none", mode="existing")
        return asyncio.ensure_future(rig.mirrors.drive_mirror(wanted))

    results = await asyncio.gather(mirror("j", "source", "a"), mirror("k", "third", "b"), return_exceptions=True)
    assert [str(result) for result in results if result is not None] == ["Duplicate nodes with node-name='same'"]
    (job,) = rig.inventory.jobs
    rig.inventory.jobs[job].cancel()
    await rig.ended(job)
    assert set(rig.inventory.nodes) == {"source", "third"}
