"""`server`: the same requests to every server, from fio's nbd engine over a Unix socket, on one file in memory.

Rules:
1. All servers run all the time and serve the same file: those that are not asked cost nothing.
2. A server's CPU time is taken over the whole of fio's run, and so are the requests that it is divided by.
"""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from nbdmirror.units import GiB, KiB, MiB
from tests.benchmarks.machine import (
    RUN_SECONDS,
    BenchmarkError,
    check_programs,
    cpu_seconds,
    memory_directory,
    write_full,
)
from tests.benchmarks.report import OURS, Table, seconds, whole
from tests.support import peers
from tests.support.daemon import serving

if TYPE_CHECKING:
    from pathlib import Path

DEFAULT_SIZE: Final = GiB
# Up to this, requests are counted; above it, bytes.
_SMALL: Final = 4 * KiB


@dataclass(frozen=True, slots=True)
class Load:
    """What fio does: `rw` is its word for it."""

    rw: str
    block: int
    depth: int

    def __str__(self) -> str:
        size = f"{self.block // MiB} MiB" if self.block >= MiB else f"{self.block // KiB} KiB"
        way = "random" if self.rw.startswith("rand") else "sequential"
        return f"{size} {way} {self.rw.removeprefix('rand')}, depth {self.depth}"


LOADS: Final = tuple(
    Load(way + what, block, depth)
    for way, block, depth in (("rand", 4 * KiB, 1), ("rand", 4 * KiB, 32), ("rand", 64 * KiB, 16), ("", MiB, 8))
    for what in ("read", "write")
)


@dataclass(frozen=True, slots=True)
class Server:
    """A running server."""

    tool: str
    pid: int
    uri: str


@dataclass(frozen=True, slots=True)
class Answered:
    """What a server did for one run of fio."""

    requests_per_second: float
    bytes_per_second: float
    cpu_per_request: float
    cpu_per_byte: float


def measure(runs: int, duration: float, size: int) -> list[Table]:
    """Every load `runs` times for `duration` seconds to each server, in turns."""
    check_programs("fio", "qemu-nbd", "nbdkit")
    tables = [
        Table("requests per second", max, whole),
        Table("server CPU seconds per million requests", min, seconds),
        Table("MiB per second", max, whole),
        Table("server CPU seconds per GiB", min, seconds),
    ]
    with ExitStack() as stack:
        disk = stack.enter_context(memory_directory(size)) / "disk.img"
        write_full(disk, size)
        servers = _start(stack, disk)
        for load in LOADS:
            print(f"bench: {load}", file=sys.stderr)
            for _ in range(runs):
                for server in servers:
                    _note(tables, load, server.tool, _run(server, load, duration, size))
    return tables


def _start(stack: ExitStack, disk: Path) -> list[Server]:
    """Ours tracks writes, as it always does; qemu-nbd with the cache mode that is the others' only one."""
    ours = stack.enter_context(serving(disk))
    qemu = stack.enter_context(peers.qemu_nbd(disk, extra=["--cache=writeback"]))
    nbdkit = stack.enter_context(peers.nbdkit("file", f"file={disk}"))
    return [
        Server(OURS, ours.pid, ours.uri),
        Server("qemu-nbd", qemu.pid, qemu.endpoint.uri),
        Server("nbdkit", nbdkit.pid, nbdkit.endpoint.uri),
    ]


def _note(tables: list[Table], load: Load, tool: str, answered: Answered) -> None:
    per_request, cpu_per_request, per_byte, cpu_per_byte = tables
    if load.block <= _SMALL:
        per_request.add(str(load), tool, answered.requests_per_second)
        cpu_per_request.add(str(load), tool, answered.cpu_per_request * 1e6)
    else:
        per_byte.add(str(load), tool, answered.bytes_per_second / MiB)
        cpu_per_byte.add(str(load), tool, answered.cpu_per_byte * GiB)


def _run(server: Server, load: Load, duration: float, size: int) -> Answered:
    options = {
        "name": "bench",
        "ioengine": "nbd",
        "uri": server.uri,
        "rw": load.rw,
        "bs": load.block,
        "iodepth": load.depth,
        "size": size,
        "runtime": f"{duration * 1000:.0f}ms",
        "output-format": "json",
    }
    argv = ["fio", *(f"--{key}={value}" for key, value in options.items()), "--time_based", "--norandommap", "--thread"]
    before = cpu_seconds(server.pid)
    result = subprocess.run(argv, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=RUN_SECONDS, check=False)
    cpu = cpu_seconds(server.pid) - before
    if result.returncode:
        raise BenchmarkError(f"fio to {server.tool} ended with status {result.returncode}: {result.stderr.strip()[-300:]}")
    job = json.loads(result.stdout[result.stdout.index("{") :])["jobs"][0]
    did = job[load.rw.removeprefix("rand")]
    if job["error"] or not did["total_ios"]:
        raise BenchmarkError(f"fio to {server.tool} failed with error {job['error']} after {did['total_ios']} requests")
    return Answered(did["iops"], did["bw_bytes"], cpu / did["total_ios"], cpu / did["io_bytes"])
