"""Monitor on real sockets: under QEMU's own client library, under rude clients, and beside a real qemu-storage-daemon."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import shutil
import socket
import stat
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from qemu.qmp import EventListener, ExecuteError, QMPClient

from nbdmirror.errors import DeviceError, InactiveError, ListenError, NotFoundError, StateError, UsageError
from nbdmirror.qmp.messages import ErrorClass, QmpError
from nbdmirror.qmp.monitor import Monitor
from nbdmirror.qmp.registry import Registry
from nbdmirror.sockets import ServerSocket
from tests.unit.qmp.qmp_cases import ARGUMENTS, NEGOTIATED, UNNEGOTIATED, VERSION

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

NEGOTIATE = b'{"execute":"qmp_capabilities"}'
NOW = 1_700_000_000_123_456_789


class World:
    """A monitor with commands that fail, wait and tell; `gate` holds back `wait` until a test opens it."""

    def __init__(self, directory: Path, max_unread: int) -> None:
        self.path = str(directory / "qmp.sock")
        self.gate = asyncio.Event()
        self.waiting = asyncio.Event()
        self.registry = Registry(VERSION)
        self.monitor = Monitor(self.registry, clock=lambda: NOW, max_unread=max_unread)
        for handler in (self.wait, self.tell, self.fail, self.unsayable, self.big):
            self.registry.command(handler.__name__)(handler)
        self.registry.command("close")(self.monitor.aclose)

    async def wait(self) -> str:
        self.waiting.set()
        await self.gate.wait()
        return "waited"

    def tell(self, event: str, data: dict[str, Any] | None = None) -> None:
        self.monitor.emit(event, data)

    def fail(self, how: str) -> None:
        raise {
            "state": StateError("not now"),
            "missing": NotFoundError("Job not found"),
            "inactive": InactiveError("Block job 'j' not found"),
            "device": DeviceError(28, "dst"),
            "class": QmpError(ErrorClass.DEVICE_NOT_FOUND, "gone"),
            "bug": KeyError("secret"),
        }[how]

    def unsayable(self) -> object:
        return object()

    def big(self, size: int) -> str:
        return "x" * size


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    world = World(tmp_path, max_unread=1024 * 1024)
    await world.monitor.listen(world.path)
    yield world
    await world.monitor.aclose()


@contextlib.asynccontextmanager
async def client(path: str) -> AsyncIterator[QMPClient]:
    qmp = QMPClient("test")
    await qmp.connect(path)
    try:
        yield qmp
    finally:
        with contextlib.suppress(EOFError, OSError):
            await qmp.disconnect()


class Raw:
    """A client that says exactly what it is told to."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def read(self) -> Any:
        line = await self.reader.readline()
        assert line == b"" or line.endswith(b"\r\n")
        return json.loads(line) if line else None

    async def ask(self, data: bytes) -> Any:
        self.writer.write(data)
        return await self.read()


@contextlib.asynccontextmanager
async def raw_client(path: str, *, negotiate: bool = True) -> AsyncIterator[Raw]:
    reader, writer = await asyncio.open_unix_connection(path, limit=1 << 20)
    raw = Raw(reader, writer)
    try:
        assert "QMP" in await raw.read()
        if negotiate:
            assert await raw.ask(NEGOTIATE) == {"return": {}}
        yield raw
    finally:
        # Not close(): it would wait for a server that doesn't read to take the rest.
        writer.transport.abort()


async def test_under_the_reference_client(world: World) -> None:
    async with client(world.path) as qmp:
        assert qmp.greeting is not None
        assert qmp.greeting.QMP.version == VERSION.as_json()
        assert await qmp.execute("query-version") == VERSION.as_json()
        names = [command["name"] for command in await qmp.execute("query-commands")]  # type: ignore[attr-defined]
        assert {"qmp_capabilities", "query-version", "query-commands", "tell"} <= set(names)
        with pytest.raises(ExecuteError, match="The command nosuch has not been found"):
            await qmp.execute("nosuch")


