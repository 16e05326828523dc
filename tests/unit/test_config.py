"""The configuration file: what is wrong is named with its line; options win."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from nbdmirror.config import Config, read
from nbdmirror.errors import UsageError
from nbdmirror.serving import DiskOptions

if TYPE_CHECKING:
    from pathlib import Path

GOOD = """
[server]
socket = "/run/nbd"
max_clients = 3
qmp = ["/run/qmp"]

[[export]]
source = "/dev/a"
name = "a"

[[export]]
source = "/dev/b"  # the other one
name = "b"
read_only = true
description = \"\"\"
two
lines\"\"\"
node_name = "beta"

[tls]
mode = "on"
certificates = "/etc/pki"
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "nbd.toml"


def parsed(path: Path, text: str) -> Config:
    path.write_text(text)
    return read(str(path))


def refusal(path: Path, text: str) -> str:
    with pytest.raises(UsageError) as caught:
        parsed(path, text)
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(str(path), "F")


def test_what_it_says_by_the_names_of_the_options(path: Path) -> None:
    config = parsed(path, GOOD)
    assert config.settings() == {
        "socket": "/run/nbd",
        "shared": 3,
        "qmp": ("/run/qmp",),
        "tls": "on",
        "tls_certificates": "/etc/pki",
    }
    assert config.disks({}) == (
        DiskOptions("/dev/a", node_name="a", export_name="a"),
        DiskOptions("/dev/b", node_name="beta", export_name="b", description="two\nlines", read_only=True),
    )


def test_an_empty_file_says_nothing(path: Path) -> None:
    config = parsed(path, "")
    assert (config.settings(), config.disks({})) == ({}, ())


def test_a_lone_export_may_have_no_name(path: Path) -> None:
    assert parsed(path, "[[export]]\nsource = '/dev/a'").disks({}) == (DiskOptions("/dev/a"),)


@pytest.mark.parametrize(
    ("text", "line", "key", "what"),
    [
        ("[server]\n\nsockt = 'x'\n", 3, "server.sockt", "nobody knows this key; there are socket, "),
        ("[servr]\n", 1, "servr", "nobody knows this key; there are the tables server, export, "),
        ("[[export]]\nsource = 'a'\n[[export]]\n# here\nsouce = 'b'\n", 5, "export.souce", "nobody knows"),
        ("[server]\n[[export]]\nname = 'a'\n", 2, "export.source", "is missing"),
        ("[server]\nport = '1'\n", 2, "server.port", "has to be a whole number, and is a string"),
        ("server.port = 65536\n", 1, "server.port", "has to be <= 65535"),
        ("server = 3\n", 1, "server", "has to be a table, and is a whole number"),
        ("[export]\nsource = 'a'\n", 1, "export", "has to be a list, and is a table"),
        ("[tls]\nmode = 'maybe'\n", 2, "tls.mode", "'maybe' is none of off, on, require"),
        ("[server]\nlog_level = 'loud'\n", 2, "server.log_level", "'loud' is none of error, "),
        ("[server]\nallow_ip = [\n  '::1',\n  'here',\n]\n", 2, "server.allow_ip", "'here' is no network"),
        ("[server]\nallow_ip = [\n  '::1',\n  4,\n]\n", 2, "server.allow_ip", "has to be a string, and is a whole number"),
        ("[server]\nvsock = 'a'\n", 2, "server.vsock", "'a' is not [CID:]PORT"),
        ("[server]\nsocket = 'a'\nport = 1\n", 3, "server.port", "excludes socket"),
        ("[server]\nbind = '::1'\nsocket = 'a'\n", 2, "server.bind", "goes with TCP"),
        ("[[export]]\nsource = 'a'\n[[export]]\nname = 'b'\nsource = 'b'\n", 1, "export", "needs a name"),
        ("[[export]]\nsource = 'a'\nname = 'n'\n" * 2, 6, "export.name", "'n' is another export's already"),
        ("[[export]]\nsource = 'a'\nnode_name = '1'\n", 3, "export.node_name", "Invalid node-name: '1'"),
        ("[[export]]\nsource = 'a'\nname = 'a b'\n", 1, "export", "needs a node_name"),
        ("[[export]]\nsource = 'a'\nname = 'a'\nnode_name = 'n'\n[[export]]\nsource='b'\nname='n'\n", 5, "export", "'n' is an"),
        (
            f"[[export]]\nsource = 'a'\ndescription = '{'x' * 4097}'\n",
            1,
            "export",
            "name and description are at most 4096 bytes",
        ),
        ("[metrics]\n", 1, "metrics.listen", "is missing"),
        ("text = '''\n[server]\nx\n'''\n", 1, "text", "nobody knows"),
    ],
)
def test_what_is_wrong_has_its_line_and_key(path: Path, text: str, line: int, key: str, what: str) -> None:
    assert refusal(path, text).startswith(f"'F', line {line}: {key}: {what}")


def test_what_is_not_toml(path: Path) -> None:
    assert refusal(path, "[server]\nport =\n") == "'F' is not TOML: Invalid value (at line 2, column 7)"
    path.write_bytes(b"\xff")
    with pytest.raises(UsageError, match="not UTF-8"):
        read(str(path))
    path.unlink()
    with pytest.raises(UsageError, match="No such file or directory"):
        read(str(path))


def test_options_win(path: Path) -> None:
    config = parsed(path, GOOD)
    assert "tls" not in config.settings(["tls"])
    assert "socket" not in config.settings(["port"]), "where to listen is said once"


def test_options_of_a_disk_are_for_the_only_one(path: Path) -> None:
    config = parsed(path, "[[export]]\nsource = '/dev/a'\nname = 'a'\nread_only = true\n")
    (disk,) = config.disks({"disk": "/dev/b", "description": "other"})
    assert disk == DiskOptions("/dev/b", node_name="a", export_name="a", description="other", read_only=True)
    with pytest.raises(UsageError, match="has 2 exports: DISK, -x"):
        parsed(path, GOOD).disks({"description": "other"})


@pytest.mark.parametrize(
    ("error", "given", "line"),
    [
        ("--tls on needs something", (), 21),
        ("--allow-dn needs --tls require", (), 21),
        ("--tls on needs something", ("tls",), None),
        ("-p and -k exclude each other", (), 3),
        ("cannot read '/etc/pki/server-cert.pem'", (), 22),
        ("--insecure would do", (), None),
    ],
)
def test_what_shows_later_has_its_line_too(path: Path, error: str, given: tuple[str, ...], line: int | None) -> None:
    said = str(parsed(path, GOOD).blame(UsageError(error), given))
    assert said.endswith(error)
    assert said == error if line is None else said.startswith(f"'{path}', line {line}: ")
