"""`nbdmirror serve` on sockets that somebody else has made: service managers, and NBD clients that start their own server."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from textwrap import dedent
from typing import TYPE_CHECKING, Any

import pytest

import nbdmirror
from nbdmirror.units import MiB
from tests.support.activation import listening_tcp, listening_unix, passed
from tests.support.daemon import run_cli, serving, until
from tests.support.peers import free_port, require
from tests.support.tools import completed, fails, make_disk, pattern, run, same_content
from tests.support.wire_client import WireClient

if TYPE_CHECKING:
    from collections.abc import Sequence

FAILED, USAGE = 1, 2


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return make_disk(tmp_path / "disk", MiB, {0: pattern(MiB // 2)})


def size_of(uri: str) -> int:
    require("nbdinfo")
    return int(run("nbdinfo", "--size", uri))


# --- what is passed is served ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", ["nbd", "nbdmirror.socket", "unknown", "", None])
def test_a_unix_socket_is_served_named_and_left_to_its_owner(disk: Path, sock_dir: Path, names: str | None) -> None:
    path = sock_dir / "s"
    with listening_unix(path) as sock, serving(disk, "-x", "a", tcp=True, **passed(sock, names=names)) as daemon:
        assert daemon.uri == f"nbd+unix:///a?socket={path}"
        assert size_of(daemon.uri) == MiB
        assert daemon.terminate() == 0
        assert path.is_socket(), "who made it removes it"
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))  # the service manager goes on listening


def test_several_sockets_of_every_kind_are_one_daemon(disk: Path, sock_dir: Path) -> None:
    with listening_unix(sock_dir / "a") as one, listening_tcp() as two, listening_unix(sock_dir / "q") as control:
        how = passed(one, two, control, names="nbd:nbd:control")
        with serving(disk, "--qmp", sock_dir / "r", tcp=True, **how) as daemon:
            assert daemon.uri == f"nbd+unix:///?socket={sock_dir}/a"
            assert size_of(daemon.uri) == size_of(f"nbd://127.0.0.1:{two.getsockname()[1]}") == MiB
            for path in (sock_dir / "q", sock_dir / "r"):
                assert run_cli("status", "--qmp", path).returncode == 0
            assert daemon.terminate() == 0
    assert sorted(path.name for path in sock_dir.iterdir()) == ["a", "q"]


async def test_the_limit_on_clients_is_one_for_all_sockets(disk: Path, sock_dir: Path) -> None:
    with (
        listening_unix(sock_dir / "a") as one,
        listening_unix(sock_dir / "b") as two,
        serving(disk, "-e", "1", tcp=True, **passed(one, two, names="nbd:nbd")) as daemon,
    ):
        async with await WireClient.connect_unix(sock_dir / "a") as first:
            await first.open()
            async with await WireClient.connect_unix(sock_dir / "b") as second:
                assert await second.read_until_closed() == b""
        daemon.wait_for_log("which is the limit")


def test_a_control_socket_alone_leaves_the_choice_of_the_other(disk: Path, sock_dir: Path) -> None:
    with listening_unix(sock_dir / "q") as control, serving(disk, **passed(control, names="control")) as daemon:
        assert size_of(daemon.uri) == MiB
        assert run_cli("status", "--qmp", sock_dir / "q").returncode == 0


def test_neither_variables_nor_sockets_are_left_to_children(disk: Path, sock_dir: Path) -> None:
    script = 'env | grep -c -e "^LISTEN_" -e "^NOTIFY_"; ls -l /proc/self/fd; echo "$uri $unixsocket $qmp $control"'
    with listening_unix(sock_dir / "a") as one, listening_unix(sock_dir / "q") as control:
        how = passed(one, control, names="nbd:control")
        result = run_cli("serve", disk, "--run", script, env={"NOTIFY_SOCKET": str(sock_dir / "none")}, **how)
    ready, variables, *files, addresses = result.stdout.splitlines()
    assert (result.returncode, result.stderr) == (0, "")
    assert ready == f"READY nbd+unix:///?socket={sock_dir}/a"
    assert variables == "0"
    assert not [line for line in files if "socket:" in line]
    assert addresses == f"nbd+unix:///?socket={sock_dir}/a {sock_dir}/a {sock_dir}/q {sock_dir}/q"


@pytest.mark.parametrize("pid", ["1", "", "x"])
def test_sockets_for_another_process_are_none_of_ours(disk: Path, sock_dir: Path, pid: str) -> None:
    with (
        listening_unix(sock_dir / "a") as sock,
        serving(disk, socket=sock_dir / "b", **passed(sock, variables=[f"LISTEN_PID={pid}"])) as daemon,
    ):
        assert daemon.uri == f"nbd+unix:///?socket={sock_dir}/b"
        assert size_of(daemon.uri) == MiB


# --- what can't be served is refused by name -------------------------------------------------------------------------


def refused(disk: Path, *args: str | Path, **how: Any) -> str:
    """The one line that `serve` says before it ends for wrong usage."""
    result = run_cli("serve", disk, *args, **how)
    assert (result.returncode, result.stdout) == (USAGE, ""), result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("nbdmirror: ")
    return line


@pytest.mark.parametrize(
    ("count", "names", "said"),
    [
        (1, "scrape", "socket 3 that was passed is named 'scrape': name it nbd, control or metrics"),
        (2, "nbd:qmp", "socket 4 that was passed is named 'qmp': name it nbd, control or metrics"),
        (2, None, "socket 3 that was passed is named '': name it nbd, control or metrics"),
        (2, "nbd", "LISTEN_FDS passes 2 sockets and LISTEN_FDNAMES names 1: 'nbd'"),
    ],
)
def test_names(disk: Path, sock_dir: Path, count: int, names: str | None, said: str) -> None:
    with listening_unix(sock_dir / "a") as one, listening_unix(sock_dir / "b") as two:
        assert said in refused(disk, **passed(*(one, two)[:count], names=names))


@pytest.mark.parametrize("count", ["0", "-1", "many", ""])
def test_no_number_of_sockets(disk: Path, sock_dir: Path, count: str) -> None:
    with listening_unix(sock_dir / "a") as sock:
        line = refused(disk, "-k", sock_dir / "b", **passed(sock, variables=[f"LISTEN_FDS={count}"]))
    assert f"LISTEN_FDS is '{count}'" in line


@pytest.mark.parametrize("args", [("-k", "x"), ("-p", "1"), ("-b", "127.0.0.1"), ("--vsock", "1")], ids=lambda args: args[0])
def test_another_place_to_listen(disk: Path, sock_dir: Path, args: Sequence[str]) -> None:
    with listening_unix(sock_dir / "a") as sock:
        line = refused(disk, *args, **passed(sock))
    assert f"{args[0]}: the service manager has passed a socket to listen on" in line


def test_going_to_the_background(disk: Path, sock_dir: Path) -> None:
    with listening_unix(sock_dir / "a") as sock:
        assert "no --fork here: whoever passed a socket" in refused(disk, "--fork", **passed(sock))


def test_what_is_no_listening_stream_socket(disk: Path, sock_dir: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagrams:
        datagrams.bind(str(sock_dir / "d"))
        assert "socket 3, passed for nbd, is not a stream socket that listens" in refused(disk, **passed(datagrams))
    left, right = socket.socketpair()
    with left, right:
        assert "socket 3, passed for nbd, is not a stream socket that listens" in refused(disk, **passed(left))
    with disk.open("rb") as file:
        line = refused(disk, **passed(file))  # type: ignore[arg-type]
        assert "file descriptor 3, passed as a socket for nbd: Socket operation on non-socket" in line
    assert "file descriptor 3, passed as a socket for nbd: Bad file descriptor" in refused(
        disk, **passed(variables=["LISTEN_FDS=1"])
    )


def test_a_control_socket_that_others_reach(disk: Path) -> None:
    with listening_tcp() as sock:
        assert "socket 3, passed for control, is not a Unix socket" in refused(disk, **passed(sock, names="control"))


def test_an_abstract_socket_has_no_uri(disk: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(f"\0nbdmirror-test-{os.getpid()}")
        sock.listen()
        assert "abstract name" in refused(disk, **passed(sock))


def test_the_open_network_without_tls(disk: Path) -> None:
    require("nbdinfo")
    with socket.socket() as sock:
        sock.bind(("0.0.0.0", 0))
        sock.listen()
        assert "serving on 0.0.0.0 without TLS" in refused(disk, **passed(sock, names="nbd"))
        with serving(disk, "--insecure", tcp=True, **passed(sock, names="nbd")) as daemon:
            assert size_of(daemon.uri) == MiB


def test_addresses_can_only_be_allowed_where_there_are_some(disk: Path, sock_dir: Path) -> None:
    with listening_tcp() as one, listening_unix(sock_dir / "a") as two:
        how = passed(one, two, names="nbd:nbd")
        assert "--allow-ip goes with TCP" in refused(disk, "--allow-ip", "127.0.0.1", **how)


# --- captive servers of libnbd's tools -------------------------------------------------------------------------------


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command, for others to run."""
    monkeypatch.setenv("PYTHONPATH", str(Path(nbdmirror.__file__).parents[1]))
    return [sys.executable, "-P", "-m", "nbdmirror"]