CLASSES = {
    "state": ("GenericError", "not now"),
    "missing": ("GenericError", "Job not found"),
    "inactive": ("DeviceNotActive", "Block job 'j' not found"),
    "device": ("GenericError", "dst: No space left on device"),
    "class": ("DeviceNotFound", "gone"),
}


@pytest.mark.parametrize("how", CLASSES)
async def test_errors_have_their_class(world: World, how: str) -> None:
    error_class, desc = CLASSES[how]
    async with raw_client(world.path) as raw:
        request = {"execute": "fail", "arguments": {"how": how}, "id": 1}
        answer = await raw.ask(json.dumps(request).encode())
        assert answer == {"error": {"class": error_class, "desc": desc}, "id": 1}


@pytest.mark.parametrize("command", [b'"fail","arguments":{"how":"bug"}', b'"unsayable"'])
async def test_a_bug_is_logged_and_the_client_stays(world: World, command: bytes, caplog: pytest.LogCaptureFixture) -> None:
    async with raw_client(world.path) as raw:
        answer = await raw.ask(b'{"execute":' + command + b',"id":"a"}')
        assert answer == {"error": {"class": "GenericError", "desc": "internal error"}, "id": "a"}
        assert [(r.levelname, r.exc_info is not None) for r in caplog.records] == [("ERROR", True)]
        assert await raw.ask(b'{"execute":"query-version"}') == {"return": VERSION.as_json()}


async def test_commands_are_answered_in_order_and_clients_do_not_wait_for_each_other(world: World) -> None:
    async with raw_client(world.path) as slow, raw_client(world.path) as quick:
        slow.writer.write(b'{"execute":"wait","id":1}{"execute":"query-version","id":2}')
        await world.waiting.wait()
        assert await quick.ask(b'{"execute":"tell","arguments":{"event":"NOW"},"id":3}') == {
            "timestamp": {"seconds": 1_700_000_000, "microseconds": 123_456},
            "event": "NOW",
        }
        assert await quick.read() == {"return": {}, "id": 3}
        world.gate.set()
        # The event came while the first command was running: whole, and before its answer.
        assert (await slow.read())["event"] == "NOW"
        assert await slow.read() == {"return": "waited", "id": 1}
        assert (await slow.read())["id"] == 2


async def test_events_reach_negotiated_clients_in_order(world: World) -> None:
    async with client(world.path) as one, client(world.path) as two, raw_client(world.path, negotiate=False) as mute:
        with one.listener() as ones, two.listener() as twos:
            for number in range(100):
                world.monitor.emit("E", {"n": number})

            async def numbers(listener: EventListener) -> list[int]:
                return [(await listener.get())["data"]["n"] for _ in range(100)]  # type: ignore[index]

            assert await numbers(ones) == await numbers(twos) == list(range(100))
        assert await mute.ask(NEGOTIATE) == {"return": {}}


async def test_several_sockets_share_the_commands(world: World, tmp_path: Path) -> None:
    other = str(tmp_path / "other.sock")
    await world.monitor.listen(other)
    async with raw_client(world.path) as one, raw_client(other) as two:
        world.monitor.emit("E")
        assert (await one.read())["event"] == (await two.read())["event"] == "E"


async def test_a_slow_reader_is_dropped_and_the_others_are_not(world: World, caplog: pytest.LogCaptureFixture) -> None:
    async with raw_client(world.path) as slow, raw_client(world.path) as quick:
        slow.writer.transport.pause_reading()  # type: ignore[attr-defined]
        caplog.clear()
        for number in range(200):
            world.monitor.emit("E", {"n": number, "text": "x" * 16384})
            assert (await quick.read())["data"]["n"] == number
        (record,) = caplog.records
        assert record.levelname == "WARNING"
        assert f"{world.path} dropped" in record.getMessage()
        slow.writer.transport.resume_reading()  # type: ignore[attr-defined]
        with contextlib.suppress(ConnectionError):
            assert len(await slow.reader.read()) < 2 * 1024 * 1024
        assert await quick.ask(b'{"execute":"query-version"}') == {"return": VERSION.as_json()}


