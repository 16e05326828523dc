"""`server`: the same work for every server, on one file in memory and on one in the page cache of a real file system.

Rules:
1. All servers run all the time and serve the same file: those that are not asked cost nothing. Their turns are A B C, A B C.
2. Each is as its manual would have it for speed: qemu-nbd with --cache=writeback, the others' only mode, and --aio=io_uring,
   which is faster here than its threads; nbdkit's file plugin with its 16 threads a connection. Any number of clients each.
3. Ours keeps a dirty bitmap of every write, which the others can't.
4. What goes with memory and with starting takes servers of its own, without a bitmap: all are as they come.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from nbdmirror.units import GiB, KiB, MiB
from tests.benchmarks import holding, load
from tests.benchmarks.goals import Absolute, AtLeast, AtMost, Goal, Row
from tests.benchmarks.load import Load
from tests.benchmarks.machine import (
    BenchmarkError,
    Server,
    check_programs,
    cpu_seconds,
    places,
    run_measured,
    wait_until_idle,
    warm,
    write_full,
    write_half_full,
)
from tests.benchmarks.report import OURS, whole
from tests.support import peers
from tests.support.daemon import run_cli, serving

if TYPE_CHECKING:
    import re
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

    from tests.benchmarks.machine import Place

DEFAULT_SIZE: Final = GiB
COPY_SIZE: Final = 4 * GiB
_BITMAP: Final = {"node": "source", "name": "bench"}

LOADS: Final[dict[Load, float]] = {
    Load("randread", 4 * KiB, 32): 1.5,
    Load("randwrite", 4 * KiB, 32): 1.5,
    Load("randread", 4 * KiB, 1): 1.0,
    Load("randwrite", 4 * KiB, 1): 1.0,
    Load("randread", 64 * KiB, 16): 1.1,
    Load("randwrite", 64 * KiB, 16): 1.1,
    Load("read", MiB, 8): 1.0,
    Load("write", MiB, 8): 1.0,
}
MIXED: Final = Load("randrw", 4 * KiB, 16, connections=8)
# Bytes, of resident memory.
_MOST_MEMORY: Final = 150 * MiB


@dataclass(frozen=True, slots=True)
class Options:
    """How to measure: turns of each tool, seconds of each load, bytes of the disk, which rows, where the real disk is, and
    how many seconds at most to wait before each turn for a machine that has nothing else to do.
    """

    runs: int
    seconds: float
    size: int
    only: re.Pattern[str]
    directory: Path
    wait: float


def measure(options: Options) -> Iterator[Row]:
    """Every row that was asked for, as it is finished."""
    check_programs("fio", "qemu-nbd", "nbdkit", "nbdcopy")
    with places(options.size + COPY_SIZE // 2 + 256 * MiB, options.directory) as found:
        for place in found:
            yield from _loads(options, place)
        for place in found:
            yield from _copies(options, place)
        yield from _memory(options, found[0])
        yield from _starts(options, found[0])


def _wanted(options: Options, row: Row) -> bool:
    """Whether to measure a row; says so."""
    if not options.only.search(f"{row.work} on {row.place}"):
        return False
    print(f"bench: {row.work}, on {row.place}", file=sys.stderr)
    return True


# --- servers ---------------------------------------------------------------------------------------------------------


@contextmanager
def _ours(disk: Path) -> Iterator[Server]:
    with serving(disk) as daemon:
        yield Server(OURS, daemon.pid, daemon.uri, str(daemon.unix))


@contextmanager
def _ours_recording(disk: Path) -> Iterator[Server]:
    with serving(disk, qmp=True) as daemon:
        added = run_cli("qmp", "--qmp", daemon.control, "block-dirty-bitmap-add", json.dumps(_BITMAP))
        if added.returncode:
            raise BenchmarkError(f"nbdmirror would not record a bitmap: {added.stderr.strip()}")
        yield Server(OURS, daemon.pid, daemon.uri, str(daemon.unix))


@contextmanager
def _qemu_nbd(disk: Path) -> Iterator[Server]:
    with peers.qemu_nbd(disk, extra=["--cache=writeback", "--aio=io_uring"]) as peer:
        yield Server("qemu-nbd", peer.pid, peer.endpoint.uri, peer.endpoint.socket)


@contextmanager
def _nbdkit(disk: Path) -> Iterator[Server]:
    with peers.nbdkit("file", f"file={disk}") as peer:
        yield Server("nbdkit", peer.pid, peer.endpoint.uri, peer.endpoint.socket)


_AS_THEY_COME: Final[tuple[Callable[[Path], AbstractContextManager[Server]], ...]] = (_ours, _qemu_nbd, _nbdkit)
_RECORDING: Final[tuple[Callable[[Path], AbstractContextManager[Server]], ...]] = (_ours_recording, _qemu_nbd, _nbdkit)


# --- requests --------------------------------------------------------------------------------------------------------


def _loads(options: Options, place: Place) -> Iterator[Row]:
    todo = [(each, goal) for alone, goal in LOADS.items() for each in (alone, Load(alone.rw, alone.block, alone.depth, 8))]
    pairs = [(each, _load_row(each, place, AtLeast(goal))) for each, goal in [*todo, (MIXED, 1.0)]]
    beside = Row(
        "99th percentile of 4 KiB reads beside a client that writes 1 MiB blocks, which gets",
        place.name,
        AtMost(1.0),
        lambda value: f"{value * 1e6:,.0f} us",
        also_show=lambda value: f"{value / MiB:,.0f} MiB/s",
    )
    wanted = [(each, row) for each, row in pairs if options.only.search(f"{row.work} on {row.place}")]
    if not wanted and not options.only.search(f"{beside.work} on {beside.place}"):
        return
    with ExitStack() as stack:
        disk = place.directory / "disk.img"
        write_full(disk, options.size)
        stack.callback(disk.unlink)
        warm(disk)
        servers = [stack.enter_context(start(disk)) for start in _RECORDING]
        for each, row in wanted:
            _wanted(options, row)
            for _ in range(options.runs):
                for server in servers:
                    wait_until_idle(options.wait)
                    did = load.run(server, each, options.seconds, options.size)
                    value = did.requests_per_second if each.block <= load.SMALL else did.bytes_per_second
                    row.add(server.tool, value, (did.cpu_per_request, did.cpu_per_byte))
            yield row
        if _wanted(options, beside):
            for _ in range(options.runs):
                for server in servers:
                    wait_until_idle(options.wait)
                    latency, wrote = load.latency_beside_a_writer(server, 2 * options.seconds, options.size)
                    beside.add(server.tool, latency, also=wrote)
            yield beside


def _load_row(each: Load, place: Place, goal: Goal) -> Row:
    def requests(value: float) -> str:
        return f"{whole(value)} /s"

    def mebibytes(value: float) -> str:
        return f"{whole(value / MiB)} MiB/s"

    return Row(str(each), place.name, goal, requests if each.block <= load.SMALL else mebibytes)


# --- nbdcopy ---------------------------------------------------------------------------------------------------------


def _copies(options: Options, place: Place) -> Iterator[Row]:
    row = Row("nbdcopy of a sparse disk of 4 GiB to null:", place.name, AtMost(1.0), lambda value: f"{value:.2f} s")
    if not _wanted(options, row):
        return
    with ExitStack() as stack:
        disk = place.directory / "sparse.img"
        data = write_half_full(disk, COPY_SIZE)
        stack.callback(disk.unlink)
        warm(disk)
        servers = [stack.enter_context(start(disk)) for start in _AS_THEY_COME]
        for _ in range(options.runs):
            for server in servers:
                wait_until_idle(options.wait)
                before = cpu_seconds(server.pid)
                cost = run_measured(["nbdcopy", server.uri, "null:"])
                # Requests are nbdcopy's own affair: what counts are the bytes of data.
                cpu = cpu_seconds(server.pid) - before
                row.add(server.tool, cost.wall, (cpu * 256 * KiB / data, cpu / data))
    yield row


# --- memory and starting ---------------------------------------------------------------------------------------------


def _memory(options: Options, place: Place) -> Iterator[Row]:
    held = f"{holding.REQUESTS} requests of {holding.LENGTH // MiB} MiB"
    measurements: dict[str, Callable[[Server], float]] = {
        f"resident with {holding.IDLE_CLIENTS} idle connections": holding.idle,
        f"resident at most, {held} to read, one connection": lambda server: holding.reading(server, 1),
        f"resident at most, {held} to read, {holding.REQUESTS} connections": lambda server: holding.reading(server, 32),
        f"resident at most, {held} to write, one connection": lambda server: holding.writing(server, 1),
        f"resident at most, {held} to write, {holding.REQUESTS} connections": lambda server: holding.writing(server, 32),
    }
    disk = place.directory / "held.img"
    write_full(disk, holding.LENGTH)
    for work, measurement in measurements.items():
        goal = Absolute(_MOST_MEMORY / MiB, "MiB")
        row = Row(work, place.name, goal, lambda value: f"{value:,.0f} MiB")
        if _wanted(options, row):
            for start in _AS_THEY_COME:
                with start(disk) as server:
                    row.add(server.tool, measurement(server) / MiB)
            yield row
    disk.unlink()


def _starts(options: Options, place: Place) -> Iterator[Row]:
    row = Row("from start to listening", place.name, Absolute(0.5, "s"), lambda value: f"{value:.3f} s")
    if not _wanted(options, row):
        return
    disk = place.directory / "start.img"
    write_full(disk, MiB)
    for _ in range(options.runs):
        for start in _AS_THEY_COME:
            before = time.monotonic()
            with start(disk) as server:
                row.add(server.tool, time.monotonic() - before)
    disk.unlink()
    yield row


def summary(rows: list[Row]) -> str:
    """How many goals were met."""
    missed = [f"{row.work} on {row.place} ({row.goal})" for row in rows if not row.is_met]
    text = f"{len(rows) - len(missed)} of {len(rows)} goals met"
    return f"{text}; not: {'; '.join(missed)}" if missed else text