def test_nbdinfo_starts_its_own_and_hears_nothing_but_nbd(disk: Path, ours: list[str]) -> None:
    require("nbdinfo")
    told = run("nbdinfo", "--json", "--no-content", "--", "[", *ours, "serve", "-x", "", disk, "]")
    assert json.loads(told)["exports"][0]["export-size"] == MiB


def test_nbdcopy_from_and_to_captive_servers(disk: Path, tmp_path: Path, ours: list[str]) -> None:
    require("nbdcopy")
    target = make_disk(tmp_path / "target", MiB)
    run("nbdcopy", "--", "[", *ours, "serve", "-r", disk, "]", "[", *ours, "serve", target, "]")
    assert same_content(disk, target)


def test_nbdcopy_to_standard_output_gets_the_disk_alone(disk: Path, ours: list[str]) -> None:
    require("nbdcopy")
    argv = ["nbdcopy", "--", "[", *ours, "serve", "-r", str(disk), "]", "-"]
    result = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=30, check=True)
    assert result.stdout == disk.read_bytes()


def test_nbdsh_starts_it_and_it_ends_with_the_handle(disk: Path, ours: list[str]) -> None:
    script = """
        import nbd, os, sys
        h = nbd.NBD()
        h.connect_systemd_socket_activation(sys.argv[1:])
        assert h.get_size() == 1 << 20
        h.pwrite(b"x" * 512, 1 << 19, nbd.CMD_FLAG_FUA)
        h.shutdown()
        del h
        try:
            os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            print("no child left")
    """
    said = run(sys.executable, "-c", dedent(script), *ours, "serve", disk)
    assert said == "no child left\n"
    with disk.open("rb") as file:
        file.seek(MiB // 2)
        assert file.read(512) == b"x" * 512


def test_a_captive_server_that_can_not_start_says_why(tmp_path: Path, ours: list[str]) -> None:
    require("nbdinfo")
    assert f"cannot open '{tmp_path}/none'" in fails("nbdinfo", "--", "[", *ours, "serve", tmp_path / "none", "]")


def test_our_own_copy_from_a_captive_server_of_ours(disk: Path, tmp_path: Path, ours: list[str]) -> None:
    target = make_disk(tmp_path / "target", MiB)
    result = run_cli("copy", "[", *ours, "serve", "-r", disk, "]", target)
    assert (result.returncode, result.stderr) == (0, "")
    assert same_content(disk, target)


# --- systemd's own launcher ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("named", [True, False])
def test_systemd_socket_activate(disk: Path, sock_dir: Path, ours: list[str], named: bool) -> None:
    require("systemd-socket-activate", "nbdinfo")
    port = free_port()
    sockets = ["-l", str(sock_dir / "s"), "-l", f"127.0.0.1:{port}", "-l", str(sock_dir / "q"), "--fdname=nbd:nbd:control"]
    argv = ["systemd-socket-activate", "-E", "PYTHONPATH", *(sockets if named else sockets[:2]), *ours, "serve", str(disk)]
    with (sock_dir / "log").open("wb") as log, subprocess.Popen(argv, stdout=log, stderr=log) as process:
        try:
            until((sock_dir / "s").is_socket, "the socket is there")
            until(lambda: completed("nbdinfo", f"nbd+unix:///?socket={sock_dir}/s").returncode == 0, "it is served")
            if named:
                assert size_of(f"nbd://127.0.0.1:{port}") == MiB
                assert run_cli("status", "--qmp", sock_dir / "q").returncode == 0
                assert f"READY nbd+unix:///?socket={sock_dir}/s\n" in (sock_dir / "log").read_text()
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(20)
    assert process.returncode == 0, (sock_dir / "log").read_text()