async def test_a_client_that_reads_no_answers_is_not_read(world: World) -> None:
    async with raw_client(world.path) as slow, raw_client(world.path) as quick:
        # Each answer is far more than its command: unlimited, these would be gigabytes.
        slow.writer.write(b'{"execute":"big","arguments":{"size":100000}}' * 20_000)
        for _ in range(50):
            assert await quick.ask(b'{"execute":"query-version"}') == {"return": VERSION.as_json()}
        assert sum(c._writer.transport.get_write_buffer_size() for c in world.monitor._clients) < 1024 * 1024
        for _ in range(100):
            assert len((await slow.read())["return"]) == 100_000


async def test_an_oversized_command_is_refused_and_the_client_stays(world: World) -> None:
    async with raw_client(world.path) as raw:
        too_long = b'{"execute":"' + b"x" * (2 * 1024 * 1024)
        answer = await raw.ask(too_long + b'"}\xff{"execute":"query-version","id":1}')
        assert answer["error"]["desc"] == "JSON token size limit exceeded"
        while "id" not in answer:
            answer = await raw.read()
        assert answer == {"return": VERSION.as_json(), "id": 1}


async def test_answers_are_sent_to_a_client_that_has_said_all(world: World) -> None:
    async with raw_client(world.path) as raw:
        raw.writer.write(b'{"execute":"query-version"}' * 2)
        raw.writer.write_eof()
        assert [await raw.read() for _ in range(3)] == [{"return": VERSION.as_json()}] * 2 + [None]


async def test_a_client_that_leaves_does_not_matter(world: World, caplog: pytest.LogCaptureFixture) -> None:
    async with raw_client(world.path) as leaving:
        leaving.writer.write(b'{"execute":"wait"}{"execute":"big","arguments":{"size":1000000}}' * 2)
        await world.waiting.wait()
        leaving.writer.transport.abort()
    world.gate.set()
    async with raw_client(world.path) as raw:
        assert await raw.ask(b'{"execute":"query-version"}') == {"return": VERSION.as_json()}
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


async def test_the_socket_is_private(world: World) -> None:
    status = Path(world.path).lstat()
    assert stat.S_ISSOCK(status.st_mode)
    assert stat.S_IMODE(status.st_mode) == 0o600


async def test_a_stale_socket_is_taken_over(tmp_path: Path) -> None:
    path = str(tmp_path / "stale.sock")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)
    monitor = Monitor(Registry(VERSION))
    await monitor.listen(path)
    async with raw_client(path):
        pass
    await monitor.aclose()
    assert not Path(path).exists()


async def test_a_socket_in_use_is_refused(world: World) -> None:
    other = Monitor(Registry(VERSION))
    with pytest.raises(ListenError, match=world.path):
        await other.listen(world.path)
    await other.aclose()
    async with raw_client(world.path):
        pass


@pytest.mark.parametrize("name", ["file", "no/such/directory", "x" * 200])
async def test_an_impossible_path_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("precious")
    with pytest.raises((ListenError, UsageError), match=name):
        await Monitor(Registry(VERSION)).listen(tmp_path / name)
    assert (tmp_path / "file").read_text() == "precious"


async def test_closing_leaves_a_successors_socket_alone(world: World) -> None:
    Path(world.path).unlink()
    successor = Monitor(Registry(VERSION))
    await successor.listen(world.path)
    await world.monitor.aclose()
    async with raw_client(world.path):
        pass
    await successor.aclose()
    assert not Path(world.path).exists()


async def test_a_socket_that_somebody_else_made(tmp_path: Path) -> None:
    path = str(tmp_path / "given.sock")
    with socket.socket(socket.AF_UNIX) as given:
        given.bind(path)
        given.listen()
        monitor = Monitor(Registry(VERSION))
        await monitor.listen_on(ServerSocket(given))
        async with raw_client(path):
            pass
        await monitor.aclose()
    assert Path(path).exists()


