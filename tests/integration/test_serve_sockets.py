"""The sockets that `nbdmirror serve` makes: whose they are, who may connect, and what happens when several want the same."""

from __future__ import annotations

import fcntl
import os
import random
import re
import socket
import stat
import struct
import subprocess
import sys
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import nbdmirror
from nbdmirror import sockets
from nbdmirror.errors import ListenError
from nbdmirror.units import MiB
from tests.support.daemon import run_cli, serving, until
from tests.support.peers import require
from tests.support.tools import make_disk, pattern, run, same_content

if TYPE_CHECKING:
    from collections.abc import Iterator

FAILED, USAGE = 1, 2


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return make_disk(tmp_path / "disk", MiB, {0: pattern(MiB)})


@pytest.fixture(autouse=True)
def _this_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(nbdmirror.__file__).parents[1]))


# --- whose it is -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("umask", [0, 0o022, 0o077])
def test_only_its_owner_may_connect_whatever_the_umask(sock_dir: Path, umask: int) -> None:
    script = "import os, sys; from nbdmirror import sockets; os.umask(int(sys.argv[2])); sockets.listen_unix(sys.argv[1])"
    subprocess.run([sys.executable, "-c", f"{script}; print(os.umask(0))", sock_dir / "s", str(umask)], check=True)
    assert stat.S_IMODE((sock_dir / "s").stat().st_mode) == 0o600


def test_the_umask_of_the_process_is_never_touched(sock_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that other threads make at that moment would have another mode than was asked for."""
    touched: list[int] = []
    monkeypatch.setattr(os, "umask", touched.append)
    sockets.listen_unix(str(sock_dir / "s")).close()
    assert not touched


def test_a_successors_socket_is_left_alone(sock_dir: Path) -> None:
    first = sockets.listen_unix(str(sock_dir / "s"))
    (sock_dir / "s").unlink()
    second = sockets.listen_unix(str(sock_dir / "s"))
    first.close()
    assert (sock_dir / "s").is_socket()
    second.close()
    assert list(sock_dir.iterdir()) == []


def test_a_link_to_a_leftover_is_not_followed(sock_dir: Path) -> None:
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(sock_dir / "others"))
    (sock_dir / "s").symlink_to("others")
    with pytest.raises(ListenError, match="is not a socket"):
        sockets.listen_unix(str(sock_dir / "s"))
    assert (sock_dir / "others").is_socket()


def test_a_directory_that_somebody_keeps_locked(sock_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "_LOCK_SECONDS", 0.1)
    fd = os.open(sock_dir, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        with pytest.raises(ListenError, match="another process keeps its directory locked; choose another one"):
            sockets.listen_unix(str(sock_dir / "s"))
    finally:
        os.close(fd)


def test_the_file_goes_while_its_socket_still_listens(sock_dir: Path) -> None:
    """After that the file could be a successor's, even one with the same inode number."""
    was_there: list[bool] = []

    class Watched(socket.socket):
        def close(self) -> None:
            was_there.append((sock_dir / "s").exists())
            super().close()

    sock = Watched(socket.AF_UNIX)
    sock.bind(str(sock_dir / "s"))
    sockets.ServerSocket(sock, str(sock_dir / "s")).close()
    assert was_there == [False]


# --- several at once -------------------------------------------------------------------------------------------------


def test_of_many_daemons_started_at_once_one_wins_and_the_others_say_who(disk: Path, sock_dir: Path) -> None:
    require("nbdinfo")
    path = sock_dir / "s"
    with socket.socket(socket.AF_UNIX) as leftover:
        leftover.bind(str(path))
    argv = [sys.executable, "-P", "-m", "nbdmirror", "serve", str(disk), "-r", "-k", str(path)]
    with ExitStack() as stack:
        daemons = [
            stack.enter_context(subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=-1, stderr=-1, text=True))
            for _ in range(6)
        ]
        try:
            until(lambda: sum(daemon.poll() is not None for daemon in daemons) == 5, "all but one have ended", 30)
            (winner,) = [daemon for daemon in daemons if daemon.poll() is None]
            assert winner.stdout is not None
            assert winner.stdout.readline() == f"READY nbd+unix:///?socket={path}\n"
            assert run("nbdinfo", "--size", f"nbd+unix:///?socket={path}") == f"{MiB}\n"
            for loser in daemons:
                if loser is not winner:
                    said = loser.communicate()[1]
                    assert loser.returncode == FAILED
                    assert f"process {winner.pid} (" in said
                    assert "is listening there; stop it or choose another path" in said
        finally:
            for daemon in daemons:
                daemon.terminate()
        assert winner.wait(20) == 0
    assert not path.exists()


# On "go" it listens, or ends what it has, and says which.
CONTENDER = """
import sys
from nbdmirror import errors, sockets
mine = None
for line in sys.stdin:
    if mine is not None:
        mine.close()
        mine = None
        print("closed", flush=True)
        continue
    try:
        mine = sockets.listen_unix(sys.argv[1])
        print("won", flush=True)
    except errors.ListenError as error:
        print(error, flush=True)
"""


