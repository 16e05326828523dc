"""Progress for people and for scripts.

Rules:
1. A bar goes to stderr, and only to a terminal.
2. With a file descriptor, nbdcopy's lines go there instead: `N/100`, each number once, 100 only when all is done.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Final, Protocol, Self

from nbdmirror.errors import UsageError

if TYPE_CHECKING:
    from types import TracebackType


class Meter(Protocol):
    """Something that shows how far a copy is."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

    def show(self, done: int, total: int, note: str = "") -> None:
        """`done` of `total` bytes, and a word on what is going on."""


class Lines:
    """nbdcopy's lines on a file descriptor."""

    def __init__(self, fd: int) -> None:
        self._fd: Final = fd
        self._last = -1
        try:
            os.fstat(fd)
        except OSError as error:
            raise UsageError(f"--progress={fd}: {error.strerror}; open that file descriptor first") from None

    def __enter__(self) -> Self:
        self._line(0)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if kind is None:
            self._line(100)

    def show(self, done: int, total: int, note: str = "") -> None:  # noqa: ARG002
        """See Meter."""
        self._line(min(99, done * 100 // total) if total else 0)

    def _line(self, percent: int) -> None:
        if percent > self._last:
            self._last = percent
            with suppress(OSError):
                os.write(self._fd, f"{percent}/100\n".encode())


class Silence:
    """Nothing to see."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        pass

    def show(self, done: int, total: int, note: str = "") -> None:
        """See Meter."""


def meter(label: str, wanted: str | None, *, default: bool) -> Meter:
    """What `--progress[=FD]` asks for: `wanted` is None without it, empty without a number."""
    if wanted:
        if not wanted.isdecimal():
            raise UsageError(f"--progress={wanted}: a file descriptor is a number")
        return Lines(int(wanted))
    if (default or wanted is not None) and sys.stderr.isatty():
        from nbdmirror.cli.bar import Bar  # noqa: PLC0415  rich takes 40 ms to import, and most runs show no bar

        return Bar(label)
    return Silence()
