"""Programs that the demo starts: each ends with it, however it ends.

Rules:
1. A child is in a session of its own, so Ctrl-C reaches the demo alone, which then stops its children in order.
2. Should the demo be killed, the kernel ends its children (setpriv's --pdeathsig, where there is setpriv).
3. A child that fails is one line: its name and the last thing it said.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE, STDOUT
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from nbdmirror.errors import NbdMirrorError

if TYPE_CHECKING:
    from asyncio.subprocess import Process
    from collections.abc import Sequence
    from pathlib import Path

# A server takes milliseconds to start and to stop; on a machine that is busy with something else, a while.
_START_SECONDS: Final = 30.0
_STOP_SECONDS: Final = 10.0
_POLL_SECONDS: Final = 0.02


def find_program(name: str) -> str | None:
    """Where a program is; also in the directories that an ordinary user's PATH lacks."""
    return shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")


def need_program(name: str, package: str) -> str:
    """As `find_program`; raises NbdMirrorError where it is missing."""
    found = find_program(name)
    if found is None:
        raise NbdMirrorError(f"the demo needs {name}; please install {package}")
    return found


def nbdmirror_command(*arguments: str) -> list[str]:
    """This very program, with other arguments."""
    # Without -P the child finds the package where we did, also in the working directory.
    return [sys.executable, *(["-P"] if sys.flags.safe_path else []), "-m", "nbdmirror", *arguments]


async def run_tool(*argv: str) -> tuple[int, str]:
    """Run a program to its end; returns its status and what it said."""
    process = await asyncio.create_subprocess_exec(
        *_tied(argv), stdin=DEVNULL, stdout=PIPE, stderr=STDOUT, start_new_session=True
    )
    try:
        output, _ = await process.communicate()
    finally:
        await _end(process, signal.SIGKILL)
    assert process.returncode is not None, "communicate returns after the end"
    return process.returncode, output.decode(errors="replace")


class Child:
    """A program that runs until it is stopped; what it says on stderr goes to the file `log`."""

    def __init__(self, name: str, process: Process, log: Path) -> None:
        self.name: Final = name
        self._process: Final = process
        self._log: Final = log

    @classmethod
    async def start(cls, name: str, argv: Sequence[str], log: Path) -> Child:
        """Start it; its standard output can be read with `line`."""
        with log.open("wb") as stderr:
            process = await asyncio.create_subprocess_exec(
                *_tied(argv), stdin=DEVNULL, stdout=PIPE, stderr=stderr, start_new_session=True
            )
        return cls(name, process, log)

    @property
    def has_ended(self) -> bool:
        """Whether it runs no more."""
        return self._process.returncode is not None

    def failure(self) -> NbdMirrorError:
        """That it ended when it should not have, or badly."""
        lines = self._log.read_text(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
        return NbdMirrorError(f"{self.name} ended with status {self._process.returncode}: {last}")

    async def line(self) -> str:
        """The first line that it prints; raises NbdMirrorError if it ends or stays silent instead."""
        assert self._process.stdout is not None, "it was started with a pipe"
        with suppress(TimeoutError):
            async with asyncio.timeout(_START_SECONDS):
                line = await self._process.stdout.readline()
                if not line:
                    await self._process.wait()
                    raise self.failure()
                return line.decode(errors="replace").strip()
        raise NbdMirrorError(f"{self.name} is not ready after {_START_SECONDS:.0f} s")

    async def accepts(self, socket_path: str) -> None:
        """Wait until it takes connections on a Unix socket."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_START_SECONDS):
                while not self.has_ended:
                    with suppress(FileNotFoundError, ConnectionRefusedError):
                        _, writer = await asyncio.open_unix_connection(socket_path)
                        writer.close()
                        return
                    await asyncio.sleep(_POLL_SECONDS)
                raise self.failure()
        raise NbdMirrorError(f"{self.name} takes no connections after {_START_SECONDS:.0f} s")

    async def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Ask it to end, insist after a while; returns its status. Does nothing where it has ended already."""
        return await _end(self._process, number)


async def _end(process: Process, number: signal.Signals) -> int:
    for step in (number, signal.SIGKILL):
        if process.returncode is None:
            with suppress(ProcessLookupError):
                process.send_signal(step)
        with suppress(TimeoutError):
            async with asyncio.timeout(_STOP_SECONDS):
                return await process.wait()
    raise NbdMirrorError(f"process {process.pid} does not end, not even when killed; is its disk stuck?")


def _tied(argv: Sequence[str]) -> list[str]:
    """The command, made to end with us."""
    setpriv = shutil.which("setpriv")
    return [*([setpriv, "--pdeathsig", "TERM", "--"] if setpriv else []), *argv]
