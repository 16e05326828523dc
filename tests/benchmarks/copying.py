"""`copy`: a sparse file to a target on the same machine, with every copier, each tuned as its manual suggests.

Rules:
1. A target is a new, wholly sparse file each time, with a new server in front of it, and every copier is told that it reads as
   zeroes. All look for zeroes in the data by 4 KiB, so all have the same to do.
2. The result is verified outside of the measured time: the content with cmp, and the allocation within 1 % of the source's.
3. The clock runs from the copier's start to its end: starting it is part of the price.
"""

from __future__ import annotations

import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from nbdmirror.units import GiB, MiB
from tests.benchmarks.machine import (
    RUN_SECONDS,
    BenchmarkError,
    Cost,
    check_programs,
    cpu_seconds,
    memory_directory,
    run_measured,
    write_half_full,
)
from tests.benchmarks.report import OURS, Table, seconds, whole
from tests.support import peers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

DEFAULT_SIZE: Final = 4 * GiB
_MOST_APART: Final = 0.01
# A target of one kind: what to copy to, and the server in front of it, if there is one.
Target = tuple[str, peers.Peer | None]
ServedTarget = tuple[str, peers.Peer]


def _nbdmirror(source: str, target: str) -> list[str]:
    return [sys.executable, "-P", "-m", "nbdmirror", "copy", "--target-is-zero", source, target]


def _nbdcopy(source: str, target: str) -> list[str]:
    # Flushing, as we do; 4 connections are its default, and ours.
    return ["nbdcopy", "--flush", "--connections=4", "--target-is-zero", source, target]


def _qemu_img(source: str, target: str) -> list[str]:
    # -W, out of order, with the most coroutines; -S 4k is the default, said here because it keeps the holes.
    tuned = ["-W", "-m", "16", "-S", "4k", "-n", "--target-is-zero"]
    return ["qemu-img", "convert", "-f", "raw", "-O", "raw", *tuned, source, target]


COPIERS: Final[dict[str, Callable[[str, str], list[str]]]] = {
    OURS: _nbdmirror,
    "nbdcopy": _nbdcopy,
    "qemu-img": _qemu_img,
}


@contextmanager
def _file(path: Path) -> Iterator[Target]:
    yield str(path), None


@contextmanager
def _behind_nbdkit(path: Path) -> Iterator[ServedTarget]:
    with peers.nbdkit("file", f"file={path}") as peer:
        yield peer.endpoint.uri, peer


@contextmanager
def _behind_qemu_nbd(path: Path) -> Iterator[ServedTarget]:
    with peers.qemu_nbd(path, extra=["--cache=writeback", "--discard=unmap"]) as peer:
        yield peer.endpoint.uri, peer


SERVED: Final[dict[str, Callable[[Path], AbstractContextManager[ServedTarget]]]] = {
    "nbdkit": _behind_nbdkit,
    "qemu-nbd": _behind_qemu_nbd,
}
TARGETS: Final[dict[str, Callable[[Path], AbstractContextManager[Target]]]] = {
    **{f"file to {name}": target for name, target in SERVED.items()},
    "file to file": _file,
}


def measure(runs: int, size: int) -> list[Table]:
    """Every copy `runs` times, in turns."""
    check_programs("nbdcopy", "qemu-img", "qemu-nbd", "nbdkit", "cmp")
    speed = Table("MiB of data per second", max, whole)
    wall = Table("seconds", min, seconds)
    client = Table("copier's CPU seconds", min, seconds)
    server = Table("target server's CPU seconds", min, seconds)
    with memory_directory(size + size // 8) as directory:
        source = directory / "source.img"
        data = write_half_full(source, size)
        for name, target in TARGETS.items():
            print(f"bench: copy, {name}", file=sys.stderr)
            for _ in range(runs):
                for tool, command in COPIERS.items():
                    cost, served = run(source, directory / "target.img", target, command)
                    speed.add(name, tool, data / MiB / cost.wall)
                    wall.add(name, tool, cost.wall)
                    client.add(name, tool, cost.cpu)
                    if served is not None:
                        server.add(name, tool, served)
    return [speed, wall, client, server]


def run(
    source: Path,
    target: Path,
    target_of: Callable[[Path], AbstractContextManager[Target]],
    command: Callable[[str, str], list[str]],
) -> tuple[Cost, float | None]:
    """One copy, verified; its cost, and the CPU time of the target's server."""
    with new_file(target, source.stat().st_size):
        with target_of(target) as (where, peer):
            before = 0.0 if peer is None else cpu_seconds(peer.pid)
            cost = run_measured(command(str(source), where))
            served = None if peer is None else cpu_seconds(peer.pid) - before
        verify(source, target, command(str(source), where)[0])
    return cost, served


@contextmanager
def new_file(path: Path, size: int) -> Iterator[Path]:
    """A file that is all hole, for as long as the context lasts."""
    with path.open("xb") as file:
        file.truncate(size)
    try:
        yield path
    finally:
        path.unlink()


def verify(source: Path, target: Path, program: str) -> None:
    """Raise unless the target has the source's content, and about as much allocated."""
    verify_content(source, target, program)
    expected, found = (path.stat().st_blocks * 512 for path in (source, target))
    if abs(found - expected) > expected * _MOST_APART:
        raise BenchmarkError(f"{program} made a copy of {found} allocated bytes where the source has {expected}")


def verify_content(source: Path, target: Path, program: str) -> None:
    """Raise unless the target has the source's content."""
    result = subprocess.run(["cmp", source, target], capture_output=True, text=True, timeout=RUN_SECONDS, check=False)
    if result.returncode:
        raise BenchmarkError(f"{program} made a copy that differs: {(result.stdout + result.stderr).strip()}")
