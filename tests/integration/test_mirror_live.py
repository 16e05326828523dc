"""Mirroring a disk that is written to all the while, into every kind of target: not one write is lost.

NBDMIRROR_SOAK=10 repeats each of the copies under load ten times, each with a seed of its own.
"""

from __future__ import annotations

import json
import os
import random
import re
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from nbdmirror.units import GiB, KiB, MiB
from tests.support import peers
from tests.support.daemon import run_cli, serving, until
from tests.support.mirroring import (
    TARGETS,
    Target,
    allocated,
    assert_same,
    fio_command,
    guest,
    into_nbdkit_memory,
    into_qemu_nbd,
    job_info,
    make_disk,
    new_seed,
    scattered,
    stop,
    tell,
    writing_guest,
)
from tests.support.tools import completed

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support.daemon import Daemon

pytest.importorskip("nbd", reason="libnbd's Python binding is not installed")

MakeTarget = "Callable[[Path, int], AbstractContextManager[Target]]"
SOAK = int(os.environ.get("NBDMIRROR_SOAK", "1"))
SIZE = 128 * MiB


@pytest.mark.timeout(120)
@pytest.mark.parametrize("turn", range(SOAK))
@pytest.mark.parametrize("into", TARGETS, ids=lambda maker: maker.__name__)
def test_guest_that_writes_all_the_while(into: MakeTarget, turn: int, tmp_path: Path) -> None:
    seed = new_seed()
    chance = random.Random(seed)
    disk = scattered(tmp_path / "source.img", SIZE, 32 * MiB, chance)
    with into(tmp_path, SIZE) as target, serving(disk, qmp=True) as daemon:
        with writing_guest(daemon, disk, SIZE, seed) as writer:
            tell(daemon, "mirror", target.uri, "--granularity", chance.choice(["4k", "64k", "1M"]))
            assert job_info(daemon)["ready"]
            assert writer.poll() is None, "READY while the guest writes"
            stop(writer)
        before = job_info(daemon)
        tell(daemon, "complete", "mirror0")
        info = job_info(daemon)
        assert (info["status"], info["len"]) == ("null", info["offset"])
        assert info["offset"] >= before["offset"] > SIZE
        assert_same(disk, target.uri, f"turn {turn}, seed {seed}")
        # The daemon goes on from the target.
        assert_same(daemon.uri, target.uri)
        source_was = disk.stat().st_mtime_ns
        assert run_write(daemon) == 0
        assert disk.stat().st_mtime_ns == source_was


def run_write(daemon: Daemon) -> int:
    peers.require("qemu-io")
    return completed("qemu-io", "-f", "raw", "-c", "write -P 77 4096 65536", daemon.uri).returncode


@pytest.mark.timeout(120)
@pytest.mark.parametrize("turn", range(SOAK))
@pytest.mark.parametrize("into", TARGETS if SOAK > 1 else TARGETS[:2], ids=lambda maker: maker.__name__)
def test_every_write_acknowledged_around_the_pivot_is_on_the_target(into: MakeTarget, turn: int, tmp_path: Path) -> None:
    """fio writes each block once, with a checksum, and reads all of them back in the end: from the target, by then."""
    seed, size = new_seed(), 24 * MiB
    disk = make_disk(tmp_path / "source.img", size)
    with into(tmp_path, size) as target, serving(disk, qmp=True) as daemon:
        argv = fio_command(daemon.uri, size, seed, "--rw=randwrite", "--bs=16k", "--verify=crc32c", "--do_verify=1")
        log = tmp_path / "guest.log"
        with guest([*argv, "--rate=12M", "--verify_fatal=1"], log) as writer:
            tell(daemon, "mirror", target.uri, "--complete")
            assert writer.poll() is None, log.read_text()
            kept = allocated(disk)
            assert writer.wait(40) == 0, f"seed {seed}\n{log.read_text()}"
        assert kept < size, "the guest was not done when the job was"
        assert allocated(disk) == kept, "nothing is written to the source after the pivot"


