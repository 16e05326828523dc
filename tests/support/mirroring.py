"""What the tests of a live mirror share: a guest that writes as fast as it can, targets of every kind, and the command line."""

from __future__ import annotations

import os
import subprocess
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import pytest

from nbdmirror.cli.client import run_client
from nbdmirror.cli.follow import look
from nbdmirror.units import MiB
from tests.support import peers
from tests.support.daemon import Daemon, run_cli, serving, until
from tests.support.tools import completed

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

# A guest writes on for so long at most if nobody stops it, in seconds.
_GUEST_SECONDS: Final = 50


def make_disk(path: Path, size: int, *pieces: tuple[int, bytes]) -> Path:
    """A sparse file with some data."""
    with path.open("wb") as out:
        out.truncate(size)
        for offset, data in pieces:
            out.seek(offset)
            out.write(data)
    return path


def scattered(path: Path, size: int, data: int, chance: random.Random, piece: int = MiB) -> Path:
    """A sparse file with `data` random bytes at random places, in pieces."""
    places = chance.sample(range(size // piece), data // piece)
    return make_disk(path, size, *((place * piece, chance.randbytes(piece)) for place in sorted(places)))


def allocated(path: Path) -> int:
    """What a file takes on its file system, in bytes."""
    return path.stat().st_blocks * 512


# --- the command line ------------------------------------------------------------------------------------------------


def ask(daemon: Daemon, command: str, *arguments: str | Path, timeout: float = 40) -> subprocess.CompletedProcess[str]:
    """A client command, whatever its exit status."""
    return run_cli(command, *arguments, "--qmp", daemon.control, timeout=timeout)


def tell(daemon: Daemon, command: str, *arguments: str | Path, timeout: float = 40) -> str:
    """A client command that has to succeed; its output."""
    result = ask(daemon, command, *arguments, timeout=timeout)
    if result.returncode:
        pytest.fail(f"{command} {arguments}: status {result.returncode}\n{result.stderr}\n{daemon.stderr}", pytrace=False)
    return result.stdout


def refused(result: subprocess.CompletedProcess[str], status: int, *words: str) -> str:
    """One clear line with these words, and this exit status; returns the line. Captive servers speak for themselves."""
    assert result.returncode == status, (result.returncode, result.stdout, result.stderr)
    assert "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if not line.startswith("nbdkit: ")]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("nbdmirror: "), lines
    for word in words:
        assert word in lines[0], lines
    return lines[0]


def job_info(daemon: Daemon, job: str = "mirror0") -> dict[str, Any]:
    """What the daemon knows of a job, alive or ended; asked from here, for that takes a tenth of a command's time."""
    report = run_client(str(daemon.control), lambda client: look(client, job))
    assert report.info, f"no job {job}"
    return report.info


# --- guests ----------------------------------------------------------------------------------------------------------


def fio_command(uri: str, size: int, seed: int, *options: str) -> list[str]:
    """fio's nbd engine; every write has content of its own."""
    base = [
        "fio",
        "--name=guest",
        "--thread",
        "--ioengine=nbd",
        f"--uri={uri}",
        f"--size={size}",
        "--iodepth=16",
        f"--randseed={seed}",
    ]
    return [*base, "--refill_buffers", "--output-format=terse", *options]


@contextmanager
def guest(argv: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A guest that is running; it is stopped in the end, at the latest."""
    peers.require(argv[0])
    # fio puts files where it stands, and must not read terminal input.
    with log.open("wb") as out:
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=out, stderr=out, cwd=log.parent)
    with process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


@contextmanager
def writing_guest(daemon: Daemon, disk: Path, size: int, seed: int, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """Random writes of all sizes at full rate, which have begun to arrive."""
    argv = fio_command(daemon.uri, size, seed, "--rw=randwrite", "--time_based", f"--runtime={_GUEST_SECONDS}", *options)
    if not any(option.startswith("--bs") for option in options):
        argv += ["--bsrange=4k-128k", "--blockalign=512"]
    before = allocated(disk)
    with guest(argv, disk.parent / "guest.log") as process:
        until(lambda: process.poll() is not None or allocated(disk) > before, "the guest writes")
        assert process.poll() is None, (disk.parent / "guest.log").read_text()
        yield process


def stop(process: subprocess.Popen[bytes]) -> None:
    """As one stops fio: what it has sent is answered first."""
    process.terminate()
    process.wait(20)


# --- targets ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Target:
    """Where to mirror to: its URI, and what runs it."""

    uri: str
    pid: int


@contextmanager
def _of_peer(server: AbstractContextManager[peers.Peer]) -> Iterator[Target]:
    with server as peer:
        yield Target(peer.endpoint.uri, peer.pid)


def into_qemu_nbd(directory: Path, size: int) -> AbstractContextManager[Target]:
    return _of_peer(peers.qemu_nbd(make_disk(directory / "target.img", size)))


def into_nbdkit_file(directory: Path, size: int) -> AbstractContextManager[Target]:
    return _of_peer(peers.nbdkit("file", str(make_disk(directory / "target.img", size))))


def into_nbdkit_memory(directory: Path, size: int) -> AbstractContextManager[Target]:
    return _of_peer(peers.nbdkit("memory", str(size)))


def into_nbd_server(directory: Path, size: int) -> AbstractContextManager[Target]:
    options = ["flush = true", "fua = true", "trim = true"]
    return _of_peer(peers.nbd_server(make_disk(directory / "target.img", size), options=options))


@contextmanager
def into_ourselves(directory: Path, size: int) -> Iterator[Target]:
    with serving(make_disk(directory / "target.img", size)) as daemon:
        yield Target(daemon.uri, daemon.pid)


TARGETS: Final[list[Callable[[Path, int], AbstractContextManager[Target]]]] = [
    into_qemu_nbd,
    into_nbdkit_file,
    into_nbdkit_memory,
    into_nbd_server,
    into_ourselves,
]


def assert_same(left: str | Path, right: str | Path, note: str = "") -> None:
    """By the word of somebody else's comparison."""
    peers.require("qemu-img")
    result = completed("qemu-img", "compare", "-f", "raw", "-F", "raw", left, right)
    assert result.returncode == 0, f"{note}\n{result.stdout}{result.stderr}"


def new_seed() -> int:
    """A seed that a failing test shows."""
    seed = int.from_bytes(os.urandom(4))
    print(f"seed {seed}")
    return seed
