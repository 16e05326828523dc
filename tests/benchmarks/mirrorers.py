"""The two that mirror a disk in use, each with a control socket: ours and QEMU's storage daemon, told in the same words.

Rules:
1. A daemon is fresh for each turn: nothing that an earlier job has left is in anybody's way.
2. QEMU's has the page cache and discards, as ours has, and its own defaults otherwise. Targets are given without a word on what
   they read as: each finds out as it can.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

from tests.benchmarks.machine import RUN_SECONDS, BenchmarkError, Server
from tests.benchmarks.report import OURS
from tests.support.daemon import serving

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

QEMU: Final = "qemu-storage-daemon"
_START_SECONDS: Final = 10.0


class Monitor:
    """A control socket; one command at a time. Events are looked for from the moment of connecting on."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(RUN_SECONDS)
        self._socket.connect(path)
        self._lines = self._socket.makefile("rb")
        self._events: list[dict[str, Any]] = []
        self._read()
        self.execute("qmp_capabilities")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.close()
        self._socket.close()

    def execute(self, command: str, **arguments: object) -> Any:
        """The result of a command; underscores in names of arguments become dashes."""
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        self._socket.sendall(json.dumps({"execute": command, "arguments": named}).encode() + b"\n")
        while "event" in (answer := self._read()):
            self._events.append(answer)
        if "error" in answer:
            raise BenchmarkError(f"{command}: {answer['error']['desc']}")
        return answer["return"]

    def wait_for(self, event: str, seconds: float = RUN_SECONDS) -> bool:
        """Until it has come; False if it does not in time. A job that fails meanwhile is an error."""
        deadline = time.monotonic() + seconds
        try:
            while True:
                while self._events:
                    found = self._events.pop(0)
                    if found["event"] == event:
                        return True
                    if found["event"] in {"BLOCK_JOB_ERROR", "BLOCK_JOB_COMPLETED"}:
                        raise BenchmarkError(f"instead of {event}: {found}")
                self._socket.settimeout(max(deadline - time.monotonic(), 0.001))
                self._events.append(self._read())
        except TimeoutError:
            return False
        finally:
            self._socket.settimeout(RUN_SECONDS)

    def _read(self) -> dict[str, Any]:
        line = self._lines.readline()
        if not line:
            raise BenchmarkError("a daemon has closed its control socket")
        answer: dict[str, Any] = json.loads(line)
        return answer


@dataclass(frozen=True, slots=True)
class Mirrorer:
    """A running daemon that exports the node `source` on a Unix socket."""

    server: Server
    monitor: Monitor

    def start(self, target: str, **arguments: object) -> None:
        """Mirror to the NBD server on the Unix socket `target`."""
        where = {"type": "unix", "path": target}
        self.monitor.execute(
            "blockdev-add", driver="nbd", node_name="target", server=where, export="", **_UNMAP[self.server.tool]
        )
        job = {"job_id": "job", "device": "source", "target": "target", "sync": "full", **arguments}
        self.monitor.execute("blockdev-mirror", **job)

    def mirror(self, target: str, seconds: float = RUN_SECONDS, **arguments: object) -> float:
        """The seconds from the command to READY; `seconds` where it is not READY by then."""
        started = time.monotonic()
        self.start(target, **arguments)
        self.monitor.wait_for("BLOCK_JOB_READY", seconds)
        return time.monotonic() - started

    def most_memory(self) -> int:
        """The most that it has had resident, in bytes."""
        status = Path(f"/proc/{self.server.pid}/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024


# By default ours lets zeroes become holes, and QEMU does not.
_UNMAP: Final[dict[str, dict[str, str]]] = {OURS: {}, QEMU: {"discard": "unmap"}}


@contextmanager
def ours(disk: Path, *options: str) -> Iterator[Mirrorer]:
    """`nbdmirror serve`."""
    with serving(disk, *options, qmp=True) as daemon, Monitor(str(daemon.control)) as monitor:
        yield Mirrorer(Server(OURS, daemon.pid, daemon.uri, str(daemon.unix)), monitor)


@contextmanager
def qemu(disk: Path) -> Iterator[Mirrorer]:
    """`qemu-storage-daemon`, with a node for a raw file and an export of it."""
    with tempfile.TemporaryDirectory(prefix="nbdm-") as name:
        nbd, control, log = (Path(name, each) for each in ("nbd", "qmp", "log"))
        argv = [QEMU, "--blockdev", f"driver=file,node-name=source,filename={disk},discard=unmap"]
        argv += ["--nbd-server", f"addr.type=unix,addr.path={nbd}"]
        argv += ["--export", "type=nbd,id=export,node-name=source,name=,writable=on"]
        argv += ["--chardev", f"socket,id=control,path={control},server=on,wait=off", "--monitor", "chardev=control"]
        with log.open("wb") as stderr, subprocess.Popen(argv, stdin=subprocess.DEVNULL, stderr=stderr) as process:
            try:
                _wait_for(control, process, log)
                with Monitor(str(control)) as monitor:
                    yield Mirrorer(Server(QEMU, process.pid, f"nbd+unix:///?socket={nbd}", str(nbd)), monitor)
            finally:
                process.kill()


def _wait_for(control: Path, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while not _is_listening(control):
        if process.poll() is not None or time.monotonic() > deadline:
            raise BenchmarkError(f"{QEMU} has not started: {log.read_text(errors='replace')[-300:]}")
        time.sleep(0.01)


def _is_listening(control: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(os.fspath(control)) == 0


BOTH: Final[tuple[Callable[[Path], AbstractContextManager[Mirrorer]], ...]] = (ours, qemu)
