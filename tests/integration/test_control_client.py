"""ControlClient against a live Monitor, and against everything that is not one."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from typing import TYPE_CHECKING, Any

import pytest

from nbdmirror.cli.client import ControlClient, DaemonError, run_client
from nbdmirror.cli.main import run
from nbdmirror.errors import InactiveError, NbdMirrorError, UsageError
from nbdmirror.qmp.messages import ErrorClass, QmpError, Version
from nbdmirror.qmp.monitor import Monitor
from nbdmirror.qmp.registry import Registry

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

VERSION = Version(10, 1, 0, "nbdmirror 0.1.0")


@pytest.fixture
async def daemon(tmp_path: Path) -> AsyncIterator[tuple[str, Monitor]]:
    registry = Registry(VERSION)
    monitor = Monitor(registry)

    @registry.command("echo")
    def echo(value: Any) -> Any:
        return value

    @registry.command("block-job-pause")
    def pause(device: str) -> None:
        raise InactiveError(f"Block job '{device}' not found")

    @registry.command("hang")
    async def hang() -> None:
        monitor.emit("HANGING")
        await asyncio.Event().wait()

    path = str(tmp_path / "s")
    await monitor.listen(path)
    yield path, monitor
    await monitor.aclose()


@pytest.fixture(autouse=True)
def silent(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """Whatever happens, users see the error alone."""
    yield
    assert [record for record in caplog.get_records("call") if record.levelno >= logging.WARNING] == []
    assert capfd.readouterr() == ("", "")


async def refusal(path: str, timeout: float = 10) -> NbdMirrorError:
    with pytest.raises(NbdMirrorError) as caught:
        async with ControlClient(path, timeout=timeout):
            pytest.fail("connected")
    message = str(caught.value)
    assert path in message
    assert "\n" not in message
    return caught.value


async def test_execute(daemon: tuple[str, Monitor]) -> None:
    path, _ = daemon
    async with ControlClient(path) as client:
        assert await client.execute("query-version") == VERSION.as_json()
        assert await client.execute("echo", {"value": [1, None, "é"]}) == [1, None, "é"]


async def test_refused_commands(daemon: tuple[str, Monitor]) -> None:
    path, _ = daemon
    async with ControlClient(path) as client:
        with pytest.raises(InactiveError, match=r"^Block job 'j' not found$"):
            await client.execute("block-job-pause", {"device": "j"})
        with pytest.raises(QmpError, match=r"^The command nosuch has not been found$") as caught:
            await client.execute("nosuch")
        assert caught.value.error_class is ErrorClass.COMMAND_NOT_FOUND
        with pytest.raises(UsageError, match="'echo' can't be sent"):
            await client.execute("echo", {"value": object()})
        assert await client.execute("echo", {"value": 1}) == 1


async def test_events_from_the_moment_of_connecting(daemon: tuple[str, Monitor]) -> None:
    path, monitor = daemon
    async with ControlClient(path) as client:
        for number in range(3):
            monitor.emit("E", {"n": number})
        seen = []
        async with contextlib.aclosing(client.events()) as events:
            async for event in events:
                seen.append((event["event"], event["data"]["n"]))
                if len(seen) == 3:
                    break
        assert seen == [("E", 0), ("E", 1), ("E", 2)]


async def test_events_end_with_the_daemon(daemon: tuple[str, Monitor]) -> None:
    path, monitor = daemon
    async with ControlClient(path) as client:
        monitor.emit("SHUTDOWN")
        await monitor.aclose()
        events = client.events()
        assert (await anext(events))["event"] == "SHUTDOWN"
        with pytest.raises(DaemonError, match=f"'{path}' went away"):
            await anext(events)
        with pytest.raises(DaemonError, match=path):
            await client.execute("query-version")


async def test_the_daemon_goes_during_a_command(daemon: tuple[str, Monitor]) -> None:
    path, monitor = daemon
    async with ControlClient(path) as client:
        command = asyncio.create_task(client.execute("hang"))
        assert (await anext(client.events()))["event"] == "HANGING"
        await monitor.aclose()
        with pytest.raises(DaemonError, match="went away before it answered 'hang'"):
            await command


async def test_no_socket(tmp_path: Path) -> None:
    error = await refusal(str(tmp_path / "missing"))
    assert isinstance(error, DaemonError)
    assert "no such socket" in str(error)


async def test_nobody_listens(tmp_path: Path) -> None:
    path = str(tmp_path / "stale")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)
    assert "nobody listens" in str(await refusal(path))


@contextlib.contextmanager
def somebody_else() -> Iterator[None]:
    """Root, who is permitted everything, becomes nobody; others are kept out by the mode alone."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


async def test_not_permitted(tmp_path: Path) -> None:
    path = tmp_path / "locked"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        path.chmod(0)
        with somebody_else():
            assert "not permitted" in str(await refusal(str(path)))


async def test_a_path_that_is_too_long(tmp_path: Path) -> None:
    assert isinstance(await refusal(str(tmp_path / ("x" * 200))), UsageError)


@contextlib.asynccontextmanager
async def stranger(path: str, says: bytes, *, hangs_up: bool) -> AsyncIterator[None]:
    async def serve(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(says)
        if hangs_up:
            writer.close()
        else:
            await _reader.read()
            writer.close()

    server = await asyncio.start_unix_server(serve, path)
    yield
    server.close()
    await server.wait_closed()


@pytest.mark.parametrize(
    ("says", "text"),
    [(b"", "hung up"), (b"NBDMAGIC\r\n", "does not speak QMP"), (b'{"hello": 1}\r\n', "does not speak QMP")],
)
async def test_a_stranger(tmp_path: Path, says: bytes, text: str) -> None:
    path = str(tmp_path / "stranger")
    async with stranger(path, says, hangs_up=True):
        assert text in str(await refusal(path))


async def test_a_daemon_that_does_not_answer(tmp_path: Path) -> None:
    path = str(tmp_path / "mute")
    async with stranger(path, b"", hangs_up=False):
        assert "does not answer" in str(await refusal(path, timeout=0.05))


async def test_the_librarys_own_words_are_for_debugging(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    await refusal(str(tmp_path / "missing"))
    assert caplog.records == []
    with caplog.at_level(logging.DEBUG, "nbdmirror.cli"):
        await refusal(str(tmp_path / "missing"))
    assert {record.levelno for record in caplog.records} == {logging.DEBUG}


def test_run_client(tmp_path: Path) -> None:
    with pytest.raises(DaemonError, match="no such socket"):
        run_client(str(tmp_path / "missing"), lambda client: client.execute("query-version"))


async def test_copy_mode_is_asked_for_as_qemu_names_it(tmp_path: Path) -> None:
    asked: list[tuple[str, str, str]] = []
    registry = Registry(VERSION)

    @registry.command("block-job-change")
    def change(id_: str, type_: str, copy_mode: str) -> None:
        asked.append((id_, type_, copy_mode))

    monitor = Monitor(registry)
    path = str(tmp_path / "s")
    await monitor.listen(path)
    assert await asyncio.to_thread(run, ["set-copy-mode", "j", "write-blocking", "--qmp", path]) == 0
    await monitor.aclose()
    assert asked == [("j", "mirror", "write-blocking")]
