"""Clients that take their time before they open an export, or never do: they keep nobody's place."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

import pytest

from nbdmirror.devices.memory import MemoryDevice
from nbdmirror.protocol import constants as c
from nbdmirror.protocol.constants import Option
from nbdmirror.server.export import Export
from nbdmirror.server.listener import Listener
from nbdmirror.sockets import ServerSocket, listen_tcp, listen_unix
from nbdmirror.units import MiB
from tests.support import wire_client as wire
from tests.support.fakes import settled
from tests.support.wire_client import TIMEOUT, WireClient

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

SIZE: Final = MiB
# What a client gets here instead of ten seconds.
HAGGLING: Final = 0.2


@asynccontextmanager
async def listening(
    sock: ServerSocket, *, haggling: float = HAGGLING, max_clients: int = 0, exports: int = 1
) -> AsyncIterator[Listener]:
    names = ["", *(f"{number:04}" + "x" * 4000 for number in range(1, exports))]
    listener = Listener(
        [sock],
        {name: Export(name, MemoryDevice(SIZE), description="y" * 4000) for name in names},
        haggling=haggling,
        max_clients=max_clients,
        farewell=0,
    )
    await listener.start()
    try:
        yield listener
    finally:
        await listener.aclose()


async def dribble(client: WireClient, said: bytes) -> None:
    """Say it byte by byte, and go on with zeroes until nobody listens."""
    try:
        for at in range(10 * MiB):
            await client.send(said[at : at + 1] or b"\0")
            await asyncio.sleep(0)
    except ConnectionError:
        return
    pytest.fail("10 MiB were taken, byte by byte")


SLOW: Final = [
    pytest.param(b"", id="silent"),
    pytest.param(b"\0", id="in the flags"),
    pytest.param(wire.client_flags(), id="after the flags"),
    pytest.param(wire.client_flags() + wire.go()[:-1], id="in an option"),
    pytest.param(wire.client_flags() + wire.info() + wire.option(Option.LIST), id="between options"),
]


@pytest.mark.parametrize("said", SLOW)
async def test_nobody_keeps_a_place_without_opening_an_export(
    sock_dir: Path, said: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async with (
        listening(listen_unix(str(sock_dir / "s")), max_clients=3) as listener,
        await WireClient.connect_unix(sock_dir / "s") as served,
    ):
        await served.open()
        idlers = [await WireClient.connect_unix(sock_dir / "s") for _ in range(2)]
        for client in idlers:
            await client.send(said)
        async with await WireClient.connect_unix(sock_dir / "s") as refused:
            assert await refused.read_until_closed() == b""
        for client in idlers:
            await client.read_until_closed()
            await client.aclose()
        async with await WireClient.connect_unix(sock_dir / "s") as welcome:
            await welcome.open()
            assert not (await welcome.ask(c.CMD_READ, 0, 512)).error
        assert not (await served.ask(c.CMD_READ, 0, 512)).error, "who has opened one has all the time in the world"
        assert len(listener._sessions) <= 2
    dropped = [record.getMessage() for record in caplog.records if "opened no export" in record.getMessage()]
    assert dropped == ["client on the Unix socket: opened no export within 0.2 s; dropped"] * 2


async def test_a_byte_now_and_then_does_not_keep_it_either(sock_dir: Path) -> None:
    """The slow loris, with an option whose data never ends."""
    async with listening(listen_unix(str(sock_dir / "s"))), await WireClient.connect_unix(sock_dir / "s") as client:
        async with asyncio.timeout(TIMEOUT):
            await dribble(client, wire.client_flags() + wire.option(4711, length=c.MAX_OPTION_LENGTH))


async def test_who_half_closed_keeps_no_place_either(sock_dir: Path) -> None:
    async with listening(listen_unix(str(sock_dir / "s"))) as listener:
        reader, writer = await asyncio.open_unix_connection(sock_dir / "s")
        async with WireClient(reader, writer) as client:
            writer.write_eof()
            await client.read_until_closed()
        assert not listener._sessions


async def test_more_options_than_anybody_needs(sock_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with (
        listening(listen_unix(str(sock_dir / "s")), haggling=TIMEOUT, exports=2),
        await WireClient.connect_unix(sock_dir / "s") as client,
    ):
        await client.greet()
        for _ in range(32 + 2 * 32):
            await client.option(4711)
        await client.send(wire.option(4711))
        assert await client.read_until_closed() == b""
    assert "more than 96 options; dropped" in caplog.text


async def test_lists_that_nobody_reads_are_not_made(sock_dir: Path) -> None:
    """One list is 1.6 MB here, and all that a client may ask for 10 GB: none is made while another waits to be read."""
    exports = 200
    async with (
        listening(listen_unix(str(sock_dir / "s")), haggling=TIMEOUT, exports=exports) as listener,
        await WireClient.connect_unix(sock_dir / "s") as client,
    ):
        await client.greet()
        await client.send(wire.option(Option.LIST) * 1000 + wire.option(Option.ABORT))
        await settled()
        (session,) = listener._sessions
        assert session._transport is not None
        unsent = session._transport.get_write_buffer_size() + sum(map(len, session._connection._handshake.out))
        assert 0 < unsent < 3 * exports * 8100
        for _ in range(20):
            assert len(await client.answers()) == exports + 1


# --- out of files ----------------------------------------------------------------------------------------------------


class Failing(socket.socket):
    """A listening socket whose accept fails as long as `failure` says."""

    failure: int = 0
    calls: int = 0

    def accept(self) -> tuple[socket.socket, object]:
        self.calls += 1
        if self.failure:
            raise OSError(self.failure, os.strerror(self.failure))
        return super().accept()

    @classmethod
    def over(cls, listening: ServerSocket) -> Failing:
        sock = listening.sock
        return cls(sock.family, sock.type, fileno=sock.detach())

    def as_server_socket(self) -> ServerSocket:
        return ServerSocket(self, self.getsockname() if self.family == socket.AF_UNIX else None)


@pytest.mark.parametrize("failure", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EINVAL])
@pytest.mark.parametrize("listen", [listen_unix, lambda _: listen_tcp("127.0.0.1", 0)], ids=["unix", "tcp"])
async def test_accepting_goes_on_after_what_made_it_fail(
    sock_dir: Path, failure: int, listen: Callable[[str], ServerSocket], caplog: pytest.LogCaptureFixture
) -> None:
    sock = Failing.over(listen(str(sock_dir / "s")))
    sock.failure = failure
    async with listening(sock.as_server_socket()) as listener:
        address = listener.address
        connect = WireClient.connect_unix(address) if isinstance(address, str) else WireClient.connect_tcp(*address)
        async with await connect as client:
            await settled()
            assert sock.calls == 1, "not one in each turn of the loop"
            while sock.calls < 3:
                await asyncio.sleep(0.01)
            sock.failure = 0
            await client.open()
            assert not (await client.ask(c.CMD_READ, 0, 512)).error
    (error,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    assert error.startswith(f"clients have to wait: {os.strerror(failure)}, with 0 connected")
    assert ("raise the limit on open files" in error) == (failure in {errno.EMFILE, errno.ENFILE})


async def test_what_befell_one_client_does_not_hold_up_the_next(sock_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    sock = Failing.over(listen_unix(str(sock_dir / "s")))
    sock.failure = errno.ECONNABORTED
    async with listening(sock.as_server_socket()), await WireClient.connect_unix(sock_dir / "s") as client:
        while not sock.calls:
            await asyncio.sleep(0)
        sock.failure = 0
        await client.open()
    assert not caplog.records


async def test_tcp_clients_get_small_replies_at_once_and_dead_hosts_are_noticed() -> None:
    async with listening(listen_tcp("127.0.0.1", 0)) as listener:
        host, port = listener.address
        async with await WireClient.connect_tcp(str(host), int(port)) as client:
            await client.open()
            (session,) = listener._sessions
            with socket.socket(fileno=os.dup(session._fd)) as sock:
                assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
                assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
