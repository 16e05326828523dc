"""Disks that are full, broken or stalled: who asked hears of it, and everybody else is served on.

How long others' cached reads take while a disk stalls is printed (pytest -s): 5 ms at the 99th percentile is what they may
take on a machine of their own. The assertion is wider, since this one may have others to serve.
"""

from __future__ import annotations

import asyncio
import os
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

import pytest

from nbdmirror.devices.file import FileDevice
from nbdmirror.devices.tracked import TrackedDevice
from nbdmirror.protocol import constants as c
from nbdmirror.server.export import Export
from nbdmirror.server.listener import Listener
from nbdmirror.units import KiB, MiB
from tests.support.block_devices import freezable_file_system, loop_device, small_file_system
from tests.support.daemon import serving
from tests.support.fakes import GatedDevice
from tests.support.fakes import Listener as Observer
from tests.support.peers import nbdkit
from tests.support.tools import content, make_disk, pattern
from tests.support.wire_client import WireClient

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping
    from pathlib import Path

    from nbdmirror.devices.base import BlockDevice

SIZE: Final = 16 * MiB
OLD: Final = pattern(SIZE)
READS: Final = 2000


@asynccontextmanager
async def two_clients(path: Path, *names: str, structured: bool = False) -> AsyncIterator[tuple[WireClient, WireClient]]:
    """Each has opened the export of its name."""
    first, second = names or ("", "")
    async with await WireClient.connect_unix(path) as client, await WireClient.connect_unix(path) as other:
        await client.open(first, structured=structured)
        await other.open(second)
        yield client, other


@asynccontextmanager
async def listening(disks: Mapping[str, BlockDevice], sock_dir: Path) -> AsyncIterator[Path]:
    listener = Listener.unix(str(sock_dir / "s"), {name: Export(name, disk) for name, disk in disks.items()})
    await listener.start()
    try:
        yield sock_dir / "s"
    finally:
        await listener.aclose()
        for disk in disks.values():
            await disk.aclose()


