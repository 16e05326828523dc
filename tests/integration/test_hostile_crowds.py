"""Many clients at once, and one after the other: figures are printed, leaks are found."""

from __future__ import annotations

import asyncio
import gc
import resource
import socket
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from nbdmirror.devices.file import FileDevice
from nbdmirror.protocol import constants as c
from nbdmirror.server.export import Export
from nbdmirror.server.listener import Listener
from nbdmirror.server.session import Session
from nbdmirror.units import KiB, MiB
from tests.support import wire_client as wire
from tests.support.daemon import Daemon, serving, until
from tests.support.tools import content, make_disk, pattern
from tests.support.wire_client import WireClient

if TYPE_CHECKING:
    from collections.abc import Iterator

SIZE: Final = 16 * MiB
CROWD: Final = 1000
VISITS: Final = 10_000


@contextmanager
def files(soft: int) -> Iterator[None]:
    """As many files as that, for this process and those that it starts."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def threads(daemon: Daemon) -> int:
    return len(list(Path(f"/proc/{daemon.pid}/task").iterdir()))


def resident(daemon: Daemon) -> int:
    """Its memory in use, in bytes."""
    status = Path(f"/proc/{daemon.pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) * 1024


async def test_a_thousand_clients_at_once_each_read_and_write(tmp_path: Path) -> None:
    old = pattern(SIZE)
    disk = make_disk(tmp_path / "disk", SIZE, {0: old})
    piece = SIZE // CROWD // 2 // 512 * 512  # each has a place of its own to write to, in the second half
    with files(512), serving(disk) as daemon, files(4 * CROWD):
        before = resident(daemon)
        began = time.monotonic()
        clients = [await WireClient.connect_unix(daemon.unix) for _ in range(CROWD)]

        async def work(number: int, client: WireClient) -> None:
            await client.open(structured=True)
            at = SIZE // 2 + number * piece
            for turn in range(3):
                data = bytes([turn + 1]) * piece
                assert not (await client.ask(c.CMD_WRITE, at, payload=data)).error
                assert (await client.ask(c.CMD_READ, at, piece)).data == data
                offset = number * 7001 % (SIZE // 2 - 64 * KiB)
                assert (await client.ask(c.CMD_READ, offset, 64 * KiB)).data == old[offset : offset + 64 * KiB]

        await asyncio.gather(*(work(number, client) for number, client in enumerate(clients)))
        grown = daemon.memory() - before
        print(f"{CROWD} clients: {time.monotonic() - began:.1f} s, {grown / MiB:.0f} MiB more")
        assert daemon.open_files() >= CROWD
        assert grown < CROWD * 256 * KiB
        for client in clients:
            client.abort()
            await client.aclose()
        until(lambda: daemon.open_files() < 64, "they have gone")
    assert content(disk, SIZE // 2, CROWD * piece) == b"\3" * (CROWD * piece)


def visit(path: Path, number: int) -> None:
    """Come, stay for one of five lengths of time, and go, politely or not."""
    with socket.socket(socket.AF_UNIX) as sock, suppress(ConnectionError):
        sock.connect(str(path))
        match number % 5:
            case 0:
                return
            case 1:
                sock.sendall(wire.client_flags() + wire.option(3))
            case 2:
                sock.sendall(wire.client_flags() + wire.go())
            case 3:
                sock.sendall(wire.client_flags() + wire.go() + wire.request(c.CMD_READ, 0, 4096) * 3)
            case _:
                sock.sendall(wire.client_flags() + wire.go() + wire.request(c.CMD_FLUSH) + wire.request(c.CMD_DISC))
                while sock.recv(4096):
                    pass


def test_ten_thousand_who_come_and_go_leave_nothing_behind(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk", SIZE, {0: pattern(SIZE)})
    with serving(disk) as daemon:
        for number in range(VISITS // 10):
            visit(daemon.unix, number)
        until(lambda: daemon.open_files() < 32, "the first have gone")
        before = daemon.open_files(), threads(daemon), resident(daemon)
        began = time.monotonic()
        for number in range(VISITS):
            visit(daemon.unix, number)
        took = time.monotonic() - began
        until(lambda: daemon.open_files() <= before[0], "all have gone")
        after = daemon.open_files(), threads(daemon), resident(daemon)
        print(f"{VISITS} visits: {took:.1f} s; files, threads, bytes: {before} before, {after} after")
        assert after[1] <= before[1] + 16, "the disk's threads, which stay"
        assert after[2] < before[2] + 4 * MiB
        assert "WARNING" not in daemon.stderr


async def test_who_has_gone_leaves_no_task_session_or_buffer(tmp_path: Path, sock_dir: Path) -> None:
    device = FileDevice.open(make_disk(tmp_path / "disk", SIZE))
    export = Export("", device)
    listener = Listener.unix(str(sock_dir / "s"), {"": export})
    await listener.start()
    tasks = asyncio.all_tasks()
    for number in range(100):
        await asyncio.to_thread(visit, sock_dir / "s", number)
    while listener._sessions or listener._joining or asyncio.all_tasks() != tasks:
        await asyncio.sleep(0.01)
    gc.collect()
    assert [each for each in gc.get_objects() if isinstance(each, Session)] == []
    assert not export.sessions
    await listener.aclose()
    await device.aclose()


async def test_clients_wait_while_the_server_is_out_of_files(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk", SIZE, {0: pattern(SIZE)})
    with serving(disk) as daemon:
        visit(daemon.unix, 4)
        hard = resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE)[1]
        resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (daemon.open_files() + 10, hard))
        clients = [await WireClient.connect_unix(daemon.unix) for _ in range(25)]
        daemon.wait_for_log("clients have to wait: Too many open files")
        for client in clients:
            await client.open()
            assert (await client.ask(c.CMD_READ, 0, 512)).data == pattern(SIZE)[:512]
            await client.aclose()
        assert daemon.stderr.count("clients have to wait") == 1


async def test_one_client_per_place(tmp_path: Path) -> None:
    """`-e N` counts those that are there, however fast they change."""
    disk, count = make_disk(tmp_path / "disk", SIZE), 64
    with serving(disk, "-e", str(count)) as daemon:
        for _ in range(5):
            clients = [await WireClient.connect_unix(daemon.unix) for _ in range(count)]
            await asyncio.gather(*(client.open() for client in clients))
            async with await WireClient.connect_unix(daemon.unix) as refused:
                assert await refused.read_until_closed() == b""
            for client in clients:
                await client.send(wire.request(c.CMD_DISC))
                assert await client.read_until_closed() == b""
                await client.aclose()
