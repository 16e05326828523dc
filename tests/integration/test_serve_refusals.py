"""What `nbdmirror serve` can't do it says on one line, names the thing, and leaves nothing behind."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from nbdmirror.units import MiB
from tests.support.daemon import run_cli
from tests.support.peers import require
from tests.support.tools import make_disk, pattern

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

FAILED, USAGE = 1, 2

# Root may open everything, unless it gives that up.
AS_ANYBODY = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []


class Place:
    """A directory with a disk, and all that is in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.disk = make_disk(path / "disk", MiB, {0: pattern(MiB)})
        self.socket = path / "s"

    def state(self) -> dict[str, tuple[int, int, int]]:
        found = {}
        for each in sorted(self.path.rglob("*")):
            status = each.lstat()
            found[str(each)] = (status.st_mode, status.st_size, status.st_mtime_ns)
        return found

    def sockets(self, option: str, path: Path) -> list[str | Path]:
        """`path` as the socket that is meant, next to a good one where there have to be two."""
        return [option, path] if option == "-k" else ["-k", self.socket, option, path]

    def refused(self, status: int, *args: str | Path, prefix: Sequence[str] = ()) -> str:
        """The one line that `serve` says before it ends with `status`, having changed nothing."""
        before = self.state()
        result = run_cli("serve", *args, prefix=prefix)
        assert (result.returncode, result.stdout) == (status, ""), result.stderr
        assert "Traceback" not in result.stderr
        assert "internal error" not in result.stderr
        (line,) = result.stderr.splitlines()
        assert line.startswith("nbdmirror: ")
        assert self.state() == before
        return line


@pytest.fixture
def place(sock_dir: Path) -> Place:
    return Place(sock_dir)


# --- disks -----------------------------------------------------------------------------------------------------------


def test_a_missing_disk(place: Place) -> None:
    line = place.refused(FAILED, place.path / "nowhere", "-k", place.socket)
    assert line.endswith(f"'{place.path}/nowhere': No such file or directory")


def test_a_directory(place: Place) -> None:
    assert place.refused(FAILED, place.path, "-k", place.socket).endswith(f"'{place.path}': Is a directory")


def test_what_is_neither_file_nor_block_device(place: Place) -> None:
    assert "'/dev/null'" in place.refused(FAILED, "/dev/null", "-k", place.socket)
    fifo = place.path / "fifo"
    os.mkfifo(fifo)
    assert f"'{fifo}'" in place.refused(FAILED, fifo, "-k", place.socket)


def test_a_disk_that_may_not_be_opened(place: Place) -> None:
    if AS_ANYBODY:
        require("setpriv")
    place.disk.chmod(0)
    for options in ([], ["-r"]):
        line = place.refused(FAILED, place.disk, "-k", place.socket, *options, prefix=AS_ANYBODY or ["env"])
        assert line.endswith(f"'{place.disk}': Permission denied")


def test_a_disk_that_may_only_be_read(place: Place) -> None:
    place.disk.chmod(0o400)
    prefix = AS_ANYBODY or ["env"]
    assert f"'{place.disk}'" in place.refused(FAILED, place.disk, "-k", place.socket, prefix=prefix)
    assert run_cli("serve", place.disk, "-r", "-k", place.socket, "--run", "exit 0", prefix=prefix).returncode == 0


def test_a_remote_disk_that_is_not_there(place: Place) -> None:
    uri = f"nbd+unix:///?socket={place.path}/nobody"
    assert uri in place.refused(FAILED, uri, "-k", place.socket)


@pytest.mark.parametrize("uri", ["", "nbd+unix:///", "nbd://host:port/"])
def test_a_disk_that_cannot_be_one(place: Place, uri: str) -> None:
    line = place.refused(USAGE, uri, "-k", place.socket)
    assert uri in line


# --- sockets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["-k", "--qmp"])
def test_a_file_where_a_socket_should_be(place: Place, option: str) -> None:
    file = place.path / "file"
    file.write_text("precious")
    line = place.refused(FAILED, place.disk, *place.sockets(option, file))
    assert f"'{file}'" in line
    assert "not a socket" in line


