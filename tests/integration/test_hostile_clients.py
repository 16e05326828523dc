"""Clients that break the protocol, stall or vanish, against the real program: none costs the others anything.

After each of them the server serves somebody else, holds no socket of the one that has gone, has kept its memory within
bounds and the disk as it was, and has no traceback in its log.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import pytest

from nbdmirror.protocol import constants as c
from nbdmirror.protocol.constants import Option, OptionReply
from nbdmirror.units import KiB, MiB
from tests.support import wire_client as wire
from tests.support.daemon import Daemon, serving, until
from tests.support.peers import require
from tests.support.tools import content, make_disk, pattern, run
from tests.support.wire_client import WireClient, WireError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SIZE = 72 * MiB
OLD = pattern(8 * MiB) + bytes(SIZE - 9 * MiB) + pattern(MiB, 2)


@contextmanager
def unharmed(directory: Path, *options: str) -> Iterator[Daemon]:
    """A server that has to come out of the block as it went in."""
    disk = make_disk(directory / "disk", SIZE, {0: OLD[: 8 * MiB], SIZE - MiB: OLD[-MiB:]})
    with serving(disk, *options) as daemon:
        yield daemon
        assert daemon.memory() < 256 * MiB
        assert daemon.terminate() == 0
    assert disk.read_bytes() == OLD


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """One server for all, so that it has to survive all of them, in any order."""
    require("nbdinfo")
    with unharmed(tmp_path_factory.mktemp("hostile")) as daemon:
        run("nbdinfo", "--size", daemon.uri)  # for its first client a loop opens files of its own
        yield daemon


@pytest.fixture
def daemon(shared: Daemon) -> Iterator[Daemon]:
    files = shared.open_files()
    yield shared
    assert run("nbdinfo", "--size", shared.uri).strip() == str(SIZE)
    until(lambda: shared.open_files() <= files, "the sockets of clients that have gone are closed")
    assert shared.memory() < 256 * MiB
    assert content(shared.disk, 0, SIZE) == OLD
    assert "Traceback" not in shared.stderr


async def connect(daemon: Daemon) -> WireClient:
    return await WireClient.connect_unix(daemon.unix)


def data(offset: int, length: int) -> bytes:
    return OLD[offset : offset + length]


# --- haggling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "said",
    [
        pytest.param(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", id="a browser"),
        pytest.param(b"\xff" * 4, id="unknown flags"),
        pytest.param(bytes(100), id="zeroes"),
        pytest.param(pattern(100_000, 5), id="noise"),
        pytest.param(wire.client_flags() + pattern(64, 6), id="noise for an option"),
        pytest.param(wire.client_flags() + wire.option(Option.GO, magic=1), id="an option of another magic"),
        pytest.param(wire.client_flags() + wire.option(Option.EXPORT_NAME, b"nobody"), id="an old client, unknown name"),
        pytest.param(wire.client_flags() + wire.option(Option.EXPORT_NAME, length=2**32 - 1), id="a name without end"),
        pytest.param(wire.client_flags() + wire.option(Option.ABORT), id="an abort"),
    ],
)
async def test_hung_up_on_while_haggling(daemon: Daemon, said: bytes) -> None:
    async with await connect(daemon) as client:
        with suppress(ConnectionError):  # it need not take all before it hangs up
            await client.send(said)
        await client.read_until_closed()


async def test_unknown_and_unfit_options_are_refused_one_by_one(daemon: Daemon) -> None:
    async with await connect(daemon) as client:
        await client.greet()
        for number, body, reply in (
            (4711, b"", OptionReply.ERR_UNSUP),
            (4711, pattern(5000), OptionReply.ERR_UNSUP),
            (4711, pattern(300_000), OptionReply.ERR_UNSUP),
            (Option.STRUCTURED_REPLY, b"x", OptionReply.ERR_INVALID),
            (Option.LIST, b"x", OptionReply.ERR_INVALID),
            (Option.GO, b"", OptionReply.ERR_INVALID),
            (Option.GO, struct.pack(">I", 10**6) + b"a", OptionReply.ERR_INVALID),
            (Option.GO, wire.go_data("nobody"), OptionReply.ERR_UNKNOWN),
            (Option.INFO, wire.go_data("nobody"), OptionReply.ERR_UNKNOWN),
        ):
            answers = await client.option(number, body)
            assert [(each.option, each.reply) for each in answers] == [(number, reply)]
        size, _ = wire.export_info(await client.option(Option.GO, wire.go_data("")))
        assert size == SIZE
        assert (await client.ask(c.CMD_READ, 4096, 512)).data == data(4096, 512)


@pytest.mark.parametrize("padded", [False, True], ids=["NO_ZEROES", "zeroes"])
async def test_an_old_client_is_served(tmp_path: Path, padded: bool) -> None:
    with unharmed(tmp_path, "-x", "a") as daemon:
        async with await connect(daemon) as client:
            assert await client.greet(c.FLAG_FIXED_NEWSTYLE | (0 if padded else c.FLAG_NO_ZEROES)) & c.FLAG_NO_ZEROES
            await client.send(wire.option(Option.EXPORT_NAME, b"a"))
            while (opened := client.core.export_name_reply(zeroes=padded)) is None:
                await client._more()
            assert opened[0] == SIZE
            assert opened[1] & c.TFLAG_HAS_FLAGS
            reply = await client.ask(c.CMD_READ, SIZE - 1000, 1000)
            assert (reply.data, reply.chunks) == (data(SIZE - 1000, 1000), 0)


async def test_vanished_at_every_point_of_haggling(daemon: Daemon) -> None:
    for said in (b"", b"\0\0", wire.client_flags(), wire.client_flags() + wire.go()[:-3], wire.client_flags() + wire.go()):
        client = await connect(daemon)
        await client.send(said)
        client.abort()
        await client.aclose()


async def test_silent_clients_do_not_keep_others_waiting(daemon: Daemon) -> None:
    silent = [await connect(daemon) for _ in range(20)]
    async with await connect(daemon) as client:
        await client.open()
        assert (await client.ask(c.CMD_READ, 0, 512)).data == data(0, 512)
    for each in silent:
        await each.aclose()


# --- transmission ----------------------------------------------------------------------------------------------------


async def test_garbage_after_the_handshake_is_hung_up_on(daemon: Daemon) -> None:
    async with await connect(daemon) as other:
        await other.open()
        for said in (pattern(28), bytes(28), wire.request(c.CMD_READ, 0, 512, magic=1), pattern(3000, 3)):
            async with await connect(daemon) as client:
                await client.open(structured=True)
                await client.send(said)
                assert await client.read_until_closed() == b""
        assert (await other.ask(c.CMD_READ, 0, 512)).data == data(0, 512)
    assert "dropped" in daemon.stderr


async def test_what_came_before_the_garbage_is_answered(daemon: Daemon) -> None:
    async with await connect(daemon) as client:
        await client.open()
        await client.request(c.CMD_READ, 512, 512)
        assert (await client.reply()).data == data(512, 512)
        await client.send(bytes(28))
        assert await client.read_until_closed() == b""


@pytest.mark.parametrize("structured", [False, True])
async def test_unfit_requests_are_refused_one_by_one(daemon: Daemon, structured: bool) -> None:
    async with await connect(daemon) as client:
        await client.open(structured=structured)
        for command, offset, length, flags, error in (
            (77, 0, 0, 0, c.EINVAL),
            (0xFFFF, 0, 512, 0, c.EINVAL),
            (c.CMD_READ, 0, 512, 0x8000, c.EINVAL),
            (c.CMD_READ, 0, 512, c.NO_HOLE, c.EINVAL),
            (c.CMD_READ, 0, 0, 0, c.EINVAL),
            (c.CMD_READ, SIZE, 1, 0, c.EINVAL),
            (c.CMD_READ, 2**64 - 512, 512, 0, c.EINVAL),
            (c.CMD_READ, 0, c.MAX_PAYLOAD + 1, 0, c.EOVERFLOW),
            (c.CMD_WRITE_ZEROES, SIZE - 1, 2, 0, c.ENOSPC),
            (c.CMD_TRIM, 0, SIZE + 1, 0, c.EINVAL),
            (c.CMD_BLOCK_STATUS, 0, 512, 0, c.EINVAL),
        ):
            assert (await client.ask(command, offset, length, flags=flags)).error == error, (command, offset, length, flags)
        assert (await client.ask(c.CMD_READ, 0, 512)).data == data(0, 512)


async def test_writes_past_the_end_or_too_large_are_consumed_and_refused(daemon: Daemon) -> None:
    async with await connect(daemon) as client:
        await client.open(structured=True)
        assert (await client.ask(c.CMD_WRITE, SIZE - 1, payload=b"xy")).error == c.ENOSPC
        assert (await client.ask(c.CMD_WRITE, SIZE - 1, payload=bytes(MiB))).error == c.ENOSPC
        assert (await client.ask(c.CMD_WRITE, 0, payload=bytes(c.MAX_PAYLOAD + MiB))).error == c.EOVERFLOW
        assert (await client.ask(c.CMD_READ, 0, 512)).data == data(0, 512)


async def test_a_write_of_4_gib_is_hung_up_on(daemon: Daemon) -> None:
    async with await connect(daemon) as client:
        await client.open()
        await client.send(wire.request(c.CMD_WRITE, 0, 2**32 - 1) + bytes(512))
        assert await client.read_until_closed() == b""


async def test_a_read_only_export_refuses_and_goes_on(tmp_path: Path) -> None:
    with unharmed(tmp_path, "-r") as daemon:
        async with await connect(daemon) as client:
            _, flags = await client.open()
            assert flags & c.TFLAG_READ_ONLY
            assert (await client.ask(c.CMD_WRITE, 0, payload=bytes(MiB))).error == c.EPERM
            assert (await client.ask(c.CMD_WRITE_ZEROES, 0, MiB)).error == c.EPERM
            assert (await client.ask(c.CMD_TRIM, 0, MiB)).error == c.EPERM
            assert (await client.ask(c.CMD_FLUSH)).error == 0
            assert (await client.ask(c.CMD_READ, 0, MiB)).data == data(0, MiB)


# --- vanishing, stalling, half closing -------------------------------------------------------------------------------


async def test_vanished_in_the_middle_of_a_large_write(daemon: Daemon) -> None:
    for length in (0, 1, 16 * MiB, 32 * MiB - 1):
        client = await connect(daemon)
        await client.open()
        await client.send(wire.request(c.CMD_WRITE, 4096, 32 * MiB) + bytes(length))
        client.abort()
        await client.aclose()


async def test_vanished_with_reads_in_flight(daemon: Daemon) -> None:
    for _ in range(3):
        client = await connect(daemon)
        await client.open(structured=True)
        for number in range(40):
            await client.request(c.CMD_READ, number * 4096, 2 * MiB if number % 2 else 4096)
            await client.request(c.CMD_FLUSH)
        client.abort()
        await client.aclose()


@pytest.mark.parametrize("length", [4 * KiB, MiB, 32 * MiB, 64 * MiB])
async def test_a_client_that_never_reads_holds_bounded_memory_and_nobody_up(daemon: Daemon, length: int) -> None:
    with socket.socket(socket.AF_UNIX) as stalled:
        stalled.connect(str(daemon.unix))
        stalled.sendall(wire.client_flags() + wire.go())
        stalled.settimeout(0)
        # More than is ever sent: it goes on until the server takes no more.
        requests = wire.request(c.CMD_READ, 0, length) * 100_000
        sent = 0
        async with await connect(daemon) as other:
            await other.open()
            for turn in range(50):
                with suppress(BlockingIOError):
                    sent += stalled.send(requests[sent % 28 :])
                offset = turn * 100_000
                assert (await other.ask(c.CMD_READ, offset, 100_000)).data == data(offset, 100_000)
                assert (await other.ask(c.CMD_FLUSH)).error == 0
        assert 0 < sent < len(requests)
        print(f"reads of {length} bytes that nobody reads: {daemon.memory() / MiB:.0f} MiB at most")
        assert daemon.memory() < 256 * MiB


async def test_the_worst_that_one_client_can_make_the_server_hold(tmp_path: Path) -> None:
    """A read just short of the largest, the largest, and payloads behind them: what all large requests share bounds it."""
    disk = make_disk(tmp_path / "disk", SIZE, {0: OLD})
    with serving(disk) as daemon:
        before = daemon.memory()
        async with await connect(daemon) as client, await connect(daemon) as other:
            await client.open()
            await other.open()
            writer = client._writer
            writer.write(wire.request(c.CMD_READ, 0, c.MAX_PAYLOAD - 4096) + wire.request(c.CMD_READ, 0, c.MAX_PAYLOAD))
            for _ in range(4):
                writer.write(wire.request(c.CMD_WRITE, 0, payload=OLD[: c.MAX_PAYLOAD]))
            for turn in range(100):
                assert (await other.ask(c.CMD_READ, turn * 4096, 4096)).data == data(turn * 4096, 4096)
                assert (await other.ask(c.CMD_FLUSH)).error == 0
            held = daemon.memory() - before
            print(f"held for one client: {held / MiB:.0f} MiB")
            assert 40 * MiB < held < 100 * MiB
            client.abort()


@pytest.mark.parametrize("length", [4 * KiB, 512 * KiB, 2 * MiB])
async def test_a_client_that_stalled_gets_all_when_it_reads_again(daemon: Daemon, length: int) -> None:
    # No two answers are alike, so that one buffer in the place of another shows.
    asked = {number: number * 11_003 for number in range(1, 32 * MiB // length if length > MiB else 200)}
    async with await connect(daemon) as client:
        await client.open()
        for number, offset in asked.items():
            await client.request(c.CMD_READ, offset, length, cookie=number)
        async with await connect(daemon) as other:
            await other.open()
            for _ in range(20):
                assert (await other.ask(c.CMD_READ, 0, 512)).data == data(0, 512)
        while client.core.awaited:
            reply = await client.reply()
            assert reply.data == data(asked.pop(reply.cookie), length)
        assert not asked


@pytest.mark.parametrize(
    "rest",
    [
        pytest.param(b"", id="after a request"),
        pytest.param(wire.request(c.CMD_READ, 0, 512)[:20], id="in a request"),
        pytest.param(wire.request(c.CMD_WRITE, 0, MiB) + bytes(100), id="in a payload"),
    ],
)
async def test_a_half_closed_client_gets_every_reply(daemon: Daemon, rest: bytes) -> None:
    reader, writer = await asyncio.open_unix_connection(daemon.unix)
    async with WireClient(reader, writer) as client:
        await client.open(structured=True)
        asked = {number: (number * 100_001, (4096, 3 * MiB)[number % 2]) for number in range(1, 13)}
        for number, (offset, length) in asked.items():
            await client.request(c.CMD_READ, offset, length, cookie=number)
            await client.request(c.CMD_FLUSH, cookie=number + 100)
        await client.send(rest)
        writer.write_eof()
        while client.core.awaited:
            reply = await client.reply()
            assert reply.error == 0
            assert reply.data == data(*asked.get(reply.cookie, (0, 0)))
        assert await client.read_until_closed() == b""


async def test_half_closed_while_haggling(daemon: Daemon) -> None:
    for said in (b"", wire.client_flags(), wire.client_flags() + wire.option(Option.LIST), wire.client_flags() + wire.go()):
        reader, writer = await asyncio.open_unix_connection(daemon.unix)
        async with WireClient(reader, writer) as client:
            await client.send(said)
            writer.write_eof()
            heard = await client.read_until_closed()
            assert len(heard) >= 18, "the greeting at least"
            with pytest.raises(WireError):
                await client._more()


async def test_disconnecting_properly_answers_what_is_in_flight(daemon: Daemon) -> None:
    async with await connect(daemon) as client:
        await client.open()
        for number in range(10):
            await client.request(c.CMD_READ, number * MiB, 2 * MiB)
        await client.request(c.CMD_DISC)
        for _ in range(10):
            reply = await client.reply()
            assert reply.data == data((reply.cookie - 1) * MiB, 2 * MiB)
        assert await client.read_until_closed() == b""
