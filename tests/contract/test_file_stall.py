"""A file whose writes are made to wait: they leave the event loop for the threads, and nothing is lost."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Final

import pytest

from nbdmirror.devices.file import FileDevice
from nbdmirror.units import KiB, MiB

_MEMORY: Final = Path("/dev/shm")
_BLOCK: Final = bytes(range(256)) * 16
_SECONDS: Final = 30.0
SIZE: Final = 256 * MiB


class Locker:
    """Allocates and frees a file over and over in a thread: the kernel locks it each time, for tens of milliseconds."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDWR)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work)
        self._thread.start()

    def _work(self) -> None:
        while not self._stop.is_set():
            os.posix_fallocate(self._fd, 4 * KiB, SIZE - 4 * KiB)
            os.ftruncate(self._fd, 4 * KiB)
            os.ftruncate(self._fd, SIZE)

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()
        os.close(self._fd)


async def test_writes_that_are_made_to_wait_move_to_the_threads(tmp_path: Path) -> None:
    if not os.access(_MEMORY, os.W_OK):
        pytest.skip(f"{_MEMORY} is not there")
    path = _MEMORY / f"{tmp_path.name}-{os.getpid()}.img"
    with path.open("xb") as file:
        file.truncate(SIZE)
    device = FileDevice.open(path)
    try:
        locker = Locker(path)
        try:
            deadline = time.monotonic() + _SECONDS
            while device.pwrite_now(_BLOCK, 0):
                assert time.monotonic() < deadline, "no write was sent to the threads"
        finally:
            locker.stop()
        await device.pwrite(_BLOCK[::-1], 0)
        assert path.read_bytes()[: len(_BLOCK)] == _BLOCK[::-1]
    finally:
        await device.aclose()
        path.unlink()


async def test_a_write_that_is_slow_without_having_slept_is_no_stall(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a busy machine, where a process is preempted in the middle of a write: here every write counts as slow."""
    if not os.access(_MEMORY, os.W_OK):
        pytest.skip(f"{_MEMORY} is not there")
    monkeypatch.setattr("nbdmirror.devices.file._STALL_SECONDS", 0.0)
    path = _MEMORY / f"{tmp_path.name}-{os.getpid()}.img"
    path.write_bytes(bytes(len(_BLOCK)))
    device = FileDevice.open(path)
    try:
        assert all(device.pwrite_now(_BLOCK, 0) for _ in range(1000))
    finally:
        await device.aclose()
        path.unlink()