@pytest.mark.parametrize("option", ["-k", "--qmp"])
def test_a_socket_in_a_directory_that_is_not_there(place: Place, option: str) -> None:
    path = place.path / "nowhere" / "s"
    line = place.refused(FAILED, place.disk, *place.sockets(option, path))
    assert line.endswith(f"'{path}': No such file or directory")


@pytest.mark.parametrize("option", ["-k", "--qmp"])
def test_a_socket_path_that_is_too_long(place: Place, option: str) -> None:
    path = place.path / ("x" * (108 - len(str(place.path)) - 1))
    assert len(str(path)) == 108
    line = place.refused(USAGE, place.disk, *place.sockets(option, path))
    assert f"'{path}'" in line
    assert "107 bytes" in line


def test_a_socket_without_a_name(place: Place) -> None:
    assert "empty" in place.refused(USAGE, place.disk, "-k", "")


def test_a_socket_that_may_not_be_made(place: Place) -> None:
    if AS_ANYBODY:
        require("setpriv")
    locked = place.path / "locked"
    locked.mkdir(0o500)
    line = place.refused(FAILED, place.disk, "-k", locked / "s", prefix=AS_ANYBODY or ["env"])
    assert line.endswith(f"'{locked}/s': Permission denied")


def test_an_address_that_is_not_ours(place: Place) -> None:
    # 192.0.2.0/24 is for documentation: no machine has it.
    line = place.refused(FAILED, place.disk, "-p", "0", "-b", "192.0.2.1", "--insecure")
    assert line.endswith("192.0.2.1 port 0: Cannot assign requested address")


@pytest.mark.parametrize("address", ["0.0.0.0", "::", "192.0.2.1"])
def test_the_open_network_without_tls(place: Place, address: str) -> None:
    line = place.refused(USAGE, place.disk, "-p", "0", "-b", address)
    assert address in line
    assert "--insecure" in line


# --- the rest --------------------------------------------------------------------------------------------------------


def test_a_pid_file_that_cannot_be_written(place: Place) -> None:
    path = place.path / "nowhere" / "pid"
    line = place.refused(USAGE, place.disk, "-k", place.socket, "--qmp", place.path / "q", "--pid-file", path)
    assert line.endswith(f"'{path}': No such file or directory")


def test_a_ready_fd_that_is_not_open(place: Place) -> None:
    line = place.refused(USAGE, place.disk, "-k", place.socket, "--ready-fd", "77", "--pid-file", place.path / "pid")
    assert line.endswith("--ready-fd 77: Bad file descriptor")


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["-k", "s", "-p", "1"], ["-k", "-p"]),
        (["-p", "65536"], ["--port", "65536"]),
        (["-p", "http"], ["--port", "http"]),
        (["-k", "s", "-e", "-1"], ["--shared", "-1"]),
        (["-k", "s", "--ready-fd", "x"], ["--ready-fd", "x"]),
        (["-k", "s", "--no-such-option"], ["--no-such-option"]),
        (["-k", "s", "-x", "x" * 4097], ["4096"]),
        (["-k"], ["-k"]),
        (["another"], ["another"]),
    ],
    ids=lambda value: " ".join(value)[:30],
)
def test_wrong_usage_is_explained(place: Place, args: list[str], named: list[str]) -> None:
    before = place.state()
    result = run_cli("serve", place.disk, *args, prefix=["env", "-C", str(place.path)])
    assert (result.returncode, result.stdout) == (USAGE, "")
    assert "Traceback" not in result.stderr
    assert all(name in result.stderr.splitlines()[-1] for name in named), result.stderr
    assert place.state() == before


def test_no_disk_at_all() -> None:
    result = run_cli("serve")
    assert (result.returncode, result.stdout) == (USAGE, "")
    assert "DISK" in result.stderr.splitlines()[-1]


def test_verbose_shows_where_it_failed(place: Place) -> None:
    result = run_cli("-v", "serve", place.path / "nowhere", "-k", place.socket)
    assert result.returncode == FAILED
    assert "Traceback" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("nbdmirror: cannot open")
