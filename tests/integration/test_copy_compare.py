"""`nbdmirror copy` and `nbdmirror compare` as a user runs them."""

from __future__ import annotations

import json
import os
import random
from typing import TYPE_CHECKING

import pytest

from nbdmirror.units import KiB, MiB
from tests.support import peers
from tests.support.daemon import run_cli
from tests.support.mirroring import allocated, make_disk, refused, scattered

if TYPE_CHECKING:
    from pathlib import Path

pytest.importorskip("nbd", reason="libnbd's Python binding is not installed")

SIZE = 16 * MiB


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return scattered(tmp_path / "source.img", SIZE, 2 * MiB, random.Random(5), piece=64 * KiB)


def test_file_to_a_new_file(disk: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.img"
    result = run_cli("copy", disk, copy, "--create", "--json")
    assert (result.returncode, result.stderr) == (0, "")
    assert copy.read_bytes() == disk.read_bytes()
    assert allocated(copy) <= allocated(disk) * 1.05
    told = json.loads(result.stdout)
    assert (told["source"], told["target"], told["size"]) == (str(disk), str(copy), SIZE)
    assert told["x-bytes-sent"] == 2 * MiB
    assert run_cli("compare", disk, copy).returncode == 0


def test_allocated_copy(disk: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.img"
    assert run_cli("copy", disk, copy, "--create", "--allocated").returncode in (0, 1)
    written = make_disk(tmp_path / "written.img", SIZE, (0, b"x" * SIZE))
    assert run_cli("copy", disk, written, "--allocated").returncode == 0
    assert allocated(written) >= SIZE
    assert written.read_bytes() == disk.read_bytes()


def test_sparse_copy_over_old_data(disk: Path, tmp_path: Path) -> None:
    old = make_disk(tmp_path / "old.img", SIZE, (0, b"x" * SIZE))
    assert run_cli("copy", disk, old).returncode == 0
    assert old.read_bytes() == disk.read_bytes()
    assert allocated(old) <= allocated(disk) * 1.05


@pytest.mark.parametrize("option", ["--no-extents", "--no-flush", "--connections=1", "--requests=1", "--request-size=64k"])
def test_options(option: str, disk: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.img"
    assert run_cli("copy", disk, copy, "--create", option).returncode == 0
    assert copy.read_bytes() == disk.read_bytes()


def test_into_a_longer_target(disk: Path, tmp_path: Path) -> None:
    longer = make_disk(tmp_path / "longer.img", SIZE + 5000, (SIZE, b"e" * 5000))
    assert run_cli("copy", disk, longer).returncode == 0
    assert longer.read_bytes() == disk.read_bytes() + b"e" * 5000


def test_captive_servers(disk: Path, tmp_path: Path) -> None:
    peers.require("nbdkit")
    copy = make_disk(tmp_path / "copy.img", SIZE)
    served = ["[", "nbdkit", "--exit-with-parent", "file", str(disk), "]"]
    assert run_cli("copy", *served, "[", "nbdkit", "file", copy, "]").returncode == 0
    assert copy.read_bytes() == disk.read_bytes()
    assert run_cli("compare", *served, copy).returncode == 0
    result = run_cli("compare", *served, "[", "nbdkit", "memory", str(SIZE), "]", "--json")
    assert result.returncode == 1
    assert json.loads(result.stdout)["same"] is False


def test_progress_lines(disk: Path, tmp_path: Path) -> None:
    reading, writing = os.pipe()
    result = run_cli("copy", disk, tmp_path / "copy.img", "--create", f"--progress={writing}", pass_fds=[writing])
    os.close(writing)
    with os.fdopen(reading) as pipe:
        lines = pipe.read().splitlines()
    assert (result.returncode, result.stderr) == (0, "")
    assert lines[0] == "0/100"
    assert lines[-1] == "100/100"
    numbers = [int(line.partition("/")[0]) for line in lines]
    assert numbers == sorted(set(numbers))


def test_errors(disk: Path, tmp_path: Path) -> None:
    gone, small = tmp_path / "gone", make_disk(tmp_path / "small.img", SIZE - 512)
    refused(run_cli("copy", disk, gone), 1, "No such file or directory", str(gone))
    refused(run_cli("copy", gone, tmp_path / "new", "--create"), 1, "No such file or directory", str(gone))
    refused(run_cli("copy", disk, small), 1, f"has {SIZE - 512} bytes", "at least as large")
    refused(run_cli("copy", disk, "https://example.com/"), 2, "'https' is not supported")
    refused(run_cli("copy", disk, gone, "--create", "--progress=77"), 2, "--progress=77")
    refused(run_cli("copy", "[", "no-such-server", "]", gone), 2, "no-such-server")
    for words in (["copy", "[", "nbdkit", disk], ["copy", "[", "]", disk], ["copy", disk]):
        result = run_cli(*words)
        assert (result.returncode, "Traceback" in result.stderr) == (2, False)
    assert not gone.exists()
    assert not (tmp_path / "new").exists()
    assert small.read_bytes() == bytes(SIZE - 512)


def test_file_that_was_made_is_removed_when_the_copy_fails(tmp_path: Path) -> None:
    peers.require("nbdkit")
    bad = ["[", "nbdkit", "--filter=error", "pattern", str(SIZE), "error-pread=EIO", "error-pread-rate=50%", "]"]
    copy = tmp_path / "copy.img"
    refused(run_cli("copy", *bad, copy, "--create"), 1, "Input/output error", "read")
    assert not copy.exists()
    copy.write_bytes(bytes(SIZE))
    refused(run_cli("copy", *bad, copy, "--create"), 1, "Input/output error")
    assert copy.exists(), "what was there before stays"


def test_compare(disk: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.img"
    other.write_bytes(disk.read_bytes())
    assert run_cli("compare", disk, other).stdout == ""
    with other.open("r+b") as out:
        out.seek(5 * MiB + 3)
        out.write(bytes([disk.read_bytes()[5 * MiB + 3] ^ 255]))
    result = run_cli("compare", disk, other)
    assert (result.returncode, result.stderr) == (1, "")
    assert result.stdout == f"different: first at offset {5 * MiB + 3}, 1 bytes in total\n"
    told = json.loads(run_cli("compare", disk, other, "--json").stdout)
    assert told == {"same": False, "first": 5 * MiB + 3, "differing": 1, "compared": SIZE}
    refused(run_cli("compare", disk, tmp_path / "gone"), 2, "No such file or directory")
    bad = ["[", "nbdkit", "--filter=error", "pattern", str(SIZE), "error-pread=EIO", "error-pread-rate=100%", "]"]
    peers.require("nbdkit")
    refused(run_cli("compare", disk, *bad), 2, "Input/output error")
