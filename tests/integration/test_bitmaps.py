"""Dirty bitmaps of a running daemon under real clients: what is counted after each step, and what is seen over NBD."""

from __future__ import annotations

import json
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from nbdmirror.units import KiB, MiB
from tests.support.control import Control, actions_of, unix
from tests.support.daemon import Daemon, serving
from tests.support.peers import require
from tests.support.tools import make_disk, mapped, run

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SIZE = 64 * MiB
CHUNK = 64 * KiB

# Each in chunks of 64 KiB: some begin at a chunk's edge, some reach over one, one is the last.
FIRST = [(0, CHUNK), (MiB, CHUNK), (32 * MiB, CHUNK), (SIZE - CHUNK, CHUNK)]  # 0, 16, 512, 1023
SECOND = [(0, CHUNK), (0xF8000, CHUNK), (0x2008000, CHUNK), (0x3FE0000, CHUNK)]  # 0, 15, 16, 512, 513, 1022


@pytest.fixture(autouse=True)
def programs() -> None:
    require("qemu-io", "qemu-img", "nbdinfo")


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return make_disk(tmp_path / "disk.img", SIZE)


@contextmanager
def controlled(disk: Path) -> Iterator[tuple[Daemon, Control]]:
    with serving(disk, qmp=True) as daemon, Control(daemon.control) as qmp:
        yield daemon, qmp


def write(daemon: Daemon, ranges: list[tuple[int, int]]) -> None:
    commands = [word for offset, length in ranges for word in ("-c", f"write -P 0x5d {offset} {length}")]
    run("qemu-io", "-f", "raw", *commands, daemon.uri)


def dirty(uri: str, name: str) -> list[tuple[int, int]]:
    """The dirty ranges that nbdinfo sees."""
    entries = json.loads(run("nbdinfo", "--json", f"--map=qemu:dirty-bitmap:{name}", uri))
    found: list[tuple[int, int]] = []
    for entry in entries:
        if not entry["type"]:
            continue
        if found and sum(found[-1]) == entry["offset"]:
            found[-1] = found[-1][0], found[-1][1] + entry["length"]
        else:
            found.append((entry["offset"], entry["length"]))
    return found


def seen_by_qemu(socket: Path | str, export: str, name: str) -> list[tuple[int, int]]:
    """The dirty ranges as qemu-img sees them: there, what is dirty is data, and what is clean is not."""
    options = f"driver=nbd,export={export},server.type=unix,server.path={socket},x-dirty-bitmap=qemu:dirty-bitmap:{name}"
    entries = json.loads(run("qemu-img", "map", "--output=json", "--image-opts", options))
    # Flag 1 arrives where a hole would be told of: QEMU shows the inverse.
    return [(entry["start"], entry["length"]) for entry in entries if not entry["data"]]


def test_merges_and_aborted_transactions(disk: Path) -> None:
    """A records all, B the first writes, C the second, D is made of B and C: 7, 4, 6 and 7 chunks, and D is as A."""
    with controlled(disk) as (daemon, qmp):
        qmp.transact(("add", {"name": "A"}), ("add", {"name": "B"}))
        write(daemon, FIRST)
        assert {name: qmp.chunks(name) for name in "AB"} == {"A": 4, "B": 4}

        before = qmp.bitmaps()
        turn = [("disable", {"name": "B"}), ("add", {"name": "C"}), ("clear", {"name": "A"}), ("remove", {"name": "A"})]
        assert qmp.refused("transaction", actions=actions_of(*turn, ("abort", {}))) == (
            "Transaction aborted using Abort action"
        )
        assert qmp.bitmaps() == before

        qmp.transact(*turn[:2])
        write(daemon, SECOND)
        assert {name: qmp.chunks(name) for name in "ABC"} == {"A": 7, "B": 4, "C": 6}

        join = [
            ("disable", {"name": "C"}),
            ("add", {"name": "D", "disabled": True}),
            ("merge", {"target": "D", "bitmaps": ["B", "C"]}),
        ]
        before = qmp.bitmaps()
        qmp.refused("transaction", actions=actions_of(*join, ("abort", {})))
        assert qmp.bitmaps() == before

        qmp.transact(*join, ("disable", {"name": "A"}))
        assert {name: qmp.chunks(name) for name in "ABCD"} == {"A": 7, "B": 4, "C": 6, "D": 7}
        hashes = {name: qmp.ask("x-debug-block-dirty-bitmap-sha256", node="source", name=name)["sha256"] for name in "ABCD"}
        assert hashes["A"] == hashes["D"]
        assert len(set(hashes.values())) == 3

        for name in "ABCD":
            qmp.bitmap("remove", name)
        assert qmp.bitmaps() == {}


