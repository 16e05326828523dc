"""A load that knows what it was promised, and a look at what is left of it after the daemon has died.

Rules:
1. The record is the writer's own: it is kept in this process, which nobody kills, and asks nothing of the daemon.
2. A block has at most one write in flight. So what it may hold is what was answered last, or what was sent and not answered.
3. What is marked is asked of the next daemon, over the protocol; the disk is read past it.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import nbd

from nbdmirror.units import KiB, MiB
from tests.support.tools import run

if TYPE_CHECKING:
    import random
    from collections.abc import Callable
    from pathlib import Path

BLOCK: Final = 4 * KiB
SIZE: Final = 48 * MiB
_DEPTH: Final = 8
_ZEROES: Final = bytes(BLOCK)


@dataclass(eq=False)
class Record:
    """What was written to a disk of SIZE bytes, by blocks. `contents` are those that a block may have."""

    contents: dict[int, set[bytes]] = field(default_factory=dict)
    sent: set[int] = field(default_factory=set)
    acked: set[int] = field(default_factory=set)
    flushed: set[int] = field(default_factory=set)
    before: dict[int, bytes] = field(default_factory=dict)
    serial: int = 0

    def forget_marks(self) -> None:
        """A new bitmap begins; the disk stays as it is, checked."""
        self.sent, self.acked, self.flushed = set(), set(), set()
        self.before = {block: content for block, (content,) in self.contents.items()}

    def check_disk(self, disk: Path) -> set[int]:
        """Every block has what was answered last, or what was under way. Returns those that have changed."""
        changed = set()
        with disk.open("rb") as file:
            for block, possible in self.contents.items():
                found = os.pread(file.fileno(), BLOCK, block * BLOCK)
                names = [each[:8].hex() for each in possible]
                assert found in possible, f"block {block} has {found[:8].hex()}, not one of {names}"
                self.contents[block] = {found}
                if found != self.before.get(block, _ZEROES):
                    changed.add(block)
        return changed


class Load:
    """Writes, zeroes and flushes of one client, DEPTH at a time, at random places among the first `span` bytes."""

    def __init__(self, record: Record, chance: random.Random, span: int = SIZE) -> None:
        self._record, self._chance = record, chance
        self._blocks = span // BLOCK
        self._busy: set[int] = set()
        self._in_flight = 0
        self.errors: list[int] = []

    def run(self, socket: Path, *, until: Callable[[], bool]) -> None:
        """Go on until told to stop, or until the connection is lost."""
        handle = nbd.NBD()
        try:
            handle.connect_unix(str(socket))
            while not until():
                while self._in_flight < _DEPTH:
                    self._send(handle)
                handle.poll(10)
        except nbd.Error:
            pass
        else:
            self._drain(handle)
        self._in_flight = 0
        self._busy.clear()

    def _drain(self, handle: nbd.NBD) -> None:
        deadline = time.monotonic() + 10
        try:
            while self._in_flight and time.monotonic() < deadline:
                handle.poll(10)
        except nbd.Error:
            pass

    def _send(self, handle: nbd.NBD) -> None:
        self._in_flight += 1
        if self._chance.random() < 0.05:
            answered = set(self._record.acked)
            handle.aio_flush(completion=lambda error: self._flushed(answered, error.value))
            return
        block = self._chance.randrange(self._blocks)
        while block in self._busy:
            block = self._chance.randrange(self._blocks)
        self._busy.add(block)
        record = self._record
        record.serial += 1
        kind, fua = self._chance.random(), self._chance.random() < 0.1
        content = _ZEROES if kind < 0.2 else record.serial.to_bytes(8) * (BLOCK // 8)
        record.contents.setdefault(block, {_ZEROES}).add(content)
        record.sent.add(block)
        flags = nbd.CMD_FLAG_FUA if fua else 0

        def done(error: object) -> int:
            return self._answered(block, content, fua, error.value)  # type: ignore[attr-defined]

        if kind < 0.2:
            handle.aio_zero(BLOCK, block * BLOCK, completion=done, flags=flags)
        else:
            handle.aio_pwrite(content, block * BLOCK, completion=done, flags=flags)

    def _answered(self, block: int, content: bytes, fua: bool, error: int) -> int:
        self._in_flight -= 1
        if error:
            self.errors.append(error)  # it stays one of those that may be there
        else:
            self._record.contents[block] = {content}
            self._record.acked.add(block)
            if fua:
                self._record.flushed.add(block)
        self._busy.discard(block)
        return 1

    def _flushed(self, answered: set[int], error: int) -> int:
        self._in_flight -= 1
        if error:
            self.errors.append(error)
        else:
            self._record.flushed |= answered
        return 1


def marked(uri: str, name: str) -> set[int]:
    """The blocks that a bitmap marks, as its daemon tells."""
    extents = json.loads(run("nbdinfo", "--json", f"--map=qemu:dirty-bitmap:{name}", uri))
    blocks: set[int] = set()
    for extent in extents:
        if extent["type"] & 1:
            first = extent["offset"] // BLOCK
            blocks |= set(range(first, first + -(-extent["length"] // BLOCK)))
    return blocks
