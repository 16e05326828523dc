"""TLS at the socket, byte by byte: the server in this process, under both event loops, with clients that misbehave."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
import struct
import warnings
from typing import TYPE_CHECKING, Any, Final

import pytest
import uvloop

from nbdmirror.devices.memory import MemoryDevice
from nbdmirror.protocol import constants as c
from nbdmirror.protocol.constants import Option, OptionReply, TlsMode
from nbdmirror.server.access import Access, parse_network
from nbdmirror.server.export import Export
from nbdmirror.server.listener import Listener
from nbdmirror.server.tls import Tls, certificate_context
from nbdmirror.sockets import listen_tcp
from nbdmirror.units import KiB, MiB
from tests.support.certificates import Authority
from tests.support.tools import pattern
from tests.support.wire_client import WireClient, client_flags, go, option

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine
    from pathlib import Path

STARTTLS: Final = option(Option.STARTTLS)
SIZE: Final = 8 * MiB
SECONDS: Final = 10.0


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directories: server, client (C=GB, O=Us, CN=me), and client of another authority."""
    path = tmp_path_factory.mktemp("pki")
    authority = Authority(path / "ca")
    authority.server(path / "server")
    authority.client(path / "client", "/C=GB/O=Us/CN=me")
    Authority(path / "other-ca", "others").client(path / "stranger", "/C=GB/O=Us/CN=me")
    return path


@pytest.fixture(params=["uvloop", "asyncio"])
def run(request: pytest.FixtureRequest) -> Callable[[Coroutine[Any, Any, None]], None]:
    """Runs a test to its end, on one loop and on the other."""
    factory = uvloop.new_event_loop if request.param == "uvloop" else asyncio.new_event_loop

    def run_on(test: Coroutine[Any, Any, None]) -> None:
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(asyncio.wait_for(test, 3 * SECONDS))

    return run_on


@contextlib.asynccontextmanager
async def listening(
    pki: Path, mode: TlsMode = TlsMode.REQUIRE, *, verify: bool = False, seconds: float = SECONDS, access: Access | None = None
) -> AsyncIterator[Listener]:
    tls = Tls(mode, certificate_context(str(pki / "server"), verify_peer=verify))
    exports = {"": Export("", MemoryDevice(SIZE))}
    listener = Listener([listen_tcp("127.0.0.1", 0)], exports, haggling=seconds, tls=tls, access=access or Access())
    await listener.start()
    try:
        yield listener
    finally:
        await listener.aclose()


def client_context(pki: Path, identity: str | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=pki / "server" / "ca-cert.pem")
    if identity is not None:
        context.load_cert_chain(pki / identity / "client-cert.pem", pki / identity / "client-key.pem")
    return context


async def connect(listener: Listener) -> WireClient:
    return await WireClient.connect_tcp("127.0.0.1", listener.address[1])  # type: ignore[arg-type]


async def encrypt(client: WireClient, context: ssl.SSLContext) -> None:
    """STARTTLS and what follows."""
    await client.greet()
    (ack,) = await client.option(Option.STARTTLS)
    assert ack.reply == OptionReply.ACK
    await client._writer.start_tls(context, server_hostname="localhost", ssl_handshake_timeout=SECONDS)


async def open_export(client: WireClient, *, structured: bool = False) -> None:
    """GO, to the transmission phase: the greeting is over already."""
    if structured:
        await client.option(Option.STRUCTURED_REPLY)
        client.core.structured = True
    await client.send(go(""))
    assert (await client.answers())[-1].reply == OptionReply.ACK


