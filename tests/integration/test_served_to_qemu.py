"""Our server under qemu-img and qemu-io."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from nbdmirror.units import KiB, MiB
from tests.support.daemon import Daemon, serving
from tests.support.peers import require
from tests.support.tools import (
    DATA,
    PIECES,
    SIZE,
    about,
    allocated,
    fails,
    make_disk,
    mapped,
    pattern,
    run,
    same_content,
    sha256,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(autouse=True)
def _tools() -> None:
    require("qemu-img", "qemu-io")


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """The test's own: a disk has one daemon."""
    return make_disk(tmp_path / "disk", SIZE, PIECES)


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """For the tests that only read, over a disk like theirs."""
    with serving(make_disk(tmp_path_factory.mktemp("shared") / "disk", SIZE, PIECES), "-x", "a") as daemon:
        yield daemon


def qemu_io(uri: str, *commands: str) -> str:
    """Run commands of qemu-io, which fails where one does, a comparison with a pattern included."""
    words = [word for command in commands for word in ("-c", command)]
    said = run("qemu-io", "-f", "raw", *words, uri)
    assert "failed" not in said, said
    return said


# --- qemu-img --------------------------------------------------------------------------------------------------------


def test_info(daemon: Daemon) -> None:
    shown = json.loads(run("qemu-img", "info", "-f", "raw", "--output=json", daemon.uri))
    assert (shown["virtual-size"], shown["format"]) == (SIZE, "raw")


def test_map(daemon: Daemon) -> None:
    shown = json.loads(run("qemu-img", "map", "-f", "raw", "--output=json", daemon.uri))
    assert [(each["start"], each["length"], each["data"]) for each in shown] == mapped(SIZE, DATA)
    assert all(each["zero"] is not each["data"] for each in shown)


def test_compare(tmp_path: Path, disk: Path, daemon: Daemon) -> None:
    compare = ("qemu-img", "compare", "-f", "raw", "-F", "raw")
    assert "identical" in run(*compare, disk, daemon.uri)
    other = make_disk(tmp_path / "other", SIZE, {**PIECES, 9 * MiB: b"x"})
    assert fails(*compare, other, daemon.uri) == ""
    assert "identical" in run(*compare, disk, daemon.uri)


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
def test_convert_from_us(tmp_path: Path, disk: Path, daemon: Daemon, fmt: str) -> None:
    copy = tmp_path / "copy"
    run("qemu-img", "convert", "-f", "raw", "-O", fmt, daemon.uri, copy)
    assert "identical" in run("qemu-img", "compare", "-f", fmt, "-F", "raw", copy, disk)
    assert allocated(copy) < allocated(disk) + MiB, "holes are kept"


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
@pytest.mark.parametrize("old", [b"", pattern(SIZE, 4)], ids=["onto nothing", "over old data"])
def test_convert_to_us(tmp_path: Path, disk: Path, fmt: str, old: bytes) -> None:
    source = tmp_path / "source"
    run("qemu-img", "convert", "-f", "raw", "-O", fmt, disk, source)
    target = make_disk(tmp_path / "target", SIZE, {0: old} if old else {})
    with serving(target) as daemon:
        run("qemu-img", "convert", "-n", "-W", "-m", "8", "-f", fmt, "-O", "raw", source, daemon.uri)
    assert same_content(disk, target)
    assert allocated(target) < allocated(disk) + MiB


# --- qemu-io ---------------------------------------------------------------------------------------------------------


def test_patterns_are_written_and_read_back(tmp_path: Path, disk: Path) -> None:
    target = make_disk(tmp_path / "target", SIZE, PIECES)
    with serving(target) as daemon:
        qemu_io(
            daemon.uri,
            "write -P 0xa5 2M 1M",
            "write -P 0x5a 2560k 64k",
            "read -P 0xa5 2M 512k",
            "read -P 0x5a 2560k 64k",
            "read -P 0xa5 2624k 448k",
            "read -P 0 3M 1M",
            "aio_write -P 0x11 8M 2M",
            "aio_write -P 0x22 10M 64k",
            "aio_flush",
            "read -P 0x11 8M 2M",
            "read -P 0x22 10M 64k",
            "write -f -P 0x33 12M 3M",
            "write -f -P 0x44 512 512",
            "read -P 0x33 12M 3M",
            "flush",
        )
        expected = bytearray(disk.read_bytes())
        for at, length, byte in (
            (2 * MiB, MiB, 0xA5),
            (2560 * KiB, 64 * KiB, 0x5A),
            (8 * MiB, 2 * MiB, 0x11),
            (10 * MiB, 64 * KiB, 0x22),
            (12 * MiB, 3 * MiB, 0x33),
            (512, 512, 0x44),
        ):
            expected[at : at + length] = bytes([byte]) * length
        assert target.read_bytes() == expected


@pytest.mark.parametrize(
    ("command", "freed"),
    [
        ("discard 1M 2M", True),
        ("write -z -u 1M 2M", True),
        ("write -z -u -f 1M 2M", True),
        ("write -z 1M 2M", False),
        ("write -z -n -u 1M 2M", True),
    ],
)
def test_discard_and_the_kinds_of_zeroes(tmp_path: Path, command: str, freed: bool) -> None:
    old = pattern(4 * MiB)
    disk = make_disk(tmp_path / "disk", 4 * MiB, {0: old})
    before = allocated(disk)
    with serving(disk) as daemon:
        qemu_io(daemon.uri, command, "flush", "read -P 0 1M 2M")
        shown = json.loads(run("qemu-img", "map", "-f", "raw", "--output=json", daemon.uri))
    assert disk.read_bytes() == old[:MiB] + bytes(2 * MiB) + old[3 * MiB :]
    assert before - allocated(disk) == about(2 * MiB if freed else 0)
    if freed:
        assert [(each["start"], each["length"], each["zero"]) for each in shown] == [
            (0, MiB, False),
            (MiB, 2 * MiB, True),
            (3 * MiB, MiB, False),
        ]


def test_nothing_is_written_to_a_read_only_export(disk: Path) -> None:
    before = sha256(disk)
    with serving(disk, "-r") as daemon:
        assert "denied" in fails("qemu-io", "-f", "raw", "-c", "write 0 64k", daemon.uri)
        run("qemu-io", "-r", "-f", "raw", "-c", "read 0 64k", daemon.uri)
    assert sha256(disk) == before
