"""`serve -B --state-dir`: bitmaps that clients can read, that outlive the daemon, and what is refused on one line."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import pytest

from nbdmirror.units import KiB, MiB
from tests.support.daemon import run_cli, serving
from tests.support.peers import require
from tests.support.tools import make_disk, nbdsh, run

if TYPE_CHECKING:
    from pathlib import Path

FAILED, USAGE = 1, 2


@pytest.fixture(autouse=True)
def _tools() -> None:
    require("nbdinfo", "nbdsh")


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return make_disk(tmp_path / "disk", 4 * MiB)


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


def dirty(uri: str, name: str) -> list[tuple[int, int]]:
    extents = json.loads(run("nbdinfo", "--json", f"--map=qemu:dirty-bitmap:{name}", uri))
    return [(extent["offset"], extent["length"]) for extent in extents if extent["type"] & 1]


def write(uri: str, offset: int, length: int) -> None:
    nbdsh(uri, f"h.pwrite(b'x' * {length}, {offset}); h.flush()")


def refused(status: int, *args: str | Path) -> str:
    result = run_cli("serve", *args)
    assert (result.returncode, result.stdout) == (status, ""), result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("nbdmirror: ")
    return line


@pytest.mark.parametrize("mode", ["lazy", "barrier", "intent"])
def test_bitmaps_come_back_after_an_orderly_end_and_after_a_kill(disk: Path, state: Path, mode: str) -> None:
    args = ["--state-dir", state, "-B", "a", "--bitmap", "b/ä:4k", "--bitmap-sync", mode]
    with serving(disk, *args) as daemon:
        write(daemon.uri, 100 * KiB, 1)
        assert daemon.terminate() == 0
    for _ in range(2):
        with serving(disk, *args) as daemon:
            assert dirty(daemon.uri, "a") == [(64 * KiB, 64 * KiB)]
            assert dirty(daemon.uri, "b/ä") == [(100 * KiB, 4 * KiB)]
            daemon.kill()
    with serving(disk, "-r", *args) as daemon:
        assert dirty(daemon.uri, "a") == [(64 * KiB, 64 * KiB)]


def test_bitmap_without_a_directory_ends_with_the_daemon(disk: Path) -> None:
    for _ in range(2):
        with serving(disk, "-B", "a:512") as daemon:
            assert dirty(daemon.uri, "a") == []
            write(daemon.uri, 1000, 30)
            assert dirty(daemon.uri, "a") == [(512, 1024)]


def test_bitmap_that_is_not_asked_for_records_all_the_same(disk: Path, state: Path) -> None:
    with serving(disk, "--state-dir", state, "-B", "a"):
        pass
    with serving(disk, "--state-dir", state) as daemon:
        assert dirty(daemon.uri, "a") == []
        write(daemon.uri, 0, 1)
    with serving(disk, "--state-dir", state, "-B", "a") as daemon:
        assert dirty(daemon.uri, "a") == [(0, 64 * KiB)]


def test_directory_from_the_environment(disk: Path, state: Path) -> None:
    with serving(disk, "-B", "a", env={"NBDMIRROR_SERVE_STATE_DIR": str(state)}):
        assert len(list((state / "bitmaps").iterdir())) == 1


def test_disk_has_one_daemon_that_writes_or_any_that_only_read(disk: Path, sock_dir: Path) -> None:
    with serving(disk) as daemon:
        for option in ([], ["-r"]):
            line = refused(FAILED, disk, "-k", sock_dir / "s", *option)
            assert f"'{disk}' is in use by process {daemon.pid}" in line
    with serving(disk, "-r"), serving(disk, "-r"):
        assert "is in use" in refused(FAILED, disk, "-k", sock_dir / "s")


def test_directory_has_one_daemon(disk: Path, state: Path, tmp_path: Path, sock_dir: Path) -> None:
    other = make_disk(tmp_path / "other", MiB)
    with serving(disk, "--state-dir", state) as daemon:
        line = refused(FAILED, other, "-k", sock_dir / "s", "--state-dir", state)
        assert f"the state directory '{state}' is in use by process {daemon.pid}" in line
        daemon.kill()
    with serving(other, "--state-dir", state):
        pass


def test_wrong_usage(disk: Path, state: Path, sock_dir: Path) -> None:
    with serving(disk, "--state-dir", state, "-B", "a:4k"):
        pass
    for args, reason in (
        (["-B", "a", "-B", "a"], "twice"),
        (["-B", "x:5"], "power of two"),
        (["-B", "x:y"], "not a size"),
        (["-B", ""], "1 to 1023 bytes"),
        (["-B", "a:64k", "--state-dir", state], "granularity of 4096, not 65536"),
        (["-B", "x", "-r", "--state-dir", state], "no bitmap 'x' yet"),
        (["-B", "x", "-r"], "no bitmap 'x' yet"),
        (["--state-dir", disk], f"cannot use the state directory '{disk}'"),
        (["--bitmap-sync", "often"], "'often' is not one of"),
        (["--on-inconsistent", "hope"], "'hope' is not one of"),
    ):
        assert reason in refused(USAGE, disk, "-k", sock_dir / "s", *args)


def test_damaged_file_is_named_and_left_as_it_is(disk: Path, state: Path, sock_dir: Path) -> None:
    with serving(disk, "--state-dir", state, "-B", "a"):
        pass
    (path,) = (state / "bitmaps").iterdir()
    os.truncate(path, 5000)
    content = path.read_bytes()
    line = refused(FAILED, disk, "-k", sock_dir / "s", "--state-dir", state)
    assert f"'{path}' can't be used: it has 5000 bytes instead of 16384; move it away" in line
    assert path.read_bytes() == content
