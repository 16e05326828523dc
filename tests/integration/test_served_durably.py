"""What FUA, FLUSH, CACHE and FAST_ZERO cost and do, seen from outside: in system calls, in the page cache, on the disk."""

from __future__ import annotations

import ctypes
import mmap
import os
import re
from typing import TYPE_CHECKING

import pytest

from nbdmirror.protocol import constants as c
from nbdmirror.units import KiB, MiB
from tests.support.daemon import serving, until
from tests.support.peers import nbdkit, require
from tests.support.tools import content, make_disk, pattern
from tests.support.wire_client import WireClient

if TYPE_CHECKING:
    from pathlib import Path

_SYNC = re.compile(r"\b(fdatasync|fsync|sync_file_range|syncfs|sync|msync)\(")


class Trace:
    """The system calls of a daemon that make something durable."""

    def __init__(self, path: Path) -> None:
        self.path = path
        calls = "trace=fdatasync,fsync,sync_file_range,syncfs,sync,msync,pwritev2"
        # -D: the daemon is our own child, as without strace.
        self.prefix = ["strace", "-D", "-f", "-q", "-o", str(path), "-e", calls]

    def counts(self) -> tuple[int, int]:
        """Writes that are durable at once, and syncs."""
        lines = [line for line in self.path.read_text().splitlines() if "resumed>" not in line]
        return sum("RWF_DSYNC" in line for line in lines), sum(bool(_SYNC.search(line)) for line in lines)


async def test_fua_costs_one_sync_and_nothing_else_costs_any(tmp_path: Path) -> None:
    require("strace")
    disk = make_disk(tmp_path / "disk", 8 * MiB, {0: pattern(8 * MiB)})
    trace = Trace(tmp_path / "trace")
    with serving(disk, prefix=trace.prefix) as daemon:
        async with await WireClient.connect_unix(daemon.unix) as client:
            await client.open(structured=True)

            async def ask(command: int, length: int, flags: int = 0) -> None:
                payload = pattern(length) if command == c.CMD_WRITE else None
                reply = await client.ask(command, 0, 0 if payload else length, payload=payload, flags=flags)
                assert reply.error == 0

            for _ in range(5):
                for length in (512, 4 * KiB, MiB, 2 * MiB):
                    await ask(c.CMD_WRITE, length)
                await ask(c.CMD_READ, 4 * KiB, c.FUA)
                await ask(c.CMD_CACHE, 64 * KiB, c.FUA)
                await ask(c.CMD_WRITE_ZEROES, 64 * KiB)
                await ask(c.CMD_TRIM, 64 * KiB)
            for length in (1, 4 * KiB, 64 * KiB, MiB, 2 * MiB):  # in the page cache at once, and in a thread
                await ask(c.CMD_WRITE, length, c.FUA)
            await ask(c.CMD_WRITE_ZEROES, 64 * KiB, c.FUA)
            await ask(c.CMD_WRITE_ZEROES, 64 * KiB, c.FUA | c.NO_HOLE)
            await ask(c.CMD_TRIM, 64 * KiB, c.FUA)
            await ask(c.CMD_FLUSH, 0)
            await ask(c.CMD_FLUSH, 0, c.FUA)
        assert daemon.terminate() == 0
    until(lambda: "+++ exited" in trace.path.read_text(), "strace has written everything")
    in_the_end = 1  # the daemon's own flush
    assert trace.counts() == (5, 2 + 1 + 2 + in_the_end)


async def test_cache_is_readahead(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk", 4 * MiB, {0: pattern(4 * MiB)})
    fd = os.open(disk, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        in_memory = is_cached(fd, MiB, MiB)  # a file system that lives there drops nothing
        with serving(disk, "-r") as daemon:
            async with await WireClient.connect_unix(daemon.unix) as client:
                await client.open()
                assert (await client.ask(c.CMD_CACHE, MiB, MiB)).error == 0
            until(lambda: is_cached(fd, MiB, MiB), "it is in the page cache")
            assert in_memory or not is_cached(fd, 3 * MiB, MiB), "and nothing else is"
    finally:
        os.close(fd)


def is_cached(fd: int, offset: int, length: int) -> bool:
    """Whether the page cache has all of it; mincore(2) looks without touching."""
    with mmap.mmap(fd, length, access=mmap.ACCESS_COPY, offset=offset) as mapped:
        pages = ctypes.create_string_buffer(length // mmap.PAGESIZE)
        start = ctypes.c_char.from_buffer(mapped)
        failed = ctypes.CDLL(None).mincore(ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(length), pages)
        del start  # which keeps the mapping from being closed
        assert not failed
    return all(page & 1 for page in pages.raw)


@pytest.mark.parametrize("flags", [c.FAST_ZERO, c.FAST_ZERO | c.NO_HOLE, c.FAST_ZERO | c.FUA])
async def test_a_fast_zero_that_would_be_slow_is_refused_at_once(tmp_path: Path, flags: int) -> None:
    disk = make_disk(tmp_path / "disk", MiB, {0: pattern(MiB)})
    # A server that can only write zeroes, and takes a minute for any write.
    with nbdkit("file", str(disk), "wdelay=60", filters=["delay", "nozero"]) as peer, serving(peer.endpoint.uri) as daemon:
        async with await WireClient.connect_unix(daemon.unix) as client:
            await client.open()
            assert (await client.ask(c.CMD_WRITE_ZEROES, 0, MiB, flags=flags)).error == c.ENOTSUP
            assert content(disk, 0, MiB) == pattern(MiB)