async def is_served(listener: Listener, pki: Path, identity: str | None = None) -> bool:
    """Whether a well-behaved client gets what it wants."""
    async with await connect(listener) as client:
        await encrypt(client, client_context(pki, identity))
        await open_export(client)
        written = await client.ask(c.CMD_WRITE, 4096, payload=b"hello")
        read = await client.ask(c.CMD_READ, 4096, 5)
        return not written.error and read.data == b"hello"


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Our own warnings, for stock asyncio has some of its own for sockets that are gone; there may be no errors of anyone."""
    assert not [record for record in caplog.records if record.levelno > logging.WARNING]
    ours = (record for record in caplog.records if record.name.startswith("nbdmirror"))
    return [record.getMessage() for record in ours if record.levelno == logging.WARNING]


async def until_warned(caplog: pytest.LogCaptureFixture) -> str:
    """The only warning there is, once it is there."""
    async with asyncio.timeout(SECONDS):
        while not (found := warned(caplog)):
            await asyncio.sleep(0.005)
    (line,) = found
    return line


@pytest.mark.parametrize("mode", [TlsMode.ON, TlsMode.REQUIRE])
def test_served_and_nothing_logged(run: Any, pki: Path, mode: TlsMode, caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with listening(pki, mode) as listener:
            assert await is_served(listener, pki)
            assert await is_served(listener, pki)

    run(test())
    assert warned(caplog) == []


def test_large_transfers_and_many_requests_in_flight(run: Any, pki: Path) -> None:
    async def test() -> None:
        content = pattern(SIZE)
        async with listening(pki) as listener, await connect(listener) as client:
            await encrypt(client, client_context(pki))
            await open_export(client, structured=True)
            for at in range(0, SIZE, MiB):
                await client.request(c.CMD_WRITE, at, payload=content[at : at + MiB])
            assert not any([(await client.reply()).error for _ in range(0, SIZE, MiB)])
            for length in (KiB, 64 * KiB, MiB):
                offsets = range(0, min(SIZE, 200 * length), length)
                for at in offsets:
                    await client.request(c.CMD_READ, at, length, cookie=at)
                for _ in offsets:
                    reply = await client.reply()
                    assert reply.data == content[reply.cookie : reply.cookie + length]

    run(test())


def test_client_that_goes_on_without_waiting_for_the_end_of_the_handshake(run: Any, pki: Path) -> None:
    """The client's last flight and its first options in one segment: the options are read, and answered encrypted."""

    async def test() -> None:
        async with listening(pki) as listener:
            reader, writer = await asyncio.open_connection(*listener.address)
            await reader.readexactly(18)
            writer.write(client_flags() + STARTTLS)
            await reader.readexactly(20)
            down, up = ssl.MemoryBIO(), ssl.MemoryBIO()
            tls = client_context(pki).wrap_bio(down, up, server_hostname="localhost")
            while True:
                try:
                    tls.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    writer.write(up.read())
                    down.write(await reader.read(65536))
            tls.write(option(Option.LIST) * 20 + go(""))
            writer.write(up.read())
            answered = b""
            while len(answered) < 20 * (20 + 4 + 20):
                try:
                    answered += tls.read(65536)
                except ssl.SSLWantReadError:
                    down.write(await asyncio.wait_for(reader.read(65536), SECONDS))
            assert answered.startswith(struct.pack(">QIII", c.OPTION_REPLY_MAGIC, Option.LIST, OptionReply.SERVER, 4))
            writer.close()

    run(test())


def test_goodbye_of_tls_before_the_socket_closes(run: Any, pki: Path) -> None:
    async def test() -> None:
        async with listening(pki) as listener:
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(None, _disc_over_blocking_tls, listener.address[1], client_context(pki))

    run(test())


def _disc_over_blocking_tls(port: Any, context: ssl.SSLContext) -> None:
    with socket.create_connection(("127.0.0.1", port), SECONDS) as raw:
        _read(raw, 18)
        raw.sendall(client_flags() + STARTTLS)
        _read(raw, 20)
        # suppress_ragged_eofs would take an end without close_notify for a proper one.
        with context.wrap_socket(raw, server_hostname="localhost", suppress_ragged_eofs=False) as tls:
            tls.sendall(option(Option.ABORT))
            assert len(_read(tls, 20)) == 20
            assert tls.recv(1) == b""


