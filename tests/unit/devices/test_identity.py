"""Which disk is this: the same after a move, another after a copy; and who has it locked."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from nbdmirror.devices import identity
from nbdmirror.devices.file import FileDevice
from nbdmirror.devices.identity import identity_of_block_device, identity_of_export, identity_of_file
from nbdmirror.devices.lock import lock
from nbdmirror.devices.memory import MemoryDevice
from nbdmirror.errors import StateError
from tests.support.tools import make_disk


def of(path: Path) -> str:
    with path.open("rb") as file:
        return identity_of_file(file.fileno(), str(path))


def test_file_that_was_made_anew_is_another_disk(tmp_path: Path) -> None:
    path = make_disk(tmp_path / "disk", 512)
    first = of(path)
    assert of(path) == first
    make_disk(tmp_path / "new", 512).rename(path)
    assert of(path) != first


def test_moved_file_is_the_same_disk_where_inodes_have_generations(tmp_path: Path) -> None:
    path = make_disk(tmp_path / "disk", 512)
    first = of(path)
    if "generation" in first:
        assert of(path.rename(tmp_path / "moved")) == first
    else:
        assert str(path) in first


def test_file_system_without_generations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "_FS_IOC_GETVERSION", 0)
    path = make_disk(tmp_path / "disk", 512)
    assert of(path) == f"file, inode {path.stat().st_ino}, {path}"
    deep = tmp_path.joinpath(*["d" * 200] * 3)
    deep.mkdir(parents=True)
    assert 400 < len(of(make_disk(deep / "a", 512)).encode()) < 1024
    assert of(deep / "a") != of(make_disk(deep / "b", 512))


def device_tree(tmp_path: Path, **attributes: str) -> Path:
    """/sys/dev/block with the number of /dev/null, which stands in for a disk."""
    number = Path("/dev/null").stat().st_rdev
    disk = tmp_path / "devices" / "disk"
    for name, value in attributes.items():
        path = disk.joinpath(*name.split("__"))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(value + "\n")
    disk.mkdir(parents=True, exist_ok=True)
    (tmp_path / "block").mkdir()
    node = disk / "part" if (disk / "part").is_dir() else disk
    (tmp_path / "block" / f"{os.major(number)}:{os.minor(number)}").symlink_to(node)
    return tmp_path / "block"


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ({"dm__uuid": "LVM-abc"}, "block device, dm/uuid LVM-abc"),
        ({"serial": "s1", "wwid": "naa.5"}, "block device, wwid naa.5"),
        ({"device__serial": "s2"}, "block device, device/serial s2"),
        ({"serial": "s3", "part__partition": "2"}, "block device, serial s3, partition 2"),
        ({"serial": ""}, "block device, /dev/null"),
        ({}, "block device, /dev/null"),
    ],
)
def test_block_device_is_what_the_kernel_says(tmp_path: Path, attributes: dict[str, str], expected: str) -> None:
    sys = device_tree(tmp_path, **attributes)
    with Path("/dev/null").open("rb") as file:
        assert identity_of_block_device(file.fileno(), "/dev/null", sys) == expected


def test_export_is_its_address_and_name() -> None:
    plain = identity_of_export("nbd://host/a")
    assert plain == "NBD, tcp host:10809, export 'a'"
    assert identity_of_export("nbds://me@host:10809/a?tls-certificates=/x") == plain
    assert identity_of_export("nbd+unix:///b?socket=/s") == "NBD, unix /s, export 'b'"
    assert identity_of_export("[ nbdkit memory 1G ]") == "NBD, [ nbdkit memory 1G ]"


async def test_disk_that_is_written_has_one_daemon(tmp_path: Path) -> None:
    path = make_disk(tmp_path / "disk", 512)
    first, second, reader = FileDevice.open(path), FileDevice.open(path), FileDevice.open(path, read_only=True)
    await first.lock()
    for other in (second, reader):
        with pytest.raises(StateError) as caught:
            await other.lock()
        line = f"'{path}' is in use by process {os.getpid()} ("
        assert str(caught.value).startswith(line), caught.value
    await first.aclose()
    await reader.lock()
    with pytest.raises(StateError):
        await second.lock()
    await reader.aclose()
    await second.lock()
    await second.aclose()


async def test_disks_that_are_only_read_are_shared(tmp_path: Path) -> None:
    path = make_disk(tmp_path / "disk", 512)
    devices = [FileDevice.open(path, read_only=True) for _ in range(2)]
    for device in devices:
        await device.lock()
    for device in devices:
        await device.aclose()


async def test_who_looks_at_a_block_device_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain file stands in for the device, whose lock is no different."""
    monkeypatch.setattr("stat.S_ISBLK", lambda _: True)
    path = make_disk(tmp_path / "disk", 512)
    with path.open("rb") as other, path.open("rb") as ours:
        await lock(other.fileno(), "it", exclusive=False)
        waiting = asyncio.create_task(lock(ours.fileno(), "it", exclusive=True))
        await asyncio.sleep(0)
        assert not waiting.done()
        other.close()
        await waiting


async def test_disk_of_another_kind_is_its_name_and_has_no_lock() -> None:
    device = MemoryDevice(512, name="m")
    assert device.identity() == "m"
    await device.lock()
