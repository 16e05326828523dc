"""A mirror in trouble: whatever dies or was asked for wrongly, the guest goes on, and the user gets one clear line."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from nbdmirror.units import KiB, MiB
from tests.support import peers
from tests.support.daemon import run_cli, serving, until
from tests.support.mirroring import (
    ask,
    assert_same,
    into_nbdkit_file,
    into_nbdkit_memory,
    into_ourselves,
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
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

    from tests.support.daemon import Daemon
    from tests.support.mirroring import Target

pytest.importorskip("nbd", reason="libnbd's Python binding is not installed")

SIZE = 16 * MiB
ODD_SIZE = 1025 * KiB + 513
DATA = bytes(range(1, 256)) * 5000


@contextmanager
def source(tmp_path: Path, size: int = SIZE) -> Iterator[tuple[Path, Daemon]]:
    """A daemon whose disk has some data, and is the same in the end but for what the guest wrote."""
    disk = make_disk(tmp_path / "source.img", size, (0, DATA[:size]))
    with serving(disk, qmp=True) as daemon:
        yield disk, daemon


def guest_writes(daemon: Daemon) -> None:
    """The export takes a write and gives it back."""
    peers.require("qemu-io")
    script = ["-c", "write -P 91 8192 4096", "-c", "read -P 91 8192 4096"]
    result = completed("qemu-io", "-f", "raw", *script, daemon.uri)
    assert result.returncode == 0, result.stderr
    assert "verification failed" not in result.stdout


def still_on_the_source(disk: Path, daemon: Daemon) -> None:
    guest_writes(daemon)
    assert disk.read_bytes()[8192:12288] == b"\x5b" * 4096


# --- somebody dies ---------------------------------------------------------------------------------------------------


def test_guest_is_killed(tmp_path: Path) -> None:
    seed = new_seed()
    with into_nbdkit_memory(tmp_path, SIZE) as target, source(tmp_path) as (disk, daemon):
        with writing_guest(daemon, disk, SIZE, seed) as writer:
            tell(daemon, "mirror", target.uri, "--background")
            writer.kill()
        assert tell(daemon, "wait", "mirror0", "--ready") == ""
        tell(daemon, "complete", "mirror0")
        assert_same(disk, target.uri, f"seed {seed}")


@pytest.mark.parametrize("when", ["before ready", "after ready"])
def test_target_is_killed(when: str, tmp_path: Path) -> None:
    seed = new_seed()
    with into_nbdkit_memory(tmp_path, SIZE) as target, source(tmp_path) as (disk, daemon):
        with writing_guest(daemon, disk, SIZE, seed) as writer:
            if when == "before ready":
                slowly = ["--background", "--speed", "256k", "--request-size", "64k"]
                tell(daemon, "mirror", target.uri, "--reconnect", "0", *slowly)
            else:
                tell(daemon, "mirror", target.uri, "--reconnect", "0")
            os.kill(target.pid, signal.SIGKILL)
            result = ask(daemon, "wait", "mirror0", "--timeout", "20")
            refused(result, 3, "job 'mirror0' failed", "Transport endpoint is not connected")
            assert writer.poll() is None
            stop(writer)
        info = job_info(daemon)
        assert (info["error"], info["x-cancelled"]) == ("Transport endpoint is not connected", False)
        still_on_the_source(disk, daemon)


def test_target_is_killed_during_complete(tmp_path: Path) -> None:
    with into_nbdkit_memory(tmp_path, SIZE) as target, source(tmp_path) as (disk, daemon):
        tell(daemon, "mirror", target.uri, "--reconnect", "0")
        os.kill(target.pid, signal.SIGSTOP)
        tell(daemon, "complete", "mirror0", "--background")
        os.kill(target.pid, signal.SIGKILL)
        refused(ask(daemon, "wait", "mirror0", "--timeout", "20"), 3, "job 'mirror0' failed")
        still_on_the_source(disk, daemon)


@pytest.mark.parametrize("when", ["copying", "ready", "completing"])
def test_target_that_does_not_answer_can_be_left(when: str, tmp_path: Path) -> None:
    with into_nbdkit_memory(tmp_path, SIZE) as target, source(tmp_path) as (disk, daemon):
        if when == "copying":
            tell(daemon, "mirror", target.uri, "--background", "--speed", "256k", "--request-size", "64k")
        else:
            tell(daemon, "mirror", target.uri)
        os.kill(target.pid, signal.SIGSTOP)
        if when == "completing":
            tell(daemon, "complete", "mirror0", "--background")
        else:
            guest_writes(daemon)
        started = time.monotonic()
        tell(daemon, "cancel", "--force", "mirror0")
        assert time.monotonic() - started < 6
        refused(ask(daemon, "wait", "mirror0"), 4, "job 'mirror0' was cancelled")
        still_on_the_source(disk, daemon)


def test_garbage_to_the_server_meanwhile(tmp_path: Path) -> None:
    with into_nbdkit_memory(tmp_path, SIZE) as target, source(tmp_path) as (disk, daemon):
        tell(daemon, "mirror", target.uri, "--background")
        for number in range(20):
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(str(daemon.unix))
                sock.sendall(os.urandom(1 + 97 * number))
        tell(daemon, "wait", "mirror0", "--ready")
        tell(daemon, "complete", "mirror0")
        assert_same(disk, target.uri)


# --- wrongly asked for -----------------------------------------------------------------------------------------------


def check_refused(daemon: Daemon, disk: Path, status: int, words: list[str], *arguments: str | Path) -> None:
    before = disk.read_bytes()
    refused(ask(daemon, "mirror", *arguments), status, *words)
    assert disk.read_bytes() == before
    still_on_the_source(disk, daemon)


@pytest.mark.parametrize("size", [SIZE - MiB, SIZE + MiB])
def test_target_of_another_size(size: int, tmp_path: Path) -> None:
    with into_nbdkit_memory(tmp_path, size) as target, source(tmp_path) as (disk, daemon):
        check_refused(daemon, disk, 1, ["Source and target image have different sizes"], target.uri)


def test_target_that_is_read_only(tmp_path: Path) -> None:
    with peers.nbdkit("memory", str(SIZE), extra=["-r"]) as peer, source(tmp_path) as (disk, daemon):
        check_refused(daemon, disk, 1, ["read-only"], peer.endpoint.uri)


def test_targets_that_are_not_there(tmp_path: Path) -> None:
    """One daemon for all of them: a refusal leaves nothing behind that the next one could stumble over."""
    image = make_disk(tmp_path / "target.img", SIZE)
    with peers.qemu_nbd(image, export="a") as peer, source(tmp_path) as (disk, daemon):
        gone = tmp_path / "gone"
        nodes = json.loads(tell(daemon, "status", "--json"))["nodes"]
        cases: list[tuple[int, list[str], str]] = [
            (1, ["No such file or directory", "gone"], f"nbd+unix:///?socket={gone}"),
            (1, ["refused"], f"nbd://127.0.0.1:{peers.free_port()}"),
            (2, ["nbd://host:port:more"], "nbd://host:port:more"),
            (2, ["https"], "https://example.com/disk"),
            (1, ["wrong"], f"nbd+unix:///wrong?socket={peer.endpoint.socket}"),
            (1, ["No such file or directory", "gone"], str(gone)),
            (1, ["Is a directory"], str(tmp_path)),
            (1, ["mirror node into itself"], str(disk)),
            (1, ["mirror node into itself"], daemon.uri),
        ]
        for status, words, target in cases:
            refused(ask(daemon, "mirror", target), status, *words)
        assert not gone.exists()
        assert json.loads(tell(daemon, "status", "--json"))["nodes"] == nodes
        assert disk.read_bytes()[: len(DATA)] == DATA
        still_on_the_source(disk, daemon)


def test_jobs_that_are_not_there(tmp_path: Path) -> None:
    with source(tmp_path) as (_, daemon):
        for verb in ("pause", "resume", "complete", "cancel", "dismiss", "status"):
            refused(ask(daemon, verb, "nothing"), 1, "not found" if verb != "status" else "no job 'nothing'")
        refused(ask(daemon, "set-speed", "nothing", "1M"), 1, "not found")
        refused(ask(daemon, "wait", "nothing"), 5, "no job 'nothing'")
        refused(ask(daemon, "mirror", "x", "--device", "nothing"), 1, "nothing")


def test_no_daemon(tmp_path: Path) -> None:
    for words in (["status"], ["mirror", "x"], ["wait", "j"], ["pause", "j"]):
        refused(run_cli(*words, "--qmp", tmp_path / "no"), 1, "no daemon at", str(tmp_path / "no"))
    result = run_cli("status")
    assert result.returncode == 2
    assert "--qmp" in result.stderr


def test_waiting_too_long(tmp_path: Path) -> None:
    with into_nbdkit_memory(tmp_path, SIZE) as target, source(tmp_path) as (_, daemon):
        tell(daemon, "mirror", target.uri, "--background", "--speed", "64k")
        refused(ask(daemon, "wait", "mirror0", "--ready", "--timeout", "0.1"), 124, "mirror0", "not ready")
        result = ask(daemon, "complete", "mirror0")
        refused(result, 1, "Job 'mirror0' in state 'running' cannot accept command verb 'complete'")
        tell(daemon, "cancel", "mirror0")
        assert ask(daemon, "wait", "mirror0", "--ready").returncode == 4


# --- sizes, granularities, rates -------------------------------------------------------------------------------------


@pytest.mark.parametrize("into", [into_nbdkit_file, into_nbdkit_memory, into_ourselves], ids=lambda maker: maker.__name__)
def test_size_that_nothing_divides(into: Callable[[Path, int], AbstractContextManager[Target]], tmp_path: Path) -> None:
    with into(tmp_path, ODD_SIZE) as target, source(tmp_path, ODD_SIZE) as (disk, daemon):
        tell(daemon, "mirror", target.uri, "--complete")
        assert run_cli("compare", disk, target.uri).returncode == 0
        guest_writes(daemon)


def test_target_that_rounds_up_to_sectors(tmp_path: Path) -> None:
    """The last bytes are written as a whole sector, and the guest still sees the size it was told."""
    with into_qemu_nbd(tmp_path, ODD_SIZE + 511) as target, source(tmp_path, ODD_SIZE) as (disk, daemon):
        tell(daemon, "mirror", target.uri, "--complete")
        content = tmp_path / "copy.img"
        assert run_cli("copy", target.uri, content, "--create").returncode == 0
        assert content.read_bytes()[:ODD_SIZE] == disk.read_bytes()
        guest_writes(daemon)


def test_disk_of_no_bytes(tmp_path: Path) -> None:
    with source(tmp_path, 0) as (_, daemon):
        target = make_disk(tmp_path / "target.img", 0)
        tell(daemon, "mirror", target, "--complete")
        assert (job_info(daemon)["len"], job_info(daemon)["status"]) == (0, "null")


@pytest.mark.parametrize("granularity", ["512", "64M"])
def test_granularity_at_its_bounds(granularity: str, tmp_path: Path) -> None:
    seed = new_seed()
    with into_nbdkit_memory(tmp_path, SIZE) as target, source(tmp_path) as (disk, daemon):
        with writing_guest(daemon, disk, SIZE, seed, "--bs=4k", "--rate=4M") as writer:
            tell(daemon, "mirror", target.uri, "--granularity", granularity)
            stop(writer)
        tell(daemon, "complete", "mirror0")
        assert_same(disk, target.uri, f"seed {seed}")


@pytest.mark.parametrize("granularity", ["256", "128M", "5000"])
def test_granularity_beyond_them(granularity: str, tmp_path: Path) -> None:
    with source(tmp_path) as (disk, daemon):
        target = make_disk(tmp_path / "target.img", SIZE)
        check_refused(daemon, disk, 1, ["Parameter 'granularity' expects"], target, "--granularity", granularity)


def test_rate_limit(tmp_path: Path) -> None:
    with into_nbdkit_memory(tmp_path, SIZE) as target, source(tmp_path) as (disk, daemon):
        started = time.monotonic()
        tell(daemon, "mirror", target.uri, "--speed", "1M", "--request-size", "64k")
        assert time.monotonic() - started > (len(DATA) - 192 * KiB) / MiB
        assert job_info(daemon)["speed"] == MiB
        tell(daemon, "complete", "mirror0")
        assert_same(disk, target.uri)


def test_rate_limit_is_lifted_at_once(tmp_path: Path) -> None:
    with into_nbdkit_memory(tmp_path, SIZE) as target, source(tmp_path) as (disk, daemon):
        tell(daemon, "mirror", target.uri, "--speed", "1k", "--background")
        until(lambda: job_info(daemon)["x-bytes-sent"] > 0, "the first unit is copied")
        tell(daemon, "set-speed", "mirror0", "0")
        tell(daemon, "wait", "mirror0", "--ready", "--timeout", "10")
        tell(daemon, "complete", "mirror0")
        assert_same(disk, target.uri)


def test_paused_job_stands_still(tmp_path: Path) -> None:
    with into_nbdkit_memory(tmp_path, SIZE) as target, source(tmp_path) as (disk, daemon):
        tell(daemon, "mirror", target.uri)
        tell(daemon, "pause", "mirror0")
        until(lambda: job_info(daemon)["status"] == "standby", "the job pauses")
        refused(ask(daemon, "pause", "mirror0"), 1, "Job is already paused")
        refused(ask(daemon, "cancel", "mirror0"), 1, "The block job for device 'mirror0' is currently paused")
        guest_writes(daemon)
        info = job_info(daemon)
        assert info["len"] > info["offset"]
        tell(daemon, "resume", "mirror0")
        refused(ask(daemon, "resume", "mirror0"), 1, "Can't resume a job that was not paused")
        tell(daemon, "complete", "mirror0")
        assert_same(disk, target.uri)


def test_one_mirror_at_a_time(tmp_path: Path) -> None:
    with source(tmp_path) as (disk, daemon):
        one, other = make_disk(tmp_path / "one", SIZE), make_disk(tmp_path / "other", SIZE)
        refused(ask(daemon, "mirror", other, "--job-id", "1k"), 1, "Invalid job ID '1k'")
        tell(daemon, "mirror", one, "--job-id", "j")
        node = json.loads(tell(daemon, "status", "--json"))["nodes"][0]["node-name"]
        refused(ask(daemon, "mirror", other, "--job-id", "k"), 1, "Need a root block node")
        refused(ask(daemon, "mirror", other, "--job-id", "j"), 1, "Job ID 'j' already in use")
        refused(ask(daemon, "mirror", other, "--device", node), 1, "block device is in use by block job: mirror")
        tell(daemon, "complete", "j")
        assert_same(disk, one)


def test_daemon_that_ends_takes_its_jobs_along(tmp_path: Path) -> None:
    with source(tmp_path) as (disk, daemon):
        target = make_disk(tmp_path / "target.img", SIZE)
        tell(daemon, "mirror", target, "--background", "--speed", "1k")
        started = time.monotonic()
        assert daemon.terminate() == 0
        assert time.monotonic() - started < 6
        assert disk.read_bytes()[: len(DATA)] == DATA
