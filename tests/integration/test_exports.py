"""Exports made while the daemon runs, under real clients: who may add and remove them, and what clients see of it."""

from __future__ import annotations

import json
import signal
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import nbd
import pytest

from nbdmirror.units import MiB
from tests.support.certificates import Authority
from tests.support.control import Control, unix
from tests.support.daemon import Daemon, serving, until
from tests.support.peers import nbdkit, require
from tests.support.tools import completed, fails, make_disk, run

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SIZE = 16 * MiB
DELETED = "BLOCK_EXPORT_DELETED"


@pytest.fixture(autouse=True)
def programs() -> None:
    require("qemu-io", "nbdinfo")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[Daemon, Control]]:
    """A daemon whose NBD server runs on the socket `n` beside its own."""
    with serving(make_disk(tmp_path / "disk.img", SIZE), qmp=True) as daemon, Control(daemon.control) as qmp:
        qmp.ask("nbd-server-start", addr=unix(socket_of(daemon)))
        yield daemon, qmp


def socket_of(daemon: Daemon) -> Path:
    return daemon.unix.with_name("n")


def uri(daemon: Daemon, name: str) -> str:
    return f"nbd+unix:///{name}?socket={socket_of(daemon)}"


def add(qmp: Control, export_id: str, **more: Any) -> None:
    qmp.ask("block-export-add", **{"type": "nbd", "id": export_id, "node_name": "source", "name": export_id, **more})


def ids(qmp: Control) -> list[str]:
    return [each["id"] for each in qmp.ask("query-block-exports")]


@contextmanager
def client(where: str) -> Iterator[nbd.NBD]:
    handle = nbd.NBD()
    handle.connect_uri(where)
    yield handle
    with suppress(nbd.Error):
        handle.shutdown()


def clients(qmp: Control, export_id: str) -> int:
    return next(int(each["x-clients"]) for each in qmp.ask("query-block-exports") if each["id"] == export_id)


def test_life_of_an_export(server: tuple[Daemon, Control]) -> None:
    daemon, qmp = server
    add(qmp, "e0", name="shown", writable=True, description="for all")
    add(qmp, "e1", node_name="source")
    assert ids(qmp) == ["e1", "e0", "default"]
    (found,) = json.loads(run("nbdinfo", "--json", uri(daemon, "shown")))["exports"]
    assert (found["description"], found["is_read_only"], found["can_multi_conn"]) == ("for all", False, True)
    assert found["contexts"] == ["base:allocation"]
    run("qemu-io", "-f", "raw", "-c", "write -P 7 1M 64k", uri(daemon, "shown"))
    run("qemu-io", "-f", "raw", "-r", "-c", "read -P 7 1M 64k", uri(daemon, "e1"))
    fails("qemu-io", "-f", "raw", "-c", "write 0 1", uri(daemon, "e1"))
    assert qmp.tell("block-export-del", {"id": "e0"}).events == [(DELETED, {"id": "e0"})]
    assert "No such file" in fails("nbdinfo", uri(daemon, "shown"))
    assert ids(qmp) == ["e1", "default"]


def test_servers_do_not_share_their_exports(server: tuple[Daemon, Control]) -> None:
    daemon, qmp = server
    add(qmp, "e0")
    assert "No such file" in fails("nbdinfo", uri(daemon, ""))
    assert "No such file" in fails("nbdinfo", f"nbd+unix:///e0?socket={daemon.unix}")
    qmp.ask("nbd-server-stop")
    run("nbdinfo", daemon.uri)
    assert ids(qmp) == ["default"]
    desc = qmp.refused("block-export-del", id="default", mode="hard")
    assert desc == "Export 'default' is the one that the daemon was started with; it ends with the daemon"


