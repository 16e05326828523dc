"""NbdDevice and NbdConnection where the server can't be reached, hangs or dies."""

from __future__ import annotations

import asyncio
import errno
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import uvloop

from nbdmirror.devices.nbd import NbdDevice
from nbdmirror.devices.nbd_connection import NbdConnection
from nbdmirror.devices.open import open_device
from nbdmirror.devices.uri import NbdEndpoint
from nbdmirror.errors import DeviceError, UsageError
from tests.support import peers
from tests.support.failing import BOUND, failed

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from pathlib import Path

pytest.importorskip("nbd", reason="libnbd's Python binding is not installed")

KIB, MIB, GIB = 1024, 1024**2, 1024**3


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Callable[[Coroutine[Any, Any, None]], None]:
    """Run a coroutine on each kind of loop; whatever the loop complains of fails the test."""

    def run(main: Coroutine[Any, Any, None]) -> None:
        complaints: list[dict[str, Any]] = []
        with asyncio.Runner(loop_factory=request.param) as runner:
            runner.get_loop().set_exception_handler(lambda _loop, context: complaints.append(context))
            runner.run(asyncio.wait_for(main, BOUND))
        assert not complaints

    return run


# --- a peer that dies or hangs ---


def test_a_server_killed_with_commands_in_flight_fails_every_one(run: Callable[[Any], None]) -> None:
    async def main() -> None:
        with peers.nbdkit("memory", "64M") as peer:
            connection = await NbdConnection.connect(peer.endpoint)
            peer.freeze()
            reads = [connection.pread(bytearray(4096), index * 4096) for index in range(50)]
            # More than the socket takes, so that most of it is still in libnbd's queue.
            writes = [connection.pwrite(bytes(MIB), index * MIB) for index in range(20)]
            status = asyncio.ensure_future(connection.block_status(0, MIB))
            await asyncio.wait([*reads, *writes], timeout=0)
            assert connection.in_flight == 71
            peer.kill()
            results = await asyncio.wait_for(asyncio.gather(*reads, *writes, status, return_exceptions=True), BOUND)
            assert all(isinstance(result, DeviceError) for result in results)
            assert "read of 4096 bytes at 4096" in str(results[1])
            assert str(peer.endpoint) in str(results[1])
            assert not connection.is_alive
            assert connection.in_flight == 0
            for later in (connection.flush, lambda: connection.pread(bytearray(1), 0)):
                with pytest.raises(DeviceError) as caught:
                    later()
                assert caught.value.errno == errno.ENOTCONN
            await connection.aclose()

    run(main())


def test_an_idle_connection_notices_its_servers_death_and_its_fd_can_be_used_again(run: Callable[[Any], None]) -> None:
    async def main() -> None:
        with peers.nbdkit("memory", "1M") as first, peers.nbdkit("memory", "2M") as second:
            for peer in (first, second):
                connection = await NbdConnection.connect(peer.endpoint)
                peer.kill()
                await asyncio.wait_for(asyncio.wait({connection._gone}), BOUND)
                assert not connection.is_alive
                # A new connection is likely to get the same number.
                with peers.nbdkit("memory", "3M") as third:
                    another = await NbdConnection.connect(third.endpoint)
                    await another.pread(bytearray(MIB), 2 * MIB)
                    await another.aclose()
                await connection.aclose()

    run(main())


def test_a_server_that_does_not_answer_the_connect_is_given_up(run: Callable[[Any], None]) -> None:
    async def main() -> None:
        for tcp in (False, True):
            with peers.nbdkit("memory", "1M", tcp=tcp) as peer:
                peer.freeze()
                error = await failed(NbdConnection.connect(peer.endpoint, timeout=0.05))
                assert error.errno == errno.ETIMEDOUT
                assert str(error) == f"cannot connect to {peer.endpoint}: Connection timed out"

    run(main())


def test_closing_a_hung_connection_is_bounded_and_fails_what_is_pending(run: Callable[[Any], None]) -> None:
    async def main() -> None:
        with peers.nbdkit("memory", "1M") as peer:
            connection = await NbdConnection.connect(peer.endpoint)
            peer.freeze()
            read = connection.pread(bytearray(4096), 0)
            await connection.aclose(timeout=0.05)
            assert (await failed(read)).errno == errno.ENOTCONN
            await connection.aclose()

    run(main())