@contextmanager
def contenders(path: Path, count: int) -> Iterator[list[subprocess.Popen[str]]]:
    with ExitStack() as stack:
        yield [
            stack.enter_context(subprocess.Popen([sys.executable, "-c", CONTENDER, path], stdin=-1, stdout=-1, text=True))
            for _ in range(count)
        ]


def one_round(processes: list[subprocess.Popen[str]]) -> list[str]:
    """What each says when all are told to go at the same moment."""
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
    for process in processes:
        assert process.stdin is not None
        process.stdin.flush()
    return [process.stdout.readline().rstrip("\n") for process in processes if process.stdout is not None]


def listener_at(path: Path) -> int:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        pid, _, _ = struct.unpack("3i", client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        return int(pid)


def test_a_leftover_is_taken_over_by_exactly_one(sock_dir: Path) -> None:
    path = sock_dir / "s"
    with contenders(path, 4) as processes:
        for _ in range(50):
            with socket.socket(socket.AF_UNIX) as leftover:
                leftover.bind(str(path))
            said = one_round(processes)
            assert said.count("won") == 1
            winner = processes[said.index("won")]
            assert listener_at(path) == winner.pid
            assert all(f"process {winner.pid} (" in line for line in said if line != "won")
            assert one_round([winner]) == ["closed"]
            assert not path.exists()


def test_who_takes_over_from_one_that_ends_stays(sock_dir: Path) -> None:
    """An ending daemon never removes the socket of the next, however close they are."""
    path = sock_dir / "s"
    with contenders(path, 3) as processes:
        said = one_round(processes)
        for _ in range(100):
            said = one_round(processes)
            assert said.count("won") <= 1
            if "won" in said:
                assert listener_at(path) == processes[said.index("won")].pid


# --- vsock -----------------------------------------------------------------------------------------------------------


def test_a_vsock_is_listened_on_and_its_uri_printed(disk: Path) -> None:
    port = free_vsock_port()
    if not port:  # this kernel has none; then that is what it says
        result = run_cli("serve", disk, "--vsock", "10809")
        assert (result.returncode, result.stdout) == (FAILED, "")
        assert "cannot listen on vsock port 10809 (Address family not supported by protocol); this kernel" in result.stderr
        return
    with serving(disk, "-x", "a", "--vsock", str(port), tcp=True) as daemon:
        match = re.fullmatch(r"nbd\+vsock://(\d+):(\d+)/a", daemon.uri)
        assert match is not None
        assert 0 < int(match[1]) < 2**32 - 1, "an address that somebody can connect to"
        assert int(match[2]) == port
        result = run_cli("serve", "-r", make_disk(disk.with_name("other"), MiB), "--vsock", str(port))
        assert (result.returncode, result.stdout) == (FAILED, "")
        assert result.stderr == f"nbdmirror: cannot listen on vsock port {port}: Address already in use\n"


def test_over_a_vsock(disk: Path, tmp_path: Path) -> None:
    """Where this machine reaches itself by vsock; where not, the copy says that it can't connect."""
    require("nbdinfo")
    target = make_disk(tmp_path / "target", MiB)
    port = free_vsock_port()
    if not port or not vsock_loops_back(port):
        result = run_cli("copy", disk, "nbd+vsock://1:1/x")
        assert result.returncode == FAILED
        assert result.stderr.startswith("nbdmirror: cannot connect to nbd+vsock://1:1/x: ")
        return
    with serving(target, "--vsock", f"1:{port}", tcp=True) as daemon:
        assert daemon.uri == f"nbd+vsock://1:{port}"
        assert run("nbdinfo", "--size", daemon.uri) == f"{MiB}\n"
        result = run_cli("copy", disk, daemon.uri)
        assert (result.returncode, result.stderr) == (0, "")
    assert same_content(disk, target)


def free_vsock_port() -> int:
    """A port that was free a moment ago; 0 where this kernel has no vsock."""
    try:
        with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as probe:
            while True:
                port = random.randrange(1024, 65536)
                with suppress(OSError):
                    probe.bind((socket.VMADDR_CID_ANY, port))
                    return port
    except OSError:
        return 0


def vsock_loops_back(port: int) -> bool:
    with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as server:
        server.bind((socket.VMADDR_CID_ANY, port))
        server.listen()
        with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as client:
            client.settimeout(1.0)
            return client.connect_ex((1, port)) == 0


def test_a_kernel_without_vsock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "AF_VSOCK", 99)  # a family that no kernel has
    with pytest.raises(ListenError, match=r"cannot listen on vsock 3:5: Address family .*; this kernel has no vsock: load"):
        sockets.listen_vsock(3, 5)


@pytest.mark.parametrize("where", ["x", "1:2:3", ":5", "5:", "4294967296", "-1", "0", "0:5"])
def test_what_is_no_vsock_address(disk: Path, where: str) -> None:
    result = run_cli("serve", disk, "--vsock", where)
    assert (result.returncode, result.stdout) == (USAGE, "")
    assert f"'{where}' is not [CID:]PORT" in result.stderr
