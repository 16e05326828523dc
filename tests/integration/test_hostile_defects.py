"""What has brought other servers down, or put them out of step. Each costs ours nothing: the others are served on."""

from __future__ import annotations

import os
import socket
import struct
from contextlib import suppress
from typing import TYPE_CHECKING, Final

import pytest

from nbdmirror.protocol import constants as c
from nbdmirror.protocol.constants import Option, OptionReply
from nbdmirror.units import MiB
from tests.support import wire_client as wire
from tests.support.block_devices import loop_device
from tests.support.daemon import Daemon, serving, until
from tests.support.peers import nbdkit
from tests.support.tools import content, make_disk, pattern
from tests.support.wire_client import WireClient

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

SIZE: Final = 16 * MiB
OLD: Final = pattern(SIZE)
STRUCTURED: Final = wire.option(Option.STRUCTURED_REPLY)


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """On TCP, where a client that goes can say so with a reset."""
    disk = make_disk(tmp_path_factory.mktemp("defects") / "disk", SIZE, {0: OLD})
    with serving(disk, "-p", "0", tcp=True) as daemon:
        yield daemon
        assert daemon.terminate() == 0
    assert disk.read_bytes() == OLD


def address(daemon: Daemon) -> tuple[str, int]:
    host, _, port = daemon.uri.removeprefix("nbd://").partition(":")
    return host, int(port)


@pytest.fixture
async def other(daemon: Daemon) -> AsyncIterator[WireClient]:
    """A client with nothing wrong: served before, and after."""
    async with await WireClient.connect_tcp(*address(daemon)) as client:
        await client.open()
        assert (await client.ask(c.CMD_READ, 0, 4096)).data == OLD[:4096]
        yield client
        assert (await client.ask(c.CMD_READ, SIZE - 4096, 4096)).data == OLD[-4096:]


@pytest.fixture
async def client(daemon: Daemon) -> AsyncIterator[WireClient]:
    async with await WireClient.connect_tcp(*address(daemon)) as client:
        yield client


def reset(sock: socket.socket) -> None:
    """From now on closing it sends RST, and what is unsent is dropped."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


# --- qemu-nbd --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("opening", [wire.option(Option.EXPORT_NAME), wire.go(), STRUCTURED + wire.go("", [1, 2, 3])])
@pytest.mark.parametrize("how", ["FIN", "RST"])
async def test_gone_before_the_reply_to_its_opening_is_written(
    daemon: Daemon, other: WireClient, opening: bytes, how: str
) -> None:
    for _ in range(50):
        with socket.create_connection(address(daemon)) as sock:
            if how == "RST":
                reset(sock)
            sock.sendall(wire.client_flags() + opening)
        assert (await other.ask(c.CMD_READ, 0, 512)).data == OLD[:512]


@pytest.mark.parametrize("number", [Option.SET_META_CONTEXT, Option.LIST_META_CONTEXT])
@pytest.mark.parametrize("queries", [[], ["base:allocation"]])
async def test_an_option_longer_than_its_content(
    client: WireClient, other: WireClient, number: Option, queries: list[str]
) -> None:
    await client.greet()
    await client.option(Option.STRUCTURED_REPLY)
    data = wire.meta_context(number, "", queries)[16:] + bytes(100)
    assert [each.reply for each in await client.option(number, data)] == [OptionReply.ERR_INVALID]
    assert [each.reply for each in await client.option(Option.STRUCTURED_REPLY)] == [OptionReply.ACK]
    assert wire.export_info(await client.option(Option.GO, wire.go_data()))[0] == SIZE


async def test_a_write_with_fua_behind_a_flush_is_on_disk(tmp_path: Path) -> None:
    """A block device's backing file has what was synced, and not yet what was only written."""
    backing = make_disk(tmp_path / "backing", SIZE)
    with loop_device(backing) as device, serving(device) as daemon:
        async with await WireClient.connect_unix(daemon.unix) as client:
            await client.open()
            for at, flags in ((0, c.FUA), (MiB, c.FUA), (2 * MiB, c.FUA)):
                assert not (await client.ask(c.CMD_FLUSH)).error
                assert not (await client.ask(c.CMD_WRITE, at, payload=OLD[at : at + 8192], flags=flags)).error
                assert content(backing, at, 8192) == OLD[at : at + 8192]
            assert not (await client.ask(c.CMD_WRITE, 3 * MiB, payload=OLD[:4096])).error
            assert content(backing, 3 * MiB, 4096) == bytes(4096), "else the above shows nothing"
            assert not (await client.ask(c.CMD_FLUSH)).error
            assert content(backing, 3 * MiB, 4096) == OLD[:4096]


