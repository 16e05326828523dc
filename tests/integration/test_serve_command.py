"""`nbdmirror serve` as scripts and service managers see it: READY, pid files, --run, signals, transports."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import stat
from typing import TYPE_CHECKING

import pytest

from nbdmirror.protocol import constants as c
from nbdmirror.units import KiB, MiB
from tests.support.daemon import run_cli, serving, until
from tests.support.peers import free_port, nbdkit, require
from tests.support.tools import content, make_disk, pattern, run
from tests.support.wire_client import WireClient, WireError

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return make_disk(tmp_path / "disk", MiB, {0: pattern(MiB)})


# --- saying that it is ready -----------------------------------------------------------------------------------------


def test_ready_names_the_uri_and_nothing_else_is_said(disk: Path, sock_dir: Path) -> None:
    require("nbdinfo")
    with serving(disk, "-x", "the disk/1", socket=sock_dir / "s") as daemon:
        assert daemon.output == f"READY nbd+unix:///the%20disk/1?socket={sock_dir}/s\n"
        assert json.loads(run("nbdinfo", "--no-content", "--json", daemon.uri))["exports"][0]["export-name"] == "the disk/1"
        assert stat.S_IMODE(daemon.unix.stat().st_mode) == 0o600, "nobody else may write to the disk"
        assert daemon.terminate() == 0
        assert daemon.process.stdout is not None
        assert daemon.process.stdout.read() == b""
        assert daemon.stderr == ""


def test_ready_fd_gets_the_line_and_is_closed(disk: Path) -> None:
    reader, writer = os.pipe()
    with serving(disk, "--ready-fd", str(writer), pass_fds=[writer]) as daemon:
        os.close(writer)
        with open(reader, "rb") as pipe:  # noqa: PTH123
            assert pipe.read() == f"READY {daemon.uri}\n".encode()


def test_the_service_manager_is_told(disk: Path, sock_dir: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(sock_dir / "notify"))
        manager.settimeout(20)
        with serving(disk, env={"NOTIFY_SOCKET": str(sock_dir / "notify")}) as daemon:
            assert b"READY=1" in manager.recv(1000).splitlines()
            assert daemon.terminate() == 0
            assert b"STOPPING=1" in manager.recv(1000).splitlines()


def test_pid_file_is_there_while_it_runs(disk: Path, tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    with serving(disk, "--pid-file", pid_file) as daemon:
        assert pid_file.read_text() == f"{daemon.pid}\n"
        assert daemon.terminate() == 0
        assert not pid_file.exists()


# --- transports ------------------------------------------------------------------------------------------------------


def test_tcp_on_a_port_that_the_kernel_chose(disk: Path) -> None:
    require("nbdinfo")
    with serving(disk, "-p", "0", tcp=True) as daemon:
        assert daemon.uri.startswith("nbd://127.0.0.1:")
        assert run("nbdinfo", "--size", daemon.uri).strip() == str(MiB)


def test_tcp_on_a_port_of_ones_choice(disk: Path, tmp_path: Path) -> None:
    require("nbdinfo")
    port = free_port()
    with serving(disk, "-p", str(port), "-x", "a", tcp=True) as daemon:
        assert daemon.uri == f"nbd://127.0.0.1:{port}/a"
        assert run("nbdinfo", "--size", daemon.uri).strip() == str(MiB)
        result = run_cli("serve", make_disk(tmp_path / "other", MiB), "-p", str(port))
        assert (result.returncode, result.stdout) == (1, "")
        assert result.stderr.splitlines() == [f"nbdmirror: cannot listen on 127.0.0.1 port {port}: Address already in use"]
        assert run("nbdinfo", "--size", daemon.uri).strip() == str(MiB)


def test_tcp_over_ipv6(disk: Path) -> None:
    require("nbdinfo")
    missing = no_ipv6()
    if missing:  # then that is what it says
        result = run_cli("serve", disk, "-p", "0", "-b", "::1")
        assert (result.returncode, result.stdout) == (1, "")
        assert result.stderr.splitlines() == [f"nbdmirror: cannot listen on ::1 port 0: {missing}"]
        return
    with serving(disk, "-p", "0", "-b", "::1", tcp=True) as daemon:
        assert daemon.uri.startswith("nbd://[::1]:")
        assert run("nbdinfo", "--size", daemon.uri).strip() == str(MiB)


def no_ipv6() -> str:
    """Why this machine has no ::1, or nothing."""
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError as error:
        return error.strerror or str(error)
    return ""


def test_serving_everybody_has_to_be_asked_for(disk: Path) -> None:
    require("nbdinfo")
    with serving(disk, "-p", "0", "-b", "0.0.0.0", "--insecure", tcp=True) as daemon:
        port = daemon.uri.rstrip("/").rpartition(":")[2]
        assert run("nbdinfo", "--size", f"nbd://127.0.0.1:{port}").strip() == str(MiB)


def test_the_longest_socket_path(disk: Path, sock_dir: Path) -> None:
    path = sock_dir / ("x" * (107 - len(str(sock_dir)) - 1))
    require("nbdinfo")
    with serving(disk, socket=path) as daemon:
        assert run("nbdinfo", "--size", daemon.uri).strip() == str(MiB)
        assert daemon.terminate() == 0
        assert list(sock_dir.iterdir()) == []


def test_a_relative_socket_path_is_named_in_full(disk: Path, sock_dir: Path) -> None:
    result = run_cli("serve", disk, "-k", "s", "--run", 'echo "$unixsocket"', prefix=["env", "-C", str(sock_dir)])
    assert result.stdout.splitlines() == [f"READY nbd+unix:///?socket={sock_dir}/s", f"{sock_dir}/s"]


# --- sockets that are there already ----------------------------------------------------------------------------------


def test_a_socket_of_a_killed_daemon_is_taken_over(disk: Path, sock_dir: Path) -> None:
    require("nbdinfo")
    with serving(disk, socket=sock_dir / "s") as daemon:
        daemon.kill()
        assert daemon.unix.is_socket()
    with serving(disk, socket=sock_dir / "s") as daemon:
        assert run("nbdinfo", "--size", daemon.uri).strip() == str(MiB)


def test_a_socket_of_a_living_daemon_is_left_alone(disk: Path, sock_dir: Path, tmp_path: Path) -> None:
    require("nbdinfo")
    other = make_disk(tmp_path / "other", MiB)
    with serving(disk, socket=sock_dir / "s", qmp=True) as daemon:
        for args in (("-k", daemon.unix), ("-k", sock_dir / "other", "--qmp", daemon.control)):
            result = run_cli("serve", other, *args)
            assert (result.returncode, result.stdout) == (1, "")
            (line,) = result.stderr.splitlines()
            assert f"'{args[-1]}'" in line
            assert f"process {daemon.pid} (" in line
            assert "is listening there; stop it" in line
            assert not (sock_dir / "other").exists()
        assert run("nbdinfo", "--size", daemon.uri).strip() == str(MiB)
        assert run_cli("status", "--qmp", daemon.control).returncode == 0


# --- --run -----------------------------------------------------------------------------------------------------------


def test_run_gives_the_addresses_and_its_status(disk: Path, sock_dir: Path) -> None:
    require("nbdinfo")
    command = 'nbdinfo --size "$uri" && test -S "$qmp" && test -S "$unixsocket" && exit 7'
    result = run_cli("serve", disk, "-k", sock_dir / "s", "--qmp", sock_dir / "q", "--run", command)
    assert result.stdout.splitlines() == [f"READY nbd+unix:///?socket={sock_dir}/s", str(MiB)]
    assert (result.returncode, result.stderr) == (7, "")
    assert list(sock_dir.iterdir()) == []


@pytest.mark.parametrize(("command", "status"), [("true", 0), ("kill -9 $$", 137), ("/nonexistent/command", 127)])
def test_run_ends_with_the_command(disk: Path, sock_dir: Path, command: str, status: int) -> None:
    result = run_cli("serve", disk, "-k", sock_dir / "s", "--run", command)
    assert result.returncode == status
    assert "Traceback" not in result.stderr
    assert list(sock_dir.iterdir()) == []


def test_a_signal_ends_the_command_that_is_run(disk: Path, tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    with serving(disk, "--run", f"echo $$ > {pid_file}; exec tail -f /dev/null") as daemon:
        until(lambda: pid_file.exists() and pid_file.read_text().endswith("\n"), "the command runs")
        assert daemon.terminate() == 128 + signal.SIGTERM
        assert not os.path.exists(f"/proc/{int(pid_file.read_text())}")  # noqa: PTH110
        assert not daemon.unix.exists()


# --- stopping --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_signals_end_it_cleanly_with_clients_connected(disk: Path, number: int) -> None:
    with serving(disk, qmp=True) as daemon:
        async with await WireClient.connect_unix(daemon.unix) as idle, await WireClient.connect_unix(daemon.unix) as haggling:
            await idle.open()
            await haggling.greet()
            assert daemon.terminate(number) == 0
            assert await idle.read_until_closed() == b""
            await haggling.read_until_closed()
        assert not daemon.unix.exists()
        assert not daemon.control.exists()
        assert daemon.stderr == ""


@pytest.mark.parametrize("length", [4 * KiB, 2 * MiB], ids=["small writes", "large writes"])
async def test_what_was_accepted_is_on_disk_when_it_ends(tmp_path: Path, length: int) -> None:
    count = 64 * MiB // length // (16 if length < MiB else 1)
    disk = make_disk(tmp_path / "disk", 64 * MiB)
    data = pattern(length)
    with serving(disk) as daemon:
        async with await WireClient.connect_unix(daemon.unix) as client:
            await client.open()

            async def write() -> None:
                for number in range(count):
                    await client.request(c.CMD_WRITE, number * length, payload=data, cookie=number)

            writing = asyncio.create_task(write())
            replies = [await client.reply()]
            daemon.send_signal(signal.SIGTERM)
            try:
                while True:
                    replies.append(await client.reply())
            except (OSError, WireError):  # hung up, or reset
                pass
            writing.cancel()
            await asyncio.gather(writing, return_exceptions=True)
        assert daemon.wait() == 0
    assert not replies[0].error
    for reply in replies:
        assert reply.error in (0, c.ESHUTDOWN)
        assert content(disk, reply.cookie * length, length) == (bytes(length) if reply.error else data)
    for number in range(count):
        assert content(disk, number * length, length) in (data, bytes(length)), "no write is half done"


async def test_what_a_slow_disk_is_working_on_is_still_answered(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk", MiB)
    with nbdkit("file", str(disk), "wdelay=500ms", filters=["delay"]) as peer, serving(peer.endpoint.uri) as daemon:
        async with await WireClient.connect_unix(daemon.unix) as client:
            await client.open()
            await client.request(c.CMD_WRITE, 4096, payload=pattern(4096), cookie=1)
            # Refused at once: once that has come, the write before it is under way.
            assert (await client.ask(77, cookie=2)).cookie == 2
            assert content(disk, 4096, 4096) == bytes(4096)
            daemon.send_signal(signal.SIGTERM)
            reply = await client.reply()
            assert (reply.cookie, reply.error) == (1, 0)
            assert await client.read_until_closed() == b""
        assert daemon.wait() == 0
    assert content(disk, 4096, 4096) == pattern(4096)


async def test_a_slow_read_is_still_answered(disk: Path) -> None:
    with nbdkit("file", str(disk), "rdelay=500ms", filters=["delay"]) as peer, serving(peer.endpoint.uri, "-r") as daemon:
        async with await WireClient.connect_unix(daemon.unix) as client:
            await client.open()
            await client.request(c.CMD_READ, 4096, 4096, cookie=1)
            assert (await client.ask(77, cookie=2)).cookie == 2
            daemon.send_signal(signal.SIGTERM)
            reply = await client.reply()
            assert (reply.cookie, reply.error, reply.data) == (1, 0, content(disk, 4096, 4096))
        assert daemon.wait() == 0


async def test_a_write_is_finished_though_its_client_has_gone(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk", MiB)
    with nbdkit("file", str(disk), "wdelay=300ms", filters=["delay"]) as peer, serving(peer.endpoint.uri) as daemon:
        client = await WireClient.connect_unix(daemon.unix)
        await client.open()
        await client.request(c.CMD_WRITE, 4096, payload=pattern(4096), cookie=1)
        assert (await client.ask(77, cookie=2)).cookie == 2
        client.abort()
        await client.aclose()
        assert daemon.terminate() == 0
    assert content(disk, 4096, 4096) == pattern(4096)


def test_quit_ends_it_as_well(disk: Path) -> None:
    with serving(disk, qmp=True) as daemon:
        assert run_cli("qmp", "quit", "--qmp", daemon.control).returncode == 0
        assert daemon.wait() == 0
        assert not daemon.unix.exists()
        assert not daemon.control.exists()


def test_a_reader_of_ready_that_has_gone_does_no_harm(disk: Path, sock_dir: Path) -> None:
    pipe = ["sh", "-c", '{ "$@"; echo "$?" >&2; } | true', "sh"]
    result = run_cli("serve", disk, "-k", sock_dir / "s", "--run", "exit 3", prefix=pipe)
    assert result.stderr == "3\n"