async def test_closing_delivers_what_is_queued_and_ends_everything(world: World, caplog: pytest.LogCaptureFixture) -> None:
    async with raw_client(world.path) as busy, raw_client(world.path) as idle:
        busy.writer.write(b'{"execute":"wait"}')
        await world.waiting.wait()
        world.monitor.emit("SHUTDOWN", {"guest": False, "reason": "host-qmp-quit"})
        await world.monitor.aclose()
        for raw in (busy, idle):
            assert (await raw.read())["event"] == "SHUTDOWN"
            assert await raw.read() is None
    assert not Path(world.path).exists()
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


async def test_a_command_may_close_its_own_monitor(world: World) -> None:
    async with raw_client(world.path) as raw, raw_client(world.path) as other:
        assert await raw.ask(b'{"execute":"close","id":1}') == {"return": {}, "id": 1}
        assert await other.read() is await raw.read() is None


class Peer:
    """A real qemu-storage-daemon's monitor."""

    def __init__(self, path: str) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(20)
        self.sock.connect(path)
        self.lines = self.sock.makefile("rb")
        self.greeting = json.loads(self.lines.readline())

    def ask(self, data: bytes) -> list[dict[str, Any]]:
        """The answers to `data`, which must leave no value unfinished that a newline does not end."""
        self.sock.sendall(data + b'\n{"execute":"query-status-of-nothing","id":"end"}')
        answers = []
        while (answer := json.loads(self.lines.readline())).get("id") != "end":
            answers.append(answer)
        return answers

    def close(self) -> None:
        self.lines.close()
        self.sock.close()


@pytest.fixture(scope="module")
def connect_peer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Peer]]:
    if shutil.which("qemu-storage-daemon") is None:
        pytest.skip("qemu-storage-daemon is not installed")
    path = str(tmp_path_factory.mktemp("qsd") / "s")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    # It inherits a socket that listens already, so that there is nothing to wait for.
    chardev = f"socket,fd={listener.fileno()},server=on,wait=off,id=c"
    command = ["qemu-storage-daemon", "--chardev", chardev, "--monitor", "chardev=c"]
    process = subprocess.Popen(command, pass_fds=[listener.fileno()])
    listener.close()
    yield lambda: Peer(path)
    process.terminate()
    process.wait(20)


@pytest.fixture
def peer(connect_peer: Callable[[], Peer]) -> Iterator[Peer]:
    with contextlib.closing(connect_peer()) as peer:
        yield peer


def errors(answers: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(answer["error"]["class"], answer["error"]["desc"]) for answer in answers]


@pytest.mark.parametrize("table", [UNNEGOTIATED, NEGOTIATED], ids=["unnegotiated", "negotiated"])
def test_qemu_refuses_in_the_same_words(peer: Peer, table: dict[bytes, tuple[tuple[str, str], ...]]) -> None:
    if table is NEGOTIATED:
        assert peer.ask(NEGOTIATE) == [{"return": {}}]
    answers = {data: errors(peer.ask(data)) for data in table}
    assert answers == {data: list(expected) for data, expected in table.items()}


def test_qemu_refuses_arguments_in_the_same_words(peer: Peer) -> None:
    peer.ask(NEGOTIATE)
    for name, arguments, desc in ARGUMENTS:
        request = json.dumps({"execute": name, "arguments": arguments}).encode()
        assert errors(peer.ask(request)) == [("GenericError", desc)]


async def test_a_whole_session_beside_qemu(peer: Peer, world: World) -> None:
    """The table once more, all of it at once and through sockets: nothing of the transport may change an answer."""
    with contextlib.closing(await asyncio.to_thread(Peer, world.path)) as ours:
        script = NEGOTIATE + b"\n".join(NEGOTIATED)
        answers = [(await asyncio.to_thread(each.ask, script))[1:] for each in (ours, peer)]
        assert errors(answers[0]) == errors(answers[1])
