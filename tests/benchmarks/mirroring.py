"""`mirror`: one-shot copies beside nbdcopy's and qemu-img's, and mirrors of a disk in use beside qemu-storage-daemon's.

Rules:
1. The source of a copy stays as it is; a mirror under load has a copy of it of its own, since its guest fills the holes.
   Targets are new, sparse files each time, and servers are new, too.
2. Copies are verified, outside of the measured time; so is the content of mirrors without a guest.
3. A guest's figures are fio's, from shortly before the job begins up to READY. A job that is not READY in time counts as if it
   had been just then.
4. Rates are those of the data, holes not counted.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from nbdmirror.units import GiB, KiB, MiB
from tests.benchmarks import copying, load, mirrorers
from tests.benchmarks.goals import Absolute, AtLeast, AtMost, Goal, Row
from tests.benchmarks.load import Load
from tests.benchmarks.machine import (
    RUN_SECONDS,
    BenchmarkError,
    check_programs,
    places,
    run_measured,
    warm,
    write_full,
    write_half_full,
)
from tests.benchmarks.mirrorers import QEMU, Mirrorer
from tests.benchmarks.report import OURS
from tests.support import peers
from tests.support.relay import GIGABIT, Relay

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.benchmarks.machine import Place
    from tests.benchmarks.serving import Options

DEFAULT_SIZE: Final = 4 * GiB
# A guest that writes as fast as it can may keep a job from READY for ever.
_READY_SECONDS: Final = 40.0
# fio starts in a third of a second; what it does before is not counted.
_RAMP_SECONDS: Final = 1.0
_WRITES: Final = Load("randwrite", 4 * KiB, 16)
_READS: Final = Load("randread", 4 * KiB, 16)
_CHUNK: Final = 64 * KiB
_HUGE: Final = 1024 * GiB
_BITMAP_DATA: Final = GiB
_LINK_DATA: Final = GiB
_LINK_DELAY: Final = 0.025
# buf-size, bitmaps (one bit per 64 KiB, and those of a job), and 80 MiB.
_BUFFER_SIZE: Final = 16 * MiB
_MEMORY: Final = 80 * MiB


def measure(options: Options) -> Iterator[Row]:
    """Every row that was asked for, as it is finished."""
    check_programs("fio", "nbdcopy", "qemu-img", "qemu-nbd", QEMU, "nbdkit", "cmp", "cp")
    with places(3 * options.size + 256 * MiB, options.directory) as found:
        for place in found:
            rows = _Rows(options, place)
            yield from _copies(rows)
            yield from _loads(rows)
            yield from _bitmaps(rows)
        yield from _links(_Rows(options, found[0]))


@dataclass(frozen=True, slots=True)
class _Rows:
    """What makes the rows of a place, and files there."""

    options: Options
    place: Place

    def row(self, work: str, goal: Goal, show: Callable[[float], str]) -> Row | None:
        """The row, if it was asked for."""
        found = self.options.only.search(f"{work} on {self.place.name}")
        return Row(work, self.place.name, goal, show) if found else None

    def path(self, name: str) -> Path:
        return self.place.directory / name

    @contextmanager
    def source(self, name: str = "source.img") -> Iterator[tuple[Path, int]]:
        """A sparse disk, and how much of it is data."""
        path = self.path(name)
        try:
            yield path, write_half_full(path, self.options.size)
        finally:
            path.unlink()

    @contextmanager
    def target(self, size: int) -> Iterator[tuple[Path, peers.Peer]]:
        """A new sparse file, and nbdkit's file plugin in front of it."""
        path = self.path("target.img")
        with path.open("xb") as file:
            file.truncate(size)
        try:
            with peers.nbdkit("file", f"file={path}") as peer:
                yield path, peer
        finally:
            path.unlink()


def _rate(value: float) -> str:
    return f"{value / MiB:,.0f} MiB/s"


def _seconds(value: float) -> str:
    return f"{value:.2f} s"


def _per_second(value: float) -> str:
    return f"{value:,.0f} /s"


def _add(row: Row | None, tool: str, value: float) -> None:
    if row is not None:
        row.add(tool, value)


def _said(*rows: Row | None) -> list[Row]:
    """Those that were asked for; says which are measured."""
    wanted = [row for row in rows if row is not None]
    for row in wanted:
        print(f"bench: {row.work}, on {row.place}", file=sys.stderr)
    return wanted


# --- all of a disk ---------------------------------------------------------------------------------------------------


