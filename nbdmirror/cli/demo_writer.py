"""Writers that keep a disk changing while the demo mirrors it, as a guest would: over NBD, at random places of one area.

Rules:
1. A writer works until it is stopped, and then says how much it wrote; one that ends by itself has failed.
2. All writers write alike: random data in requests of 4 to 64 KiB, multiples of 4 KiB, a few of them at a time, RATE bytes a
   second.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from nbdmirror.cli.demo_children import Child, find_program, run_tool
from nbdmirror.devices.nbd import NbdDevice
from nbdmirror.devices.uri import parse_endpoint
from nbdmirror.errors import NbdMirrorError
from nbdmirror.units import KiB, MiB

if TYPE_CHECKING:
    from pathlib import Path

# A busy guest, with a thousand writes a second, and far from holding a mirror up that sends ten times as much.
RATE: Final = 34 * MiB
_DEPTH: Final = 8
_SMALLEST: Final = 4 * KiB
_LARGEST: Final = 64 * KiB


@dataclass(frozen=True, slots=True)
class Written:
    """What a writer did."""

    count: int
    length: int


class Writer(Protocol):
    """Something that writes; `name` is for the report."""

    name: str

    def check(self) -> None:
        """Raise NbdMirrorError unless it is still writing."""

    async def stop(self) -> Written:
        """End, and tell; raises NbdMirrorError where a write failed."""

    async def aclose(self) -> None:
        """End at once, if that has not happened yet."""


async def fio_speaks_nbd() -> bool:
    """Whether there is a fio, built with its nbd engine."""
    return find_program("fio") is not None and (await run_tool("fio", "--enghelp=nbd"))[0] == 0


class FioWriter:
    """fio's nbd engine, which is libnbd."""

    name = "fio"

    def __init__(self, child: Child, report: Path) -> None:
        self._child = child
        self._report = report

    @classmethod
    async def start(cls, uri: str, offset: int, length: int, directory: Path) -> FioWriter:
        """Begin to write the area at `offset`."""
        report = directory / "fio.json"
        options = {
            "name": "guest",
            "ioengine": "nbd",
            "uri": uri,
            "rw": "randwrite",
            "offset": offset,
            "size": length,
            "bsrange": f"{_SMALLEST}-{_LARGEST}",
            "iodepth": _DEPTH,
            "rate": RATE,
            "runtime": 3600,
            "output-format": "json",
            "output": report,
        }
        flags = ["--time_based", "--norandommap", "--randrepeat=0", "--refill_buffers", "--thread"]
        argv = ["fio", *(f"--{key}={value}" for key, value in options.items()), *flags]
        return cls(await Child.start("the writer (fio)", argv, directory / "fio.log"), report)

    def check(self) -> None:
        """See Writer."""
        if self._child.has_ended:
            raise self._child.failure()

    async def stop(self) -> Written:
        """See Writer. fio, interrupted, finishes what is in flight and reports."""
        self.check()
        await self._child.stop(signal.SIGINT)
        try:
            # Told to stop, it says so before the report.
            text = self._report.read_text()
            job = json.loads(text[text.index("{") :])["jobs"][0]
            written = Written(job["write"]["total_ios"], job["write"]["io_bytes"])
            error = job["error"]
        except (OSError, ValueError, LookupError):
            raise self._child.failure() from None
        if error:
            raise NbdMirrorError(f"the writer (fio) failed: {os.strerror(error)}")
        return written

    async def aclose(self) -> None:
        """See Writer."""
        await self._child.stop(signal.SIGKILL)


class OwnWriter:
    """A writer of a few lines, for where there is no fio."""

    name = "own"

    def __init__(self, device: NbdDevice, offset: int, length: int) -> None:
        self._device = device
        self._offset = offset
        self._length = length
        self._count = 0
        self._written = 0
        self._stopping = False
        self._started = time.monotonic()
        self._task = asyncio.create_task(self._run())

    @classmethod
    async def start(cls, uri: str, offset: int, length: int) -> OwnWriter:
        """Begin to write the area at `offset`."""
        return cls(await NbdDevice.open(parse_endpoint(uri), connections=1), offset, length)

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(_DEPTH):
                group.create_task(self._write())

    async def _write(self) -> None:
        chance = random.Random()  # noqa: S311  nothing here is secret
        while not self._stopping:
            length = chance.randrange(_SMALLEST, _LARGEST + 1, _SMALLEST)
            at = chance.randrange(0, self._length - length + 1, _SMALLEST)
            due = self._started + self._written / RATE
            self._written += length
            self._count += 1
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            await self._device.pwrite(os.urandom(length), self._offset + at)

    def check(self) -> None:
        """See Writer."""
        if self._task.done():
            raise _failure(self._task)

    async def stop(self) -> Written:
        """See Writer."""
        self.check()
        self._stopping = True
        await asyncio.wait((self._task,))
        if self._task.exception() is not None:
            raise _failure(self._task)
        await self._device.flush()
        return Written(self._count, self._written)

    async def aclose(self) -> None:
        """See Writer."""
        self._task.cancel()
        await asyncio.wait((self._task,))
        await self._device.aclose()


def _failure(task: asyncio.Task[None]) -> NbdMirrorError:
    error = task.exception()
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return NbdMirrorError(f"the writer failed: {error}")
