"""Thousands of sessions of real clients, each with something wrong, while a client with nothing wrong is served.

NBDMIRROR_TEST_SESSIONS says how many are played; a failing run is repeated by its --randomly-seed.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import random
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from nbdmirror.devices.file import FileDevice
from nbdmirror.devices.tracked import TrackedDevice
from nbdmirror.protocol import constants as c
from nbdmirror.protocol.constants import Option
from nbdmirror.server.export import Export
from nbdmirror.server.listener import Listener
from nbdmirror.server.session import Session
from nbdmirror.units import KiB, MiB
from tests.support import wire_client as wire
from tests.support.certificates import Authority
from tests.support.daemon import serving, until
from tests.support.mutation import PLAYED, mutated, play, record
from tests.support.peers import require
from tests.support.tools import make_disk, pattern
from tests.support.wire_client import WireClient

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.support.mutation import Session as Recorded

SIZE: Final = MiB
PIECES: Final = {0: pattern(96 * KiB), SIZE - 32 * KiB: pattern(32 * KiB, 2)}
# So many are played before the server's memory is looked at, and so many at a time.
WARM_UP: Final = 500
AT_ONCE: Final = 16

URI: Final = "nbd+unix:///?socket={socket}"
NBDSH: Final = """
h.add_meta_context("base:allocation")
h.add_meta_context("qemu:allocation-depth")
h.set_opt_mode(True)
h.set_full_info(True)
h.connect_unix("{socket}")
h.opt_list(lambda name, description: 0)
h.opt_list_meta_context(lambda name: 0)
h.opt_info()
h.opt_go()
h.pread_structured(65536, 80000, lambda *_: 0)
h.pread_structured(512, 1, lambda *_: 0, nbd.CMD_FLAG_DF)
h.pwrite(b"x" * 70000, 4096, nbd.CMD_FLAG_FUA)
h.zero(4096, 1, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FAST_ZERO)
h.trim(65536, 131072)
h.cache(4096, 0)
h.block_status(1048576, 0, lambda *_: 0, nbd.CMD_FLAG_REQ_ONE)
h.flush()
h.shutdown()
"""
# Headers that no client of Debian 12 has.
EXTENDED: Final = [
    wire.client_flags(),
    wire.option(Option.EXTENDED_HEADERS),
    wire.meta_context(Option.SET_META_CONTEXT, "", ["base:allocation", "qemu:allocation-depth"]),
    wire.go("", [0, 1, 2, 3]),
    wire.extended_request(c.CMD_READ, 512, 70_000, cookie=1) + wire.extended_request(c.CMD_BLOCK_STATUS, 0, SIZE, cookie=2),
    wire.extended_request(c.CMD_WRITE, 512, payload=b"x" * 70_000, cookie=3)
    + wire.extended_request(c.CMD_TRIM, 0, 4096, cookie=4),
    wire.extended_request(c.CMD_WRITE_ZEROES, 0, SIZE, cookie=5) + wire.extended_request(c.CMD_DISC, cookie=6),
]


def commands(directory: Path) -> list[list[str]]:
    disk, tls = make_disk(directory / "disk", SIZE, PIECES), f"nbds+unix:///?socket={{socket}}&tls-certificates={directory}/pki"
    io = [
        word
        for each in ("write -P 5 4k 64k", "write -z -u 0 128k", "read 0 1M", "discard 0 64k", "flush")
        for word in ("-c", each)
    ]
    return [
        ["nbdinfo", "--no-content", "--json", "--list", URI],
        ["nbdinfo", "--no-content", "--map", URI],
        ["nbdinfo", "--no-content", tls],
        ["nbdcopy", URI, "null:"],
        ["nbdcopy", "--flush", str(disk), URI],
        ["nbdcopy", "--connections=1", tls, "null:"],
        ["qemu-img", "map", "--output=json", "-f", "raw", URI],
        ["qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", "-W", str(disk), URI],
        ["qemu-io", "-f", "raw", *io, URI],
        [sys.executable, "-P", "-m", "nbd", "-c", NBDSH],
    ]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    require("nbdinfo", "nbdcopy", "qemu-img", "qemu-io")
    path = tmp_path_factory.mktemp("mutations")
    Authority(path / "ca").server(path / "pki")
    return path


@pytest.fixture(scope="module")
def sessions(directory: Path) -> list[Recorded]:
    """As they are said by real clients of the real server."""
    with serving(
        make_disk(directory / "recorded", SIZE, PIECES), "--tls-certificates", directory / "pki", "--tls=on"
    ) as daemon:
        recorded = asyncio.run(record(daemon.unix, daemon.unix.parent, commands(directory)))
    assert len(recorded) >= 12
    assert all(sum(map(len, session)) < 2 * MiB for session in recorded)
    return [*recorded, EXTENDED]


async def play_all(unix: Path, sessions: list[Recorded], count: int, check: Callable[[], Awaitable[None]]) -> None:
    """Play `count` of them, mutated, some at a time; `check` something again and again meanwhile."""
    rng = random.Random(random.getrandbits(64))  # which --randomly-seed repeats
    left = iter(range(count))

    async def play_some() -> None:
        for number in left:
            await play(unix, mutated(sessions, rng), rng)
            if number % 50 == 0:
                await check()

    await asyncio.gather(*(play_some() for _ in range(AT_ONCE)))


def memory(pid: int) -> int:
    return int(Path(f"/proc/{pid}/status").read_text().partition("VmRSS:")[2].split()[0]) * 1024


@pytest.mark.timeout(60 + PLAYED / 50)
async def test_the_program(tmp_path: Path, directory: Path, sessions: list[Recorded]) -> None:
    """It stays, holds no more files, threads and memory than before, and has logged no fault of its own."""
    disk = make_disk(tmp_path / "disk", SIZE, PIECES)
    with serving(disk, "--tls-certificates", directory / "pki", "--tls=on") as daemon:
        async with await WireClient.connect_unix(daemon.unix) as client:
            await client.open(structured=True)
            lock, turn = asyncio.Lock(), 0

            async def check() -> None:
                """All of its requests are answered, though what it writes others may overwrite."""
                nonlocal turn
                async with lock:
                    turn += 1
                    assert not (await client.ask(c.CMD_WRITE, SIZE - 4096, payload=bytes(4096))).error
                    assert len((await client.ask(c.CMD_READ, 0, SIZE)).data) == SIZE
                    assert not (await client.ask(c.CMD_FLUSH)).error

            await play_all(daemon.unix, sessions, WARM_UP, check)
            files = daemon.open_files()
            until(lambda: daemon.open_files() <= 32, "the first have gone")
            files, before, began = daemon.open_files(), memory(daemon.pid), time.monotonic()
            await play_all(daemon.unix, sessions, PLAYED, check)
            took = time.monotonic() - began
            until(lambda: daemon.open_files() <= files, "all have gone")
            threads = len(list(Path(f"/proc/{daemon.pid}/task").iterdir()))
            grown = memory(daemon.pid) - before
            print(f"{PLAYED} sessions, {PLAYED / took:.0f} a second; {files} files as before, {threads} threads,", end=" ")
            print(f"{before / MiB:.1f} MiB and {grown / MiB:+.1f}, {daemon.memory() / MiB:.0f} at most; {turn} checks")
            assert threads <= 1 + 16 + 8, "the loop, the disk's, and those of the loop's executor"
            assert grown < 96 * MiB, "what the allocator keeps levels off at 60 MiB"
            assert daemon.memory() < 512 * MiB
        assert "fault" not in daemon.stderr
        assert "Exception" not in daemon.stderr
        assert daemon.terminate() == 0
    assert disk.stat().st_size == SIZE


@pytest.mark.timeout(60 + PLAYED / 50)
async def test_a_listener_and_another_disk(
    tmp_path: Path, sock_dir: Path, sessions: list[Recorded], caplog: pytest.LogCaptureFixture
) -> None:
    """What is said about one export changes nothing of another; no task, session or write in flight is left over."""
    caplog.set_level(logging.ERROR)
    victim = TrackedDevice(FileDevice.open(make_disk(tmp_path / "victim", SIZE, PIECES)))
    content = pattern(SIZE, 3)
    witness = TrackedDevice(FileDevice.open(make_disk(tmp_path / "witness", SIZE, {0: content})))
    exports = {"": Export("", victim), "witness": Export("witness", witness)}
    listener = Listener.unix(str(sock_dir / "s"), exports)
    await listener.start()
    async with await WireClient.connect_unix(sock_dir / "s") as client:
        await client.open("witness")
        lock, turn = asyncio.Lock(), 0

        async def check() -> None:
            nonlocal turn
            async with lock:
                turn += 1
                offset = turn * 4099 % (SIZE - 4096)
                assert (await client.ask(c.CMD_READ, offset, 4096)).data == content[offset : offset + 4096]

        tasks = asyncio.all_tasks()
        await play_all(sock_dir / "s", sessions, PLAYED // 2, check)
        async with asyncio.timeout(20):
            while len(listener._sessions) > 1 or asyncio.all_tasks() != tasks:
                await asyncio.sleep(0.01)
        assert (victim.in_flight, len(exports[""].sessions), len(exports["witness"].sessions)) == (0, 0, 1)
        gc.collect()
        assert len([each for each in gc.get_objects() if isinstance(each, Session)]) == 1
    await listener.aclose()
    await victim.aclose()
    await witness.aclose()
    assert (tmp_path / "witness").read_bytes() == content
    assert not caplog.records