def test_soft_cancel_leaves_a_copy_of_one_moment(tmp_path: Path) -> None:
    """fio writes each block once, in order: the copy has a front part of them, and no gap."""
    seed, size, block = new_seed(), 64 * MiB, 64 * KiB
    disk = make_disk(tmp_path / "source.img", size)
    with into_nbdkit_memory(tmp_path, size) as target, serving(disk, qmp=True) as daemon:
        argv = fio_command(daemon.uri, size, seed, "--rw=write", f"--bs={block}", "--iodepth=1", "--rate=12M")
        with guest(argv, tmp_path / "guest.log") as writer:
            until(lambda: allocated(disk) > 0, "the guest writes")
            tell(daemon, "mirror", target.uri)
            tell(daemon, "cancel", "mirror0")
            assert writer.poll() is None
            stop(writer)
        copy = tmp_path / "copy.img"
        assert run_cli("copy", target.uri, copy, "--create").returncode == 0
        blocks, whole = copy.read_bytes(), disk.read_bytes()
        written = [at for at in range(0, size, block) if blocks[at : at + block] != bytes(block)]
        assert written == list(range(0, len(written) * block, block))
        assert 0 < len(written) < size // block
        assert blocks[: len(written) * block] == whole[: len(written) * block]


def test_several_jobs_one_after_another(tmp_path: Path) -> None:
    """Source to first target, and on to the next one, with the guest writing throughout."""
    seed, size = new_seed(), 32 * MiB
    disk = make_disk(tmp_path / "source.img", size)
    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    with (
        into_qemu_nbd(tmp_path / "first", size) as first,
        into_nbdkit_memory(tmp_path / "second", size) as second,
        serving(disk, qmp=True) as daemon,
    ):
        with writing_guest(daemon, disk, size, seed, "--bs=16k", "--rate=12M") as writer:
            tell(daemon, "mirror", first.uri, "--complete", "--job-id", "one")
            node = job_nodes(daemon)
            tell(daemon, "mirror", second.uri, "--device", node, "--job-id", "two")
            assert writer.poll() is None
            stop(writer)
        tell(daemon, "complete", "two")
        assert_same(first.uri, second.uri, f"seed {seed}")


def job_nodes(daemon: Daemon) -> str:
    """The node that the export is made from now."""
    return str(json.loads(tell(daemon, "status", "--json"))["exports"][0]["node-name"])


# --- large and hollow ------------------------------------------------------------------------------------------------


@contextmanager
def counting_nbdkit(path: Path, counts: Path) -> Iterator[Target]:
    with peers.nbdkit("file", str(path), f"statsfile={counts}", filters=["stats"]) as peer:
        yield Target(peer.endpoint.uri, peer.pid)


def sent_bytes(counts: Path) -> int:
    """What nbdkit's stats filter says was written."""
    match = re.search(r"^write: \d+ ops, [\d.]+ s, ([\d.]+) (bytes|[KMG]iB)", counts.read_text(), re.MULTILINE)
    assert match is not None, counts.read_text()
    return int(float(match[1]) * {"bytes": 1, "KiB": KiB, "MiB": MiB, "GiB": GiB}[match[2]])


@pytest.mark.timeout(120)
def test_large_hollow_disk_costs_what_its_data_costs(tmp_path: Path) -> None:
    data = int(os.environ.get("NBDMIRROR_SPARSE_MIB", "50")) * MiB
    size = 100 * GiB
    seed = new_seed()
    disk = scattered(tmp_path / "source.img", size, data, random.Random(seed))
    image, counts = make_disk(tmp_path / "target.img", size), tmp_path / "counts"
    with serving(disk, qmp=True) as daemon:
        with counting_nbdkit(image, counts) as target:
            started = time.monotonic()
            tell(daemon, "mirror", target.uri, timeout=100)
            taken = time.monotonic() - started
            tell(daemon, "cancel", "mirror0")
            info = job_info(daemon)
        print(f"{data // MiB} MiB in {taken:.2f} s; {info}")
        assert info["error" if "error" in info else "status"] == "null"
        assert data <= info["x-bytes-sent"] <= data * 1.03
        assert data * 0.99 <= sent_bytes(counts) <= data * 1.03
        assert info["x-bytes-read"] <= data * 1.03
        assert abs(allocated(image) - allocated(disk)) <= allocated(disk) * 0.01
        # A second at most for a hundred GiB of nothing, and the data at a tenth of what it takes on a quiet machine.
        assert taken < 5 + data / (50 * MiB), "time goes with the data, not with the size"