def _copies(rows: _Rows) -> Iterator[Row]:
    for server, target_of in copying.SERVED.items():
        work = f"copy, half of it holes, to {server}"
        beside_nbdcopy = rows.row(f"{work}, beside nbdcopy", AtLeast(1.0), _rate)
        beside_qemu = rows.row(f"{work}, beside qemu-img", AtLeast(1.2), _rate)
        cost = rows.row(f"{work}, CPU time", AtMost(1.2), _seconds)
        ready = rows.row(f"mirror, half of it holes, to {server}, to READY", AtLeast(1.2), _rate)
        wanted = _said(beside_nbdcopy, beside_qemu, cost, ready)
        if not wanted:
            continue
        with rows.source() as (source, data):
            warm(source)
            for _ in range(rows.options.runs):
                for tool, command in copying.COPIERS.items() if wanted != [ready] else ():
                    took, _served = copying.run(source, rows.path("target.img"), target_of, command)
                    for row, peer in ((beside_nbdcopy, "nbdcopy"), (beside_qemu, "qemu-img")):
                        if tool in {OURS, peer}:
                            _add(row, tool, data / took.wall)
                    if tool in {OURS, "nbdcopy"}:
                        _add(cost, tool, took.cpu)
                for start in mirrorers.BOTH if ready else ():
                    with copying.new_file(rows.path("target.img"), source.stat().st_size) as target:
                        with target_of(target) as (_, peer), start(source) as daemon:
                            seconds = daemon.mirror(peer.endpoint.socket)
                        copying.verify_content(source, target, daemon.server.tool)
                    _add(ready, daemon.server.tool, data / seconds)
        yield from wanted


# --- beside a guest --------------------------------------------------------------------------------------------------


