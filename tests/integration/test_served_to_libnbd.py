"""Our server under libnbd's tools: nbdinfo, nbdcopy and nbdsh."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

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
    content,
    data_ranges,
    fails,
    make_disk,
    mapped,
    nbdsh,
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
    require("nbdinfo", "nbdcopy", "nbdsh")


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """The test's own: a disk has one daemon."""
    return make_disk(tmp_path / "disk", SIZE, PIECES)


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """For the tests that only read, over a disk like theirs."""
    with serving(make_disk(tmp_path_factory.mktemp("shared") / "disk", SIZE, PIECES)) as daemon:
        yield daemon


def exports(*argv: str) -> list[dict[str, Any]]:
    # Without the look at the content: where no `file` command is installed, libnbd 1.14 prints what happened to be in memory.
    found: list[dict[str, Any]] = json.loads(run("nbdinfo", "--no-content", "--json", *argv))["exports"]
    return found


# --- nbdinfo ---------------------------------------------------------------------------------------------------------

WHAT_A_DISK_CAN = {
    "is_rotational": False,
    "is_read_only": False,
    "can_cache": True,
    "can_df": True,
    "can_fast_zero": True,
    "can_flush": True,
    "can_fua": True,
    "can_multi_conn": True,
    "can_trim": True,
    "can_zero": True,
    "block_size_minimum": 1,
    "block_size_preferred": 4096,
    "block_size_maximum": 64 * MiB,
    "contexts": ["base:allocation", "qemu:allocation-depth"],
    "export-size": SIZE,
}
WHAT_A_READ_ONLY_DISK_CAN = WHAT_A_DISK_CAN | {
    "is_read_only": True,
    "can_fast_zero": False,
    "can_trim": False,
    "can_zero": False,
}


@pytest.mark.parametrize(
    ("options", "expected"), [((), WHAT_A_DISK_CAN), (("-r",), WHAT_A_READ_ONLY_DISK_CAN)], ids=["writable", "read-only"]
)
def test_nbdinfo_sees_every_field(disk: Path, options: tuple[str, ...], expected: dict[str, Any]) -> None:
    with serving(disk, "-x", "a disk", "-D", "the first\N{LATIN SMALL LETTER E WITH ACUTE}", *options) as daemon:
        (shown,) = exports(daemon.uri)
    assert {name: shown[name] for name in expected} == expected
    assert shown["export-name"] == "a disk"
    assert shown["description"] == "the first\N{LATIN SMALL LETTER E WITH ACUTE}"


def test_nbdinfo_speaks_fixed_newstyle_and_structured_replies(daemon: Daemon) -> None:
    shown = json.loads(run("nbdinfo", "--no-content", "--json", daemon.uri))
    assert (shown["protocol"], shown["TLS"], shown["structured"]) == ("newstyle-fixed", False, True)
    assert run("nbdinfo", "--size", daemon.uri).strip() == str(SIZE)


def test_nbdinfo_lists_the_export_under_its_name(disk: Path) -> None:
    with serving(disk, "-x", "a", "-D", "what it is") as daemon:
        (shown,) = exports("--list", f"nbd+unix:///?socket={daemon.socket}")
        assert (shown["export-name"], shown["description"], shown["export-size"]) == ("a", "what it is", SIZE)
        assert "No such file or directory for export: b\n" in fails(
            "nbdinfo", "--no-content", f"nbd+unix:///b?socket={daemon.socket}"
        )
        fails("nbdinfo", "--no-content", f"nbd+unix:///?socket={daemon.socket}")
        run("nbdinfo", "--no-content", daemon.uri)


def test_nbdinfo_maps_holes_and_data_exactly(disk: Path, daemon: Daemon) -> None:
    assert data_ranges(disk) == DATA, "the file system keeps holes"
    shown = json.loads(run("nbdinfo", "--map", "--json", daemon.uri))
    assert [(each["offset"], each["length"], each["type"] == 0) for each in shown] == mapped(SIZE, DATA)
    assert {each["description"] for each in shown} == {"data", "hole,zero"}


def test_nbdinfo_maps_an_empty_disk_and_one_without_holes(tmp_path: Path) -> None:
    for name, pieces, kind in (("empty", {}, 3), ("full", {0: pattern(MiB)}, 0)):
        with serving(make_disk(tmp_path / name, MiB, pieces)) as daemon:
            (only,) = json.loads(run("nbdinfo", "--map", "--json", daemon.uri))
        assert (only["offset"], only["length"], only["type"]) == (0, MiB, kind)


