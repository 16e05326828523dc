"""`nbdmirror bitmap` and `nbdmirror export`, as users and scripts run them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import nbd
import pytest

from nbdmirror.units import KiB, MiB
from tests.support.control import Control
from tests.support.daemon import Daemon, run_cli, serving
from tests.support.mirroring import ask, refused, tell
from tests.support.peers import require
from tests.support.tools import make_disk, nbdsh, run

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SIZE = 64 * MiB


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    with serving(make_disk(tmp_path / "disk.img", SIZE), qmp=True) as daemon:
        yield daemon


@pytest.fixture
def other(daemon: Daemon, tmp_path: Path) -> Iterator[Control]:
    """A second disk, so that `source` is the default but not the only one."""
    with Control(daemon.control) as qmp:
        qmp.ask("blockdev-add", driver="file", node_name="other", filename=str(make_disk(tmp_path / "other.img", SIZE)))
        yield qmp


def test_life_of_a_bitmap(daemon: Daemon) -> None:
    require("qemu-io")
    tell(daemon, "bitmap", "add", "b0")
    tell(daemon, "bitmap", "add", "b1", "--granularity", "4k", "--disabled")
    run("qemu-io", "-f", "raw", "-c", "write 1M 5M", "-c", f"write {SIZE - 512} 512", daemon.uri)
    tell(daemon, "bitmap", "merge", "b1", "b0")
    tell(daemon, "bitmap", "disable", "b0")
    tell(daemon, "bitmap", "enable", "b1")
    common = {"node": "source", "persistent": False, "busy": False}
    last, dirty = 64 * KiB, 5 * MiB + 64 * KiB
    found = json.loads(tell(daemon, "bitmap", "list", "--json"))["bitmaps"]
    assert found == [
        {**common, "name": "b1", "recording": True, "granularity": 4 * KiB, "count": dirty},
        {**common, "name": "b0", "recording": False, "granularity": 64 * KiB, "count": dirty},
    ]
    shown = json.loads(tell(daemon, "bitmap", "show", "b0", "--json"))
    extents = [{"offset": MiB, "length": 5 * MiB}, {"offset": SIZE - last, "length": last}]
    assert shown == {**found[1], "size": SIZE, "extents": extents}
    tell(daemon, "bitmap", "clear", "b0")
    tell(daemon, "bitmap", "remove", "b1")
    (left,) = json.loads(tell(daemon, "bitmap", "list", "--json"))["bitmaps"]
    assert (left["name"], left["count"]) == ("b0", 0)


def test_map_is_as_wide_as_the_terminal(daemon: Daemon) -> None:
    require("qemu-io")
    tell(daemon, "bitmap", "add", "b")
    run("qemu-io", "-f", "raw", "-c", "write 0 8M", "-c", "write 20M 64k", daemon.uri)
    shown = run_cli("bitmap", "show", "b", "--qmp", daemon.control, env={"COLUMNS": "18"}).stdout.splitlines()
    assert shown == [
        "bitmap 'b' of source: recording",
        "129 of 1024 chunks of 64 KiB dirty, 8.1 MiB of 64 MiB",
        "|##...+..........|",
        "'.' clean  '+' dirty in part  '#' dirty",
    ]


def test_very_scattered_bitmap_is_shown_whole(daemon: Daemon) -> None:
    with Control(daemon.control) as qmp:
        qmp.bitmap("add", "b", granularity=512)
    script = "\n".join(f"h.pwrite(b'x', {chunk * 1024})" for chunk in range(5000))
    nbdsh(daemon.uri, script)
    extents = json.loads(tell(daemon, "bitmap", "show", "b", "--json"))["extents"]
    assert extents == [{"offset": chunk * 1024, "length": 512} for chunk in range(5000)]


def test_tables_name_everything(daemon: Daemon) -> None:
    tell(daemon, "bitmap", "add", "wanted")
    for command in (("bitmap", "list"), ("status",)):
        out = tell(daemon, *command)
        for word in ("wanted", "source", "64 KiB", "recording"):
            assert word in out, (command, word)


def test_node_is_the_only_one_or_source(daemon: Daemon, other: Control) -> None:
    tell(daemon, "bitmap", "add", "here")
    tell(daemon, "bitmap", "add", "there", "--node", "other")
    assert set(other.bitmaps()) == {"here"}
    tell(daemon, "bitmap", "merge", "here", "there", "--from-node", "other")
    found = json.loads(tell(daemon, "bitmap", "list", "--json", "--node", "other"))["bitmaps"]
    assert [each["name"] for each in found] == ["there"]


@pytest.mark.parametrize(
    ("command", "status", "words"),
    [
        (("bitmap", "add", "b"), 1, ["Bitmap already exists: b"]),
        (("bitmap", "add", "c", "--granularity", "1000"), 1, ["power of 2"]),
        (("bitmap", "add", "c", "--granularity", "much"), 2, ["'much' is not a size"]),
        (("bitmap", "add", "c", "--persistent"), 1, ["no state directory; start it with --state-dir"]),
        (("bitmap", "add", "c", "--node", "zz"), 1, ["node-name='zz'"]),
        (("bitmap", "clear", "zz"), 1, ["Dirty bitmap 'zz' not found"]),
        (("bitmap", "show", "zz"), 1, ["no bitmap 'zz'", "bitmap list"]),
        (("bitmap", "show", "b", "--node", "zz"), 1, ["no node 'zz'", "source"]),
        (("bitmap", "merge", "b"), 2, ["SOURCE"]),
        (("bitmap", "frobnicate"), 2, ["frobnicate"]),
        (("export", "add", "e"), 1, ["no NBD server runs", "-k PATH or -p PORT"]),
        (("export", "add", "e", "-k", "/a", "-p", "1"), 2, ["-k and -p exclude each other"]),
        (("export", "add", "e", "--tls-creds", "t"), 2, ["--tls-creds goes with"]),
        (("export", "add", "e", "-k", "/no/such/dir/s"), 1, ["/no/such/dir/s", "No such file"]),
        (("export", "remove", "zz"), 1, ["Export 'zz' is not found"]),
        (("export", "stop"), 1, ["NBD server not running"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_refusals(daemon: Daemon, command: tuple[str, ...], status: int, words: list[str]) -> None:
    with Control(daemon.control) as qmp:
        qmp.bitmap("add", "b")
        before = qmp.bitmaps()
        refused(ask(daemon, *command), status, *words)
        assert qmp.bitmaps() == before


def test_life_of_an_export(daemon: Daemon, other: Control) -> None:
    require("nbdinfo")
    socket = daemon.unix.with_name("n")
    tell(daemon, "bitmap", "add", "b", "--disabled")
    uri = tell(daemon, "export", "add", "snap", "-B", "b", "-D", "as it was", "-k", str(socket)).strip()
    assert uri == f"nbd+unix:///snap?socket={socket}"
    run("nbdinfo", "--map=qemu:dirty-bitmap:b", uri)
    made = json.loads(tell(daemon, "export", "add", "x y", "--id", "second", "--node", "other", "--writable", "--json"))
    assert (made["id"], made["x-name"], made["node-name"], made["x-read-only"]) == ("second", "x y", "other", False)
    run("nbdinfo", made["x-uri"])
    found = json.loads(tell(daemon, "export", "list", "--json"))["exports"]
    assert [each["id"] for each in found] == ["second", "snap", "default"]
    assert "snap" in tell(daemon, "export", "list")
    tell(daemon, "export", "remove", "snap")
    tell(daemon, "bitmap", "remove", "b")
    tell(daemon, "export", "stop")
    assert [each["id"] for each in json.loads(tell(daemon, "export", "list", "--json"))["exports"]] == ["default"]


def test_export_in_use_is_removed_by_force(daemon: Daemon) -> None:
    socket = daemon.unix.with_name("n")
    uri = tell(daemon, "export", "add", "e", "-k", str(socket)).strip()
    handle = nbd.NBD()
    handle.connect_uri(uri)
    refused(ask(daemon, "export", "remove", "e"), 1, "still in use")
    tell(daemon, "export", "remove", "e", "--force")
    with pytest.raises(nbd.Error):
        handle.pread(512, 0)
