"""`nbdmirror serve` with TLS, under the clients that people have: libnbd's tools, qemu-img and our own copy."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from nbdmirror.cli import main
from nbdmirror.units import MiB
from tests.support.certificates import EXPIRED, NOT_YET, Authority
from tests.support.daemon import run_cli, serving
from tests.support.peers import nbdkit, require
from tests.support.tools import fails, make_disk, pattern, run, same_content

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.daemon import Daemon

FAILED, USAGE = 1, 2


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pki")
    authority = Authority(path / "ca")
    authority.server(path / "server")
    authority.server(path / "elsewhere", names="DNS:elsewhere.example")
    authority.server(path / "expired", dates=EXPIRED)
    authority.server(path / "not-yet", dates=NOT_YET)
    authority.client(path / "client", "/C=GB/O=Us/CN=me")
    authority.client(path / "revoked", "/CN=was me")
    authority.client(path / "expired-client", dates=EXPIRED)
    authority.server(path / "with-crl")
    authority.revoke(path / "revoked" / "client-cert.pem", path / "with-crl" / "ca-crl.pem")
    Authority(path / "other-ca", "others").client(path / "stranger")
    return path


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return make_disk(tmp_path / "disk", 8 * MiB, {MiB: pattern(MiB)})


def with_certificates(uri: str, directory: Path) -> str:
    return f"{uri}{'&' if '?' in uri else '?'}tls-certificates={directory}"


def tcp(pki: Path, *more: str, server: str = "server") -> tuple[str, ...]:
    return ("-p", "0", "--tls-certificates", str(pki / server), *more)


def refused_once(daemon: Daemon, text: str) -> None:
    daemon.wait_for_log(text)
    assert daemon.stderr.count(text) == 1


# --- clients ---------------------------------------------------------------------------------------------------------


def test_nbdinfo_and_the_uri_that_is_printed(pki: Path, disk: Path) -> None:
    require("nbdinfo")
    with serving(disk, *tcp(pki), tcp=True) as daemon:
        assert daemon.uri.startswith("nbds://127.0.0.1:")
        told = run("nbdinfo", "--no-content", with_certificates(daemon.uri, pki / "client"))
        assert "newstyle-fixed with TLS" in told
        fails("nbdinfo", "--no-content", daemon.uri.replace("nbds:", "nbd:"))
        assert daemon.stderr == ""


def test_nbdinfo_over_a_unix_socket(pki: Path, disk: Path) -> None:
    require("nbdinfo")
    with serving(disk, "-x", "a", "--tls-certificates", pki / "server") as daemon:
        assert daemon.uri.startswith("nbds+unix:///a?socket=/")
        assert run("nbdinfo", "--size", with_certificates(daemon.uri, pki / "client")) == f"{8 * MiB}\n"
        fails("nbdinfo", "--size", daemon.uri.replace("nbds+", "nbd+"))


@pytest.mark.parametrize("scheme", ["nbd+unix", "nbds+unix"])
def test_optional_tls_serves_both(pki: Path, disk: Path, scheme: str) -> None:
    require("nbdinfo")
    with serving(disk, "--tls", "on", "--tls-certificates", pki / "server") as daemon:
        assert daemon.uri.startswith("nbd+unix:")
        uri = daemon.uri.replace("nbd+unix", scheme)
        if scheme == "nbds+unix":
            uri = with_certificates(uri, pki / "client")
        assert ("with TLS" in run("nbdinfo", "--no-content", uri)) == (scheme == "nbds+unix")


def test_without_tls_clients_that_insist_on_it_go_away(pki: Path, disk: Path) -> None:
    require("nbdinfo")
    with serving(disk) as daemon:
        uri = with_certificates(daemon.uri.replace("nbd+", "nbds+"), pki / "client")
        fails("nbdinfo", "--no-content", uri)
        run("nbdinfo", "--no-content", daemon.uri)


def test_nbdcopy_there_and_back(pki: Path, tmp_path: Path) -> None:
    """64 MiB without a hole each way, over several connections."""
    require("nbdcopy")
    size = 64 * MiB
    original = make_disk(tmp_path / "original", size, {0: pattern(size)})
    disk, back = make_disk(tmp_path / "disk", size), make_disk(tmp_path / "back", size)
    with serving(disk, *tcp(pki, "--tls-verify-peer"), tcp=True) as daemon:
        uri = with_certificates(daemon.uri, pki / "client")
        run("nbdcopy", original, uri)
        assert same_content(original, disk)
        run("nbdcopy", uri, back)
        assert same_content(original, back)
        assert daemon.stderr == ""


def test_qemu_img(pki: Path, disk: Path, tmp_path: Path) -> None:
    require("qemu-img")
    back = tmp_path / "back"
    with serving(disk, "--tls-verify-peer", "--tls-certificates", pki / "server") as daemon:
        creds = f"tls-creds-x509,id=t,endpoint=client,dir={pki}/client"
        image = f"driver=nbd,server.type=unix,server.path={daemon.unix},tls-creds=t,tls-hostname=localhost"
        run("qemu-img", "convert", "--object", creds, "--image-opts", "-O", "raw", image, back)
        assert same_content(disk, back)
        stranger = creds.replace("/client", "/stranger")
        assert fails("qemu-img", "info", "--object", stranger, "--image-opts", image)
        assert "Traceback" not in daemon.stderr


def test_our_own_copy(pki: Path, disk: Path, tmp_path: Path) -> None:
    target = make_disk(tmp_path / "target", 8 * MiB)
    with serving(target, *tcp(pki, "--tls-verify-peer"), tcp=True) as daemon:
        uri = with_certificates(daemon.uri.replace("127.0.0.1", "localhost"), pki / "client")
        result = run_cli("copy", disk, uri)
        assert (result.returncode, result.stderr) == (0, "")
        assert same_content(disk, target)
        assert daemon.stderr == ""


def test_our_own_mirror(pki: Path, disk: Path, tmp_path: Path) -> None:
    target = make_disk(tmp_path / "target", 8 * MiB)
    with serving(target, *tcp(pki), tcp=True) as remote, serving(disk, qmp=True) as daemon:
        uri = with_certificates(remote.uri, pki / "client")
        result = run_cli("mirror", "--qmp", daemon.control, "--complete", uri)
        assert result.returncode == 0, result.stderr
        assert daemon.terminate() == 0
        assert same_content(disk, target)


@pytest.mark.parametrize(("server", "client"), [("server", "stranger"), ("elsewhere", "client")])
def test_our_client_refuses_servers_that_are_not_who_they_should_be(pki: Path, disk: Path, server: str, client: str) -> None:
    before = disk.read_bytes()
    with serving(disk, *tcp(pki, server=server), tcp=True) as daemon:
        result = run_cli("copy", disk, with_certificates(daemon.uri, pki / client))
        assert result.returncode == FAILED
        (line,) = result.stderr.splitlines()
        assert f"cannot connect to {daemon.uri}" in line
        assert "its certificate has expired, is for another host, or is not signed by the ca-cert.pem that was given" in line
        refused_once(daemon, "the TLS handshake failed: ")
    assert disk.read_bytes() == before


def test_our_client_refuses_an_expired_server(pki: Path, disk: Path) -> None:
    extra = ["--tls=require", f"--tls-certificates={pki}/expired"]
    with nbdkit("memory", "8M", extra=extra, tcp=True) as peer:
        uri = f"nbds://localhost:{peer.endpoint.port}/?tls-certificates={pki}/client"
        result = run_cli("copy", disk, uri)
    assert result.returncode == FAILED
    (line,) = result.stderr.splitlines()
    assert "its certificate has expired, is for another host" in line


def test_our_client_never_goes_on_in_clear_text(pki: Path, disk: Path) -> None:
    with serving(disk, "-p", "0", tcp=True) as daemon:
        result = run_cli("copy", disk, with_certificates(daemon.uri.replace("nbd:", "nbds:"), pki / "client"))
        assert result.returncode == FAILED
        (line,) = result.stderr.splitlines()
        assert "TLS" in line


# --- clients that are not let in -------------------------------------------------------------------------------------


REASONS = {
    "server": "peer did not return a certificate",
    "expired-client": "certificate has expired",
    "revoked": "certificate revoked",
}


@pytest.mark.parametrize("client", REASONS)
def test_client_certificates_are_verified(pki: Path, disk: Path, client: str) -> None:
    require("nbdinfo")
    with serving(disk, *tcp(pki, "--tls-verify-peer", server="with-crl"), tcp=True) as daemon:
        fails("nbdinfo", "--no-content", with_certificates(daemon.uri, pki / client))
        refused_once(daemon, REASONS[client])
        run("nbdinfo", "--no-content", with_certificates(daemon.uri, pki / "client"))


def test_allowed_subjects(pki: Path, disk: Path) -> None:
    require("nbdinfo")
    allow = ("--tls-verify-peer", "--allow-dn", "CN=nobody", "--allow-dn", "CN=me,O=Us,*")
    with serving(disk, *tcp(pki, *allow), tcp=True) as daemon:
        run("nbdinfo", "--no-content", with_certificates(daemon.uri, pki / "client"))
        fails("nbdinfo", "--no-content", with_certificates(daemon.uri, pki / "revoked"))
        refused_once(daemon, "its certificate, for 'CN=was me', is not among those allowed; refused")


def test_allowed_addresses(disk: Path) -> None:
    require("nbdinfo")
    with serving(disk, "-p", "0", "--allow-ip", "192.0.2.0/24", tcp=True) as daemon:
        fails("nbdinfo", "--no-content", daemon.uri)
        refused_once(daemon, "its address is not among those allowed; refused")
    with serving(disk, "-p", "0", "--allow-ip", "192.0.2.0/24", "--allow-ip", "127.0.0.1", tcp=True) as daemon:
        run("nbdinfo", "--no-content", daemon.uri)


# --- what serve refuses ----------------------------------------------------------------------------------------------


Refused = Callable[..., str]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """The one line that `serve` says before it ends for wrong usage. In this process: that is ten times as fast."""

    def line_of(*args: str | Path) -> str:
        status = main.run(["serve", *map(str, args)])
        said = capsys.readouterr()
        assert (status, said.out) == (USAGE, ""), said.err
        (line,) = said.err.splitlines()
        assert line.startswith("nbdmirror: ")
        return line

    return line_of


CONFLICTS = {
    "off with certificates": ("--tls", "off", "--tls-certificates", "d"),
    "off with keys": ("--tls", "off", "--tls-psk", "f"),
    "on without": ("--tls", "on"),
    "require without": ("--tls", "require"),
    "both": ("--tls-certificates", "d", "--tls-psk", "f"),
    "verify without certificates": ("--tls-verify-peer",),
    "subjects unverified": ("--tls-certificates", "d", "--allow-dn", "CN=*"),
    "subjects optional": ("--tls-certificates", "d", "--tls-verify-peer", "--tls", "on", "--allow-dn", "CN=*"),
    "addresses of a Unix socket": ("--allow-ip", "127.0.0.1"),
}


@pytest.mark.parametrize("args", CONFLICTS.values(), ids=CONFLICTS)
def test_flags_that_contradict_each_other(refused: Refused, disk: Path, sock_dir: Path, args: tuple[str, ...]) -> None:
    assert "--" in refused(disk, "-k", sock_dir / "s", *args)
    assert not (sock_dir / "s").exists()


def test_what_is_no_network(refused: Refused, disk: Path) -> None:
    assert "'localhost' is no network" in refused(disk, "-p", "0", "--allow-ip", "localhost")


@pytest.mark.parametrize("name", ["server-cert.pem", "server-key.pem", "ca-cert.pem"])
@pytest.mark.parametrize("content", [None, b"", b"not PEM\n", b"\xff\xfe"])
def test_files_that_are_missing_or_unusable(
    refused: Refused, pki: Path, disk: Path, sock_dir: Path, tmp_path: Path, name: str, content: bytes | None
) -> None:
    directory = tmp_path / "bad"
    directory.mkdir()
    for each in ("server-cert.pem", "server-key.pem", "ca-cert.pem"):
        (directory / each).write_bytes((pki / "server" / each).read_bytes())
    if content is None:
        (directory / name).unlink()
    else:
        (directory / name).write_bytes(content)
    line = refused(disk, "-k", sock_dir / "s", "--tls-certificates", directory, "--tls-verify-peer")
    assert f"'{directory / name}'" in line
    assert not (sock_dir / "s").exists()


def test_a_key_of_another_certificate(refused: Refused, pki: Path, disk: Path, tmp_path: Path) -> None:
    for each, origin in (("server-cert.pem", "server"), ("server-key.pem", "elsewhere")):
        (tmp_path / each).write_bytes((pki / origin / each).read_bytes())
    line = refused(disk, "-p", "0", "--tls-certificates", tmp_path)
    assert line.endswith(f"'{tmp_path}/server-key.pem' is not the key of '{tmp_path}/server-cert.pem'")


@pytest.mark.parametrize(("kind", "reason"), [("expired", "certificate has expired"), ("not-yet", "not yet valid")])
def test_certificates_that_no_client_would_accept(refused: Refused, pki: Path, disk: Path, kind: str, reason: str) -> None:
    line = refused(disk, *tcp(pki, server=kind))
    assert f"'{pki / kind}/server-cert.pem'" in line
    assert reason in line


def test_other_hosts_need_tls_required(refused: Refused, pki: Path, disk: Path) -> None:
    others = ("-b", "0.0.0.0")
    assert "--insecure" in refused(disk, *tcp(pki, "--tls", "on"), *others)
    assert run_cli("serve", disk, *tcp(pki), *others, "--run", "exit 0").returncode == 0
