"""`bitmap`: what recording costs a guest, with bitmaps in memory and on disk, and what a bitmap's own work costs.

Rules:
1. A disk has one daemon: each turn starts its own, over the same file, A B, A B. The peer is the same server without a bitmap.
2. Persistent bitmaps are on the real file system, also where the disk is in memory: that is what makes them persistent.
3. A bitmap's own work is measured in this process, on one of 16 TiB with 64 KiB chunks.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Final

from nbdmirror.bitmap.dirty import DirtyBitmap
from nbdmirror.units import GiB, KiB, MiB
from tests.benchmarks import load, mirrorers
from tests.benchmarks.goals import Absolute, AtLeast, Goal, Row
from tests.benchmarks.load import Load
from tests.benchmarks.machine import check_programs, places, warm, write_full
from tests.benchmarks.report import OURS
from tests.support.daemon import run_cli

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.benchmarks.machine import Place
    from tests.benchmarks.mirrorers import Mirrorer
    from tests.benchmarks.serving import Options

DEFAULT_SIZE: Final = GiB
_WRITES: Final = Load("randwrite", 4 * KiB, 32)
_WITHOUT: Final = "no bitmap"
_IN_MEMORY: Final = {1: 0.97, 4: 0.95}
_PERSISTENT: Final = {"lazy": 0.95, "barrier": 0.9, "intent": 0.75}
# What intent records ahead of writes is written once per chunk, so its goal is for a guest whose writes come back to chunks.
_INTENT_SET: Final = 10 * GiB
_LARGEST: Final = 16 * 1024 * GiB
_CHUNK: Final = 64 * KiB
_SETS: Final = 1_000_000
_SPARSE: Final = 1000


def measure(options: Options) -> Iterator[Row]:
    """Every row that was asked for, as it is finished."""
    check_programs("fio")
    with places(options.size + 256 * MiB, options.directory) as found:
        for place in found:
            yield from _recording(options, place, found[-1].directory)
    yield from _own_work(options)


def _asked_for(options: Options, work: str, place: str, goal: Goal, show: Callable[[float], str]) -> Row | None:
    return Row(work, place, goal, show) if options.only.search(f"{work} on {place}") else None


# --- what a guest notices --------------------------------------------------------------------------------------------


def _recording(options: Options, place: Place, durable: Path) -> Iterator[Row]:
    def row(bitmaps: str, goal: float) -> Row | None:
        return _asked_for(options, f"{_WRITES}, {bitmaps}", place.name, AtLeast(goal), lambda value: f"{value:,.0f} /s")

    memory = {count: row(f"{count} in memory", goal) for count, goal in _IN_MEMORY.items()}
    disk = {mode: row(f"one persistent, {mode}", goal) for mode, goal in _PERSISTENT.items()}
    if any(disk.values()) and "--bitmap-sync" not in run_cli("serve", "--help").stdout:
        print("bench: serve has no -B yet: no rows of persistent bitmaps", file=sys.stderr)
        disk = {}
    rows = [each for each in (*memory.values(), *disk.values()) if each is not None]
    if not rows:
        return
    with ExitStack() as stack:
        path = place.directory / "recorded.img"
        write_full(path, options.size)
        stack.callback(path.unlink)
        if disk.get("intent"):
            stack.enter_context(_grown(path, max(options.size, _INTENT_SET)))
        warm(path)
        starts = [(each, partial(_in_memory, path, count)) for count, each in memory.items() if each]
        starts += [(each, partial(_persistent, path, durable, mode)) for mode, each in disk.items() if each]
        for each, start in starts:
            print(f"bench: {each.work}, on {place.name}", file=sys.stderr)
            size = max(options.size, _INTENT_SET) if each is disk.get("intent") else options.size
            for _ in range(options.runs):
                for tool, begin in ((OURS, start), (_WITHOUT, partial(mirrorers.ours, path))):
                    with begin() as daemon:
                        each.add(tool, load.run(daemon.server, _WRITES, options.seconds, size).requests_per_second)
            yield each


@contextmanager
def _grown(path: Path, size: int) -> Iterator[None]:
    """The rest is a hole; what is written there goes with the file."""
    with path.open("rb+") as file:
        file.truncate(size)
    yield


@contextmanager
def _in_memory(path: Path, count: int) -> Iterator[Mirrorer]:
    with mirrorers.ours(path) as daemon:
        for number in range(count):
            daemon.monitor.execute("block-dirty-bitmap-add", node="source", name=f"bench{number}")
        yield daemon


@contextmanager
def _persistent(path: Path, durable: Path, mode: str) -> Iterator[Mirrorer]:
    with (
        tempfile.TemporaryDirectory(prefix=f"{mode}-", dir=durable) as state,
        mirrorers.ours(path, "-B", "bench", "--state-dir", state, "--bitmap-sync", mode) as daemon,
    ):
        yield daemon


# --- what a bitmap does by itself ------------------------------------------------------------------------------------


def _own_work(options: Options) -> Iterator[Row]:
    work: dict[str, tuple[Callable[[], float], float]] = {
        f"{_SETS:,} random sets of one chunk, 16 TiB": (_sets, 1.0),
        f"a scan of 16 TiB with {_SPARSE:,} chunks set": (lambda: _scan(_SPARSE), 0.05),
        "a scan of 16 TiB with every other chunk of 1 TiB set": (_dense, 10.0),
    }
    for name, (measurement, limit) in work.items():
        row = _asked_for(options, name, "this process", Absolute(limit, "s"), lambda value: f"{value:.4f} s")
        if row is not None:
            print(f"bench: {name}", file=sys.stderr)
            for _ in range(options.runs):
                row.add(OURS, measurement())
            yield row


def _sets() -> float:
    bitmap, chance = DirtyBitmap(_LARGEST, _CHUNK), random.Random(0)
    offsets = [chance.randrange(0, _LARGEST, 4 * KiB) for _ in range(_SETS)]
    started = time.perf_counter()
    for offset in offsets:
        bitmap.add(offset, 4 * KiB)
    return time.perf_counter() - started


def _scan(count: int) -> float:
    bitmap, chance = DirtyBitmap(_LARGEST, _CHUNK), random.Random(0)
    for _ in range(count):
        bitmap.add(chance.randrange(0, _LARGEST, _CHUNK), _CHUNK)
    return _timed_scan(bitmap)


def _dense() -> float:
    bitmap = DirtyBitmap(_LARGEST, _CHUNK)
    for offset in range(0, 1024 * GiB, 2 * _CHUNK):
        bitmap.add(offset, _CHUNK)
    return _timed_scan(bitmap)


def _timed_scan(bitmap: DirtyBitmap) -> float:
    started = time.perf_counter()
    found = sum(end - first for first, end in bitmap.runs())
    took = time.perf_counter() - started
    assert found == bitmap.count
    return took