def test_closing_waits_for_what_is_in_flight(run: Callable[[Any], None]) -> None:
    async def main() -> None:
        with peers.nbdkit("memory", "8M", "delay-write=50ms", filters=["delay"]) as peer:
            connection = await NbdConnection.connect(peer.endpoint)
            write = connection.pwrite(b"x" * MIB, 0)
            await asyncio.gather(connection.aclose(), connection.aclose())
            await write
            assert "closed" in repr(connection)

    run(main())


def test_a_cancelled_read_harms_nothing(run: Callable[[Any], None]) -> None:
    async def main() -> None:
        with peers.nbdkit("memory", "8M") as peer:
            device = await NbdDevice.open(peer.endpoint, connections=1)
            await device.pwrite(b"x" * MIB, 0)
            peer.freeze()
            buffer = bytearray(MIB)
            tasks = [asyncio.ensure_future(device.pread(buffer, 0)), asyncio.ensure_future(device.pwrite(b"y" * MIB, MIB))]
            tasks.append(asyncio.ensure_future(device.extents(0, MIB)))
            await asyncio.wait(tasks, timeout=0.01)
            for task in tasks:
                task.cancel()
            assert all(isinstance(r, asyncio.CancelledError) for r in await asyncio.gather(*tasks, return_exceptions=True))
            with pytest.raises(BufferError):  # libnbd still holds it
                buffer.clear()
            peer.thaw()
            again = bytearray(MIB)
            await device.pread(again, 0)
            await device.flush()
            assert again == b"x" * MIB
            await device.aclose()  # waits for the cancelled ones, too
            buffer.clear()

    run(main())


def test_a_cancelled_request_of_several_pieces_leaves_no_failure_behind(run: Callable[[Any], None]) -> None:
    async def main() -> None:
        with peers.nbdkit("memory", "80M") as peer:
            device = await NbdDevice.open(peer.endpoint, connections=2)
            peer.freeze()
            task = asyncio.ensure_future(device.pread(bytearray(70 * MIB), 0))
            await asyncio.wait([task], timeout=0.01)
            task.cancel()
            await asyncio.wait([task])
            peer.kill()
            await device.aclose()

    run(main())


async def test_a_cancelled_connect_leaves_nothing_behind() -> None:
    with peers.nbdkit("memory", "1M") as peer:
        peer.freeze()
        task = asyncio.ensure_future(NbdConnection.connect(peer.endpoint))
        await asyncio.wait([task], timeout=0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_opening_that_is_cancelled_between_connections_closes_them_all() -> None:
    with peers.nbdkit("memory", "1M") as peer:
        for step in range(80):  # opening takes a few milliseconds
            task = asyncio.ensure_future(NbdDevice.open(peer.endpoint, connections=4))
            await asyncio.wait([task], timeout=step / 10_000)
            task.cancel()
            await asyncio.wait([task])
            if not task.cancelled():
                await task.result().aclose()
        assert peer.terminate()  # nbdkit waits for its clients to go


async def test_a_lost_connection_leaves_the_others_working() -> None:
    with peers.nbdkit("memory", "8M") as peer:
        device = await NbdDevice.open(peer.endpoint, connections=3)
        assert device.connection_count == 3
        await device.link.connections[0].aclose()
        assert device.connection_count == 2
        await device.pwrite(b"x" * 4096, 0)
        await device.flush()
        peer.kill()
        assert (await failed(device.pread(bytearray(10), 0))).errno in {errno.ENOTCONN, errno.ESHUTDOWN}
        for work in (device.extents(0, 10), device.flush(), device.pwrite(b"x", 0), device.zero(0, 1), device.trim(0, 1)):
            assert (await failed(work)).errno == errno.ENOTCONN
        assert device.connection_count == 0
        await device.aclose()


# --- connecting ---


async def test_no_such_socket_and_nobody_listening(tmp_path: Path) -> None:
    endpoint = NbdEndpoint.unix(str(tmp_path / "none"))
    error = await failed(NbdDevice.open(endpoint))
    assert (error.errno, str(error)) == (errno.ENOENT, f"cannot connect to {endpoint}: No such file or directory")
    endpoint = NbdEndpoint.tcp("localhost", peers.free_port())
    error = await failed(NbdDevice.open(endpoint))
    assert (error.errno, str(error)) == (errno.ECONNREFUSED, f"cannot connect to {endpoint}: Connection refused")


async def test_an_unknown_export_is_named(tmp_path: Path) -> None:
    image = tmp_path / "disk"
    image.write_bytes(bytes(MIB))
    with peers.qemu_nbd(image, export="good") as peer:
        error = await failed(NbdDevice.open(NbdEndpoint.unix(peer.endpoint.socket, "bad")))
        assert error.errno == errno.ENOENT
        assert "no export named 'bad'" in str(error)
        device = await NbdDevice.open(peer.endpoint)
        assert device.size == MIB
        await device.aclose()


async def test_a_peer_that_speaks_something_else(tmp_path: Path) -> None:
    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"SSH-2.0-OpenSSH_9.2p1 Debian\r\n" * 10)
        await reader.read()
        writer.close()

    server = await asyncio.start_unix_server(greet, tmp_path / "s")
    async with server:
        error = await failed(NbdConnection.connect(NbdEndpoint.unix(str(tmp_path / "s"))))
        assert str(error).startswith("cannot connect to nbd+unix:///?socket=")


