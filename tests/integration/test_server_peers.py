"""Our server as others see it: real tools read its status, and a client of our own asks what those tools can't."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from nbdmirror.bitmap.dirty import DirtyBitmap
from nbdmirror.devices.file import FileDevice
from nbdmirror.protocol import constants as c
from nbdmirror.server.export import Export
from nbdmirror.server.listener import Listener
from nbdmirror.units import GiB, KiB, MiB, TiB
from tests.support.peers import require
from tests.support.wire_client import WireClient, request

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping
    from pathlib import Path

ALLOCATION, DEPTH, BITMAP = CONTEXTS = (c.BASE_ALLOCATION, c.ALLOCATION_DEPTH, "qemu:dirty-bitmap:b0")
TOOL_SECONDS = 30.0


@asynccontextmanager
async def serving(
    path: Path, sock_dir: Path, size: int, *, bitmaps: Mapping[str, DirtyBitmap] | None = None, read_only: bool = False
) -> AsyncIterator[Path]:
    """Serve a sparse file of `size` bytes; the socket's path."""
    with path.open("ab") as file:
        file.truncate(size)
    device = FileDevice.open(path, read_only=read_only)
    listener = Listener.unix(str(sock_dir / "sock"), {"": Export("", device, bitmaps=bitmaps)})
    await listener.start()
    try:
        yield sock_dir / "sock"
    finally:
        await listener.aclose()
        await device.aclose()


async def run(*argv: str) -> str:
    """The standard output of a tool that has to succeed."""
    require(argv[0])
    process = await asyncio.create_subprocess_exec(*argv, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE)
    try:
        async with asyncio.timeout(TOOL_SECONDS):
            out, err = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.wait()
        raise
    assert process.returncode == 0, err.decode()
    return out.decode()


def uri(sock: Path) -> str:
    return f"nbd+unix:///?socket={sock}"


async def nbdinfo_map(sock: Path, context: str) -> list[tuple[int, int, int]]:
    found = json.loads(await run("nbdinfo", "--json", f"--map={context}", uri(sock)))
    return [(each["offset"], each["length"], each["type"]) for each in found]


# --- real tools ------------------------------------------------------------------------------------------------------


async def test_nbdinfo_lists_and_maps_every_context(tmp_path: Path, sock_dir: Path) -> None:
    bitmap = DirtyBitmap(MiB, 64 * KiB)
    bitmap.add(64 * KiB, 1)
    path = tmp_path / "disk"
    path.write_bytes(bytes(64 * KiB) + b"x" * 64 * KiB)
    async with serving(path, sock_dir, MiB, bitmaps={"b0": bitmap}) as sock:
        described = json.loads(await run("nbdinfo", "--no-content", "--json", "--list", uri(sock)))["exports"][0]
        assert described["contexts"] == list(CONTEXTS)
        assert described["block_size_maximum"] == 64 * MiB
        assert described["can_fast_zero"]
        assert await nbdinfo_map(sock, ALLOCATION) == [(0, 128 * KiB, 0), (128 * KiB, MiB - 128 * KiB, 3)]
        assert await nbdinfo_map(sock, DEPTH) == [(0, 128 * KiB, 1), (128 * KiB, MiB - 128 * KiB, 0)]
        assert await nbdinfo_map(sock, BITMAP) == [
            (0, 64 * KiB, 0),
            (64 * KiB, 64 * KiB, 1),
            (128 * KiB, MiB - 128 * KiB, 0),
        ]


async def test_qemu_reads_a_dirty_bitmap(tmp_path: Path, sock_dir: Path) -> None:
    bitmap = DirtyBitmap(MiB, 64 * KiB)
    bitmap.add(64 * KiB, 1)
    async with serving(tmp_path / "disk", sock_dir, MiB, bitmaps={"b0": bitmap}) as sock:
        image = f"driver=nbd,server.type=unix,server.path={sock},x-dirty-bitmap={BITMAP}"
        found = json.loads(await run("qemu-img", "map", "--output=json", "--image-opts", image))
        # The client shows bit 0 of the bitmap as if it were HOLE of base:allocation.
        assert [(each["start"], each["length"], each["data"]) for each in found] == [
            (0, 64 * KiB, True),
            (64 * KiB, 64 * KiB, False),
            (128 * KiB, MiB - 128 * KiB, True),
        ]


