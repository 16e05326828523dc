"""`nbdmirror serve --config`: several disks in one daemon, and what a reload changes, keeps and refuses."""

from __future__ import annotations

import json
import signal
import socket
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from nbdmirror.protocol.constants import CMD_WRITE
from nbdmirror.units import MiB
from tests.support.daemon import Daemon, run_cli, serving, until
from tests.support.peers import nbdkit, require
from tests.support.tools import make_disk, pattern, run
from tests.support.wire_client import WireClient

if TYPE_CHECKING:
    from collections.abc import Iterator

USAGE = 2


class Site:
    """A configuration with disks a, b and c, and the daemon that reads it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "nbd.toml"
        for name in "abc":
            make_disk(path / name, MiB, {0: name.encode() * MiB})

    def write(self, *names: str, server: str = "", more: str = "") -> None:
        exports = [f'[[export]]\nname = "{name}"\nsource = "{self.path / name}"\n' for name in names]
        self.config.write_text(f"[server]\n{server}\n{''.join(exports)}{more}\n")

    @contextmanager
    def serving(self, *args: str) -> Iterator[Daemon]:
        with serving(f"--config={self.config}", *args, qmp=True) as daemon:
            yield daemon

    def reload(self, daemon: Daemon) -> str:
        """What the daemon logs of a reload."""
        before = len(daemon.stderr)
        daemon.send_signal(signal.SIGHUP)
        until(lambda: "reloaded;" in daemon.stderr[before:] or "stays as it was" in daemon.stderr[before:], "it has reloaded")
        return daemon.stderr[before:]


@pytest.fixture
def site(sock_dir: Path) -> Site:
    return Site(sock_dir)


def exports(daemon: Daemon) -> list[str]:
    require("nbdinfo")
    found = json.loads(run("nbdinfo", "--json", "--list", "--no-content", f"nbd+unix://?socket={daemon.unix}"))
    return sorted(export["export-name"] for export in found["exports"])


def uri(daemon: Daemon, name: str) -> str:
    return f"nbd+unix:///{name}?socket={daemon.unix}"


def clients(daemon: Daemon, name: str) -> int:
    status = json.loads(run_cli("status", "--json", "--qmp", daemon.control).stdout)
    return next(int(export["x-clients"]) for export in status["exports"] if export["x-name"] == name)


def test_several_disks(site: Site) -> None:
    require("nbdcopy")
    site.write("a", "b", more=f'[[export]]\nname = "third"\nsource = "{site.path}/c"\nread_only = true\nnode_name = "C"')
    with site.serving() as daemon:
        assert daemon.uri == uri(daemon, "a"), "READY has the first"
        assert exports(daemon) == ["a", "b", "third"]
        for name, disk in (("a", "a"), ("b", "b"), ("third", "c")):
            run("nbdcopy", uri(daemon, name), str(site.path / "copy"))
            assert (site.path / "copy").read_bytes() == (site.path / disk).read_bytes()
        status = json.loads(run_cli("status", "--json", "--qmp", daemon.control).stdout)
        assert {node["node-name"]: node["ro"] for node in status["nodes"]} == {"a": False, "b": False, "C": True}
        copied = run_cli("copy", uri(daemon, "a"), uri(daemon, "third"))
        assert copied.returncode == 1, "it is read-only"


def test_each_disk_has_a_mirror_of_its_own(site: Site) -> None:
    site.write("a", "b")
    make_disk(site.path / "target", MiB, {})
    with site.serving() as daemon:
        assert run_cli("copy", site.path / "c", uri(daemon, "a")).returncode == 0
        mirror = run_cli(
            "mirror", "--qmp", daemon.control, "--device", "b", "--job-id", "j", "--complete", site.path / "target"
        )
        assert mirror.returncode == 0, mirror.stderr
        assert run_cli("copy", site.path / "c", uri(daemon, "b")).returncode == 0
        assert daemon.terminate() == 0
    assert (site.path / "b").read_bytes() == b"b" * MiB, "clients of b have moved"
    assert (site.path / "target").read_bytes() == (site.path / "a").read_bytes() == b"c" * MiB


def test_options_win(site: Site) -> None:
    site.write("a", server='port = 1\nbind = "192.0.2.1"\nmax_clients = 1')
    with site.serving("-x", "mine", "-e", "0") as daemon:
        assert daemon.uri == uri(daemon, "mine"), "-k over port and bind"


@pytest.mark.parametrize(
    ("more", "args", "what"),
    [
        ('[tls]\nallow_dn = ["CN=a"]', (), "line 7: tls.allow_dn: --allow-dn looks at"),
        ("[tls]\ncertificates = '/nowhere'", (), "line 7: tls.certificates: cannot read '/nowhere/server-cert.pem'"),
        ("[tls]\nsecret = 1", (), "line 7: tls.secret: nobody knows"),
        ("", ("-D", "x", "--vsock", "1:2:3"), "is not [CID:]PORT"),
    ],
)
def test_what_is_wrong_is_usage(site: Site, more: str, args: tuple[str, ...], what: str) -> None:
    site.write("a", server=f'socket = "{site.path}/s"', more=more)
    result = run_cli("serve", "--config", site.config, *args)
    assert (result.returncode, result.stdout) == (USAGE, "")
    (line,) = result.stderr.splitlines()
    assert what in line


def test_one_disk_is_open_once(site: Site) -> None:
    site.write("a", more=f'[[export]]\nname = "again"\nsource = "{site.path}/../{site.path.name}/a"')
    result = run_cli("serve", "--config", site.config)
    assert result.returncode == USAGE
    assert "is open already, as node 'a'" in result.stderr


@pytest.mark.parametrize("option", ["--state-dir", "-B"])
def test_bitmaps_of_the_command_line_are_for_one_disk(site: Site, option: str) -> None:
    site.write("a", "b")
    result = run_cli("serve", "--config", site.config, option, site.path / "state")
    assert result.returncode == USAGE
    assert "--state-dir and -B are for one disk, and there are 2 exports" in result.stderr
    assert not (site.path / "state").exists()


def test_bitmaps_of_the_only_disk(site: Site) -> None:
    """A reload would leave another disk's writes unrecorded."""
    state = site.path / "state"
    site.write("a")
    with site.serving("-v", "-B", "b:4k", "--state-dir", str(state)) as daemon:
        for names in ("b", "ab"):
            site.write(*names)
            assert "everything stays as it was: --state-dir and -B are for" in site.reload(daemon)
        assert exports(daemon) == ["a"]
        assert run_cli("copy", site.path / "c", uri(daemon, "a")).returncode == 0
        assert daemon.terminate() == 0
    site.write("a")
    with site.serving("-v", "--state-dir", str(state)) as daemon:
        extents = json.loads(run("nbdinfo", "--json", "--map=qemu:dirty-bitmap:b", uri(daemon, "a")))
        assert [(each["length"], each["type"]) for each in extents] == [(MiB, 1)]


