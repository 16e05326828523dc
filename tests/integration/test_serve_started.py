"""How `nbdmirror serve` is started: in the background, with a parent, with closed stdio, by its environment alone."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click
import pytest

import nbdmirror
from nbdmirror.cli.serve import serve
from nbdmirror.units import MiB
from tests.support.daemon import run_cli, serving, until
from tests.support.peers import nbdkit, require
from tests.support.tools import make_disk, pattern, run
from tests.support.wire_client import WireClient

if TYPE_CHECKING:
    from collections.abc import Iterator

FAILED, USAGE = 1, 2
COMMAND = f"{sys.executable} -P -m nbdmirror"


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return make_disk(tmp_path / "disk", MiB, {0: pattern(MiB)})


@pytest.fixture(autouse=True)
def _this_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(nbdmirror.__file__).parents[1]))


def has_ended(pidfd: int) -> bool:
    """Also before anybody has collected its status."""
    return bool(select.select([pidfd], [], [], 0)[0])


# --- in the background -----------------------------------------------------------------------------------------------


class Background:
    """A daemon that is nobody's child any more."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.pidfd = os.pidfd_open(pid)

    def stop(self) -> None:
        signal.pidfd_send_signal(self.pidfd, signal.SIGTERM)
        until(lambda: has_ended(self.pidfd), "the daemon ends")


@contextmanager
def in_background(pid_file: Path) -> Iterator[Background]:
    daemon = Background(int(pid_file.read_text()))
    try:
        yield daemon
    finally:
        daemon.stop()
        os.close(daemon.pidfd)


def test_fork_returns_when_it_is_ready_and_lets_go_of_everything(disk: Path, sock_dir: Path) -> None:
    require("nbdinfo")
    # Pipes for both: this returns only when nobody holds them any more.
    result = run_cli("serve", disk, "-k", sock_dir / "s", "--fork", "--pid-file", sock_dir / "pid")
    with in_background(sock_dir / "pid") as daemon:
        assert (result.returncode, result.stderr) == (0, "")
        assert result.stdout == f"READY nbd+unix:///?socket={sock_dir}/s\n"
        assert run("nbdinfo", "--size", f"nbd+unix:///?socket={sock_dir}/s") == f"{MiB}\n"
        assert os.getsid(daemon.pid) == daemon.pid, "it has no terminal"
        for fd in (0, 1, 2):
            assert Path(f"/proc/{daemon.pid}/fd/{fd}").readlink() == Path("/dev/null")
        daemon.stop()
        assert list(sock_dir.iterdir()) == [], "the socket and the pid file are removed"


def test_fork_keeps_an_stderr_that_is_a_file(disk: Path, sock_dir: Path) -> None:
    log = sock_dir / "log"
    prefix = ["sh", "-c", f'exec "$@" 2> {log}', "sh"]
    result = run_cli("-v", "serve", disk, "-k", sock_dir / "s", "--fork", "--pid-file", sock_dir / "pid", prefix=prefix)
    assert result.returncode == 0
    with in_background(sock_dir / "pid"):
        pass
    assert "shutting down" in log.read_text()


def test_fork_fails_as_the_daemon_does(disk: Path, sock_dir: Path) -> None:
    result = run_cli("serve", disk, "-k", sock_dir / "nowhere" / "s", "--fork")
    assert (result.returncode, result.stdout) == (FAILED, "")
    (line,) = result.stderr.splitlines()
    assert line.endswith(f"'{sock_dir}/nowhere/s': No such file or directory")
    assert run_cli("serve", disk, "--tls", "on", "--fork").returncode == USAGE


def test_fork_that_is_waited_for_by_nobody_ends(disk: Path, sock_dir: Path) -> None:
    """Its caller is killed while the disk, which another server has, takes its time to open."""
    argv = [*COMMAND.split(), "serve", "", "-k", str(sock_dir / "s"), "--fork", "--log", "stderr"]
    with nbdkit("file", str(disk), extra=["--exit-with-parent"]) as peer:
        argv[argv.index("")] = peer.endpoint.uri
        peer.freeze()
        with (sock_dir / "log").open("wb") as log:
            caller = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log)
        children = Path(f"/proc/{caller.pid}/task/{caller.pid}/children")
        until(lambda: bool(children.read_text().strip()), "it has forked")
        child = os.pidfd_open(int(children.read_text()))
        caller.kill()
        caller.wait()
        peer.thaw()
        until(lambda: has_ended(child), "the daemon ends")
        os.close(child)
    assert "whoever started this daemon has gone" in (sock_dir / "log").read_text()
    assert not (sock_dir / "s").exists()


