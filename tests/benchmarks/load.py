"""What fio asks of a server: one kind of request at one depth, over one connection or several.

Rule: a server's CPU time is taken over the whole of fio's run, and so are the requests and bytes that it is divided by.
"""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from nbdmirror.units import KiB, MiB
from tests.benchmarks.machine import RUN_SECONDS, BenchmarkError, cpu_seconds

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.benchmarks.machine import Server

# Up to this, requests are counted; above it, bytes.
SMALL: Final = 4 * KiB
_READS_OF_100: Final = 70
_WAYS: Final = {
    "randread": "random read",
    "randwrite": "random write",
    "randrw": f"random {_READS_OF_100}/{100 - _READS_OF_100}",
    "read": "sequential read",
    "write": "sequential write",
}


@dataclass(frozen=True, slots=True)
class Load:
    """`rw` is fio's word for it; `depth` is that of each connection."""

    rw: str
    block: int
    depth: int
    connections: int = 1

    def __str__(self) -> str:
        size = f"{self.block // MiB} MiB" if self.block >= MiB else f"{self.block // KiB} KiB"
        text = f"{size} {_WAYS[self.rw]}, depth {self.depth}"
        return text if self.connections == 1 else f"{text} each, {self.connections} connections"


@dataclass(frozen=True, slots=True)
class Answered:
    """What a server did for one run of fio; CPU time in seconds."""

    requests_per_second: float
    bytes_per_second: float
    cpu_per_request: float
    cpu_per_byte: float


def run(server: Server, load: Load, duration: float, size: int) -> Answered:
    """One run of fio."""
    before = cpu_seconds(server.pid)
    (job,) = _fio(server, duration, size, _job("bench", load, group=True))
    cpu = cpu_seconds(server.pid) - before
    did = [job["read"], job["write"]]
    requests, count = sum(each["total_ios"] for each in did), sum(each["io_bytes"] for each in did)
    if not requests:
        raise BenchmarkError(f"fio to {server.tool} was answered nothing in {duration:g} s")
    return Answered(sum(each["iops"] for each in did), sum(each["bw_bytes"] for each in did), cpu / requests, cpu / count)


def latency_beside_a_writer(server: Server, duration: float, size: int) -> tuple[float, float]:
    """The 99th percentile, in seconds, of 4 KiB reads at depth 1 beside a client that writes 1 MiB blocks; its bytes/s."""
    writer = _job("writer", Load("write", MiB, 8))
    reader = _job("reader", Load("randread", 4 * KiB, 1))
    wrote, read = _fio(server, duration, size, [*writer, *reader])
    return read["read"]["clat_ns"]["percentile"]["99.000000"] / 1e9, wrote["write"]["bw_bytes"]


def _job(name: str, load: Load, *, group: bool = False) -> list[str]:
    options = [f"--name={name}", f"--rw={load.rw}", f"--bs={load.block}", f"--iodepth={load.depth}"]
    options += [f"--rwmixread={_READS_OF_100}"] if load.rw == "randrw" else []
    return [*options, f"--numjobs={load.connections}", "--group_reporting"] if group else options


def _fio(server: Server, duration: float, size: int, jobs: Sequence[str]) -> list[dict[str, Any]]:
    common = ["--ioengine=nbd", f"--uri={server.uri}", f"--size={size}", f"--runtime={duration * 1000:.0f}ms", "--time_based"]
    argv = ["fio", *common, "--norandommap", "--thread", "--output-format=json", *jobs]
    result = subprocess.run(argv, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=RUN_SECONDS, check=False)
    if result.returncode:
        raise BenchmarkError(f"fio to {server.tool} ended with status {result.returncode}: {result.stderr.strip()[-300:]}")
    found: list[dict[str, Any]] = json.loads(result.stdout[result.stdout.index("{") :])["jobs"]
    if any(job["error"] for job in found):
        raise BenchmarkError(f"fio to {server.tool} failed with errors {[job['error'] for job in found]}")
    return found