async def test_a_host_name_and_ipv4() -> None:
    with peers.nbdkit("memory", "1M", tcp=True) as peer:
        for host in ("127.0.0.1", "localhost"):
            device = await NbdDevice.open(NbdEndpoint.tcp(host, peer.endpoint.port))
            assert device.size == MIB
            await device.aclose()


async def test_as_many_connections_as_the_server_allows() -> None:
    for filters, args, count in (
        ([], [], 4),
        (["multi-conn"], ["multi-conn-mode=disable"], 1),
        (["limit"], ["limit=2"], 2),
    ):
        with peers.nbdkit("memory", "1M", *args, filters=filters) as peer:
            device = await NbdDevice.open(peer.endpoint, connections=4)
            assert device.connection_count == count
            await device.aclose()


async def test_a_captive_server_lives_and_ends_with_the_device() -> None:
    peers.require("nbdkit")
    device = await open_device(["nbdkit", "memory", "1M"])
    await device.pwrite(b"abc", 5)
    buffer = bytearray(5)
    await device.pread(buffer, 4)
    assert buffer == b"\0abc\0"
    assert device.name == "[ nbdkit memory 1M ]"
    await device.aclose()


async def test_a_captive_server_that_can_not_be_started() -> None:
    with pytest.raises(UsageError, match="no such command"):
        await open_device(["/nonexistent/server"])
    with pytest.raises(UsageError, match="no such command"):
        await open_device([])
    error = await failed(open_device(["false"]))
    assert "[ false ]" in str(error)


async def test_open_device_by_path_by_file_uri_and_by_nbd_uri(tmp_path: Path) -> None:
    image = tmp_path / "a disk"
    image.write_bytes(bytes(MIB))
    for text in (str(image), f"file://{tmp_path}/a%20disk", f"file:{tmp_path}/a%20disk"):
        device = await open_device(text, read_only=True)
        assert (device.size, device.name) == (MIB, str(image))
        await device.aclose()
    with peers.nbdkit("file", str(image)) as peer:
        device = await open_device(str(peer.endpoint), read_only=True)
        assert (device.size, device.name, device.capabilities.read_only) == (MIB, peer.endpoint.uri, True)
        await device.aclose()
    for text in ("http://host/disk", "file://host/disk", "nbd+ssh://host/", ""):
        with pytest.raises(UsageError):
            await open_device(text)


def test_without_libnbd_the_error_says_what_to_install() -> None:
    code = (
        "import sys, asyncio; sys.modules['nbd'] = None\n"
        "from nbdmirror.devices.open import open_device\n"
        "try: asyncio.run(open_device('nbd://localhost'))\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert output.startswith("UsageError")
    assert "apt install python3-libnbd" in output
    assert output.count("\n") == 1