@pytest.mark.parametrize(
    ("args", "why"), [(("--run", "true"), "--run ends with its command"), (("--exit-with-parent",), "for who stays")]
)
def test_fork_has_no_meaning_with(disk: Path, sock_dir: Path, args: tuple[str, ...], why: str) -> None:
    result = run_cli("serve", disk, "-k", sock_dir / "s", "--fork", *args)
    assert result.returncode == USAGE
    assert why in result.stderr


# --- under a parent --------------------------------------------------------------------------------------------------


PARENT = """
import subprocess, sys, threading
def start():
    global daemon
    daemon = subprocess.Popen(sys.argv[1:], stdout=sys.stderr)
starter = threading.Thread(target=start)
starter.start()
starter.join()
print(daemon.pid, flush=True)
sys.stdin.read()
"""


def test_exit_with_parent_not_with_the_thread_that_started_it(disk: Path, sock_dir: Path) -> None:
    require("nbdinfo")
    argv = [*COMMAND.split(), "serve", str(disk), "-k", str(sock_dir / "s"), "--exit-with-parent"]
    with (
        (sock_dir / "log").open("wb") as log,
        subprocess.Popen([sys.executable, "-c", PARENT, *argv], stdin=-1, stdout=-1, stderr=log) as parent,
    ):
        assert parent.stdout is not None
        pidfd = os.pidfd_open(int(parent.stdout.readline()))
        until(lambda: b"READY" in (sock_dir / "log").read_bytes(), "it is ready")
        assert run("nbdinfo", "--size", f"nbd+unix:///?socket={sock_dir}/s") == f"{MiB}\n"
        parent.kill()
    until(lambda: has_ended(pidfd), "it has ended with its parent")
    os.close(pidfd)
    assert "the parent process has ended" in (sock_dir / "log").read_text()
    assert not (sock_dir / "s").exists()


# Waits until it is an orphan, says whose child it is then, and becomes the daemon.
ORPHAN = """
import os, sys
while os.getppid() == int(sys.argv[1]):
    os.sched_yield()
print(os.getppid(), flush=True)
os.execv(sys.argv[2], sys.argv[2:])
"""


def test_exit_with_parent_that_has_gone_already(disk: Path, sock_dir: Path) -> None:
    log = sock_dir / "log"
    daemon = [*COMMAND.split(), "serve", disk, "-k", sock_dir / "s", "--exit-with-parent", "--run", "echo over"]
    with log.open("wb") as stream:
        script = 'python=$1; shift; "$python" -c "$0" $$ "$@" &'
        argv = ["sh", "-c", script, ORPHAN, sys.executable, *map(str, daemon)]
        subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, check=True)
    until(lambda: len(log.read_text().splitlines()) > 1, "it has said something")
    adopted_by, said, *_ = log.read_text().splitlines()
    if adopted_by == "1":
        assert said.startswith("nbdmirror: --exit-with-parent: the parent process has gone already, or is init")
    else:  # a subreaper, which nobody can tell from a parent
        until(lambda: "over" in log.read_text(), "its command ends")
    until(lambda: not (sock_dir / "s").exists(), "it is over")


# --- stdio -----------------------------------------------------------------------------------------------------------


def test_a_disk_never_becomes_standard_output(disk: Path, sock_dir: Path) -> None:
    before = disk.read_bytes()
    prefix = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh"]
    result = run_cli("-v", "serve", disk, "-k", sock_dir / "s", "--run", "exit 3", prefix=prefix)
    assert result.returncode == 3
    assert disk.read_bytes() == before


# --- by the environment ----------------------------------------------------------------------------------------------


def test_every_option_has_a_variable_with_its_own_name() -> None:
    for option in serve.params:
        if isinstance(option, click.Option) and option.name not in ("version", "help"):
            (first, *_) = [name for name in option.opts if name.startswith("--")]
            assert option.name == first.removeprefix("--").replace("-", "_")


VALUES = {
    "SOCKET": "{dir}/s",
    "EXPORT_NAME": "a b",
    "DESCRIPTION": "what it is",
    "READ_ONLY": "1",
    "SHARED": "3",
    "PERSISTENT": "1",
    "NODE_NAME": "other",
    "QMP": "{dir}/q1 '{dir}/q 2'",
    "PID_FILE": "{dir}/pid",
    "RUN": 'nbdinfo --list "$uri"; test -S "$qmp" && test -S "{dir}/q 2" && test -e "{dir}/pid" && exit 5',
}