async def test_errors_have_their_own_numbers(client: WireClient, other: WireClient, tmp_path: Path) -> None:
    await client.open()
    for command in (c.CMD_WRITE, c.CMD_WRITE_ZEROES):
        payload = {"payload": b"xy"} if command == c.CMD_WRITE else {"length": 2}
        assert (await client.ask(command, SIZE - 1, **payload)).error == c.ENOSPC
    assert (await client.ask(c.CMD_READ, SIZE - 1, 2)).error == c.EINVAL
    with serving(make_disk(tmp_path / "disk", SIZE), "-r") as daemon:
        async with await WireClient.connect_unix(daemon.unix) as reader:
            await reader.open()
            assert (await reader.ask(c.CMD_WRITE, SIZE - 1, payload=b"xy")).error == c.EPERM


# --- nbdkit ----------------------------------------------------------------------------------------------------------


async def test_fast_zero_where_it_is_not_offered(tmp_path: Path) -> None:
    """Refused on a read-only export; refused, and not passed on, over a server that has none and would abort."""
    disk = make_disk(tmp_path / "disk", SIZE, {0: OLD})
    with serving(disk, "-r") as daemon:
        async with await WireClient.connect_unix(daemon.unix) as client:
            assert not (await client.open())[1] & c.TFLAG_SEND_FAST_ZERO
            assert (await client.ask(c.CMD_WRITE_ZEROES, 0, 4096, flags=c.FAST_ZERO)).error == c.EPERM
            assert (await client.ask(c.CMD_READ, 0, 4096)).data == OLD[:4096]
    with nbdkit("file", str(disk), filters=["nozero"]) as peer, serving(peer.endpoint.uri) as daemon:
        async with await WireClient.connect_unix(daemon.unix) as client:
            await client.open()
            assert (await client.ask(c.CMD_WRITE_ZEROES, 0, 4096, flags=c.FAST_ZERO)).error == c.ENOTSUP
            assert (await client.ask(c.CMD_READ, 0, 4096)).data == OLD[:4096]
            assert not (await client.ask(c.CMD_WRITE_ZEROES, 0, 4096)).error
            assert (await client.ask(c.CMD_READ, 0, 8192)).data == bytes(4096) + OLD[4096:8192]
        assert not peer.wait(0)


@pytest.mark.parametrize("length", [512, 4096, MiB, 4 * MiB])
@pytest.mark.parametrize("structured", [b"", STRUCTURED], ids=["simple", "structured"])
async def test_reset_with_replies_pending(daemon: Daemon, other: WireClient, length: int, structured: bytes) -> None:
    files = daemon.open_files()
    for heard in (0, 1000, 8 * length):
        with socket.create_connection(address(daemon)) as sock:
            sock.sendall(wire.client_flags() + structured + wire.go() + wire.request(c.CMD_READ, 0, length) * 64)
            with suppress(ConnectionError):
                while heard > 0:
                    heard -= len(sock.recv(heard))
            reset(sock)
        assert (await other.ask(c.CMD_READ, 0, 4096)).data == OLD[:4096]
    until(lambda: daemon.open_files() <= files, "they have gone")


# --- nbd-server ------------------------------------------------------------------------------------------------------


async def test_info_says_what_go_will_say(client: WireClient, other: WireClient) -> None:
    await client.greet()
    told = [(each.reply, each.data) for each in await client.option(Option.INFO, wire.go_data("", [1, 2, 3]))]
    assert wire.export_info(await client.option(Option.INFO, wire.go_data()))[0] == SIZE
    assert [(each.reply, each.data) for each in await client.option(Option.GO, wire.go_data("", [1, 2, 3]))] == told
    assert (await client.ask(c.CMD_READ, 0, 512)).data == OLD[:512]


@pytest.mark.parametrize("number", [Option.LIST, Option.STARTTLS, Option.STRUCTURED_REPLY, Option.EXTENDED_HEADERS])
@pytest.mark.parametrize("data", [b"x", wire.option(Option.ABORT), bytes(100_000)], ids=["a byte", "an option", "100 kB"])
async def test_data_where_an_option_has_none(client: WireClient, other: WireClient, number: Option, data: bytes) -> None:
    await client.greet()
    (answer,) = await client.option(number, data)
    assert answer.is_error
    assert wire.export_info(await client.option(Option.GO, wire.go_data()))[0] == SIZE


@pytest.mark.parametrize("data", [b"", b"x" * 70_000])
async def test_abort_is_acknowledged(client: WireClient, other: WireClient, data: bytes) -> None:
    await client.greet()
    assert [each.reply for each in await client.option(Option.ABORT, data)] == [OptionReply.ACK]
    assert await client.read_until_closed() == b""


@pytest.mark.parametrize("number", [Option.GO, Option.INFO])
@pytest.mark.parametrize(
    "data", [b"", b"\0", bytes(4), bytes(5), b"\0\0\0\xff" + bytes(20), bytes(4) + b"\0\2\0\1", os.urandom(3)], ids=str
)
async def test_options_too_short_for_what_they_announce(
    client: WireClient, other: WireClient, number: Option, data: bytes
) -> None:
    await client.greet()
    assert [each.reply for each in await client.option(number, data)] == [OptionReply.ERR_INVALID]
    assert wire.export_info(await client.option(Option.GO, wire.go_data()))[0] == SIZE