def test_checkpoint_rotation_loses_no_write(disk: Path) -> None:
    with controlled(disk) as (daemon, qmp):
        qmp.bitmap("add", "now")
        write(daemon, FIRST)
        qmp.transact(
            ("add", {"name": "past", "disabled": True}),
            ("merge", {"target": "past", "bitmaps": ["now"]}),
            ("clear", {"name": "now"}),
        )
        assert (qmp.chunks("past"), qmp.chunks("now")) == (4, 0)
        write(daemon, SECOND)
        assert (qmp.chunks("past"), qmp.chunks("now")) == (4, 6)
        qmp.transact(("merge", {"target": "now", "bitmaps": ["past"]}), ("remove", {"name": "past"}))
        assert (qmp.chunks("now"), list(qmp.bitmaps())) == (7, ["now"])


def test_every_kind_of_write_counts(disk: Path) -> None:
    with controlled(disk) as (daemon, qmp):
        qmp.bitmap("add", "b")
        run(
            "qemu-io",
            "-f",
            "raw",
            "-d",
            "unmap",
            "-c",
            "write 0 1",
            "-c",
            "write -z 1M 64k",
            "-c",
            "discard 2M 64k",
            daemon.uri,
        )
        assert dirty(daemon.uri, "b") == [(0, CHUNK), (MiB, CHUNK), (2 * MiB, CHUNK)]
        run("qemu-io", "-f", "raw", "-c", "read 0 4M", "-c", "flush", daemon.uri)
        assert qmp.chunks("b") == 3


def test_disabled_bitmap_stays_as_it_is(disk: Path) -> None:
    with controlled(disk) as (daemon, qmp):
        for name in ("on", "off", "late"):
            qmp.bitmap("add", name, disabled=name == "late")
        write(daemon, FIRST)
        qmp.bitmap("disable", "off")
        qmp.bitmap("enable", "late")
        write(daemon, SECOND)
        assert {name: qmp.chunks(name) for name in ("on", "off", "late")} == {"on": 7, "off": 4, "late": 6}
        flags = {name: info["recording"] for name, info in qmp.bitmaps().items()}
        assert flags == {"late": True, "off": False, "on": True}


def test_granularities_over_nbd(disk: Path, sock_dir: Path) -> None:
    """The same writes in chunks of 512 bytes and of 64 KiB, seen by nbdinfo and by qemu-img."""
    writes = [(MiB, 1), (MiB + 64 * KiB - 512, 1024), (3 * MiB, 3 * MiB), (SIZE - 1, 1)]
    fine = [(MiB, 512), (MiB + CHUNK - 512, 1024), (3 * MiB, 3 * MiB), (SIZE - 512, 512)]
    coarse = [(MiB, 2 * CHUNK), (3 * MiB, 3 * MiB), (SIZE - CHUNK, CHUNK)]
    with controlled(disk) as (daemon, qmp):
        qmp.bitmap("add", "fine", granularity=512)
        qmp.bitmap("add", "coarse")
        write(daemon, writes)
        for name in ("fine", "coarse"):
            qmp.bitmap("disable", name)
        qmp.ask("nbd-server-start", addr=unix(sock_dir / "n"))
        export = {"type": "nbd", "id": "e", "node_name": "source", "name": "snap"}
        qmp.ask("block-export-add", **export, bitmaps=["fine", "coarse"])
        uri = f"nbd+unix:///snap?socket={sock_dir / 'n'}"
        for name, expected in (("fine", fine), ("coarse", coarse)):
            assert dirty(uri, name) == expected
            assert seen_by_qemu(sock_dir / "n", "snap", name) == expected
            assert sum(length for _, length in expected) == qmp.bitmaps()[name]["count"]
        assert mapped(SIZE, coarse)  # clean in between, to the end
        # They are copies in all but granularity.
        qmp.ask("block-export-del", id="e")
        qmp.bitmap("add", "merged", disabled=True)
        qmp.ask("block-dirty-bitmap-merge", node="source", target="merged", bitmaps=["fine"])
        assert dirty(daemon.uri, "merged") == coarse


