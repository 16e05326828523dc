"""Every spelling of an endpoint leads to it: our own printed URI for everybody, other tools' spellings for us."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import quote

import pytest

from nbdmirror.devices.open import open_device
from nbdmirror.units import MiB
from tests.support.daemon import run_cli, serving
from tests.support.peers import nbdkit, qemu_nbd, require
from tests.support.tools import completed, make_disk, pattern, run, same_content

if TYPE_CHECKING:
    from pathlib import Path

# What needs encoding somewhere in a URI, and what does not but looks so.
NAMES = ["", "disk", "/disk", "a b", "a+b", "100%", "what?", "a#b&c=d", "dïsk/ü", "a:b@c", "[x]", "%41", "."]


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return make_disk(tmp_path / "disk", MiB, {0: pattern(MiB)})


@pytest.mark.parametrize("name", NAMES)
async def test_the_printed_uri_is_understood_by_everybody(disk: Path, name: str) -> None:
    require("nbdinfo", "qemu-img")
    for where in ((), ("-p", "0")):
        with serving(disk, "-r", "-x", name, *where, tcp=bool(where)) as daemon:
            assert run("nbdinfo", "--size", daemon.uri) == f"{MiB}\n"
            device = await open_device(daemon.uri, read_only=True)
            assert device.size == MiB
            await device.aclose()
            # QEMU resolves "." in a URI's path as RFC 3986 has it for relative ones.
            if name != ".":
                assert completed("qemu-img", "info", daemon.uri).returncode == 0


@pytest.mark.parametrize("directory", ["with space", "a&b", "100%", "ü"])
def test_the_printed_uri_of_any_path(disk: Path, sock_dir: Path, directory: str) -> None:
    require("nbdinfo")
    (sock_dir / directory).mkdir()
    with serving(disk, "-r", socket=sock_dir / directory / "s") as daemon:
        assert run("nbdinfo", "--size", daemon.uri) == f"{MiB}\n"
        assert run_cli("compare", disk, daemon.uri).returncode == 0


@pytest.mark.parametrize("name", ["", "drive-scsi0", "a:b", "a b%41"])
def test_qemus_older_spelling_of_a_unix_socket(disk: Path, tmp_path: Path, name: str) -> None:
    target = make_disk(tmp_path / "target", MiB)
    with qemu_nbd(target, export=name) as peer:
        uri = f"nbd:unix:{peer.endpoint.socket}{':exportname=' + name if name else ''}"
        result = run_cli("copy", disk, uri)
        assert (result.returncode, result.stderr) == (0, "")
    assert same_content(disk, target)


def test_spellings_of_a_tcp_port(disk: Path) -> None:
    with nbdkit("file", str(disk), tcp=True) as peer:
        port = peer.endpoint.port
        for uri in (
            f"nbd:127.0.0.1:{port}",
            f"nbd:localhost:{port}:exportname=any",
            f"nbd://localhost:{port}",
            f"nbd+tcp://127.0.0.1:{port}/any",
            f"NBD://127.0.0.1:{port}/?x-mine=1",
        ):
            result = run_cli("compare", disk, uri)
            assert (result.returncode, result.stderr) == (0, ""), uri


def test_serving_what_another_server_has_by_its_older_spelling(disk: Path) -> None:
    require("nbdinfo")
    with qemu_nbd(disk, export="drive") as peer, serving(f"nbd:unix:{peer.endpoint.socket}:exportname=drive") as daemon:
        assert run("nbdinfo", "--size", daemon.uri) == f"{MiB}\n"


@pytest.mark.parametrize("extra", ["tls-certificate=/x", "sockets=/x", "debug"])
def test_a_parameter_that_nobody_knows(disk: Path, sock_dir: Path, extra: str) -> None:
    uri = f"nbds+unix:///?socket={quote(str(sock_dir))}/s&{extra}"
    result = run_cli("copy", disk, uri)
    assert (result.returncode, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert f"unknown parameter '{extra.partition('=')[0]}'; known are socket, " in line