def test_all_of_it_from_the_environment(disk: Path, sock_dir: Path) -> None:
    require("nbdinfo")
    env = {f"NBDMIRROR_SERVE_{name}": value.format(dir=sock_dir) for name, value in VALUES.items()}
    result = run_cli("serve", disk, env=env)
    assert (result.returncode, result.stderr) == (5, "")
    assert result.stdout.startswith(f"READY nbd+unix:///a%20b?socket={sock_dir}/s\n")
    for told in ('export="a b"', "description: what it is", "is_read_only: true"):
        assert told in result.stdout


def test_variables_that_make_no_sense_are_refused(disk: Path, sock_dir: Path) -> None:
    for name, value in (("PORT", "http"), ("QMP", "'open"), ("VSOCK", "1:2:3"), ("TLS", "maybe")):
        result = run_cli("serve", disk, env={f"NBDMIRROR_SERVE_{name}": value})
        assert (result.returncode, result.stdout) == (USAGE, ""), name
        assert len(result.stderr.splitlines()) == 1
        assert value in result.stderr


@pytest.mark.parametrize("spelling", [("-P",), ("--pidfile",), ("--pid-file",)])
def test_names_that_other_servers_have(disk: Path, sock_dir: Path, spelling: tuple[str]) -> None:
    command = f"test -e {sock_dir}/pid"
    for where in (("--unix", sock_dir / "s"), ("-t", "-p", "0", "--ipaddr", "127.0.0.1")):
        result = run_cli("serve", disk, *where, *spelling, sock_dir / "pid", "--run", command)
        assert (result.returncode, result.stderr) == (0, "")


# --- what it says on stderr ------------------------------------------------------------------------------------------


def test_json_lines(disk: Path, sock_dir: Path) -> None:
    result = run_cli("--log", "json", "serve", sock_dir / "none", "-k", sock_dir / "s", "-v")
    said = [json.loads(line) for line in result.stderr.splitlines()]
    assert [line["level"] for line in said] == ["info", "error"]
    assert "Traceback" in said[0]["traceback"]
    assert said[1]["message"] == f"cannot open '{sock_dir}/none': No such file or directory"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", said[1]["time"])


def test_the_journals_form_where_stderr_is_the_journal(disk: Path, sock_dir: Path) -> None:
    left, right = socket.socketpair()
    with left, right:
        status = os.fstat(right.fileno())
        for stream, prefix in ((f"{status.st_dev}:{status.st_ino}", "<3>nbdmirror: "), ("1:2", "nbdmirror: ")):
            argv = [*COMMAND.split(), "serve", str(sock_dir / "none"), "-k", str(sock_dir / "s")]
            env = {**os.environ, "JOURNAL_STREAM": stream}
            subprocess.run(argv, stderr=right, stdin=subprocess.DEVNULL, env=env, timeout=20, check=False)
            assert left.recv(10000).decode().startswith(f"{prefix}cannot open")


def test_every_line_has_its_priority(disk: Path, sock_dir: Path) -> None:
    result = run_cli("serve", "--log=journal", "-vv", sock_dir / "none")
    assert result.returncode == FAILED
    lines = result.stderr.splitlines()
    assert "Traceback" in result.stderr
    assert all(re.match(r"<[367]>", line) for line in lines)
    assert lines[-1].startswith("<3>nbdmirror: cannot open")


@pytest.mark.parametrize(("before", "behind"), [((), ()), (("-q",), ()), ((), ("-q",))], ids=["", "before", "behind"])
async def test_quiet_before_or_behind_the_command(disk: Path, before: tuple[str, ...], behind: tuple[str, ...]) -> None:
    with serving(disk, "-e", "1", *behind, options=before) as daemon:
        async with await WireClient.connect_unix(daemon.unix) as first, await WireClient.connect_unix(daemon.unix) as second:
            await first.open()
            assert await second.read_until_closed() == b""
        assert daemon.terminate() == 0
        assert ("a client was refused" in daemon.stderr) == (not before and not behind)


def test_version_behind_the_command() -> None:
    assert run_cli("serve", "-V").stdout == f"nbdmirror {nbdmirror.__version__}\n"