async def cached_reads(client: WireClient, what: str) -> None:
    """Read what is in memory, again and again, and say how long that took."""
    took = []
    for number in range(READS):
        offset = number * 8192 % SIZE
        began = time.perf_counter()
        reply = await client.ask(c.CMD_READ, offset, 4096)
        took.append(time.perf_counter() - began)
        assert reply.data == OLD[offset : offset + 4096]
    took.sort()
    middle, high, most = took[READS // 2] * 1e3, took[READS * 99 // 100] * 1e3, took[-1] * 1e3
    print(f"cached reads while {what}: median {middle:.2f} ms, 99th percentile {high:.2f} ms, slowest {most:.2f} ms")
    assert high < 100, f"99th percentile {high:.2f} ms"
    assert most < 5000, "one waited until the disk went on"


# --- full ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [0, c.FUA], ids=["", "FUA"])
@pytest.mark.parametrize("length", [64 * KiB, 3 * MiB])
async def test_a_full_disk(tmp_path: Path, length: int, flags: int) -> None:
    with small_file_system(tmp_path / "small", 8 * MiB) as place:
        filler = make_disk(place / "filler", 3 * MiB, {0: pattern(3 * MiB, 2)})
        disk = make_disk(place / "disk", SIZE, {0: OLD[:MiB]})
        with serving(disk) as daemon:
            async with two_clients(daemon.unix, structured=True) as (client, other):
                errors, at = [], MiB
                while not errors and at + length <= SIZE:
                    errors = [(await client.ask(c.CMD_WRITE, at, payload=OLD[at : at + length], flags=flags)).error]
                    errors = [each for each in errors if each]
                    at += 0 if errors else length
                assert errors == [c.ENOSPC]
                assert at > MiB
                assert (await client.ask(c.CMD_WRITE_ZEROES, at, SIZE - at, flags=c.NO_HOLE)).error == c.ENOSPC
                for each in (client, other):
                    assert (await each.ask(c.CMD_READ, 0, at)).data == OLD[:at], "what was acknowledged is there"
                    assert not (await each.ask(c.CMD_FLUSH)).error
                    assert not (await each.ask(c.CMD_WRITE, 0, payload=OLD[: 64 * KiB])).error, "where it has room already"
                assert not (await other.ask(c.CMD_TRIM, at, SIZE - at)).error
                filler.unlink()
                again = OLD[at : at + length]
                assert not (await client.ask(c.CMD_WRITE, at, payload=again, flags=flags)).error
                assert (await other.ask(c.CMD_READ, 0, at + length)).data == OLD[: at + length]
            assert daemon.terminate() == 0


# --- broken ----------------------------------------------------------------------------------------------------------


async def fails_beyond(unix: Path, good: int) -> None:
    """Reads that go beyond `good` fail; nothing else does, on this connection or another."""
    async with two_clients(unix, structured=True) as (client, other):
        for offset, length in ((good, 4096), (SIZE - 4096, 4096), (good + MiB, 3 * MiB), (good - MiB, 2 * MiB)):
            reply = await client.ask(c.CMD_READ, offset, length)
            assert (reply.error, reply.data) == (c.EIO, b"")
            assert "Input/output error" in reply.message
            assert (await other.ask(c.CMD_READ, offset, length)).error == c.EIO
            for each in (client, other):
                assert (await each.ask(c.CMD_READ, 0, 64 * KiB)).data == OLD[: 64 * KiB]
        assert (await other.ask(c.CMD_READ, 0, good)).data == OLD[:good]


async def test_a_block_device_that_fails_reads(tmp_path: Path) -> None:
    backing = make_disk(tmp_path / "backing", SIZE, {0: OLD})
    with loop_device(backing) as device:
        os.truncate(backing, SIZE // 2)
        with serving(device) as daemon:
            await fails_beyond(daemon.unix, SIZE // 2)


async def test_a_file_that_was_cut_short(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk", SIZE, {0: OLD})
    with serving(disk) as daemon:
        os.truncate(disk, SIZE // 2)
        await fails_beyond(daemon.unix, SIZE // 2)


async def test_a_remote_disk_that_fails_reads_and_then_does_not(tmp_path: Path) -> None:
    disk, broken = make_disk(tmp_path / "disk", SIZE, {0: OLD}), tmp_path / "broken"
    broken.touch()
    options = [str(disk), "error-pread=EIO", "error-pread-rate=100%", f"error-pread-file={broken}"]
    with nbdkit("file", *options, filters=["error"]) as peer, serving(peer.endpoint.uri) as daemon:
        async with await WireClient.connect_unix(daemon.unix) as client:
            await client.open(structured=True)
            for _ in range(3):
                reply = await client.ask(c.CMD_READ, 0, 4096)
                assert reply.error == c.EIO
                assert not (await client.ask(c.CMD_FLUSH)).error
            broken.unlink()
            assert (await client.ask(c.CMD_READ, 0, 4096)).data == OLD[:4096]


async def test_a_remote_disk_that_is_full(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk", SIZE, {0: OLD})
    options = [str(disk), "error-pwrite=ENOSPC", "error-pwrite-rate=100%"]
    with nbdkit("file", *options, filters=["error"]) as peer, serving(peer.endpoint.uri) as daemon:
        async with await WireClient.connect_unix(daemon.unix) as client:
            await client.open(structured=True)
            assert (await client.ask(c.CMD_WRITE, 0, payload=b"x" * 4096)).error == c.ENOSPC
            assert (await client.ask(c.CMD_READ, 0, 4096)).data == OLD[:4096]


# --- stalled ---------------------------------------------------------------------------------------------------------


async def test_cached_reads_while_another_disk_stalls(tmp_path: Path, sock_dir: Path) -> None:
    good = FileDevice.open(make_disk(tmp_path / "disk", SIZE, {0: OLD}))
    stalled = GatedDevice(SIZE)
    async with (
        listening({"good": good, "stalled": stalled}, sock_dir) as path,
        two_clients(path, "stalled", "good") as (client, other),
    ):
        for number in range(100):
            await client.request(c.CMD_WRITE, number * 4096, payload=b"x" * 4096)
        await cached_reads(other, "a disk of another export stalls")
        assert client.core.awaited == 100
        while client.core.awaited:
            for held in stalled.calls:
                if not held._word.done():
                    held.finish()
            await client.reply()


async def test_cached_reads_while_their_own_disk_stalls(tmp_path: Path) -> None:
    """A block device whose requests wait in the kernel: what is in the page cache is still served at once."""
    with freezable_file_system(tmp_path / "fs", 64 * MiB) as system:
        backing = make_disk(system.path / "backing", SIZE, {0: OLD})
        with loop_device(backing) as device, serving(device) as daemon:
            async with two_clients(daemon.unix) as (client, other):
                assert (await other.ask(c.CMD_READ, 0, SIZE)).data == OLD, "now it is in the page cache"
                system.freeze()
                for number in range(40):  # more than the disk has threads
                    await client.request(c.CMD_WRITE, number * 4096, payload=OLD[number * 4096 :][:4096], flags=c.FUA)
                    await client.request(c.CMD_FLUSH)
                await cached_reads(other, "the disk itself stalls")
                assert client.core.awaited >= 70
                system.thaw()
                while client.core.awaited:
                    assert not (await client.reply()).error
        assert content(backing, 0, 160 * KiB) == OLD[: 160 * KiB]


async def test_cached_reads_while_a_disk_that_is_being_zeroed_stalls(tmp_path: Path, sock_dir: Path) -> None:
    """Zeroing locks a block device in the kernel, even against reads that must not wait: no such read may be tried then."""
    good = FileDevice.open(make_disk(tmp_path / "disk", SIZE, {0: OLD}))
    with freezable_file_system(tmp_path / "fs", 64 * MiB) as system:
        backing = make_disk(system.path / "backing", SIZE, {0: OLD})
        with loop_device(backing) as device:
            stalled = FileDevice.open(device)
            async with (
                listening({"good": good, "stalled": stalled}, sock_dir) as path,
                two_clients(path, "stalled", "good") as (client, other),
            ):
                assert (await client.ask(c.CMD_READ, 0, MiB)).data == OLD[:MiB]
                await asyncio.to_thread(system.freeze)
                await client.request(c.CMD_WRITE, 0, payload=OLD[:MiB], flags=c.FUA)
                await client.request(c.CMD_FLUSH)
                await client.request(c.CMD_WRITE_ZEROES, 4 * MiB, 4096, flags=c.NO_HOLE)
                while not stalled._locking:
                    await asyncio.sleep(0)
                for number in range(10):
                    await client.request(c.CMD_READ, number * 4096, 4096)
                    await client.request(c.CMD_WRITE, number * 4096, payload=OLD[number * 4096 :][:4096])
                await cached_reads(other, "a block device is being zeroed and stalls")
                assert client.core.awaited > 20
                await asyncio.to_thread(system.thaw)
                while client.core.awaited:
                    assert not (await client.reply()).error


async def test_cached_reads_while_writes_to_their_file_stall(tmp_path: Path) -> None:
    """Once a write is stuck in a thread, those that could go straight into the page cache do not try."""
    with freezable_file_system(tmp_path / "fs", 64 * MiB) as system:
        disk = make_disk(system.path / "disk", SIZE, {0: OLD})
        with serving(disk) as daemon:
            async with two_clients(daemon.unix) as (client, other):
                system.freeze()
                await client.request(c.CMD_WRITE, 0, payload=OLD[:4096], flags=c.FUA)
                await cached_reads(other, "a write to the file stalls")
                for number in range(20):
                    await client.request(c.CMD_WRITE, number * 4096, payload=OLD[number * 4096 :][:4096])
                await cached_reads(other, "21 writes to the file stall")
                assert client.core.awaited == 21
                system.thaw()
                while client.core.awaited:
                    assert not (await client.reply()).error
            assert daemon.terminate() == 0
        assert content(disk, 0, SIZE) == OLD


async def test_a_remote_disk_that_stalls(tmp_path: Path, sock_dir: Path) -> None:
    """Nothing of it is cached here; control and the haggling of others are as quick as ever, and it goes on where it was."""
    disk = make_disk(tmp_path / "disk", SIZE, {0: OLD})
    with nbdkit("file", str(disk)) as peer, serving(peer.endpoint.uri) as daemon:
        async with await WireClient.connect_unix(daemon.unix) as client:
            await client.open(structured=True)
            peer.freeze()
            for number in range(20):
                await client.request(c.CMD_READ, number * 4096, 4096, cookie=number)
            for _ in range(20):
                async with await WireClient.connect_unix(daemon.unix) as other:
                    await other.open()
                    assert (await other.ask(c.CMD_READ, SIZE, 1)).error == c.EINVAL
            assert client.core.awaited == 20
            peer.thaw()
            while client.core.awaited:
                reply = await client.reply()
                assert reply.data == OLD[reply.cookie * 4096 :][:4096]


# --- a disk that changes while it is looked at -----------------------------------------------------------------------


async def test_block_status_while_others_punch_holes(tmp_path: Path) -> None:
    """What the file system called data a moment ago may be a hole by the time its end is asked for."""
    disk = make_disk(tmp_path / "disk", SIZE, {0: OLD})
    with serving(disk) as daemon:
        async with (
            await WireClient.connect_unix(daemon.unix) as looking,
            await WireClient.connect_unix(daemon.unix) as changing,
        ):
            await looking.open(structured=True, contexts=[c.BASE_ALLOCATION])
            await changing.open()
            for _ in range(100):
                for at in range(0, MiB, 64 * KiB):
                    await changing.request(c.CMD_TRIM, at, 64 * KiB)
                    await changing.request(c.CMD_WRITE, at, payload=OLD[at : at + 64 * KiB], flags=c.FUA)
                    await looking.request(c.CMD_BLOCK_STATUS, 0, SIZE)
                for client in (looking, changing):
                    while client.core.awaited:
                        assert not (await client.reply()).error
            assert daemon.terminate() == 0


# --- a client that vanishes while it writes --------------------------------------------------------------------------


@pytest.mark.parametrize("sent", [0, 1, 64 * KiB, 16 * MiB, 32 * MiB - 1, 32 * MiB])
async def test_vanished_in_the_middle_of_a_write_of_32_mib(tmp_path: Path, sock_dir: Path, sent: int) -> None:
    """None of it is on disk, or all of it: a payload is written once it is whole. Its range is marked either way."""
    old, new = pattern(40 * MiB), pattern(32 * MiB, 2)
    path = make_disk(tmp_path / "disk", len(old), {0: old})
    disk, observer = TrackedDevice(FileDevice.open(path)), Observer()
    disk.observe(observer)
    offset = 4096 + 512
    async with listening({"": disk}, sock_dir) as sock:
        client = await WireClient.connect_unix(sock)
        await client.open()
        raw = client.core.request(c.CMD_WRITE, offset, payload=new)
        await client.send(raw[: len(raw) - len(new) + sent])
        client.abort()
        await client.aclose()
        async with await WireClient.connect_unix(sock) as other:
            await other.open()
            assert (await other.ask(c.CMD_READ, 0, 4096)).data == old[:4096]
    now, whole = path.read_bytes(), old[:offset] + new + old[offset + len(new) :]
    assert now == old or (now == whole and sent == len(new))
    assert observer.heard[-2:] == [("begins", offset, len(new)), ("ends", offset, len(new))]


async def test_vanished_while_its_write_is_under_way(sock_dir: Path) -> None:
    """The write is finished, and stays announced until it has been."""
    device = GatedDevice(64 * MiB)
    disk, observer = TrackedDevice(device), Observer()
    disk.observe(observer)
    async with listening({"": disk}, sock_dir) as sock:
        client = await WireClient.connect_unix(sock)
        await client.open()
        await client.request(c.CMD_WRITE, 512, payload=b"x" * (32 * MiB))
        held = await device.next()
        client.abort()
        await client.aclose()
        async with await WireClient.connect_unix(sock) as other:
            await other.open()
        assert observer.heard[-1] == ("begins", 512, 32 * MiB)
        held.finish()
        async with asyncio.timeout(10):
            while observer.heard[-1][0] == "begins":
                await asyncio.sleep(0)
    assert observer.heard[-1] == ("ends", 512, 32 * MiB)
    assert device.data[512 : 512 + 32 * MiB] == b"x" * (32 * MiB)