# --- nbdcopy ---------------------------------------------------------------------------------------------------------


def test_nbdcopy_reads_all_and_keeps_the_holes(tmp_path: Path, disk: Path, daemon: Daemon) -> None:
    copy = tmp_path / "copy"
    run("nbdcopy", daemon.uri, copy)
    assert same_content(disk, copy)
    assert allocated(copy) == about(allocated(disk))


@pytest.mark.parametrize("old", [b"", pattern(SIZE, 4)], ids=["onto nothing", "over old data"])
def test_nbdcopy_writes_all_and_keeps_the_holes(tmp_path: Path, disk: Path, old: bytes) -> None:
    target = make_disk(tmp_path / "target", SIZE, {0: old} if old else {})
    with serving(target) as daemon:
        run("nbdcopy", "--flush", *([] if old else ["--destination-is-zero"]), disk, daemon.uri)
        assert same_content(disk, target), "once it was flushed, without waiting for the end of the daemon"
    assert allocated(target) == about(allocated(disk))


def test_nbdcopy_allocates_when_it_is_told_to(tmp_path: Path, disk: Path) -> None:
    target = make_disk(tmp_path / "target", SIZE)
    with serving(target) as daemon:
        run("nbdcopy", "--allocated", disk, daemon.uri)
    assert same_content(disk, target)
    assert allocated(target) >= SIZE


def test_nbdcopy_between_two_of_ours_without_structured_replies(tmp_path: Path, disk: Path) -> None:
    target = make_disk(tmp_path / "target", SIZE, {0: pattern(SIZE, 4)})
    with serving(disk, "-r") as source, serving(target) as other:
        run("nbdcopy", "--no-extents", "--connections=4", "--requests=64", source.uri, other.uri)
    assert same_content(disk, target)


def test_nothing_is_written_to_a_read_only_export(tmp_path: Path, disk: Path) -> None:
    before, allocation = sha256(disk), allocated(disk)
    with serving(disk, "-r") as daemon:
        fails("nbdcopy", make_disk(tmp_path / "other", SIZE, {0: pattern(MiB, 5)}), daemon.uri)
        nbdsh(
            daemon.uri,
            """
            import errno
            h.set_strict_mode(0)
            for attempt in (lambda: h.pwrite(b"x" * 512, 0), lambda: h.zero(4096, 0), lambda: h.trim(4096, 0)):
                try:
                    attempt()
                except nbd.Error as error:
                    assert error.errnum == errno.EPERM, error
                else:
                    raise AssertionError("it was written to")
            """,
        )
    assert (sha256(disk), allocated(disk)) == (before, allocation)


# --- nbdsh -----------------------------------------------------------------------------------------------------------


def test_a_read_comes_in_chunks_of_data_and_holes(daemon: Daemon) -> None:
    out = nbdsh(
        daemon.uri,
        f"""
        chunks = []
        def chunk(data, offset, status, error):
            chunks.append((offset, len(data), status == nbd.READ_HOLE))
            assert status != nbd.READ_HOLE or not any(data)
        got = h.pread_structured({MiB}, {4 * MiB + 512 * KiB}, chunk)
        print(sorted(chunks))
        assert not any(got[:{512 * KiB}]) and all(got[{512 * KiB} + i * 4096:][:4096].strip(b"\\0") for i in range(128))

        chunks = []
        assert h.pread_structured({MiB}, {4 * MiB + 512 * KiB}, chunk, nbd.CMD_FLAG_DF) == got
        print(chunks)
        """,
    )
    whole, hole = (4 * MiB + 512 * KiB, MiB), 512 * KiB
    assert out.splitlines() == [
        str([(whole[0], hole, True), (5 * MiB, MiB - hole, False)]),
        str([(*whole, False)]),
    ]


def test_large_reads_come_in_chunks_too(daemon: Daemon) -> None:
    out = nbdsh(
        daemon.uri,
        f"""
        chunks = []
        def chunk(data, offset, status, error):
            chunks.append((offset, len(data), status != nbd.READ_HOLE))
        h.pread_structured({SIZE}, 0, chunk)
        print(sorted(chunks))
        """,
    )
    assert out.strip() == str(mapped(SIZE, DATA))