async def test_libnbd_hears_of_several_contexts_in_one_reply(tmp_path: Path, sock_dir: Path) -> None:
    pytest.importorskip("nbd")
    bitmap = DirtyBitmap(MiB, 64 * KiB)
    bitmap.add(64 * KiB, 1)
    contexts = "".join(f"h.add_meta_context({name!r})\n" for name in CONTEXTS)
    async with serving(tmp_path / "disk", sock_dir, MiB, bitmaps={"b0": bitmap}) as sock:
        script = f"""
import json, nbd
h, found = nbd.NBD(), {{}}
{contexts}
h.connect_uri({uri(sock)!r})
h.block_status({MiB}, 0, lambda name, offset, entries, error: found.update({{name: entries}}))
print(json.dumps(found))
"""
        assert json.loads(await run(sys.executable, "-c", script)) == {
            ALLOCATION: [MiB, 3],
            DEPTH: [MiB, 0],
            BITMAP: [64 * KiB, 0, 64 * KiB, 1, MiB - 128 * KiB, 0],
        }


@pytest.mark.parametrize("size", [1, 511, MiB + 1, MiB + 511])
async def test_sizes_are_exact_to_the_byte(tmp_path: Path, sock_dir: Path, size: int) -> None:
    path, copy = tmp_path / "disk", tmp_path / "copy"
    path.write_bytes(os.urandom(size))
    async with serving(path, sock_dir, size) as sock:
        assert (await run("nbdinfo", "--size", uri(sock))).strip() == str(size)
        await run("nbdcopy", uri(sock), str(copy))
    assert copy.read_bytes() == path.read_bytes()


async def test_nbdinfo_maps_eight_terabytes_of_nothing(tmp_path: Path, sock_dir: Path) -> None:
    async with serving(tmp_path / "disk", sock_dir, 8 * TiB) as sock:
        assert await nbdinfo_map(sock, ALLOCATION) == [(0, 8 * TiB, 3)]


# --- our own client --------------------------------------------------------------------------------------------------


@asynccontextmanager
async def client_of(sock: Path, **how: Any) -> AsyncIterator[WireClient]:
    async with await WireClient.connect_unix(sock) as client:
        await client.open(**how)
        yield client


async def test_a_hole_is_one_extent_per_request_however_long(tmp_path: Path, sock_dir: Path) -> None:
    async with serving(tmp_path / "disk", sock_dir, 8 * TiB) as sock:
        async with client_of(sock, structured=True, contexts=[ALLOCATION]) as client:
            for offset in (0, 5 * TiB + 1, 8 * TiB - 4 * GiB):
                reply = await client.ask(c.CMD_BLOCK_STATUS, offset, 4 * GiB - 1)
                assert reply.extents == {1: [(4 * GiB - 1, 3)]}
        async with client_of(sock, extended=True, contexts=CONTEXTS[:2]) as client:
            reply = await client.ask(c.CMD_BLOCK_STATUS, 0, 8 * TiB)
            assert reply.extents == {1: [(8 * TiB, 3)], 2: [(8 * TiB, 0)]}


async def test_commands_beyond_four_gigabytes(tmp_path: Path, sock_dir: Path) -> None:
    path = tmp_path / "disk"
    size = 16 * GiB + 7
    async with serving(path, sock_dir, size) as sock, client_of(sock, extended=True, contexts=[ALLOCATION]) as client:
        for offset in (0, 5 * GiB, size - 5):
            assert (await client.ask(c.CMD_WRITE, offset, payload=b"here!")).error == 0
        assert (await client.ask(c.CMD_CACHE, 0, size)).error == 0
        assert len((await client.ask(c.CMD_BLOCK_STATUS, 0, size)).extents[1]) == 5
        assert (await client.ask(c.CMD_WRITE_ZEROES, 1, size - 2)).error == 0
        assert (await client.ask(c.CMD_READ, 0, 5)).data == b"h\0\0\0\0"
        assert (await client.ask(c.CMD_READ, 5 * GiB, 5)).data == bytes(5)
        assert (await client.ask(c.CMD_READ, size - 5, 5)).data == b"\0\0\0\0!"
        assert (await client.ask(c.CMD_TRIM, 0, size)).error == 0
        assert path.stat().st_blocks * 512 <= 4096  # the begun block at the end stays
        assert (await client.ask(c.CMD_WRITE_ZEROES, 1, size)).error == c.ENOSPC
        assert (await client.ask(c.CMD_READ, 0, 5 * GiB)).error == c.EOVERFLOW
        assert (await client.ask(c.CMD_READ, 1, 2**64 - 1)).error == c.EINVAL
    assert path.stat().st_size == size


