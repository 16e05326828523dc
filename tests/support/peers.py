"""Real NBD servers for tests: each starts in a directory of its own, and exactly the process that was started is stopped.

Rules:
1. A peer is ready when its socket takes a connection; a peer that ends or stays silent fails the test with its stderr.
2. A missing program skips the test and names the program.
3. Servers listen on a Unix socket, or on a port of 127.0.0.1 that the system chose.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from nbdmirror.devices.uri import NbdEndpoint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_READY_SECONDS: Final = 10.0
_STOP_SECONDS: Final = 5.0


@dataclass(frozen=True, slots=True)
class Peer:
    """A running server."""

    pid: int
    pidfd: int
    endpoint: NbdEndpoint
    log: Path

    @property
    def stderr(self) -> str:
        return self.log.read_text(errors="replace")

    def kill(self) -> None:
        """As a crash: no goodbye on any connection."""
        signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        self.wait()

    def freeze(self) -> None:
        """Connections stay, and nothing answers any more: once this returns, every thread has stopped."""
        signal.pidfd_send_signal(self.pidfd, signal.SIGSTOP)
        tasks = Path(f"/proc/{self.pid}/task")
        _wait_until(lambda: all(_state(task) == "T" for task in tasks.iterdir()), f"process {self.pid} has stopped")

    def thaw(self) -> None:
        signal.pidfd_send_signal(self.pidfd, signal.SIGCONT)

    def wait(self, timeout: float = _STOP_SECONDS) -> bool:
        """Whether the process has ended, after at most `timeout` seconds. A pidfd is readable from then on."""
        return bool(select.select([self.pidfd], [], [], timeout)[0])

    def terminate(self) -> bool:
        """Ask it to end; whether it did."""
        with suppress(ProcessLookupError):
            self.thaw()
            signal.pidfd_send_signal(self.pidfd, signal.SIGTERM)
        return self.wait()

    def vacated(self) -> NbdEndpoint:
        """Where it listened before it was killed, free to be listened on again."""
        if self.endpoint.socket:
            Path(self.endpoint.socket).unlink(missing_ok=True)
        return self.endpoint

    def stop(self) -> None:
        """See that it ends, by force if need be."""
        if not self.terminate():
            self.kill()


def require(*programs: str) -> None:
    """Skip the test unless each of the programs is installed."""
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")


def free_port() -> int:
    """A TCP port of 127.0.0.1 that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def qemu_nbd(
    path: Path, fmt: str = "raw", *, export: str = "", extra: Sequence[str] = (), after: Peer | None = None
) -> Iterator[Peer]:
    """qemu-nbd over an image; it serves any number of clients, one after another or at once, where `after` did before."""
    require("qemu-nbd")
    with _directory() as directory:
        endpoint = NbdEndpoint.unix(f"{directory}/sock", export) if after is None else after.vacated()
        options = ["--persistent", "--shared=0", f"--format={fmt}", f"--socket={endpoint.socket}"]
        with _running(["qemu-nbd", *options, "-x", export, *extra, str(path)], endpoint, directory) as peer:
            yield peer


@contextmanager
def nbdkit(
    plugin: str,
    *args: str,
    filters: Sequence[str] = (),
    extra: Sequence[str] = (),
    tcp: bool = False,
    after: Peer | None = None,
) -> Iterator[Peer]:
    """nbdkit with a plugin and its (and the filters') arguments; it listens where `after` did before."""
    require("nbdkit")
    with _directory() as directory:
        if after is not None:
            endpoint = after.vacated()
        else:
            endpoint = NbdEndpoint.tcp("127.0.0.1", free_port()) if tcp else NbdEndpoint.unix(f"{directory}/sock")
        where = ["-U", endpoint.socket] if endpoint.socket else ["-i", endpoint.host, "-p", str(endpoint.port)]
        options = ["--foreground", *where, *(f"--filter={name}" for name in filters), *extra]
        with _running(["nbdkit", *options, plugin, *args], endpoint, directory) as peer:
            yield peer


@contextmanager
def nbd_server(path: Path, *, export: str = "disk", options: Sequence[str] = ()) -> Iterator[Peer]:
    """nbd-server with one export; `options` are lines of the export's section."""
    require("nbd-server")
    with _directory() as directory:
        endpoint = NbdEndpoint.tcp("127.0.0.1", free_port(), export)
        config = directory / "config"
        lines = ["[generic]", f"listenaddr = {endpoint.host}", f"port = {endpoint.port}"]
        config.write_text("\n".join([*lines, f"[{export}]", f"exportname = {path}", *options, ""]))
        pid_file = directory / "pid"
        # It puts itself in the background, and without that (-d) it would serve a single client.
        subprocess.run(["nbd-server", "-C", str(config), "-p", str(pid_file)], check=True, stdin=subprocess.DEVNULL)
        _wait_until(lambda: pid_file.exists() and pid_file.read_text().endswith("\n"), "nbd-server writes its pid")
        with _watched(int(pid_file.read_text()), endpoint, config) as peer:
            yield peer


@contextmanager
def _directory() -> Iterator[Path]:
    # Not pytest's tmp_path: its name is often too long for a socket's path.
    with tempfile.TemporaryDirectory(prefix="nbd-") as name:
        yield Path(name)


@contextmanager
def _running(argv: Sequence[str], endpoint: NbdEndpoint, directory: Path) -> Iterator[Peer]:
    log = directory / "log"
    with log.open("wb") as stderr:
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=stderr, stderr=stderr, start_new_session=True)
    try:
        with _watched(process.pid, endpoint, log) as peer:
            yield peer
    except BaseException:
        print(f"{' '.join(argv)}\n{log.read_text(errors='replace')}")
        raise
    finally:
        process.wait()


@contextmanager
def _watched(pid: int, endpoint: NbdEndpoint, log: Path) -> Iterator[Peer]:
    peer = Peer(pid, os.pidfd_open(pid), endpoint, log)
    try:
        _wait_until(lambda: peer.wait(0) or _accepts(endpoint), f"{endpoint} takes connections")
        if peer.wait(0):
            pytest.fail(f"the server of {endpoint} ended: {peer.stderr}")
        yield peer
    finally:
        peer.stop()
        os.close(peer.pidfd)


def _wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + _READY_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"waited {_READY_SECONDS} s in vain until {what}")
        time.sleep(0.01)


def _state(task: Path) -> str:
    """The letter behind the name in parentheses (proc(5))."""
    return (task / "stat").read_text().rpartition(") ")[2][0]


def _accepts(endpoint: NbdEndpoint) -> bool:
    family = socket.AF_UNIX if endpoint.transport == "unix" else socket.AF_INET
    with socket.socket(family) as probe:
        try:
            probe.connect(endpoint.socket or (endpoint.host, endpoint.port))
        except OSError:
            return False
        return True
