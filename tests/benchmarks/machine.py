"""What the benchmarks share: the machine, what processes cost on it, where disks are.

Rules:
1. Disks are files on tmpfs, where nothing but memory is in the way, and, for servers, on a real file system with all of the
   file in the page cache. Every server has the same file, and so the same pages.
2. CPU time is a process's own account, user and system; threads are in it.
"""

from __future__ import annotations

import os
import platform
import random
import shutil
import subprocess
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from nbdmirror import __version__
from nbdmirror.units import KiB, MiB, format_size

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_TICK: Final = os.sysconf("SC_CLK_TCK")
_MEMORY: Final = Path("/dev/shm")
_MOMENT: Final = 0.1
_IDLE: Final = 0.9
_PIECE: Final = 16 * MiB
# Far longer than any one run: something is stuck then.
RUN_SECONDS: Final = 300.0


class BenchmarkError(Exception):
    """A benchmark can't be run, or a tool did not do what was asked of it; one line."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What a command took: seconds by the clock, and of CPU."""

    wall: float
    cpu: float


@dataclass(frozen=True, slots=True)
class Server:
    """A running server on a Unix socket."""

    tool: str
    pid: int
    uri: str
    socket: str


@dataclass(frozen=True, slots=True)
class Place:
    """A directory for disks, and the name of its file system."""

    name: str
    directory: Path


def check_programs(*names: str) -> None:
    """Raise unless all are installed."""
    missing = [name for name in names if shutil.which(name) is None]
    if missing:
        raise BenchmarkError(f"not installed: {', '.join(missing)}")


@contextmanager
def memory_directory(need: int) -> Iterator[Path]:
    """A directory on tmpfs with room for `need` bytes."""
    free = shutil.disk_usage(_MEMORY).free
    if free < need:
        raise BenchmarkError(f"{_MEMORY} has {format_size(free)} free, {format_size(need)} are needed; try a smaller --size")
    with tempfile.TemporaryDirectory(prefix="nbdmirror-bench-", dir=_MEMORY) as name:
        yield Path(name)


@contextmanager
def places(need: int, real: Path) -> Iterator[list[Place]]:
    """A directory on tmpfs and one below `real`, on another file system, each with room for `need` bytes."""
    name = _file_system(real)
    if name in {"tmpfs", "ramfs"}:
        raise BenchmarkError(f"'{real}' is on {name}; name a directory on a disk with --directory")
    if shutil.disk_usage(real).free < need:
        raise BenchmarkError(f"'{real}' has less than {format_size(need)} free; name another directory with --directory")
    with memory_directory(need) as memory, tempfile.TemporaryDirectory(prefix="nbdmirror-bench-", dir=real) as disk:
        yield [Place("tmpfs", memory), Place(name, Path(disk))]


def _file_system(path: Path) -> str:
    result = subprocess.run(["stat", "-f", "-c", "%T", path], capture_output=True, text=True, check=False, timeout=10)
    if result.returncode:
        raise BenchmarkError(result.stderr.strip())
    name = result.stdout.strip()
    return "ext4" if name == "ext2/ext3" else name


def warm(path: Path) -> None:
    """Have all of a file on the disk and in the page cache."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
        while file.read(_PIECE):
            pass


def cpu_seconds(pid: int) -> float:
    """CPU time of a process so far, with the children that it has waited for (proc(5), fields 14 to 17)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return sum(map(int, fields[11:15])) / _TICK


def wait_until_idle(most: float) -> None:
    """Return when the processors have been idle for a moment, after `most` seconds at the latest."""
    deadline = time.monotonic() + most
    while time.monotonic() < deadline:
        before = _processor_ticks()
        time.sleep(_MOMENT)
        total, idle = (after - earlier for after, earlier in zip(_processor_ticks(), before, strict=True))
        if idle >= total * _IDLE:
            return


def _processor_ticks() -> tuple[int, int]:
    """All ticks of all processors so far, and the idle ones (proc(5))."""
    ticks = list(map(int, Path("/proc/stat").read_text().partition("\n")[0].split()[1:9]))
    return sum(ticks), ticks[3] + ticks[4]


def run_measured(argv: Sequence[str]) -> Cost:
    """Run a command to its end; raises BenchmarkError when it fails."""
    started = time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
        try:
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        finally:
            if process.returncode is None:
                process.kill()
                process.wait()
        wall = time.monotonic() - started
        output.seek(0)
        if process.returncode:
            raise BenchmarkError(f"{argv[0]} ended with status {process.returncode}: {' '.join(output.read().split())[-300:]}")
    return Cost(wall, usage.ru_utime + usage.ru_stime)


def write_full(path: Path, size: int) -> None:
    """A file with no hole and no zeroes in it."""
    piece = random.Random(0).randbytes(_PIECE)
    with path.open("xb") as file:
        for left in range(size, 0, -_PIECE):
            file.write(piece[:left])


def write_half_full(path: Path, size: int) -> int:
    """A file of `size` bytes of which half, at random places, is random data and the rest holes; returns the bytes of data.

    Runs of 4 KiB to 4 MiB, small ones as often as large ones.
    """
    chance = random.Random(0)
    data = memoryview(chance.randbytes(_PIECE))
    written = at = 0
    with path.open("xb") as file:
        file.truncate(size)
        while written < size // 2:
            length = min(4 * KiB << chance.randrange(11), size // 2 - written)
            # As much hole as data on average; what is left over at either end doesn't matter.
            at += 4 * KiB << chance.randrange(11)
            if at + length > size:
                break
            start = chance.randrange(0, _PIECE - length + 1, 512)
            file.seek(at)
            file.write(data[start : start + length])
            at, written = at + length, written + length
    return written


def describe() -> str:
    """The machine and the versions, in one line."""
    model = "unknown processor"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(": ")[2]
            break
    load = os.getloadavg()[0]
    versions = ", ".join([_version("fio"), _version("nbdkit"), _version("qemu-nbd"), _version("nbdcopy")])
    python = f"Python {platform.python_version()}"
    return (
        f"{os.cpu_count()} cores of {model}, Linux {platform.release()}, {python}, nbdmirror {__version__}, {versions}; "
        f"load {load:.1f} before"
    )


def _version(program: str) -> str:
    result = subprocess.run([program, "--version"], capture_output=True, text=True, check=False, timeout=10)
    first = (result.stdout or result.stderr).partition("\n")[0].split(" (")[0]
    return first if first.startswith(program) else f"{program} {first}"
