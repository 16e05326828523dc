"""The demo's disk: a sparse raw image with an ext4 file system in it, and one file of it that a writer may change.

Rules:
1. No mounting and no root: `mkfs.ext4 -d` copies a directory into the image, `debugfs` tells where a file lies in it.
2. The writer's area is within one file's data blocks, so the file system stays consistent whatever is written there.
3. What is never written stays a hole: also the journal and the inode tables, which mkfs would fill with zeroes.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from nbdmirror.cli.demo_children import need_program, run_tool
from nbdmirror.errors import DeviceError, NbdMirrorError
from nbdmirror.units import KiB, MiB, format_size, round_down

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

MIN_SIZE: Final = 64 * MiB
_BLOCK: Final = 4 * KiB
_PIECE: Final = 4 * MiB
# The area is a multiple of the largest write.
AREA_UNIT: Final = 64 * KiB
_PACKAGE: Final = "e2fsprogs"
_WRITTEN_FILE: Final = "database.bin"
_EXTENT: Final = re.compile(r"\((\d+)(?:-(\d+))?\):(\d+)")
_WORDS: Final = (
    b"accepted block client closed connection disk error from guest host in job mirror of open read to write".split()
)


@dataclass(frozen=True, slots=True)
class DemoDisk:
    """An image of `size` bytes holding `files` files of `content` bytes; `area_length` bytes at `area_offset` may change."""

    path: Path
    size: int
    files: int
    content: int
    area_offset: int
    area_length: int


async def make_disk(path: Path, size: int) -> DemoDisk:
    """Make the image at `path`, which must not exist, beside a directory of files that is removed again."""
    free = shutil.disk_usage(path.parent).free
    if free < size:
        raise NbdMirrorError(
            f"{path.parent} has {format_size(free)} free, the demo needs {format_size(size)}; set TMPDIR to a larger directory"
        )
    root = path.parent / "files"
    try:
        for _ in _write_files(root, size):
            await asyncio.sleep(0)  # signals are looked at here
    except OSError as error:
        raise DeviceError.of(error, f"writing {error.filename or root}") from None
    found = [entry.stat() for entry in root.rglob("*") if entry.is_file()]
    make_sparse(path, size)
    options = ["-q", "-F", "-b", str(_BLOCK), "-E", "lazy_itable_init=1,lazy_journal_init=1", "-L", "nbdmirror-demo"]
    await _must(need_program("mkfs.ext4", _PACKAGE), *options, "-d", str(root), str(path))
    shutil.rmtree(root)
    offset, length = await _find(path, _WRITTEN_FILE)
    return DemoDisk(path, size, len(found), sum(status.st_blocks for status in found) * 512, offset, length)


async def check_file_system(path: Path) -> str | None:
    """What e2fsck finds wrong, on one line; None if nothing. It changes nothing."""
    status, output = await run_tool(need_program("e2fsck", _PACKAGE), "-fn", str(path))
    return None if status == 0 else " ".join(output.split())[-200:] or f"status {status}"


def make_sparse(path: Path, size: int) -> None:
    """A new file of `size` bytes, all of them a hole."""
    with path.open("xb") as file:
        file.truncate(size)


async def _must(*argv: str) -> str:
    status, output = await run_tool(*argv)
    if status:
        raise NbdMirrorError(f"{argv[0]} failed with status {status}: {' '.join(output.split())[-200:]}")
    return output


async def _find(image: Path, name: str) -> tuple[int, int]:
    """Offset and length of the longest piece of a file that lies in one place."""
    output = await _must(need_program("debugfs", _PACKAGE), "-R", f"stat /{name}", str(image))
    runs: list[tuple[int, int]] = []
    for first, last, at in _EXTENT.findall(output):
        length = (int(last or first) - int(first) + 1) * _BLOCK
        start = int(at) * _BLOCK
        if runs and sum(runs[-1]) == start:
            start, length = runs[-1][0], runs.pop()[1] + length
        runs.append((start, length))
    start, length = max(runs, key=lambda run: run[1], default=(0, 0))
    length = round_down(length, AREA_UNIT)
    if not length:
        raise NbdMirrorError(f"cannot find the file {name} in {image}: debugfs said: {' '.join(output.split())[-200:]}")
    return start, length


def _write_files(root: Path, size: int) -> Iterator[None]:
    """Files for a disk of `size` bytes, about a third of it; yields now and then."""
    chance = random.Random(size)  # noqa: S311  nothing here is secret
    lines = [_line(chance) for _ in range(4096)]
    (root / "etc").mkdir(parents=True)
    for number in range(300):
        (root / "etc" / f"{number}.conf").write_bytes(b"".join(chance.choices(lines, k=chance.randrange(1, 200))))
    yield
    for number in range(4):
        yield from _write_pieces(root / "log" / f"{number}.log", size // 40, lambda: _text(chance, lines))
    for number in range(4):
        yield from _write_pieces(root / "media" / f"{number}.bin", size // 40, lambda: os.urandom(_PIECE))
    yield from _write_pieces(root / _WRITTEN_FILE, size // 8, lambda: os.urandom(_PIECE))
    _write_holey(root / "sparse.img", size // 4)
    yield


def _write_pieces(path: Path, size: int, piece: Callable[[], bytes]) -> Iterator[None]:
    path.parent.mkdir(exist_ok=True)
    with path.open("xb") as file:
        for left in range(size, 0, -_PIECE):
            file.write(piece()[:left])
            yield


def _write_holey(path: Path, size: int) -> None:
    """64 KiB of data every 8 MiB, holes between."""
    with path.open("xb") as file:
        file.truncate(size)
        for offset in range(0, size, 8 * MiB):
            file.seek(offset)
            file.write(os.urandom(64 * KiB))


def _line(chance: random.Random) -> bytes:
    return b"%010d %s\n" % (chance.randrange(10**10), b" ".join(chance.choices(_WORDS, k=chance.randrange(8, 24))))


def _text(chance: random.Random, lines: list[bytes]) -> bytes:
    # A line has about a hundred bytes; 64 is less than any average of them.
    return b"".join(chance.choices(lines, k=_PIECE // 64))