def test_refusals_in_their_order(server: tuple[Daemon, Control], tmp_path: Path) -> None:
    _, qmp = server
    read_only = make_disk(tmp_path / "ro.img", SIZE)
    qmp.ask("blockdev-add", driver="file", node_name="ro", filename=str(read_only), read_only=True)
    for name in ("on", "off"):
        qmp.bitmap("add", name, disabled=name == "off")
    add(qmp, "e0", name="taken")
    before = (ids(qmp), qmp.bitmaps())
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"id": "0e", "node-name": "zz"}, "Invalid block export id"),
        ({"id": "e0", "node-name": "zz"}, "Block export id 'e0' is already in use"),
        ({"node-name": "zz", "writable": True}, "Cannot find device='' nor node-name='zz'"),
        ({"node-name": "ro", "writable": True, "name": "taken"}, "Cannot export read-only node as writable"),
        ({"name": "x" * 4097, "bitmaps": ["zz"]}, f"export name '{'x' * 4097}' too long"),
        ({"name": "taken", "description": "d" * 4097}, f"description '{'d' * 4097}' too long"),
        ({"name": "taken", "bitmaps": ["zz"]}, "NBD server already has export named 'taken'"),
        ({"bitmaps": ["off", "zz"]}, "Bitmap 'zz' is not found"),
        ({"bitmaps": ["on"]}, "Enabled bitmap 'on' incompatible with readonly export"),
        ({"bitmaps": [{"node": "zz", "name": "on"}]}, "Node 'zz' not found"),
        ({"bitmaps": [{"node": "ro", "name": "on"}]}, "Dirty bitmap 'on' not found"),
        ({"bitmaps": ["off", "off"]}, "Bitmap 'off' is named twice: clients could not tell one from the other"),
    ]
    for arguments, desc in wrong:
        answer = qmp.tell("block-export-add", {"type": "nbd", "id": "e1", "node-name": "source", "name": "new", **arguments})
        assert answer.error == ("GenericError", desc)
        assert (ids(qmp), qmp.bitmaps()) == before
    qmp.ask("nbd-server-stop")
    assert qmp.refused("block-export-add", type="nbd", id="e1", node_name="source", name="x" * 5000) == "NBD server not running"
    assert qmp.refused("nbd-server-stop") == "NBD server not running"