def test_each_export_has_an_id(site: Site) -> None:
    site.write("a", "b")
    with site.serving() as daemon:
        status = json.loads(run_cli("status", "--json", "--qmp", daemon.control).stdout)
        found = {export["id"]: export["x-uri"] for export in status["exports"]}
        assert found == {"default": uri(daemon, "a"), "b": uri(daemon, "b")}


# --- reloading -------------------------------------------------------------------------------------------------------


def test_exports_come_and_go(site: Site) -> None:
    site.write("a", "b")
    with site.serving("-v") as daemon:
        site.write("b", "c")
        site.reload(daemon)
        assert exports(daemon) == ["b", "c"]
        run("nbdcopy", uri(daemon, "c"), str(site.path / "copy"))
        assert (site.path / "copy").read_bytes() == b"c" * MiB
        held = {str(fd.readlink()) for fd in Path(f"/proc/{daemon.pid}/fd").iterdir()}
        assert str(site.path / "a") not in held, "what is not served is closed"


async def test_what_is_in_use_stays(site: Site) -> None:
    site.write("a", "b")
    with site.serving("-v") as daemon:
        async with await WireClient.connect_unix(daemon.unix) as client:
            await client.open("a")
            site.write("b")
            assert "export 'a' stays as it is: in use by a client" in site.reload(daemon)
            assert (await client.ask(CMD_WRITE, 0, 4096, payload=pattern(4096))).error == 0
            assert exports(daemon) == ["a", "b"]
        until(lambda: not clients(daemon, "a"), "the client has gone")
        site.reload(daemon)
        assert exports(daemon) == ["b"]
        assert (site.path / "a").read_bytes()[:4096] == pattern(4096)