def _loads(rows: _Rows) -> Iterator[Row]:
    iops = rows.row("guest's 4 KiB random writes, depth 16, during a mirror", AtLeast(2.0), _per_second)
    ready = rows.row("mirror beside 4 KiB random writes, depth 16, to READY", AtMost(1.0), _seconds)
    bitmaps = 4 * (rows.options.size // _CHUNK // 8)
    limit = (_BUFFER_SIZE + bitmaps + _MEMORY) / MiB
    memory = rows.row("resident at most, in a mirror beside writes", Absolute(limit, "MiB"), lambda value: f"{value:,.0f} MiB")
    reads = rows.row("guest's 4 KiB random reads, depth 16, during a mirror", AtLeast(2.0), _per_second)
    latency = rows.row(
        "99th percentile of 4 KiB random reads, depth 16, during a mirror", AtMost(0.7), lambda value: f"{value * 1e6:,.0f} us"
    )
    blocking = rows.row("guest's 4 KiB random writes, depth 16, write-blocking, after READY", AtLeast(1.2), _per_second)
    for group in ((iops, ready, memory), (reads, latency), (blocking,)):
        if not _said(*group):
            continue
        with rows.source("origin.img") as (origin, _):
            for _ in range(rows.options.runs):
                for start in mirrorers.BOTH:
                    with (
                        _copied(origin, rows.path("source.img")) as source,
                        start(source) as daemon,
                        rows.target(rows.options.size) as (_, target),
                    ):
                        _measure_load(daemon, target, group, rows.options)
        yield from (row for row in group if row is not None)


def _measure_load(daemon: Mirrorer, target: peers.Peer, group: tuple[Row | None, ...], options: Options) -> None:
    tool = daemon.server.tool
    match group:
        case (blocking,):
            daemon.mirror(target.endpoint.socket, copy_mode="write-blocking")
            did = load.run(daemon.server, _WRITES, max(options.seconds, 2.0), options.size)
            _add(blocking, tool, did.requests_per_second)
        case (reads, latency):
            guest, _ = _beside(daemon, target, _READS, options.size)
            _add(reads, tool, guest["read"]["iops"])
            _add(latency, tool, guest["read"]["clat_ns"]["percentile"]["99.000000"] / 1e9)
        case (iops, ready, memory):
            guest, seconds = _beside(daemon, target, _WRITES, options.size)
            _add(iops, tool, guest["write"]["iops"])
            _add(ready, tool, seconds)
            _add(memory, tool, daemon.most_memory() / MiB)


def _beside(daemon: Mirrorer, target: peers.Peer, work: Load, size: int) -> tuple[dict[str, Any], float]:
    """What fio says of a guest during a mirror, and how long that took to be READY."""
    options = [
        f"--uri={daemon.server.uri}",
        f"--rw={work.rw}",
        f"--bs={work.block}",
        f"--iodepth={work.depth}",
        f"--size={size}",
    ]
    options += [f"--ramp_time={_RAMP_SECONDS * 1000 - 300:.0f}ms", f"--runtime={RUN_SECONDS:.0f}", "--time_based"]
    argv = ["fio", "--name=guest", "--ioengine=nbd", "--norandommap", "--thread", "--output-format=json", *options]
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as fio:
        try:
            time.sleep(_RAMP_SECONDS)
            seconds = daemon.mirror(target.endpoint.socket, _READY_SECONDS)
            fio.send_signal(signal.SIGINT)
            output, _ = fio.communicate(timeout=RUN_SECONDS)
        finally:
            fio.kill()
    try:
        guest: dict[str, Any] = json.loads(output[output.index("{") :])["jobs"][0]
    except (ValueError, IndexError):
        raise BenchmarkError(f"fio to {daemon.server.tool} said nothing of use: {output[-300:]}") from None
    return guest, seconds


@contextmanager
def _copied(origin: Path, path: Path) -> Iterator[Path]:
    try:
        subprocess.run(["cp", "--sparse=auto", "--reflink=never", origin, path], check=True, timeout=RUN_SECONDS)
        warm(path)
        yield path
    finally:
        path.unlink(missing_ok=True)


# --- by a bitmap -----------------------------------------------------------------------------------------------------


def _bitmaps(rows: _Rows) -> Iterator[Row]:
    huge, small = "1 TiB", "2 GiB"
    work = f"mirror of {_BITMAP_DATA // GiB} GiB by bitmap, random 64 KiB chunks of {huge}, beside the same of {small}"
    dirty = rows.row(work, AtMost(1.2), _seconds)
    clean = rows.row(f"mirror of nothing by bitmap, {huge}, to READY", Absolute(0.5, "s"), lambda value: f"{value:.3f} s")
    wanted = _said(dirty, clean)
    if not wanted:
        return
    for _ in range(rows.options.runs):
        if clean:
            clean.add(OURS, _by_bitmap(rows, _HUGE, 0))
        if dirty:
            dirty.add(OURS, _by_bitmap(rows, _HUGE, _BITMAP_DATA))
            dirty.add(small, _by_bitmap(rows, 2 * _BITMAP_DATA, _BITMAP_DATA))
    yield from wanted


def _by_bitmap(rows: _Rows, size: int, dirty: int) -> float:
    """Seconds to READY of a mirror by a bitmap, in which `dirty` bytes of random chunks are set."""
    path = rows.path("recorded.img")
    with path.open("xb") as file:
        file.truncate(size)
    try:
        with mirrorers.ours(path) as daemon:
            daemon.monitor.execute("block-dirty-bitmap-add", node="source", name="bench")
            if dirty:
                argv = [
                    "fio",
                    "--name=guest",
                    "--ioengine=nbd",
                    f"--uri={daemon.server.uri}",
                    "--rw=randwrite",
                    f"--bs={_CHUNK}",
                ]
                # Each chunk once: without its map, which is as large as the disk, only where they are few.
                argv += [
                    "--iodepth=16",
                    f"--size={size}",
                    f"--number_ios={dirty // _CHUNK}",
                    "--random_generator=lfsr",
                    "--thread",
                ]
                run_measured(argv)
            with rows.target(size) as (_, target):
                return daemon.mirror(target.endpoint.socket, sync="incremental", bitmap="bench")
    finally:
        path.unlink()


# --- far away --------------------------------------------------------------------------------------------------------


def _links(rows: _Rows) -> Iterator[Row]:
    work = "copy over 1 Gbit/s, 50 ms there and back"
    beside_link = rows.row(f"{work}, beside the link", AtLeast(0.9), _rate)
    beside_nbdcopy = rows.row(f"{work}, beside nbdcopy", AtLeast(1.0), _rate)
    wanted = _said(beside_link, beside_nbdcopy)
    if not wanted:
        return
    source = rows.path("link.img")
    write_full(source, _LINK_DATA)
    try:
        for _ in range(rows.options.runs):
            _add(beside_link, "the link", GIGABIT)
            for tool in (OURS, "nbdcopy"):
                with rows.target(_LINK_DATA) as (_, peer), Relay(peer.endpoint) as relay:
                    relay.set_link(delay=_LINK_DELAY, rate=GIGABIT)
                    took = run_measured(copying.COPIERS[tool](str(source), relay.endpoint.uri))
                _add(beside_nbdcopy, tool, _LINK_DATA / took.wall)
                if tool == OURS:
                    _add(beside_link, tool, _LINK_DATA / took.wall)
    finally:
        source.unlink()
    yield from wanted
