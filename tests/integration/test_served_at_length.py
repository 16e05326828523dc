"""Our server under load, over every kind of disk and transport: fio, many clients, odd sizes, a loop device, a remote disk."""

from __future__ import annotations

import asyncio
import json
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import pytest

from nbdmirror.protocol import constants as c
from nbdmirror.units import KiB, MiB
from tests.support.block_devices import loop_device
from tests.support.daemon import serving
from tests.support.peers import nbdkit, require
from tests.support.tools import PIECES, SIZE, allocated, content, make_disk, nbdsh, pattern, run, same_content, sha256
from tests.support.wire_client import WireClient

if TYPE_CHECKING:
    from pathlib import Path

# --- fio -------------------------------------------------------------------------------------------------------------


def fio(uri: str, directory: Path, *options: str) -> None:
    """Random writes, all read back and verified."""
    require("fio")
    words = ["--name=job", "--ioengine=nbd", f"--uri={uri}", "--rw=randwrite", "--verify=crc32c", "--verify_fatal=1"]
    words += ["--do_verify=1", "--verify_state_save=0", "--randrepeat=0", "--thread", "--output-format=json"]
    said = run("fio", *words, *options, cwd=directory)
    (job,) = json.loads(said[said.index("{") :])["jobs"]
    assert job["error"] == 0
    assert job["write"]["total_ios"] > 0
    assert job["read"]["io_bytes"] == job["write"]["io_bytes"], "all that was written was verified"


@pytest.mark.parametrize(
    "options",
    [
        ["--bs=4k", "--iodepth=32", "--size=16m", "--io_size=8m"],
        ["--bsrange=512-256k", "--bs_unaligned=1", "--iodepth=16", "--size=32m"],
        ["--bs=1m", "--iodepth=8", "--size=48m", "--fsync=4"],
    ],
    ids=["small", "mixed sizes", "large and flushed"],
)
def test_fio_verifies_what_it_wrote(tmp_path: Path, options: list[str]) -> None:
    disk = make_disk(tmp_path / "disk", 48 * MiB)
    with serving(disk) as daemon:
        fio(daemon.uri, tmp_path, *options)
        assert daemon.memory() < 256 * MiB
    assert allocated(disk) > 0


# --- many clients ----------------------------------------------------------------------------------------------------


async def test_a_flush_on_one_connection_covers_the_writes_of_all(tmp_path: Path) -> None:
    count, length = 64, 16 * KiB
    disk = make_disk(tmp_path / "disk", count * length)
    with serving(disk) as daemon:
        async with AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(await WireClient.connect_unix(daemon.unix)) for _ in range(count)]
            opened = await asyncio.gather(*(client.open(structured=True) for client in clients))
            assert all(size == count * length and flags & c.TFLAG_CAN_MULTI_CONN for size, flags in opened)
            for turn in range(3):
                pieces = [pattern(length, turn * count + number) for number in range(count)]
                writes = [
                    client.ask(c.CMD_WRITE, number * length, payload=piece)
                    for number, (client, piece) in enumerate(zip(clients, pieces, strict=True))
                ]
                assert not any(reply.error for reply in await asyncio.gather(*writes))
                assert (await clients[turn].ask(c.CMD_FLUSH)).error == 0
                reads = [client.ask(c.CMD_READ, (number + 1) % count * length, length) for number, client in enumerate(clients)]
                got = [reply.data for reply in await asyncio.gather(*reads)]
                assert got == [*pieces[1:], pieces[0]], "what one wrote, another reads"
                assert disk.read_bytes() == b"".join(pieces)
        assert daemon.memory() < 128 * MiB
        assert daemon.terminate() == 0