def test_bitmap_of_another_node(server: tuple[Daemon, Control], tmp_path: Path) -> None:
    daemon, qmp = server
    for name, size in (("twin", SIZE), ("small", SIZE // 2)):
        disk = make_disk(tmp_path / name, size)
        qmp.ask("blockdev-add", driver="file", node_name=name, filename=str(disk))
        qmp.bitmap("add", name, node=name)
    add(qmp, "e0", bitmaps=[{"node": "twin", "name": "twin"}])
    run("nbdinfo", "--map=qemu:dirty-bitmap:twin", uri(daemon, "e0"))
    assert qmp.refused("blockdev-del", node_name="twin") == "Node twin is in use"
    wrong = {"type": "nbd", "id": "e1", "node_name": "source", "name": "e1", "bitmaps": [{"node": "small", "name": "small"}]}
    assert "of a disk of" in qmp.refused("block-export-add", **wrong)
    qmp.ask("block-export-del", id="e0")
    qmp.ask("blockdev-del", node_name="twin")


def test_safe_deletion_waits_for_clients_and_hard_hangs_up(server: tuple[Daemon, Control]) -> None:
    daemon, qmp = server
    add(qmp, "e0")
    add(qmp, "e1")
    with client(uri(daemon, "e0")) as gone, client(uri(daemon, "e1")) as kept:
        for mode in ({}, {"mode": "safe"}):
            assert qmp.refused("block-export-del", id="e0", **mode) == "export 'e0' still in use"
        gone.pread(512, 0)
        assert qmp.tell("block-export-del", {"id": "e0", "mode": "hard"}).events == [(DELETED, {"id": "e0"})]
        with pytest.raises(nbd.Error):
            gone.pread(512, 0)
        kept.pread(512, 0)
        assert "No such file" in fails("nbdinfo", uri(daemon, "e0"))
        assert qmp.refused("block-export-del", id="e0", mode="hard") == "Export 'e0' is not found"
    until(lambda: clients(qmp, "e1") == 0, "the client has gone")
    qmp.ask("block-export-del", id="e1", mode="safe")


def test_older_names_of_the_same(server: tuple[Daemon, Control], tmp_path: Path) -> None:
    daemon, qmp = server
    qmp.ask("blockdev-add", driver="file", node_name="ro", filename=str(make_disk(tmp_path / "ro", SIZE)), read_only=True)
    qmp.bitmap("add", "b")
    qmp.ask("nbd-server-add", device="source", writable=True, bitmap="b")
    qmp.ask("nbd-server-add", device="ro", name="legacy", writable=True)  # quietly read-only
    modes = {each["id"]: each["x-read-only"] for each in qmp.ask("query-block-exports")}
    assert modes == {"legacy": True, "source": False, "default": False}
    assert qmp.refused("nbd-server-add", device="source", name="legacy") == "Block export id 'legacy' is already in use"
    assert qmp.refused("nbd-server-add", device="zz") == "Cannot find device='zz' nor node-name='zz'"
    with client(uri(daemon, "source")):
        assert qmp.refused("nbd-server-remove", name="source") == "export 'source' still in use"
        assert qmp.tell("nbd-server-remove", {"name": "source", "mode": "hard"}).events == [(DELETED, {"id": "source"})]
    assert qmp.refused("nbd-server-remove", name="source") == "Export 'source' is not found"


def test_stopping_the_server_ends_its_exports_newest_first(server: tuple[Daemon, Control]) -> None:
    daemon, qmp = server
    qmp.bitmap("add", "b")
    for name in ("e0", "e1", "e2"):
        add(qmp, name, writable=True, bitmaps=["b"] if name == "e1" else [])
    with client(uri(daemon, "e0")) as first, client(uri(daemon, "e2")):
        first.pwrite(b"x" * 512, 0)
        answer = qmp.tell("nbd-server-stop", {})
        assert answer.events == [(DELETED, {"id": name}) for name in ("e2", "e1", "e0")]
        with pytest.raises(nbd.Error):
            first.pread(512, 0)
    assert not socket_of(daemon).exists()
    assert qmp.bitmaps()["b"]["busy"] is False
    assert ids(qmp) == ["default"]
    qmp.ask("nbd-server-start", addr=unix(socket_of(daemon)))
    assert qmp.refused("nbd-server-start", addr=unix(daemon.unix)) == "NBD server already running"
    add(qmp, "e0")
    run("nbdinfo", uri(daemon, "e0"))


def test_server_that_cannot_listen(server: tuple[Daemon, Control]) -> None:
    daemon, qmp = server
    qmp.ask("nbd-server-stop")
    missing = daemon.unix.with_name("no") / "such"
    inet = {"type": "inet", "data": {"host": "127.0.0.1", "port": "x"}}
    assert (
        qmp.refused("nbd-server-start", addr=unix(missing)) == f"Failed to bind socket to {missing}: No such file or directory"
    )
    assert qmp.refused("nbd-server-start", addr=inet).startswith("address resolution failed for 127.0.0.1:x: ")
    assert "is listening there; stop it" in qmp.refused("nbd-server-start", addr=unix(daemon.unix))
    qmp.ask("nbd-server-start", addr={"type": "inet", "data": {"host": "127.0.0.1", "port": "0"}})
    add(qmp, "e0")
    where = qmp.ask("query-block-exports")[0]["x-uri"]
    assert where.startswith("nbd://127.0.0.1:")
    run("nbdinfo", where)


def test_limits_of_the_server(server: tuple[Daemon, Control]) -> None:
    daemon, qmp = server
    qmp.ask("nbd-server-stop")
    qmp.ask("nbd-server-start", addr=unix(socket_of(daemon)), max_connections=1, handshake_max_seconds=1)
    add(qmp, "e0")
    with client(uri(daemon, "e0")) as only:
        assert not only.can_multi_conn()
        assert completed("nbdinfo", uri(daemon, "e0")).returncode
        daemon.wait_for_log("is the limit")
        only.pread(512, 0)  # who has opened an export may stay
    until(lambda: clients(qmp, "e0") == 0, "the client has gone")
    lingering = nbd.NBD()
    lingering.set_opt_mode(True)
    lingering.connect_unix(str(socket_of(daemon)))
    daemon.wait_for_log("opened no export within 1 s")
    with pytest.raises(nbd.Error):
        lingering.opt_list(lambda *_: 0)


@pytest.mark.parametrize("end", ["quit", "signal"])
def test_end_of_the_daemon_with_an_exported_bitmap_and_a_client(server: tuple[Daemon, Control], end: str) -> None:
    daemon, qmp = server
    qmp.bitmap("add", "b")
    add(qmp, "e0", writable=True, bitmaps=["b"])
    with client(uri(daemon, "e0")) as handle:
        handle.pwrite(b"x" * 512, 0)
        if end == "quit":
            qmp.ask("quit")
        else:
            daemon.send_signal(signal.SIGTERM)
        assert daemon.wait() == 0
    assert not socket_of(daemon).exists()


def test_certificates_as_objects(server: tuple[Daemon, Control], tmp_path: Path) -> None:
    _, qmp = server
    qmp.ask("nbd-server-stop")
    ours, theirs = Authority(tmp_path / "ca"), Authority(tmp_path / "ca2", "strangers")
    server_dir = ours.server(tmp_path / "server")
    known, stranger = ours.client(tmp_path / "client"), theirs.client(tmp_path / "stranger")
    (stranger / "ca-cert.pem").write_bytes(ours.certificate.read_bytes())
    qmp.ask("object-add", qom_type="tls-creds-x509", id="mine", dir=str(server_dir), endpoint="server")
    qmp.ask("object-add", qom_type="tls-creds-x509", id="theirs", dir=str(known))
    address = {"addr": {"type": "inet", "data": {"host": "127.0.0.1", "port": "0"}}}
    assert qmp.refused("nbd-server-start", **address, tls_creds="zz") == "No TLS credentials with id 'zz'"
    desc = "Expected TLS credentials for a server endpoint"
    assert qmp.refused("nbd-server-start", **address, tls_creds="theirs") == desc
    qmp.ask("nbd-server-start", **address, tls_creds="mine")
    add(qmp, "e0")
    where = qmp.ask("query-block-exports")[0]["x-uri"]
    assert where.startswith("nbds://127.0.0.1:")
    run("nbdinfo", f"{where}?tls-certificates={known}")
    fails("nbdinfo", f"{where}?tls-certificates={stranger}")
    fails("nbdinfo", where.replace("nbds:", "nbd:"))
    # What is in use has been read: the object may go, the server stays.
    qmp.ask("object-del", id="mine")
    assert qmp.refused("object-del", id="mine") == "object 'mine' not found"
    run("nbdinfo", f"{where}?tls-certificates={known}")


def test_credentials_of_a_disk_elsewhere(server: tuple[Daemon, Control], tmp_path: Path) -> None:
    _, qmp = server
    ours, theirs = Authority(tmp_path / "ca"), Authority(tmp_path / "ca2", "strangers")
    options = ["-p", "0", "--tls-certificates", str(ours.server(tmp_path / "server"))]
    qmp.ask("object-add", qom_type="tls-creds-x509", id="mine", dir=str(ours.client(tmp_path / "client")))
    qmp.ask("object-add", qom_type="tls-creds-x509", id="strangers", dir=str(theirs.client(tmp_path / "stranger")))
    qmp.ask("object-add", qom_type="tls-creds-x509", id="server", dir=str(tmp_path / "server"), endpoint="server")
    with serving(make_disk(tmp_path / "far", SIZE), *options, tcp=True) as far:
        port = far.uri.removeprefix("nbds://127.0.0.1:").strip("/")
        node = {"driver": "nbd", "node_name": "far", "server": {"type": "inet", "host": "127.0.0.1", "port": port}}
        assert qmp.refused("blockdev-add", **node, tls_creds="zz") == "No TLS credentials with id 'zz'"
        assert qmp.refused("blockdev-add", **node, tls_creds="server") == "Expected TLS credentials for a client endpoint"
        assert "certificate" in qmp.refused("blockdev-add", **node, tls_creds="strangers").lower()
        qmp.ask("blockdev-add", **node, tls_creds="mine")
        qmp.ask("blockdev-del", node_name="far")


def test_credentials_that_are_none(server: tuple[Daemon, Control], tmp_path: Path) -> None:
    _, qmp = server
    keys = tmp_path / "keys.psk"
    keys.write_text("qemu:0123456789abcdef\n")
    empty = tmp_path / "empty"
    empty.mkdir()
    x509, psk = {"qom_type": "tls-creds-x509", "id": "t"}, {"qom_type": "tls-creds-psk", "id": "t"}
    missing = f"Unable to access credentials {empty}/%s: No such file or directory"
    wrong: list[tuple[dict[str, str], str]] = [
        ({**x509, "id": "0t", "dir": str(empty)}, "Parameter 'id' expects an identifier"),
        (x509, "Missing 'dir' property value"),
        ({**x509, "dir": str(empty)}, missing % "ca-cert.pem"),
        ({**x509, "dir": str(empty), "endpoint": "server"}, missing % "ca-cert.pem"),
        ({**psk, "dir": str(empty)}, missing % "keys.psk"),
        ({**psk, "dir": str(tmp_path), "username": "nobody"}, f"Username nobody not found in PSK file {keys}"),
    ]
    for arguments, desc in wrong:
        assert qmp.refused("object-add", **arguments) == desc
    qmp.ask("object-add", **psk, dir=str(tmp_path))
    desc = "attempt to add duplicate property 't' to object (type 'container')"
    assert qmp.refused("object-add", **psk, dir=str(tmp_path)) == desc


def test_request_in_flight_holds_the_deletion_up(tmp_path: Path) -> None:
    """While a request of a client that was hung up on is being carried out, the export is there, and shutting down."""
    with (
        nbdkit("memory", str(SIZE)) as disk,
        serving(disk.endpoint.uri, qmp=True) as daemon,
        Control(daemon.control) as qmp,
    ):
        qmp.ask("nbd-server-start", addr=unix(socket_of(daemon)))
        qmp.bitmap("add", "b")
        add(qmp, "e0", writable=True, bitmaps=["b"])
        handle = nbd.NBD()
        handle.connect_uri(uri(daemon, "e0"))
        disk.freeze()
        handle.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(512)), 0)
        until(lambda: qmp.chunks("b") == 1, "the write has begun")
        qmp.ask("block-export-del", id="e0", mode="hard")
        (export,) = (each for each in qmp.ask("query-block-exports") if each["id"] == "e0")
        assert export["shutting-down"] is True
        assert qmp.refused("block-export-del", id="e0", mode="hard") == "Export 'e0' is already shutting down"
        assert qmp.bitmaps()["b"]["busy"] is True
        assert qmp.refused("blockdev-del", node_name="source") == "Node source is in use"
        disk.thaw()
        assert qmp.wait(DELETED) == {"id": "e0"}
        assert qmp.bitmaps()["b"]["busy"] is False


