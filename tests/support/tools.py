"""Other people's command-line tools, run to their end, and raw disks to run them on."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
from pathlib import Path
from textwrap import dedent
from typing import TYPE_CHECKING, Any, Final

import pytest

from nbdmirror.units import KiB, MiB

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

# Each of these commands takes a fraction of a second; on a machine that others use, some more.
TOOL_SECONDS: Final = 30.0

# libnbd's shell by way of our interpreter, which has the binding; nbdsh takes whatever python3 comes first in PATH.
_NBDSH: Final = (sys.executable, "-P", "-m", "nbd")


def completed(*argv: Any, **rest: Any) -> subprocess.CompletedProcess[str]:
    """The command's result, whatever its exit status."""
    return subprocess.run(
        [str(word) for word in argv],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TOOL_SECONDS,
        check=False,
        **rest,
    )


def run(*argv: Any, **rest: Any) -> str:
    """The output of a command that has to succeed."""
    result = completed(*argv, **rest)
    if result.returncode:
        words = " ".join(map(str, argv))
        pytest.fail(f"{words}: exit status {result.returncode}\n{result.stdout}\n{result.stderr}", pytrace=False)
    return result.stdout


def fails(*argv: Any, **rest: Any) -> str:
    """What a command says on stderr that has to fail."""
    result = completed(*argv, **rest)
    assert result.returncode > 0, f"{argv} should have failed, with a status:\n{result.stdout}\n{result.stderr}"
    return result.stderr


def nbdsh(uri: str, script: str, *options: str) -> str:
    """Run a script in libnbd's shell, connected as `h`; what it asserts is asserted. Returns its output."""
    return run(*_NBDSH, *options, "-u", uri, "-c", dedent(script))


# --- disks -----------------------------------------------------------------------------------------------------------


def pattern(length: int, seed: int = 1) -> bytes:
    """Bytes that no shifted, missing or repeated piece could pass for."""
    return random.Random(seed).randbytes(length)


def make_disk(path: Path, size: int, pieces: Mapping[int, bytes] | None = None) -> Path:
    """A sparse file with data at some offsets."""
    with path.open("wb") as file:
        file.truncate(size)
        for offset, data in (pieces or {}).items():
            os.pwrite(file.fileno(), data, offset)
    return path


def content(path: Path | str, offset: int, length: int) -> bytes:
    """What a file holds in a range."""
    with Path(path).open("rb") as file:
        return os.pread(file.fileno(), length, offset)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def allocated(path: Path) -> int:
    """How many bytes of storage a file has."""
    return path.stat().st_blocks * 512


def about(storage: int) -> Any:
    """Equal to that much storage, give or take what file systems need to tell pieces apart or hold in reserve."""
    return pytest.approx(storage, abs=256 * KiB)


def data_ranges(path: Path) -> list[tuple[int, int]]:
    """The (offset, length) pairs that the file system calls data."""
    found = []
    with path.open("rb") as file:
        at, size = 0, os.fstat(file.fileno()).st_size
        while at < size:
            try:
                at = os.lseek(file.fileno(), at, os.SEEK_DATA)
            except OSError:  # ENXIO: no more data
                break
            end = os.lseek(file.fileno(), at, os.SEEK_HOLE)
            found.append((at, end - at))
            at = end
    return found


def same_content(first: Path, second: Path) -> bool:
    return first.stat().st_size == second.stat().st_size and sha256(first) == sha256(second)


def mapped(size: int, ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int, bool]]:
    """All of a disk as (offset, length, is data), from the ranges that are data."""
    found, at = [], 0
    for offset, length in ranges:
        if offset > at:
            found.append((at, offset - at, False))
        found.append((offset, length, True))
        at = offset + length
    if at < size:
        found.append((at, size - at, False))
    return found


# A disk for most purposes: 16 MiB, with data at its start, next to a hole in the middle, and up to its very end.
SIZE: Final = 16 * MiB
PIECES: Final = {0: pattern(MiB, 1), 5 * MiB: pattern(MiB // 2, 2), SIZE - 65536: pattern(65536, 3)}
DATA: Final = [(offset, len(data)) for offset, data in PIECES.items()]
