"""What the demo has to show in the end: every claim beside what was found, and whether it held.

Rules:
1. A claim holds or the demo has failed; there is no third way, and numbers that nothing depends on claim nothing.
2. The files are looked at when the servers of both have ended, by their paths, as anybody could.
"""

from __future__ import annotations

from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from nbdmirror.cli.demo_disk import check_file_system
from nbdmirror.devices.open import open_device
from nbdmirror.mirror.compare import Comparison
from nbdmirror.mirror.compare import compare as compare_disks
from nbdmirror.units import format_size

if TYPE_CHECKING:
    from pathlib import Path

    from nbdmirror.cli.demo_writer import Written

# Of the source's allocated size: what a file system's own bookkeeping of two files may differ by.
MOST_APART: Final = 0.01


@dataclass(frozen=True, slots=True)
class Mirrored:
    """What the job did, by the daemon's counters (bytes), and how long it took (seconds)."""

    ready_seconds: float
    ready_sent: int
    complete_seconds: float
    sent: int
    zeroes: int
    written: Written
    writer: str
    target: str


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the report. `held` is None where nothing is claimed."""

    label: str
    text: str
    held: bool | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """The report as lines, and as an object for scripts."""

    lines: tuple[Line, ...]
    facts: dict[str, Any]

    @property
    def failures(self) -> list[str]:
        """The claims that did not hold."""
        return [f"{line.label}: {line.text}" for line in self.lines if line.held is False]


async def prove(source: Path, target: Path, size: int, mirrored: Mirrored) -> Outcome:
    """Look at both files."""
    comparison = await _compare(source, target)
    allocated = [path.stat().st_blocks * 512 for path in (source, target)]
    damage = await check_file_system(target)
    lines = (
        _contents(comparison),
        _allocation(allocated[0], allocated[1]),
        Line("file system", f"e2fsck on the target: {damage}" if damage else "clean on the target (e2fsck -fn)", not damage),
        _writes(mirrored),
        *_figures(mirrored),
    )
    facts = {
        "ok": all(line.held is not False for line in lines),
        "size": size,
        "first-difference": comparison.first,
        "source-allocated": allocated[0],
        "target-allocated": allocated[1],
        "file-system-clean": not damage,
        "writer": mirrored.writer,
        "target": mirrored.target,
        "writes": mirrored.written.count,
        "bytes-written": mirrored.written.length,
        "bytes-sent": mirrored.sent,
        "bytes-of-zeroes-not-sent": mirrored.zeroes,
        "ready-seconds": mirrored.ready_seconds,
        "complete-seconds": mirrored.complete_seconds,
    }
    return Outcome(lines, facts)


async def _compare(source: Path, target: Path) -> Comparison:
    async with AsyncExitStack() as stack:
        disks = []
        for path in (source, target):
            disk = await open_device(str(path), read_only=True)
            stack.push_async_callback(disk.aclose)
            disks.append(disk)
        return await compare_disks(disks[0], disks[1])


def _contents(found: Comparison) -> Line:
    if found.first is None:
        return Line("contents", f"identical, all {format_size(found.compared)}", held=True)
    text = f"source and target differ: first at offset {found.first}, {found.differing} bytes in total"
    return Line("contents", text, held=False)


def _allocation(source: int, target: int) -> Line:
    apart = abs(source - target) / source if source else float(target > 0)
    text = f"source {format_size(source)}, target {format_size(target)}: {apart:.2%} apart"
    return Line("allocated", text, held=apart <= MOST_APART)


def _writes(mirrored: Mirrored) -> Line:
    written = mirrored.written
    text = f"{written.count:,} of {format_size(written.length)} in all, before and after READY ({mirrored.writer})"
    return Line("guest's writes", text, held=written.count > 0)


def _figures(mirrored: Mirrored) -> tuple[Line, ...]:
    rate = mirrored.ready_sent / mirrored.ready_seconds
    return (
        Line("copied", f"{format_size(mirrored.sent)}, what the guest wrote again included"),
        Line("zeroes never sent", format_size(mirrored.zeroes)),
        Line("time", f"READY after {mirrored.ready_seconds:.2f} s, handed over in {mirrored.complete_seconds:.2f} s"),
        Line("rate", f"{format_size(rate)}/s until READY, to {mirrored.target}"),
    )