def _read(sock: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        piece = sock.recv(length - len(data))
        assert piece, "the server hung up"
        data += piece
    return data


# --- what must not be served -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [TlsMode.ON, TlsMode.REQUIRE])
def test_clear_text_in_the_same_segment_as_starttls(
    run: Any, pki: Path, mode: TlsMode, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        async with listening(pki, mode) as listener:
            async with await connect(listener) as client:
                await client.greet()
                await client.send(STARTTLS + go(""))
                assert await client.read_until_closed() == b""
            assert "in clear text behind STARTTLS; dropped" in await until_warned(caplog)
            assert await is_served(listener, pki)

    run(test())


@pytest.mark.parametrize(
    "garbage",
    [go(""), option(Option.ABORT), b"GET / HTTP/1.0\r\n\r\n", bytes(1000), b"\x16\x03\x01\xff\xff" + bytes(70_000), STARTTLS],
    ids=["GO", "ABORT", "HTTP", "zeroes", "a long record", "STARTTLS"],
)
def test_anything_but_tls_behind_the_answer_to_starttls(
    run: Any, pki: Path, garbage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        async with listening(pki) as listener:
            async with await connect(listener) as client:
                await client.greet()
                await client.option(Option.STARTTLS)
                with contextlib.suppress(ConnectionError):
                    await client.send(garbage)
                # An alert of TLS (21) perhaps, but nothing of NBD's.
                assert (await client.read_until_closed())[:1] in {b"", b"\x15"}
            assert "the TLS handshake failed: " in await until_warned(caplog)
            assert not listener._sessions
            assert await is_served(listener, pki)

    run(test())


def test_stalled_handshake_costs_others_nothing_and_ends(run: Any, pki: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with listening(pki, seconds=1.0) as listener:
            stalled = [await connect(listener) for _ in range(20)]
            for client in stalled:
                await client.greet()
                await client.option(Option.STARTTLS)
                await client.send(b"\x16\x03\x01")
            assert await is_served(listener, pki)
            assert warned(caplog) == []
            for client in stalled:
                await client.read_until_closed()
                await client.aclose()
            assert len(warned(caplog)) == 20
            assert not listener._sessions

    run(test())


def test_shutting_down_during_a_handshake(run: Any, pki: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with contextlib.AsyncExitStack() as stack:
            listener = await stack.enter_async_context(listening(pki))
            client = await connect(listener)
            await client.greet()
            await client.option(Option.STARTTLS)
            await client.send(b"\x16\x03\x01")
            async with asyncio.timeout(SECONDS / 2):
                await stack.aclose()
            await client.read_until_closed()
            await client.aclose()
            assert not listener._sessions

    run(test())
    assert warned(caplog) == []


def test_client_that_vanishes_during_a_handshake(run: Any, pki: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with listening(pki) as listener:
            client = await connect(listener)
            await client.greet()
            await client.option(Option.STARTTLS)
            client.abort()
            assert "the TLS handshake failed: " in await until_warned(caplog)
            assert not listener._sessions
            assert await is_served(listener, pki)

    run(test())


@pytest.mark.parametrize("command", [None, c.CMD_READ, c.CMD_WRITE])
def test_client_that_vanishes_without_goodbye(
    run: Any, pki: Path, command: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        async with listening(pki) as listener:
            client = await connect(listener)
            await encrypt(client, client_context(pki))
            await open_export(client)
            if command is not None:
                for _ in range(20):
                    await client.request(command, 0, MiB, payload=bytes(MiB) if command == c.CMD_WRITE else None)
            raw = client._writer.get_extra_info("socket")
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.abort()
            async with asyncio.timeout(SECONDS):
                while listener._sessions:
                    await asyncio.sleep(0.005)
            assert await is_served(listener, pki)

    run(test())
    assert warned(caplog) == []


def test_tls_1_1_is_refused(run: Any, pki: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        context = client_context(pki)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
        context.set_ciphers("ALL:@SECLEVEL=0")
        async with listening(pki) as listener:
            client = await connect(listener)
            with pytest.raises((ssl.SSLError, ConnectionError)):
                await encrypt(client, context)
            assert "unsupported protocol" in await until_warned(caplog)

    run(test())


def test_tls_1_2_is_served(run: Any, pki: Path) -> None:
    async def test() -> None:
        context = client_context(pki)
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        async with listening(pki) as listener, await connect(listener) as client:
            await encrypt(client, context)
            await open_export(client)
            assert not (await client.ask(c.CMD_FLUSH)).error

    run(test())


@pytest.mark.parametrize(
    ("identity", "reason"),
    [(None, "peer did not return a certificate"), ("stranger", "unable to get local issuer certificate")],
)
def test_client_certificate_that_is_missing_or_strange(
    run: Any, pki: Path, identity: str | None, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        async with listening(pki, verify=True) as listener:
            async with await connect(listener) as client:
                # With TLS 1.3 a client learns of its refusal only when it reads.
                with contextlib.suppress(ssl.SSLError, ConnectionError):
                    await encrypt(client, client_context(pki, identity))
                    await client.send(go(""))
                    assert await client.read_until_closed() == b""
            assert reason in await until_warned(caplog)
            assert await is_served(listener, pki, "client")

    run(test())


# --- lists of those allowed ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("patterns", "served"), [(("CN=me,O=Us,C=GB",), True), (("CN=you,*", "CN=me"), False)])
def test_subjects(run: Any, pki: Path, patterns: tuple[str, ...], served: bool, caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with listening(pki, verify=True, access=Access(subjects=patterns)) as listener:
            if served:
                assert await is_served(listener, pki, "client")
                return
            async with await connect(listener) as client:
                await encrypt(client, client_context(pki, "client"))
                await client.send(go(""))
                with contextlib.suppress(ssl.SSLError):
                    assert await client.read_until_closed() == b""
            assert "its certificate, for 'CN=me,O=Us,C=GB', is not among those allowed" in await until_warned(caplog)

    run(test())
    assert served == (warned(caplog) == [])


@pytest.mark.parametrize(("network", "served"), [("127.0.0.0/8", True), ("192.0.2.0/24", False)])
def test_addresses(run: Any, pki: Path, network: str, served: bool, caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with listening(pki, access=Access((parse_network("::1"), parse_network(network)))) as listener:
            if served:
                assert await is_served(listener, pki)
                return
            async with await connect(listener) as client:
                assert await client.read_until_closed() == b""
            assert "its address is not among those allowed; refused" in await until_warned(caplog)

    run(test())
    assert served == (warned(caplog) == [])