async def test_many_requests_in_flight_are_answered_each_with_its_own_data(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk", SIZE, {0: pattern(SIZE)})
    whole = disk.read_bytes()
    with serving(disk) as daemon:
        async with await WireClient.connect_unix(daemon.unix) as client:
            await client.open()
            # Small reads are answered at once, those above 1 MiB and flushes by threads, in any order.
            asked = {}
            for number in range(200):
                offset, length = number * 40_009, 3 * MiB // 2 if number % 8 == 0 else number * 13 + 1
                asked[number + 1] = (offset, length)
                await client.request(c.CMD_READ, offset, length, cookie=number + 1)
                if number % 16 == 0:
                    await client.request(c.CMD_FLUSH, cookie=number + 1000)
            while client.core.awaited:
                reply = await client.reply()
                assert reply.error == 0
                if reply.cookie in asked:
                    offset, length = asked.pop(reply.cookie)
                    assert reply.data == whole[offset : offset + length]
            assert not asked


async def test_many_writes_in_flight_reach_the_disk_each_with_its_own_data(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk", 4 * MiB)
    whole, at = pattern(4 * MiB), 0
    with serving(disk) as daemon:
        async with await WireClient.connect_unix(daemon.unix) as client:
            await client.open()
            # FUA sends a write to the threads, while what comes behind it is received already.
            for number in range(150):
                length = (4096, 777, 60_000)[number % 3]
                flags = 0 if number % 5 == 0 else c.FUA
                await client.request(c.CMD_WRITE, at, payload=whole[at : at + length], flags=flags)
                at += length
            while client.core.awaited:
                assert (await client.reply()).error == 0
    assert content(disk, 0, at) == whole[:at]


async def test_one_client_too_many_is_hung_up_on(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk", MiB, {0: pattern(MiB)})
    with serving(disk, "-e", "2") as daemon:
        async with await WireClient.connect_unix(daemon.unix) as first:
            await first.open()
            async with await WireClient.connect_unix(daemon.unix) as second:
                await second.open()
                async with await WireClient.connect_unix(daemon.unix) as third:
                    assert await third.read_until_closed() == b""
                daemon.wait_for_log("limit")
                assert (await first.ask(c.CMD_READ, 0, 512)).data == pattern(MiB)[:512]
                await second.send(second.core.request(c.CMD_DISC))
                assert await second.read_until_closed() == b""
            async with await WireClient.connect_unix(daemon.unix) as fourth:
                await fourth.open()


# --- disks of every kind ---------------------------------------------------------------------------------------------

ODD = 123_456_789


def test_a_size_that_is_no_multiple_of_anything(tmp_path: Path) -> None:
    require("nbdcopy", "nbdinfo")
    disk = make_disk(tmp_path / "disk", ODD, {0: pattern(5000), 77 * MiB + 5: pattern(MiB, 2), ODD - 1001: pattern(1001, 3)})
    copy, back = tmp_path / "copy", make_disk(tmp_path / "back", ODD, {ODD - 5000: pattern(5000, 4)})
    with serving(disk, "-r") as source, serving(back) as target:
        assert run("nbdinfo", "--size", source.uri).strip() == str(ODD)
        shown = json.loads(run("nbdinfo", "--map", "--json", source.uri))
        assert sum(each["length"] for each in shown) == ODD
        run("nbdcopy", source.uri, copy)
        run("nbdcopy", source.uri, target.uri)
    assert same_content(disk, copy)
    assert same_content(disk, back)
    assert allocated(copy) < 4 * MiB


async def test_the_last_byte_is_the_last(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk", ODD, {ODD - 512: pattern(512)})
    with serving(disk) as daemon:
        async with await WireClient.connect_unix(daemon.unix) as client:
            assert (await client.open(structured=True, contexts=["base:allocation"]))[0] == ODD
            assert (await client.ask(c.CMD_READ, ODD - 512, 512)).data == pattern(512)
            assert (await client.ask(c.CMD_WRITE, ODD - 1, payload=b"\xee")).error == 0
            assert (await client.ask(c.CMD_READ, ODD - 1, 1)).data == b"\xee"
            for command, rest in (
                (c.CMD_READ, {"length": 2}),
                (c.CMD_WRITE, {"payload": b"xx"}),
                (c.CMD_WRITE_ZEROES, {"length": 2}),
                (c.CMD_TRIM, {"length": 2}),
                (c.CMD_CACHE, {"length": 2}),
                (c.CMD_BLOCK_STATUS, {"length": 2}),
                (c.CMD_READ, {"length": 32 * MiB}),
            ):
                expected = c.ENOSPC if command in (c.CMD_WRITE, c.CMD_WRITE_ZEROES) else c.EINVAL
                assert (await client.ask(command, ODD - 1, **rest)).error == expected
            assert (await client.ask(c.CMD_READ, 2**64 - 1, 1)).error == c.EINVAL
            assert (await client.ask(c.CMD_WRITE_ZEROES, ODD - 100, 99)).error == 0
            last = await client.ask(c.CMD_BLOCK_STATUS, ODD - 1, 1)
            assert list(last.extents.values()) == [[(1, 0)]]
    assert disk.stat().st_size == ODD
    assert content(disk, ODD - 512, 512) == pattern(512)[:412] + bytes(99) + b"\xee"


def test_a_block_device(tmp_path: Path) -> None:
    require("nbdcopy", "nbdinfo")
    backing = make_disk(tmp_path / "backing", SIZE, PIECES)
    expected = bytearray(backing.read_bytes())
    with loop_device(backing) as device, serving(device, qmp=True) as daemon:
        assert run("nbdinfo", "--size", daemon.uri).strip() == str(SIZE)
        copy = tmp_path / "copy"
        run("nbdcopy", daemon.uri, copy)
        assert same_content(backing, copy)
        data = pattern(100_001, 9)
        (tmp_path / "data").write_bytes(data)
        nbdsh(
            daemon.uri,
            f"""
            import pathlib
            data = pathlib.Path({str(tmp_path / "data")!r}).read_bytes()
            h.pwrite(data, {2 * MiB + 1})
            h.pwrite(data, {3 * MiB}, nbd.CMD_FLAG_FUA)
            h.zero({512 * KiB}, {5 * MiB})
            h.zero(10_001, 5_003)
            h.zero(100_001, 300_003, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FUA)
            h.zero(100, 600_100)
            h.flush()
            assert h.pread({len(data)}, {2 * MiB + 1}) == data
            assert not any(h.pread({512 * KiB}, {5 * MiB})) and not any(h.pread(10_001, 5_003))
            h.trim({MiB}, {8 * MiB})
            h.flush()
            """,
        )
        assert daemon.terminate() == 0
    expected[2 * MiB + 1 : 2 * MiB + 1 + len(data)] = data
    expected[3 * MiB : 3 * MiB + len(data)] = data
    for at, length in ((5 * MiB, 512 * KiB), (5_003, 10_001), (300_003, 100_001), (600_100, 100)):
        expected[at : at + length] = bytes(length)
    assert backing.read_bytes() == expected


def test_a_disk_that_another_server_has(tmp_path: Path) -> None:
    require("nbdcopy", "nbdinfo")
    disk, copy = make_disk(tmp_path / "disk", SIZE, PIECES), tmp_path / "copy"
    with nbdkit("file", str(disk)) as peer, serving(peer.endpoint.uri, "-x", "again") as daemon:
        shown = json.loads(run("nbdinfo", "--map", "--json", daemon.uri))
        assert [each["offset"] for each in shown if each["type"] == 0] == list(PIECES)
        run("nbdcopy", daemon.uri, copy)
        assert same_content(disk, copy)
        other = make_disk(tmp_path / "other", SIZE, {3 * MiB + 1: pattern(2 * MiB, 7)})
        run("nbdcopy", "--flush", other, daemon.uri)
        assert same_content(disk, other)
        assert allocated(disk) < 4 * MiB, "zeroes went on as zeroes"
        assert daemon.terminate() == 0


@pytest.mark.parametrize("source", ["file", "remote"])
def test_a_read_only_disk_of_every_kind_stays_as_it_is(tmp_path: Path, source: str) -> None:
    disk = make_disk(tmp_path / "disk", MiB, {0: pattern(MiB)})
    before = sha256(disk), disk.stat().st_mtime_ns
    script = """
        assert h.is_read_only()
        assert h.pread(512, 0) != bytes(512)
        try:
            h.pwrite(b"x", 0)
        except nbd.Error:
            pass
        else:
            raise AssertionError("it was written to")
        """
    if source == "file":
        with serving(disk, "-r") as daemon:
            nbdsh(daemon.uri, script)
    else:
        with nbdkit("file", str(disk), extra=["-r"]) as peer, serving(peer.endpoint.uri, "-r") as daemon:
            nbdsh(daemon.uri, script)
    assert (sha256(disk), disk.stat().st_mtime_ns) == before
