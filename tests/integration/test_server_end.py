"""How the server's side of a connection ends: by DISC, by the end of the stream, by the end of the server."""

from __future__ import annotations

import asyncio
import sys
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest

from nbdmirror.devices.memory import MemoryDevice
from nbdmirror.protocol import constants as c
from nbdmirror.protocol.constants import Option, OptionReply
from nbdmirror.server.export import Export
from nbdmirror.server.listener import Listener
from nbdmirror.sockets import listen_unix
from tests.support.fakes import GatedDevice, settled
from tests.support.wire_client import TIMEOUT, WireClient, go, option, request

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

SIZE = 1 << 20


@asynccontextmanager
async def listening(device: MemoryDevice, sock_dir: Path, *, farewell: float = TIMEOUT) -> AsyncIterator[Listener]:
    listener = Listener([listen_unix(str(sock_dir / "sock"))], {"": Export("", device)}, farewell=farewell)
    await listener.start()
    try:
        yield listener
    finally:
        await listener.aclose()


async def test_disc_finishes_what_is_outstanding(sock_dir: Path) -> None:
    device = GatedDevice(SIZE)
    async with listening(device, sock_dir), await WireClient.connect_unix(sock_dir / "sock") as client:
        await client.open()
        await client.request(c.CMD_WRITE, 0, payload=b"one")
        await client.request(c.CMD_WRITE, 512, payload=b"two")
        await client.send(client.core.request(c.CMD_DISC))
        held = [await device.next(), await device.next()]
        assert client.core.unread == b""
        for each in reversed(held):
            each.finish()
        assert {(await client.reply()).cookie, (await client.reply()).cookie} == {1, 2}
        assert await client.read_until_closed() == b""
    assert (device.data[:3], device.data[512:515]) == (b"one", b"two")


async def test_late_requests_are_refused_while_accepted_ones_are_finished(sock_dir: Path) -> None:
    device = GatedDevice(SIZE)
    async with listening(device, sock_dir) as listener, await WireClient.connect_unix(sock_dir / "sock") as client:
        await client.open(structured=True)
        await client.request(c.CMD_WRITE, 0, payload=b"early")
        early = await device.next()
        closing = asyncio.create_task(listener.aclose())
        await settled()
        late = [await client.ask_among(c.CMD_WRITE, 0, payload=b"late!"), await client.ask_among(c.CMD_READ, 0, 512)]
        assert [(reply.error, reply.message) for reply in late] == [(c.ESHUTDOWN, "the server is shutting down")] * 2
        assert not closing.done()
        early.finish()
        assert (await client.reply()).error == 0
        assert (await client.ask(c.CMD_FLUSH)).error == c.ESHUTDOWN
        await client.send(request(c.CMD_DISC))
        assert await client.read_until_closed() == b""
        async with asyncio.timeout(TIMEOUT / 2):  # not the whole farewell: nobody is left
            await closing
    assert device.data[:5] == b"early"
    assert [call.name for call in device.calls] == ["pwrite"]


@pytest.mark.parametrize("headers", ["compact", "extended"])
async def test_write_half_sent_when_the_server_ends_is_refused_when_it_is_whole(sock_dir: Path, headers: str) -> None:
    device = MemoryDevice(SIZE)
    async with listening(device, sock_dir) as listener, await WireClient.connect_unix(sock_dir / "sock") as client:
        await client.open(extended=headers == "extended")
        raw = client.core.request(c.CMD_WRITE, 0, payload=b"x" * 200_000)
        await client.send(raw[:100_000])
        closing = asyncio.create_task(listener.aclose())
        await settled()
        await client.send(raw[100_000:] + request(c.CMD_DISC))
        assert (await client.reply()).error == c.ESHUTDOWN
        client.abort()
        await closing
    assert not any(device.data)


async def test_haggling_clients_hear_of_the_end(sock_dir: Path) -> None:
    async with (
        listening(MemoryDevice(SIZE), sock_dir) as listener,
        await WireClient.connect_unix(sock_dir / "sock") as client,
    ):
        await client.greet()
        assert (await client.option(Option.STRUCTURED_REPLY))[0].reply == OptionReply.ACK
        closing = asyncio.create_task(listener.aclose())
        await settled()
        await client.send(go())
        assert [each.reply for each in await client.answers()] == [OptionReply.ERR_SHUTDOWN]
        await client.send(option(Option.ABORT))
        assert [each.reply for each in await client.answers()] == [OptionReply.ACK]
        assert await client.read_until_closed() == b""
        await closing


async def test_silent_clients_are_hung_up_on(sock_dir: Path) -> None:
    async with (
        listening(MemoryDevice(SIZE), sock_dir, farewell=0.01) as listener,
        await WireClient.connect_unix(sock_dir / "sock") as one,
        await WireClient.connect_unix(sock_dir / "sock") as two,
    ):
        await one.open()
        await two.greet()
        await listener.aclose()
        assert await one.read_until_closed() == b""
        await two.read_until_closed()


async def test_the_daemon_answers_what_it_accepted_and_ends_although_a_client_stays(tmp_path: Path, sock_dir: Path) -> None:
    disk, sock = tmp_path / "disk", sock_dir / "sock"
    disk.write_bytes(bytes(SIZE))
    daemon = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "nbdmirror", "serve", "-k", str(sock), str(disk), stdout=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(TIMEOUT):
            assert daemon.stdout is not None
            assert (await daemon.stdout.readline()).startswith(b"READY ")
        async with await WireClient.connect_unix(sock) as client:
            await client.open(structured=True)
            assert (await client.ask(c.CMD_WRITE, 0, payload=b"kept", flags=c.FUA)).error == 0
            daemon.terminate()
            assert await client.read_until_closed() == b""
            async with asyncio.timeout(TIMEOUT):
                assert await daemon.wait() == 0
    finally:
        if daemon.returncode is None:
            daemon.kill()
            await daemon.wait()
    assert disk.read_bytes()[:4] == b"kept"
