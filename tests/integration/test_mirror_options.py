"""What a mirror can be told to do otherwise, on the command line and against real servers: when writes are copied, what errors
do, and how it ends."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from nbdmirror.units import KiB, MiB
from tests.support import peers
from tests.support.daemon import run_cli, serving, until
from tests.support.mirroring import (
    ask,
    assert_same,
    into_qemu_nbd,
    job_info,
    make_disk,
    new_seed,
    refused,
    stop,
    tell,
    writing_guest,
)
from tests.support.tools import completed

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.daemon import Daemon

pytest.importorskip("nbd", reason="libnbd's Python binding is not installed")

SIZE = 32 * MiB


def write_to(daemon: Daemon, pattern: int, offset: int, length: int) -> int:
    """The exit status of a client that writes."""
    peers.require("qemu-io")
    return completed("qemu-io", "-f", "raw", "-c", f"write -P {pattern} {offset} {length}", daemon.uri).returncode


@pytest.mark.timeout(120)
def test_write_blocking_there_and_back_under_load(tmp_path: Path) -> None:
    seed = new_seed()
    disk = make_disk(tmp_path / "source.img", SIZE, (0, b"data" * MiB))
    with into_qemu_nbd(tmp_path, SIZE) as target, serving(disk, qmp=True) as daemon:
        with writing_guest(daemon, disk, SIZE, seed) as writer:
            tell(daemon, "mirror", target.uri)
            for _ in range(2):
                tell(daemon, "set-copy-mode", "mirror0", "write-blocking")
                until(lambda: job_info(daemon)["actively-synced"], "the job is actively synced", 30)
                assert writer.poll() is None
                tell(daemon, "set-copy-mode", "mirror0", "background")
                until(lambda: not job_info(daemon)["actively-synced"], "something is written", 30)
            tell(daemon, "set-copy-mode", "mirror0", "write-blocking")
            until(lambda: job_info(daemon)["actively-synced"], "the job is actively synced", 30)
            stop(writer)
        assert job_info(daemon)["actively-synced"], "until there is an error"
        assert_same(disk, target.uri, f"every answered write is on both, seed {seed}")
        assert write_to(daemon, 99, 4096, 64 * KiB) == 0
        assert_same(disk, target.uri)
        tell(daemon, "complete", "mirror0")
        assert_same(disk, target.uri)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("blocks", ["512", "4096"])
def test_write_blocking_from_the_start_into_larger_blocks(tmp_path: Path, blocks: str) -> None:
    """The guest may write any byte; the target takes whole blocks."""
    disk, image = make_disk(tmp_path / "source.img", SIZE, (0, b"data" * MiB)), make_disk(tmp_path / "target.img", SIZE)
    filters, limits = ["blocksize-policy"], [f"blocksize-minimum={blocks}", "blocksize-error-policy=error"]
    with peers.nbdkit("file", str(image), *limits, filters=filters) as target, serving(disk, qmp=True) as daemon:
        tell(daemon, "mirror", target.endpoint.uri, "--copy-mode", "write-blocking")
        for offset, length in [(1, 3), (4095, 2), (100_000, 70_001), (SIZE - 5, 5)]:
            assert write_to(daemon, 99, offset, length) == 0
        until(lambda: job_info(daemon)["actively-synced"], "the job is actively synced")
        assert job_info(daemon)["x-bytes-filled"] > 0
        assert job_info(daemon)["x-errors"] == 0
        assert_same(disk, target.endpoint.uri)
        tell(daemon, "cancel", "mirror0")


def test_complete_without_pivot(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "source.img", SIZE, (0, b"data" * MiB))
    with into_qemu_nbd(tmp_path, SIZE) as target, serving(disk, qmp=True) as daemon:
        with writing_guest(daemon, disk, SIZE, new_seed(), "--bs=16k", "--continue_on_error=io"):
            tell(daemon, "mirror", target.uri)
            tell(daemon, "complete", "mirror0", "--no-pivot")
            assert_same(disk, target.uri, "while the guest tries to write")
        assert write_to(daemon, 99, 0, 4096) != 0
        assert run_cli("compare", daemon.uri, target.uri).returncode == 0
        assert '"x-read-only": true' in tell(daemon, "status", "--json")


@pytest.mark.parametrize("policy", ["stop", "enospc", "auto"])
def test_target_without_space_pauses_the_job(tmp_path: Path, policy: str) -> None:
    disk, image = make_disk(tmp_path / "source.img", SIZE, (0, b"data" * MiB)), make_disk(tmp_path / "target.img", SIZE)
    full = tmp_path / "full"
    full.touch()
    errors = ["error=ENOSPC", "error-pwrite-rate=100%", f"error-file={full}"]
    with peers.nbdkit("file", str(image), *errors, filters=["error"]) as target, serving(disk, qmp=True) as daemon:
        refused(
            ask(daemon, "mirror", target.endpoint.uri, "--on-target-error", policy),
            1,
            "paused by an error",
            "No space left on device",
        )
        info = job_info(daemon)
        assert (info["status"], info["io-status"], info["paused"]) == ("paused", "nospace", True)
        refused(ask(daemon, "cancel", "mirror0"), 1, "The block job for device 'mirror0' is currently paused")
        full.unlink()
        tell(daemon, "resume", "mirror0")
        tell(daemon, "wait", "mirror0", "--ready", "--timeout", "30")
        assert job_info(daemon)["io-status"] == "ok"
        assert write_to(daemon, 99, 0, 4096) == 0
        tell(daemon, "complete", "mirror0")
        assert_same(image, daemon.uri)


def test_ignored_errors_are_tried_again(tmp_path: Path) -> None:
    disk, image = make_disk(tmp_path / "source.img", SIZE, (0, b"data" * MiB)), make_disk(tmp_path / "target.img", SIZE)
    broken = tmp_path / "broken"
    broken.touch()
    errors = ["error=EIO", "error-pwrite-rate=100%", f"error-file={broken}"]
    with peers.nbdkit("file", str(image), *errors, filters=["error"]) as target, serving(disk, qmp=True) as daemon:
        tell(daemon, "mirror", target.endpoint.uri, "--on-target-error", "ignore", "--background")
        until(lambda: job_info(daemon)["x-errors"] > 16, "errors were met more than once")
        info = job_info(daemon)
        assert (info["status"], info["io-status"]) == ("running", "ok")
        assert info["x-last-error"]["operation"] == "write"
        broken.unlink()
        tell(daemon, "wait", "mirror0", "--ready", "--timeout", "30")
        tell(daemon, "complete", "mirror0")
        assert_same(disk, image)


def test_errors_are_reported_unless_told_otherwise(tmp_path: Path) -> None:
    disk, image = make_disk(tmp_path / "source.img", SIZE, (0, b"data" * MiB)), make_disk(tmp_path / "target.img", SIZE)
    errors = ["error=EIO", "error-pwrite-rate=100%"]
    with peers.nbdkit("file", str(image), *errors, filters=["error"]) as target, serving(disk, qmp=True) as daemon:
        refused(ask(daemon, "mirror", target.endpoint.uri), 1, "job 'mirror0' failed", "Input/output error")


def test_what_is_refused(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "source.img", SIZE)
    with into_qemu_nbd(tmp_path, SIZE) as target, serving(disk, qmp=True) as daemon:
        refused(ask(daemon, "mirror", target.uri, "--bitmap", "nothing"), 1, "Dirty bitmap 'nothing' not found")
        refused(
            ask(daemon, "mirror", target.uri, "--bitmap", "b", "--sync", "top"), 1, "Sync mode 'top' not supported with bitmap."
        )
        refused(
            ask(daemon, "mirror", target.uri, "--bitmap", "b", "--granularity", "4k"),
            1,
            "Granularity and bitmap cannot both be set",
        )
        refused(ask(daemon, "set-copy-mode", "nothing", "background"), 1, "not found")
        refused(ask(daemon, "mirror", target.uri, "--copy-mode", "sometimes"), 2, "sometimes")
        tell(daemon, "mirror", target.uri, "--sync", "top", "--buffer", "1M")
        tell(daemon, "cancel", "mirror0")
        assert_same(disk, target.uri)
