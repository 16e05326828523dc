"""`nbdmirror serve --tls-psk` under the clients that people have; on a Python without pre-shared keys, its refusal.

No test here is skipped: each says what is to be seen on the Python that runs it.
"""

from __future__ import annotations

import secrets
import ssl
from typing import TYPE_CHECKING

import pytest

from nbdmirror.units import MiB
from tests.support.daemon import run_cli, serving
from tests.support.peers import require
from tests.support.tools import fails, make_disk, pattern, run, same_content

if TYPE_CHECKING:
    from pathlib import Path

USAGE = 2
HAS_PSK = getattr(ssl, "HAS_PSK", False)  # from Python 3.13 on


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return make_disk(tmp_path / "disk", 8 * MiB, {MiB: pattern(MiB)})


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """The directory of the server's keys, named as QEMU wants them."""
    directory = tmp_path / "keys"
    directory.mkdir()
    users = "".join(f"{user}:{secrets.token_hex(32)}\n" for user in ("alice", "bob"))
    (directory / "keys.psk").write_text(users)
    return directory


def is_refused(disk: Path, keys: Path, *where: str | Path) -> bool:
    """Whether this Python has no pre-shared keys; then `serve` says so, and what to do."""
    if HAS_PSK:
        return False
    result = run_cli("serve", disk, *where, "--tls-psk", keys / "keys.psk")
    assert (result.returncode, result.stdout) == (USAGE, "")
    assert result.stderr == "nbdmirror: pre-shared keys for TLS need Python 3.13 or newer; use --tls-certificates\n"
    return True


def with_key(uri: str, user: str, file: Path) -> str:
    scheme, rest = uri.split("://")
    return f"{scheme}://{user}@{rest}{'&' if '?' in rest else '?'}tls-psk-file={file}"


@pytest.mark.parametrize("transport", ["unix", "tcp"])
def test_the_right_key_is_let_in_and_no_other(disk: Path, keys: Path, tmp_path: Path, transport: str) -> None:
    require("nbdinfo")
    where = ("-p", "0") if transport == "tcp" else ()
    if is_refused(disk, keys, "-p", "0"):
        return
    others = tmp_path / "others.psk"
    others.write_text(f"alice:{secrets.token_hex(32)}\nmallory:{secrets.token_hex(32)}\n")
    with serving(disk, "--tls-psk", keys / "keys.psk", *where, tcp=transport == "tcp") as daemon:
        assert daemon.uri.startswith("nbds")
        for user in ("alice", "bob"):
            told = run("nbdinfo", "--no-content", with_key(daemon.uri, user, keys / "keys.psk"))
            assert "newstyle-fixed with TLS" in told
        for user in ("alice", "mallory"):
            fails("nbdinfo", "--no-content", with_key(daemon.uri, user, others))
        fails("nbdinfo", "--no-content", daemon.uri.replace("nbds", "nbd"))
        assert daemon.stderr.count("the TLS handshake failed") == 2
        for line in (keys / "keys.psk").read_text().splitlines():
            assert line.partition(":")[2] not in daemon.stderr


def test_copies_there_and_back(disk: Path, keys: Path, tmp_path: Path) -> None:
    require("nbdcopy", "qemu-img")
    if is_refused(disk, keys, "-p", "0"):
        return
    target, back = make_disk(tmp_path / "target", 8 * MiB), tmp_path / "back"
    with serving(target, "--tls-psk", keys / "keys.psk") as daemon:
        uri = with_key(daemon.uri, "alice", keys / "keys.psk")
        run("nbdcopy", disk, uri)
        assert same_content(disk, target)
        result = run_cli("copy", uri, "--create", back)
        assert (result.returncode, result.stderr) == (0, "")
        assert same_content(disk, back)
        creds = f"tls-creds-psk,id=t,endpoint=client,username=bob,dir={keys}"
        image = f"driver=nbd,server.type=unix,server.path={daemon.unix},tls-creds=t"
        run("qemu-img", "convert", "--object", creds, "--image-opts", "-O", "raw", image, tmp_path / "again")
        assert same_content(disk, tmp_path / "again")
        assert daemon.stderr == ""