def test_exported_bitmap_records_on_and_is_nobody_elses(disk: Path, sock_dir: Path) -> None:
    busy = "Bitmap 'b' is currently in use by another operation and cannot be used"
    with controlled(disk) as (daemon, qmp):
        qmp.bitmap("add", "b")
        qmp.bitmap("add", "other")
        qmp.ask("nbd-server-start", addr=unix(sock_dir / "n"))
        qmp.ask("block-export-add", type="nbd", id="e", node_name="source", writable=True, bitmaps=["b"])
        uri = f"nbd+unix:///source?socket={sock_dir / 'n'}"
        write(daemon, FIRST)
        assert len(dirty(uri, "b")) == 4
        run("qemu-io", "-f", "raw", "-c", "write 5M 64k", uri)
        assert len(dirty(uri, "b")) == 5
        assert qmp.bitmaps()["b"] == {
            "name": "b",
            "recording": True,
            "persistent": False,
            "busy": True,
            "granularity": CHUNK,
            "count": 5 * CHUNK,
        }
        for verb in ("remove", "clear", "enable", "disable"):
            assert qmp.refused(f"block-dirty-bitmap-{verb}", node="source", name="b") == busy
        merge = {"node": "source", "target": "other", "bitmaps": ["b"]}
        assert qmp.refused("block-dirty-bitmap-merge", **merge) == busy
        assert qmp.refused("transaction", actions=actions_of(("clear", {"name": "other"}), ("clear", {"name": "b"}))) == busy
        qmp.ask("block-export-del", id="e")
        assert qmp.bitmaps()["b"]["busy"] is False
        qmp.bitmap("clear", "b")


def test_served_export_shows_what_bitmaps_there_are(disk: Path) -> None:
    """Without an export of its own, a bitmap is seen where the disk is served, and is free to be changed."""
    with controlled(disk) as (daemon, qmp):
        qmp.bitmap("add", "b")
        write(daemon, FIRST)
        assert len(dirty(daemon.uri, "b")) == 4
        qmp.bitmap("clear", "b")
        assert dirty(daemon.uri, "b") == []
        qmp.bitmap("remove", "b")
        contexts = json.loads(run("nbdinfo", "--json", daemon.uri))["exports"][0]["contexts"]
        assert contexts == ["base:allocation", "qemu:allocation-depth"]


def pivoted(daemon: Daemon, qmp: Control, target: Path) -> None:
    """Mirror to another disk and go over to it."""
    make_disk(target, SIZE)
    qmp.ask("blockdev-add", driver="file", node_name="target", filename=str(target))
    qmp.ask("blockdev-mirror", job_id="m", device="source", target="target", sync="full")
    qmp.wait("BLOCK_JOB_READY")
    qmp.ask("job-complete", id="m")
    while qmp.ask("query-jobs"):
        qmp.wait("JOB_STATUS_CHANGE")


def test_bitmaps_stay_with_their_disk_in_a_pivot(disk: Path, tmp_path: Path, sock_dir: Path) -> None:
    """What is served then is the other disk: bitmaps of the old one would tell a lie about it."""
    with controlled(disk) as (daemon, qmp):
        qmp.bitmap("add", "old")
        qmp.ask("nbd-server-start", addr=unix(sock_dir / "n"))
        qmp.ask("block-export-add", type="nbd", id="e", node_name="source", writable=True, bitmaps=["old"])
        pivoted(daemon, qmp, tmp_path / "target.img")
        nodes = {each["id"]: each["node-name"] for each in qmp.ask("query-block-exports")}
        assert nodes == {"e": "target", "default": "target"}
        qmp.bitmap("add", "new", node="target")
        write(daemon, FIRST)
        assert (qmp.chunks("old"), qmp.chunks("new", "target")) == (0, 4)
        for uri, bitmaps in ((daemon.uri, ["new"]), (f"nbd+unix:///source?socket={sock_dir / 'n'}", [])):
            contexts: list[Any] = json.loads(run("nbdinfo", "--json", uri))["exports"][0]["contexts"]
            assert [each.removeprefix("qemu:dirty-bitmap:") for each in contexts if "dirty" in each] == bitmaps
        assert qmp.bitmaps()["old"]["busy"] is False
        assert {name for name, _ in qmp.tell("nbd-server-stop", {}).events} == {"BLOCK_EXPORT_DELETED"}