async def test_what_comes_into_use_while_a_new_disk_is_opened_stays(site: Site) -> None:
    site.write("a")
    with nbdkit("memory", "size=1M", extra=["--exit-with-parent"]) as peer, site.serving("-v") as daemon:
        peer.freeze()
        site.write(more=f"[[export]]\nname = 'slow'\nsource = '{peer.endpoint.uri}'")
        before = daemon.open_files()
        daemon.send_signal(signal.SIGHUP)
        until(lambda: daemon.open_files() > before, "it connects")
        async with await WireClient.connect_unix(daemon.unix) as client:
            await client.open("a")
            peer.thaw()
            until(lambda: "reloaded; exports: 'a', 'slow'" in daemon.stderr, "it has reloaded")
            assert (await client.ask(CMD_WRITE, 0, 4096, payload=pattern(4096))).error == 0
        assert (site.path / "a").read_bytes()[:4096] == pattern(4096)


def test_a_disk_is_opened_otherwise(site: Site) -> None:
    site.write("a")
    with site.serving("-v") as daemon:
        site.config.write_text(site.config.read_text() + 'read_only = true\ndescription = "x"\n')
        site.reload(daemon)
        info = json.loads(run("nbdinfo", "--json", "--no-content", uri(daemon, "a")))["exports"][0]
        assert (info["is_read_only"], info["description"]) == (True, "x")


@pytest.mark.parametrize(
    "broken", ["[server", "[[export]]\nname = 'x'\nsource = '/nowhere'\n", "[server]\nmax_client = 1\n", None]
)
def test_a_broken_file_changes_nothing(site: Site, broken: str | None) -> None:
    site.write("a")
    with site.serving("-v") as daemon:
        if broken is None:
            site.config.unlink()
        else:
            site.config.write_text(broken)
        assert "reload: everything stays as it was: " in site.reload(daemon)
        assert exports(daemon) == ["a"]
        site.write("b")
        site.reload(daemon)
        assert exports(daemon) == ["b"]


def test_limits_and_the_log_level_change(site: Site) -> None:
    site.write("a", server='max_clients = 1\nlog_level = "info"')
    with site.serving() as daemon:
        with socket.socket(socket.AF_UNIX) as first, socket.socket(socket.AF_UNIX) as second:
            for each in (first, second):
                each.settimeout(10)
                each.connect(str(daemon.unix))
            assert (first.recv(8), second.recv(8)) == (b"NBDMAGIC", b"")
            site.write("a", server='max_clients = 2\nlog_level = "debug"')
            site.reload(daemon)
            with socket.socket(socket.AF_UNIX) as third:
                third.settimeout(10)
                third.connect(str(daemon.unix))
                assert third.recv(8) == b"NBDMAGIC"
        site.write("a", server='log_level = "warning"\npid_file = "/nowhere/pid"\nqmp = ["/other"]')
        daemon.send_signal(signal.SIGHUP)
        daemon.wait_for_log("reload: server.pid_file counts from the next start on")
        assert "server.qmp" not in daemon.stderr, "--qmp wins"


def test_allowed_addresses_change(site: Site) -> None:
    site.write("a", server='allow_ip = ["127.0.0.1"]')
    with serving(f"--config={site.config}", "-p", "0", "-v", tcp=True) as daemon:
        assert run("nbdinfo", "--size", daemon.uri) == f"{MiB}\n"
        site.write("a", server='allow_ip = ["192.0.2.0/24"]')
        site.reload(daemon)
        with socket.create_connection(("127.0.0.1", int(daemon.uri.split(":")[2].partition("/")[0])), 10) as client:
            assert client.recv(8) == b""