def test_end_of_the_daemon_waits_for_a_deletion(tmp_path: Path) -> None:
    """Also one that a client is waiting for that is cut off: the disk is closed after the last request."""
    with (
        nbdkit("memory", str(SIZE)) as disk,
        serving(disk.endpoint.uri, qmp=True) as daemon,
        Control(daemon.control) as qmp,
        Control(daemon.control) as other,
    ):
        qmp.ask("nbd-server-start", addr=unix(socket_of(daemon)))
        qmp.bitmap("add", "b")
        add(qmp, "e0", writable=True)
        handle = nbd.NBD()
        handle.connect_uri(uri(daemon, "e0"))
        disk.freeze()
        handle.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(b"x" * 512)), 0)
        until(lambda: qmp.chunks("b") == 1, "the write has begun")
        qmp.send("nbd-server-stop")
        until(lambda: not other.ask("x-nbdmirror-query-nbd-server")["running"], "the server is being stopped")
        other.ask("quit")
        disk.thaw()
        assert qmp.wait(DELETED) == {"id": "e0"}
        assert daemon.wait() == 0
        reader = nbd.NBD()
        reader.connect_uri(disk.endpoint.uri)
        assert reader.pread(512, 0) == b"x" * 512
        reader.shutdown()


def test_export_of_ours_is_no_target_of_a_mirror(server: tuple[Daemon, Control]) -> None:
    """Every copied chunk would be a write of a guest, and dirty again."""
    daemon, qmp = server
    add(qmp, "e0", writable=True)
    where = {"type": "unix", "path": str(socket_of(daemon))}
    qmp.ask("blockdev-add", driver="nbd", node_name="loop", server=where, export="e0")
    desc = qmp.refused("blockdev-mirror", job_id="j", device="source", target="loop", sync="none")
    assert desc == "Can't mirror node into itself"
    qmp.ask("blockdev-del", node_name="loop")
