"""The program itself, as a user runs it: `nbdmirror serve` in a process of its own, and one-shot commands.

    with serving(disk, "-x", "a") as daemon:
        subprocess.run(["nbdinfo", daemon.uri], check=True)
        assert daemon.terminate() == 0

Rules:
1. A daemon is there once it has printed READY; one that ends or stays silent instead fails the test with its stderr.
2. A daemon's log never holds a traceback: the context fails a test whose daemon has left one.
3. It runs this checkout, under the interpreter of the tests.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

import nbdmirror

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

# A bound each, in seconds; a start takes half a second, and a machine that others use many times that.
_READY_SECONDS: Final = 20.0
_STOP_SECONDS: Final = 15.0
CLI_SECONDS: Final = 20.0

_PYTHON: Final = [sys.executable, "-P", "-m", "nbdmirror"]


def doomed(point: str) -> list[str]:
    """The program with something wrong at a point: see `tests.support.doomed`."""
    return [sys.executable, "-P", "-m", "tests.support.doomed", point]


def environment(env: Mapping[str, str] | None) -> dict[str, str]:
    root = str(Path(nbdmirror.__file__).parents[1])
    return {**os.environ, "PYTHONPATH": root, **(env or {})}


def run_cli(
    *args: str | Path,
    timeout: float = CLI_SECONDS,
    env: Mapping[str, str] | None = None,
    prefix: Sequence[str] = (),
    pass_fds: Sequence[int] = (),
    program: Sequence[str] = _PYTHON,
) -> subprocess.CompletedProcess[str]:
    """`nbdmirror ARGS`, to its end; `prefix` is a command that runs it, `env` is added to the environment.

    `program` is a command that stands in for `nbdmirror`.
    """
    return subprocess.run(
        [*prefix, *program, *map(str, args)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment(env),
        pass_fds=pass_fds,
        check=False,
    )


@dataclass(eq=False)
class Daemon:
    """A running `nbdmirror serve`. `socket` is None where it listens on TCP, `qmp` where it has no control socket."""

    process: subprocess.Popen[bytes]
    disk: Path | str
    log: Path
    socket: Path | None = None
    qmp: Path | None = None
    uri: str = ""
    output: str = field(default="", repr=False)

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def stderr(self) -> str:
        """All that it has logged so far."""
        return self.log.read_text(errors="replace")

    @property
    def unix(self) -> Path:
        """The socket, of a daemon that has one."""
        assert self.socket is not None, "this daemon listens on TCP"
        return self.socket

    @property
    def control(self) -> Path:
        """The control socket, of a daemon that has one."""
        assert self.qmp is not None, "this daemon has no control socket"
        return self.qmp

    def send_signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self, timeout: float = _STOP_SECONDS) -> int:
        """Its exit status, once it has ended by itself."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            pytest.fail(f"the daemon has not ended after {timeout} s:\n{self.stderr}")

    def terminate(self, number: int = signal.SIGTERM) -> int:
        """Stop it as an administrator would; its exit status."""
        self.send_signal(number)
        return self.wait()

    def kill(self) -> None:
        """As a crash: nothing is finished, flushed or removed."""
        self.process.kill()
        self.process.wait(_STOP_SECONDS)

    def wait_for_log(self, text: str) -> None:
        """Until it has logged this."""
        until(lambda: text in self.stderr, f"the daemon logs {text!r}; it has:\n{self.stderr}")

    def memory(self) -> int:
        """The most memory that it has used so far, in bytes."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024

    def open_files(self) -> int:
        """How many file descriptors it holds."""
        return len(list(Path(f"/proc/{self.pid}/fd").iterdir()))

    def _read_ready(self) -> None:
        assert self.process.stdout is not None
        deadline = time.monotonic() + _READY_SECONDS
        said = b""
        while not said.endswith(b"\n"):
            left = max(0.0, deadline - time.monotonic())
            piece = b""
            if select.select([self.process.stdout], [], [], left)[0]:
                piece = os.read(self.process.stdout.fileno(), 4096)
            if not piece:
                pytest.fail(f"the daemon said {said!r} instead of READY within {_READY_SECONDS} s:\n{self.stderr}")
            said += piece
        self.output = said.decode()
        word, _, self.uri = self.output.rstrip("\n").partition(" ")
        assert word == "READY", self.output
        assert self.uri, self.output


@contextmanager
def serving(
    disk: Path | str,
    *args: str | Path,
    socket: Path | None = None,
    tcp: bool = False,
    qmp: bool = False,
    options: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    prefix: Sequence[str] = (),
    pass_fds: Sequence[int] = (),
    program: Sequence[str] = _PYTHON,
) -> Iterator[Daemon]:
    """`nbdmirror OPTIONS serve DISK ... ARGS`, ready.

    It listens on `socket`, or on one in a directory of its own, or with `tcp` where ARGS say; `qmp` adds a control socket.
    `prefix` is a command that runs it, and becomes it.
    `program` is a command that stands in for `nbdmirror`.
    """
    # Not pytest's tmp_path: its name is often too long for a socket's path.
    with tempfile.TemporaryDirectory(prefix="nbdm-") as name:
        directory = Path(name)
        path = None if tcp else socket or directory / "nbd"
        control = directory / "qmp" if qmp else None
        argv = [*prefix, *program, *options, "serve", str(disk)]
        argv += ["-k", str(path)] if path else []
        argv += ["--qmp", str(control)] if control else []
        log = directory / "log"
        with log.open("wb") as stderr:
            process = subprocess.Popen(
                [*argv, *map(str, args)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=environment(env),
                pass_fds=pass_fds,
            )
        with process:
            daemon = Daemon(process, disk, log, path, control)
            try:
                daemon._read_ready()
                yield daemon
            except BaseException:
                print(f"{' '.join(map(str, process.args))}\n{daemon.stderr}")  # type: ignore[arg-type]
                raise
            finally:
                _stop(daemon)
        assert "Traceback" not in daemon.stderr, daemon.stderr


def _stop(daemon: Daemon) -> None:
    if daemon.process.poll() is None:
        daemon.process.terminate()
        try:
            daemon.process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            daemon.kill()


def until(condition: Callable[[], bool], what: str, seconds: float = 10.0) -> None:
    """Wait until something outside this process has become so."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"waited {seconds} s in vain until {what}")
        time.sleep(0.01)
