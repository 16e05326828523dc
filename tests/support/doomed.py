"""`nbdmirror`, with something wrong at a named point: `python -m tests.support.doomed POINT ARGS...`.

    before:CALL:N     SIGKILL instead of the Nth such call
    after:CALL:N      SIGKILL when it has returned
    ERRNO:CALL:N      it fails, and so do all that follow; nothing is done

CALL is what the daemon does, not how: `allocate`, `draft`, `complete` and `rename` make a bitmap's file, `state`, `regions` and
`bits` make a part of it durable, `write` changes the disk, `flush` makes that durable. Calls are counted over all threads. The
program is the product's own: what is changed are the system's calls below it, in this process.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbdmirror.__main__ import main
from nbdmirror.bitmap import mapped
from nbdmirror.bitmap.image import REGIONS_OFFSET, STATE_OFFSET

if TYPE_CHECKING:
    from collections.abc import Callable


class Point:
    """Counts the calls of one kind, and acts at one of them."""

    def __init__(self, text: str) -> None:
        self.action, self.call, number = text.split(":")
        self._left = int(number)
        self._lock = threading.Lock()

    def wrap(self, real: Callable[..., Any], kind: Callable[..., str]) -> Callable[..., Any]:
        def call(*args: Any, **rest: Any) -> Any:
            if kind(*args) != self.call:
                return real(*args, **rest)
            with self._lock:
                self._left -= 1
                is_it = self._left == 0
                fails = self._left <= 0 and self.action.isupper()
            if is_it and self.action == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            if fails:
                return self.fail()
            result = real(*args, **rest)
            if is_it and self.action == "after":
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    def fail(self) -> int:
        number = getattr(errno, self.action)
        if self.call == "bits":
            ctypes.set_errno(number)
            return -1
        raise OSError(number, os.strerror(number))


def kind_of_write(fd: int, _data: object, offset: int, _flags: int = 0) -> str:
    name = Path(f"/proc/self/fd/{fd}").readlink().name
    if name.endswith(".nbm.new"):
        return "draft"
    if not name.endswith(".nbm"):
        return "write"
    return "regions" if offset >= REGIONS_OFFSET else "state" if offset == STATE_OFFSET else "head"


def install(point: Point) -> None:
    os.pwrite = point.wrap(os.pwrite, kind_of_write)
    os.pwritev = point.wrap(os.pwritev, kind_of_write)
    os.posix_fallocate = point.wrap(os.posix_fallocate, lambda *_: "allocate")
    os.fsync = point.wrap(os.fsync, lambda *_: "complete")
    os.fdatasync = point.wrap(os.fdatasync, lambda *_: "flush")
    Path.rename = point.wrap(Path.rename, lambda *_: "rename")  # type: ignore[method-assign]
    mapped._libc.msync = point.wrap(mapped._libc.msync, lambda *_: "bits")


if __name__ == "__main__":
    install(Point(sys.argv.pop(1)))
    sys.exit(main())