def test_block_status_and_its_shortest_form(daemon: Daemon) -> None:
    out = nbdsh(
        daemon.uri,
        f"""
        def ask(length, offset, flags=0):
            def status(context, at, entries, error):
                assert context == nbd.CONTEXT_BASE_ALLOCATION
                print(at, *entries)
            h.block_status(length, offset, status, flags)
        ask({SIZE}, 0)
        ask({SIZE}, 0, nbd.CMD_FLAG_REQ_ONE)
        ask({64 * KiB}, {4 * MiB}, nbd.CMD_FLAG_REQ_ONE)
        ask(1, {SIZE - 1})
        """,
        "--base-allocation",
    )
    every = [word for _, length, data in mapped(SIZE, DATA) for word in (length, 0 if data else 3)]
    assert [[int(word) for word in line.split()] for line in out.splitlines()] == [
        [0, *every],
        [0, *every[:2]],
        [4 * MiB, 64 * KiB, 3],
        [SIZE - 1, 1, 0],
    ]


def test_zero_and_trim_free_the_range_and_no_hole_keeps_it(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk", 8 * MiB, {0: pattern(8 * MiB)})
    with serving(disk) as daemon:

        def zeroed(command: str, offset: int) -> int:
            """How much storage the disk has lost to the command."""
            before = allocated(disk)
            nbdsh(daemon.uri, f"{command}\nh.flush()\nassert h.pread({MiB}, {offset}) == bytearray({MiB})")
            assert content(disk, offset, MiB) == bytes(MiB)
            return before - allocated(disk)

        assert zeroed(f"h.zero({MiB}, {MiB})", MiB) == about(MiB)
        assert zeroed(f"h.trim({MiB}, {3 * MiB}, nbd.CMD_FLAG_FUA)", 3 * MiB) == about(MiB)
        assert zeroed(f"h.zero({MiB}, {5 * MiB}, nbd.CMD_FLAG_FAST_ZERO | nbd.CMD_FLAG_FUA)", 5 * MiB) == about(MiB)
        assert zeroed(f"h.zero({MiB}, {7 * MiB}, nbd.CMD_FLAG_NO_HOLE)", 7 * MiB) == about(0)
    for piece in (0, 2, 4, 6):
        assert content(disk, piece * MiB, MiB) == pattern(8 * MiB)[piece * MiB :][:MiB], "what lies between is untouched"
    assert [(at // MiB, length // MiB) for at, length in data_ranges(disk)][:3] == [(0, 1), (2, 1), (4, 1)]


def test_zero_is_exact_to_the_byte(tmp_path: Path) -> None:
    before = pattern(MiB)
    disk = make_disk(tmp_path / "disk", MiB, {0: before})
    with serving(disk) as daemon:
        nbdsh(daemon.uri, "h.zero(10_001, 5_003)\nh.zero(10_001, 105_003, nbd.CMD_FLAG_NO_HOLE)\nh.zero(1, 1048575)")
    after = bytearray(before)
    for at, length in ((5_003, 10_001), (105_003, 10_001), (MiB - 1, 1)):
        after[at : at + length] = bytes(length)
    assert disk.read_bytes() == after


def test_cache_does_no_harm(disk: Path, daemon: Daemon) -> None:
    before = sha256(disk)
    nbdsh(daemon.uri, f"h.cache({SIZE}, 0)\nh.cache(1, {SIZE - 1})\nassert h.pread(1, {SIZE - 1}) != b''")
    assert sha256(disk) == before


def test_the_largest_requests(tmp_path: Path) -> None:
    length = 64 * MiB
    disk = make_disk(tmp_path / "disk", length + 8 * KiB)
    (tmp_path / "data").write_bytes(pattern(length))
    with serving(disk) as daemon:
        nbdsh(
            daemon.uri,
            f"""
            import errno, pathlib
            data = pathlib.Path({str(tmp_path / "data")!r}).read_bytes()
            h.pwrite(data, 4096, nbd.CMD_FLAG_FUA)
            assert h.pread({length}, 4096) == data
            h.zero({length + 8 * KiB}, 0)
            h.pwrite(data, 4095)
            h.set_strict_mode(0)
            for too_much in (lambda: h.pread({length + 1}, 0), lambda: h.pwrite(data + b"x", 0)):
                try:
                    too_much()
                except nbd.Error as error:
                    assert error.errnum in (errno.EOVERFLOW, errno.EINVAL, errno.ERANGE), error
                else:
                    raise AssertionError("more than the limit was taken")
            assert h.pread(1, 4095) == data[:1]
            """,
        )
        assert daemon.memory() < 384 * MiB
    assert content(disk, 4095, length) == pattern(length)
    assert (content(disk, 0, 4095), content(disk, 4095 + length, 4096)) == (bytes(4095), bytes(4096))
