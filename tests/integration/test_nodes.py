"""Disks that are added and removed while the daemon runs: of files, of NBD servers, and over one another."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from nbdmirror.units import KiB, MiB
from tests.support.control import Control, unix
from tests.support.daemon import Daemon, serving
from tests.support.peers import nbdkit, qemu_nbd, require
from tests.support.tools import content, make_disk, run

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SIZE = 4 * MiB
CHUNK = 64 * KiB


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[Daemon, Control]]:
    with serving(make_disk(tmp_path / "disk.img", SIZE), qmp=True) as daemon, Control(daemon.control) as qmp:
        qmp.ask("nbd-server-start", addr=unix(daemon.unix.with_name("n")))
        yield daemon, qmp


def write(daemon: Daemon, export: str, offset: int) -> None:
    require("qemu-io")
    uri = f"nbd+unix:///{export}?socket={daemon.unix.with_name('n')}"
    run("qemu-io", "-f", "raw", "-c", f"write -P 7 {offset} 64k", uri)


def test_node_over_a_node_passes_everything_on(server: tuple[Daemon, Control], tmp_path: Path) -> None:
    daemon, qmp = server
    path = make_disk(tmp_path / "other.img", SIZE)
    qmp.ask("blockdev-add", driver="file", node_name="proto", filename=str(path))
    qmp.ask("blockdev-add", driver="raw", node_name="fmt", file="proto")
    for node in ("proto", "fmt"):
        qmp.bitmap("add", node, node=node)
    qmp.ask("block-export-add", type="nbd", id="e", node_name="fmt", writable=True, bitmaps=["fmt", "proto"])
    write(daemon, "fmt", MiB)
    assert content(path, MiB, CHUNK) == b"\7" * CHUNK
    assert (qmp.chunks("fmt", "fmt"), qmp.chunks("proto", "proto")) == (1, 1)
    infos = {node["node-name"]: node for node in qmp.ask("query-named-block-nodes")}
    assert [(infos[name]["drv"], infos[name]["file"]) for name in ("proto", "fmt")] == [("file", str(path)), ("raw", str(path))]

    # It is written through the one above alone: what went past that would be missing from its bitmaps and jobs.
    below = {"type": "nbd", "id": "f", "node_name": "proto", "writable": True}
    assert "node over it" in qmp.refused("block-export-add", **below)
    desc = "block device is in use by block job: mirror"
    assert qmp.refused("blockdev-mirror", job_id="j", device="source", target="proto", sync="none") == desc
    assert qmp.refused("blockdev-mirror", job_id="j", device="proto", target="source", sync="none") == desc
    assert qmp.refused("blockdev-add", driver="raw", node_name="again", file="proto") == "Node proto is in use"
    assert qmp.refused("blockdev-del", node_name="proto") == "Block device proto is in use"
    qmp.ask("block-export-del", id="e")
    qmp.ask("blockdev-del", node_name="fmt")
    qmp.ask("block-export-add", **below)
    write(daemon, "proto", 2 * MiB)


def test_node_over_a_disk_of_its_own(server: tuple[Daemon, Control], tmp_path: Path) -> None:
    daemon, qmp = server
    path = make_disk(tmp_path / "other.img", SIZE)
    qmp.ask("blockdev-add", driver="raw", node_name="fmt", file={"driver": "file", "filename": str(path)})
    qmp.ask("block-export-add", type="nbd", id="e", node_name="fmt", writable=True)
    write(daemon, "fmt", 0)
    assert content(path, 0, CHUNK) == b"\7" * CHUNK
    qmp.ask("block-export-del", id="e")
    files = daemon.open_files()
    qmp.ask("blockdev-del", node_name="fmt")
    assert daemon.open_files() < files


def test_mirror_and_pivot_over_nodes_over_nodes(server: tuple[Daemon, Control], tmp_path: Path) -> None:
    daemon, qmp = server
    paths = {name: make_disk(tmp_path / name, SIZE) for name in ("from", "to")}
    for name, path in paths.items():
        qmp.ask("blockdev-add", driver="file", node_name=f"{name}0", filename=str(path))
        qmp.ask("blockdev-add", driver="raw", node_name=name, file=f"{name}0")
    qmp.ask("block-export-add", type="nbd", id="e", node_name="from", name="e", writable=True)
    write(daemon, "e", 0)
    qmp.ask("blockdev-mirror", job_id="j", device="from", target="to", sync="full")
    qmp.wait("BLOCK_JOB_READY")
    write(daemon, "e", MiB)
    qmp.ask("job-complete", id="j")
    while qmp.ask("query-jobs"):
        qmp.wait("JOB_STATUS_CHANGE")
    write(daemon, "e", 2 * MiB)
    for offset in (0, MiB, 2 * MiB):
        assert content(paths["to"], offset, CHUNK) == b"\7" * CHUNK
    assert content(paths["from"], 2 * MiB, CHUNK) == bytes(CHUNK)


@pytest.mark.parametrize("peer", ["nbdkit", "qemu-nbd"])
def test_disk_of_an_nbd_server(server: tuple[Daemon, Control], tmp_path: Path, peer: str) -> None:
    daemon, qmp = server
    path = make_disk(tmp_path / "remote.img", SIZE)
    with nbdkit("file", str(path)) if peer == "nbdkit" else qemu_nbd(path) as remote:
        where = {"type": "unix", "path": remote.endpoint.socket}
        qmp.ask("blockdev-add", driver="nbd", node_name="remote", server=where, discard="unmap")
        qmp.bitmap("add", "b", node="remote")
        qmp.ask("block-export-add", type="nbd", id="e", node_name="remote", writable=True)
        write(daemon, "remote", MiB)
        assert qmp.chunks("b", "remote") == 1
        assert content(path, MiB, CHUNK) == b"\7" * CHUNK
        qmp.ask("block-export-del", id="e")
        qmp.ask("blockdev-del", node_name="remote")


def test_read_only_disk(server: tuple[Daemon, Control], tmp_path: Path) -> None:
    _, qmp = server
    path = make_disk(tmp_path / "ro.img", SIZE)
    qmp.ask("blockdev-add", driver="file", node_name="ro", filename=str(path), read_only=True)
    qmp.ask("blockdev-add", driver="raw", node_name="over", file="ro", read_only=True)
    assert {node["node-name"]: node["ro"] for node in qmp.ask("query-named-block-nodes")} == {
        "over": True,
        "ro": True,
        "source": False,
    }
    desc = "Cannot export read-only node as writable"
    assert qmp.refused("block-export-add", type="nbd", id="e", node_name="over", writable=True) == desc


def test_daemon_ends_with_nodes_over_nodes(server: tuple[Daemon, Control], tmp_path: Path) -> None:
    daemon, qmp = server
    qmp.ask("blockdev-add", driver="file", node_name="proto", filename=str(make_disk(tmp_path / "o.img", SIZE)))
    qmp.ask("blockdev-add", driver="raw", node_name="fmt", file="proto")
    assert daemon.terminate() == 0
    assert "may not be durable" not in daemon.stderr
