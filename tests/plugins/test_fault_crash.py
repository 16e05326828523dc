"""plugins/fault.py and what a crash leaves: all that was flushed, and of the rest what the seed keeps."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

from nbdmirror.devices.nbd import NbdDevice
from nbdmirror.protocol.constants import FUA
from nbdmirror.units import KiB, MiB
from tests.support import plugins
from tests.support.daemon import run_cli, serving
from tests.support.mirroring import stop, tell, writing_guest
from tests.support.tools import allocated, content, make_disk, pattern, run, same_content

if TYPE_CHECKING:
    from pathlib import Path

pytest.importorskip("nbd", reason="libnbd's Python binding is not installed")

SECTOR = 4 * KiB
SIZE = 4 * MiB
ALL = SIZE // SECTOR


async def crash(path: Path, *args: str) -> list[int]:
    """Flush ones, write twos over them, kill; which sectors have twos."""
    make_disk(path, SIZE)
    with plugins.fault(f"file={path}", *args) as target:
        device = await NbdDevice.open(target.endpoint, connections=1)
        await device.pwrite(b"1" * SIZE, 0)
        await device.flush()
        await device.pwrite(b"2" * SIZE, 0)
        everything = bytearray(SIZE)
        await device.pread(everything, 0)
        assert everything == b"2" * SIZE
        target.peer.kill()
        await device.aclose()
    sectors = [content(path, number * SECTOR, SECTOR) for number in range(ALL)]
    assert set(sectors) <= {b"1" * SECTOR, b"2" * SECTOR}, "a sector is whole"
    return [number for number, sector in enumerate(sectors) if sector[0] == ord("2")]


async def test_a_crash_keeps_what_was_flushed_and_a_part_of_the_rest_by_the_seed(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    kept = await crash(disk, "volatile=50%", "seed=1")
    assert ALL // 3 < len(kept) < ALL * 2 // 3
    assert await crash(disk, "volatile=0.5", "seed=1") == kept
    assert await crash(disk, "volatile=50%", "seed=2") != kept
    assert await crash(disk, "volatile=100%") == []
    assert len(await crash(disk)) == ALL


async def test_a_flush_may_lie(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk", SIZE)
    with plugins.fault(f"file={disk}", "volatile=1", "fault=flush,fua lie at=2") as target:
        device = await NbdDevice.open(target.endpoint, connections=1)
        for number in range(3):
            await device.pwrite(b"x" * SECTOR, number * SECTOR)
            await device.flush()
        await device.pwrite(b"x" * SECTOR, 3 * SECTOR, FUA)
        assert target.ask("counts")["unflushed-sectors"] == 3
        target.peer.kill()
        await device.aclose()
    assert content(disk, 0, 4 * SECTOR) == b"x" * SECTOR + bytes(3 * SECTOR)


async def test_fua_makes_its_own_range_durable_and_no_other(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk", SIZE, {2 * SECTOR: b"o" * 2 * SECTOR})
    with plugins.fault(f"file={disk}", "volatile=1") as target:
        device = await NbdDevice.open(target.endpoint, connections=1)
        await device.pwrite(b"x" * SECTOR, 0)
        await device.pwrite(b"x" * SECTOR, SECTOR, FUA)
        await device.zero(2 * SECTOR, SECTOR, FUA)
        await device.zero(3 * SECTOR, SECTOR)
        target.peer.kill()
        await device.aclose()
    assert content(disk, 0, 4 * SECTOR) == bytes(SECTOR) + b"x" * SECTOR + bytes(SECTOR) + b"o" * SECTOR


async def test_the_control_can_crash_it(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk", SIZE)
    with plugins.fault(f"file={disk}", "volatile=1") as target:
        device = await NbdDevice.open(target.endpoint, connections=1)
        await device.pwrite(b"x" * SECTOR, 0)
        with pytest.raises((OSError, ValueError)):
            target.ask("crash")
        assert target.peer.wait()
        await device.aclose()
    assert content(disk, 0, SECTOR) == bytes(SECTOR)


@pytest.mark.parametrize("volatile", ["0", "0.5", "1"])
async def test_reads_and_extents_tell_of_the_cache_and_the_file_as_one(volatile: str, tmp_path: Path) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    size = 64 * SECTOR - 1000
    disk, model = make_disk(tmp_path / "disk", size), bytearray(size)
    with plugins.fault(f"file={disk}", f"volatile={volatile}", f"seed={seed}") as target:
        device = await NbdDevice.open(target.endpoint, connections=1)
        for step in range(200):
            offset = chance.randrange(size)
            length = chance.randint(1, min(5 * SECTOR, size - offset))
            if chance.random() < 0.5:
                data = bytes([step % 255 + 1]) * length
                await device.pwrite(data, offset)
            else:
                data = bytes(length)
                await (device.zero if chance.random() < 0.5 else device.trim)(offset, length)
            model[offset : offset + length] = data
            if chance.random() < 0.1:
                await device.flush()
            start = chance.randrange(size)
            buffer = bytearray(chance.randint(1, size - start))
            await device.pread(buffer, start)
            assert buffer == model[start : start + len(buffer)]
            for extent in await device.extents(start, len(buffer)):
                assert not extent.is_zero or not any(model[extent.offset : extent.end])
        await device.flush()
        await device.aclose()
        target.peer.kill()
    assert disk.read_bytes() == model


async def test_zeroes_are_holes_in_the_file_in_the_end(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk", SIZE, {0: pattern(SIZE)})
    with plugins.fault(f"file={disk}", "volatile=50%") as target:
        device = await NbdDevice.open(target.endpoint, connections=1)
        await device.zero(0, SIZE // 2)
        await device.trim(SIZE // 2, SIZE // 4)
        await device.flush()
        await device.aclose()
    assert allocated(disk) <= SIZE // 4 + 64 * KiB
    assert not any(content(disk, 0, SIZE * 3 // 4))


# --- what it is for --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lies", [False, True])
def test_target_that_crashes_after_a_mirror_has_completed_has_it_all(lies: bool, tmp_path: Path) -> None:
    source = make_disk(tmp_path / "source", SIZE, {0: pattern(MiB), 3 * MiB: pattern(MiB // 2)})
    disk = make_disk(tmp_path / "target", SIZE, {2 * MiB: b"old" * 1000})
    with (
        plugins.fault(f"file={disk}", "volatile=80%", *(["fault=flush,fua lie"] if lies else [])) as target,
        serving(source, qmp=True) as daemon,
    ):
        with writing_guest(daemon, source, SIZE, 1) as writer:
            tell(daemon, "mirror", target.uri)
            stop(writer)
        tell(daemon, "complete", "mirror0")
        target.peer.kill()
    assert same_content(source, disk) is not lies


@pytest.mark.parametrize("tool", ["nbdmirror", "nbdcopy"])
def test_target_that_crashes_after_a_copy_has_it_all(tool: str, tmp_path: Path) -> None:
    source = make_disk(tmp_path / "source", SIZE, {0: pattern(MiB), 3 * MiB: pattern(MiB // 2)})
    disk = make_disk(tmp_path / "target", SIZE, {2 * MiB: b"old" * 1000})
    with plugins.fault(f"file={disk}", "volatile=80%") as target:
        if tool == "nbdmirror":
            result = run_cli("copy", source, target.uri)
            assert (result.returncode, result.stderr) == (0, "")
        else:
            run("nbdcopy", "--flush", source, target.uri)
        target.peer.kill()
    assert same_content(source, disk)
