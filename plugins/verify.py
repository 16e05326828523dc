#!/usr/bin/env python3
"""verify.py: a target that keeps checksums only, of a disk of any size, and counts what it is sent; for nbdkit >= 1.32.

    nbdkit python plugins/verify.py size=1T report=/tmp/report.json
    python3 plugins/verify.py FILE [CHUNK]      prints the digest that a target with the content of FILE has

    size=SIZE         of the disk, which is all zero at first; with a reference its size is the default
    chunk=SIZE        what a checksum is for (64k); memory is 16 bytes per chunk that was written, 256 MiB per TiB
    reference=FILE    the content that is to come. A write or zero that differs is refused with EIO, and counted. FILE has to
                      stay as it is
    report=PATH       the report is written here at each flush, and in the end
    control=SOCKET    takes `report`, which answers the report, and `reset`, which starts all counts anew:
                      python3 plugins/control.py SOCKET report

What was written can be read back while a part of it is kept in memory, and always with a reference; otherwise EIO is the
answer, but for zeroes. The rest is in checksums.py: with chunks that are not larger than what the client writes at a time (the
granularity of a mirror), and aligned as these, every write is accounted for.

The report is a JSON object: `digest`, null while the content of some chunks is unknown, and how many, `unknown-chunks`;
`requests`, `count` and `bytes` of each of read, write, zero, trim, flush, fua, cache and extents; `may-trim-bytes` of zero
requests that may leave holes; `zero-bytes-written`, of the aligned blocks of 4 KiB that were written though they are all
zero; `mismatches` and `first-mismatch`, an offset; `in-flight` and `max-in-flight`.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parent))
from checksums import Checksums
from control import Control, parse_size, refuse
from tally import Tally

try:
    import nbdkit
except ImportError:
    nbdkit = None

if TYPE_CHECKING:
    from collections.abc import Iterator

API_VERSION = 2

_CHUNK: Final = "64k"
_BLOCK: Final = 4096
_ZEROES: Final = bytes(1 << 20)


# --- the reference, and the digest of a file -------------------------------------------------------------------------


def _data_ranges(fd: int, offset: int, end: int) -> Iterator[tuple[int, int]]:
    """What is no hole, as (offset, end)."""
    while offset < end:
        try:
            start = os.lseek(fd, offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:  # nothing but a hole to the end
                raise
            return
        offset = min(os.lseek(fd, start, os.SEEK_HOLE), end)
        if start < end:
            yield start, offset


def digest_of(path: str, chunk: int) -> str | None:
    """What the digest of a target with this content is. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.lseek(fd, 0, os.SEEK_END)
        sums = Checksums(size, chunk)
        for start, end in _data_ranges(fd, 0, size):
            # Whole chunks, so that none is kept in parts.
            for at in range(start // chunk * chunk, end, chunk):
                sums.write(memoryview(os.pread(fd, chunk, at)), at)
        return sums.digest()[0]
    finally:
        os.close(fd)


def main() -> None:
    """Print the digest of a file."""
    if len(sys.argv) not in {2, 3} or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    try:
        print(digest_of(sys.argv[1], parse_size(sys.argv[2] if len(sys.argv) > 2 else _CHUNK)))
    except (OSError, ValueError) as error:
        sys.exit(f"verify.py: {error}")


class Target:
    """The disk, and what is told of it."""

    def __init__(self, size: int, chunk: int, reference: int | None, report: Path | None) -> None:
        self.sums = Checksums(size, chunk)
        self.tally = Tally()
        self._reference, self._report = reference, report
        self._lock, self._reporting = threading.Lock(), threading.Lock()
        self._start_counting()

    def _start_counting(self) -> None:
        self._may_trim = self._zeroes_written = self._mismatches = 0
        self._first_mismatch: int | None = None

    def write(self, data: memoryview, offset: int) -> None:
        """Check and take note; raises OSError where it is not what the reference has."""
        zeroes = sum(_is_zero(data[at : at + _BLOCK]) for at in range(-offset % _BLOCK, len(data) - _BLOCK + 1, _BLOCK))
        with self._lock:
            self._zeroes_written += zeroes * _BLOCK
        if self._reference is not None and os.pread(self._reference, len(data), offset) != data.tobytes():
            self._mismatch(offset)
        self.sums.write(data, offset)

    def zero(self, offset: int, length: int, may_trim: int) -> None:
        """As a write of zeroes."""
        with self._lock:
            self._may_trim += length if may_trim else 0
        if self._reference is not None:
            for start, end in _data_ranges(self._reference, offset, offset + length):
                for at in range(start, end, len(_ZEROES)):
                    piece = os.pread(self._reference, min(len(_ZEROES), end - at), at)
                    if piece.strip(b"\0"):
                        self._mismatch(at)
        self.sums.zero(offset, length)

    def read(self, buffer: memoryview, offset: int) -> None:
        """Fill the buffer; raises OSError where the content is not known, or only its checksum."""
        if not self.sums.read(buffer, offset, self._recall):
            _fail("has content that is not known")

    def _recall(self, buffer: memoryview, offset: int) -> None:
        if self._reference is None:
            _fail("is known by its checksum only")
        buffer[:] = os.pread(self._reference, len(buffer), offset)

    def _mismatch(self, offset: int) -> NoReturn:
        with self._lock:
            self._mismatches += 1
            if self._first_mismatch is None:
                self._first_mismatch = offset
        _fail(f"differs from the reference, at {offset} or behind")

    def reset(self, _rest: str = "") -> dict[str, object]:
        """Count anew; the content stays."""
        with self._lock:
            self._start_counting()
        self.tally.reset()
        return self.report()

    def report(self, _rest: str = "") -> dict[str, object]:
        """All that is known."""
        digest, unknown = self.sums.digest()
        with self._lock:
            return {
                "size": self.sums.size,
                "chunk": self.sums.chunk,
                "digest": digest,
                "unknown-chunks": unknown,
                **self.tally.counts(),
                "may-trim-bytes": self._may_trim,
                "zero-bytes-written": self._zeroes_written,
                "mismatches": self._mismatches,
                "first-mismatch": self._first_mismatch,
            }

    def write_report(self) -> None:
        """Whole or not at all."""
        if self._report:
            with self._reporting:
                text = json.dumps(self.report())
                new = self._report.with_name(f"{self._report.name}.new")
                new.write_text(f"{text}\n")
                new.replace(self._report)


def _is_zero(block: memoryview) -> bool:
    return not block[0] and block.tobytes() == _ZEROES[:_BLOCK]


def _fail(what: str) -> NoReturn:
    nbdkit.set_error(errno.EIO)
    raise OSError(errno.EIO, f"what was asked for {what}")


# --- what nbdkit calls -----------------------------------------------------------------------------------------------

_settings: dict[str, str] = {"chunk": _CHUNK}
target: Target
_control: Control | None = None


def thread_model() -> int:
    return int(nbdkit.THREAD_MODEL_PARALLEL)


def config(key: str, value: str) -> None:
    if key in {"reference", "report", "control"}:
        value = str(Path(value).absolute())  # nbdkit goes to / later
    elif key not in {"size", "chunk"}:
        refuse(f"verify.py: no such parameter: {key}; python3 verify.py explains those that there are")
    _settings[key] = value


def config_complete() -> None:
    try:
        _configure()
    except ValueError as error:
        refuse(f"verify.py: {error}")
    except OSError as error:
        refuse(f"verify.py: {error.filename}: {error.strerror}")


def _configure() -> None:
    global target, _control  # noqa: PLW0603  a plugin is a module, and this its constructor
    chunk = parse_size(_settings["chunk"])
    if not chunk:
        raise ValueError("chunk=0: give a size")
    reference = os.open(_settings["reference"], os.O_RDONLY | os.O_CLOEXEC) if "reference" in _settings else None
    if "size" in _settings:
        size = parse_size(_settings["size"])
    elif reference is not None:
        size = os.lseek(reference, 0, os.SEEK_END)
    else:
        raise ValueError("give size=SIZE or reference=FILE")
    target = Target(size, chunk, reference, Path(_settings["report"]) if "report" in _settings else None)
    target.write_report()  # where that cannot be written is a matter of the command line
    if "control" in _settings:
        _control = Control(_settings["control"], {"report": target.report, "reset": target.reset})


def after_fork() -> None:
    if _control:
        _control.start()


def cleanup() -> None:
    if _control:
        _control.stop()
    target.write_report()


def open(_readonly: bool) -> object:
    return "a connection"


def get_size(_h: object) -> int:
    return target.sums.size


def can_multi_conn(_h: object) -> bool:
    return True


def can_fua(_h: object) -> int:
    return int(nbdkit.FUA_NATIVE)


def can_fast_zero(_h: object) -> bool:
    return True


def can_cache(_h: object) -> int:
    return int(nbdkit.CACHE_NATIVE)


def _note_fua(flags: int, length: int) -> None:
    if flags & nbdkit.FLAG_FUA:
        target.tally.note("fua", length)


def pread(_h: object, buf: memoryview, offset: int, _flags: int) -> None:
    with target.tally.request("read", len(buf)):
        target.read(buf, offset)


def pwrite(_h: object, buf: memoryview, offset: int, flags: int) -> None:
    with target.tally.request("write", len(buf)):
        target.write(buf, offset)
    _note_fua(flags, len(buf))


def zero(_h: object, count: int, offset: int, flags: int) -> None:
    with target.tally.request("zero", count):
        target.zero(offset, count, flags & nbdkit.FLAG_MAY_TRIM)
    _note_fua(flags, count)


def trim(_h: object, count: int, offset: int, flags: int) -> None:
    with target.tally.request("trim", count):
        target.sums.forget(offset, count)
    _note_fua(flags, count)


def flush(_h: object, _flags: int) -> None:
    with target.tally.request("flush"):
        target.write_report()


def cache(_h: object, count: int, _offset: int, _flags: int) -> None:
    target.tally.note("cache", count)


def extents(_h: object, count: int, offset: int, _flags: int) -> list[tuple[int, int, int]]:
    hole = nbdkit.EXTENT_HOLE | nbdkit.EXTENT_ZERO
    with target.tally.request("extents", count):
        return [(at, length, hole if zeroes else 0) for at, length, zeroes in target.sums.extents(offset, count)]


if nbdkit is None:
    main()