@pytest.mark.parametrize("how", [{}, {"structured": True}, {"extended": True}], ids=["simple", "structured", "extended"])
async def test_payloads_up_to_the_limit(tmp_path: Path, sock_dir: Path, how: dict[str, bool]) -> None:
    most, path = 64 * MiB, tmp_path / "disk"
    async with serving(path, sock_dir, 2 * most) as sock, client_of(sock, **how) as client:
        payload = os.urandom(MiB) * 64
        assert (await client.ask(c.CMD_WRITE, 1, payload=payload)).error == 0
        assert (await client.ask(c.CMD_READ, 1, most)).data == payload
        if how:
            whole = await client.ask(c.CMD_READ, 0, most, flags=c.DF)
            assert (whole.data, whole.chunks) == (b"\0" + payload[:-1], 1)
        assert (await client.ask(c.CMD_READ, 0, most + 1)).error == c.EOVERFLOW
        if "extended" in how:
            await client.request(c.CMD_WRITE, 0, most + 1, flags=c.PAYLOAD_LEN)
            await client.read_until_closed()
        else:
            assert (await client.ask(c.CMD_WRITE, 0, payload=bytes(most + 1))).error == c.EOVERFLOW
            assert (await client.ask(c.CMD_READ, 1, 5)).data == payload[:5]


async def test_df_keeps_a_half_empty_read_in_one_chunk(tmp_path: Path, sock_dir: Path) -> None:
    async with serving(tmp_path / "disk", sock_dir, MiB) as sock, client_of(sock, structured=True) as client:
        assert (await client.ask(c.CMD_WRITE, 0, payload=b"x" * 4096)).error == 0
        assert (await client.ask(c.CMD_READ, 0, MiB)).chunks > 1
        assert (await client.ask(c.CMD_READ, 0, MiB, flags=c.DF)).chunks == 1


async def test_requests_of_nothing_and_unknown_ones_are_refused_with_a_reason(tmp_path: Path, sock_dir: Path) -> None:
    async with serving(tmp_path / "disk", sock_dir, MiB) as sock, client_of(sock, extended=True) as client:
        for command in (c.CMD_READ, c.CMD_WRITE, c.CMD_TRIM, c.CMD_CACHE, c.CMD_WRITE_ZEROES, c.CMD_BLOCK_STATUS, 8, 99):
            reply = await client.ask(command, 0, 0)
            assert reply.error == c.EINVAL
            assert reply.message
        assert (await client.ask(c.CMD_BLOCK_STATUS, 0, 512)).message == "no meta context was negotiated"


async def test_read_only_exports_refuse_what_they_do_not_offer(tmp_path: Path, sock_dir: Path) -> None:
    async with serving(tmp_path / "disk", sock_dir, MiB, read_only=True) as sock, client_of(sock) as client:
        for command, flags in ((c.CMD_TRIM, 0), (c.CMD_WRITE_ZEROES, c.FAST_ZERO), (c.CMD_WRITE, c.FUA)):
            payload = b"x" * 512 if command == c.CMD_WRITE else None
            assert (await client.ask(command, 0, 512, flags=flags, payload=payload)).error == c.EPERM


async def test_compact_requests_end_an_extended_connection(tmp_path: Path, sock_dir: Path) -> None:
    async with serving(tmp_path / "disk", sock_dir, MiB) as sock, client_of(sock, extended=True) as client:
        await client.send(request(c.CMD_READ, 0, 512) + bytes(4))
        assert await client.read_until_closed() == b""
