"""The kernel's own ways to get a disk that is small, broken or stalled. All of them need root."""

from __future__ import annotations

import os
import subprocess
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from tests.support.peers import require
from tests.support.tools import completed, make_disk, run

if TYPE_CHECKING:
    from collections.abc import Iterator


FROZEN_SECONDS: Final = 10.0


def _need_root(what: str) -> None:
    if os.geteuid() != 0:
        pytest.skip(f"{what} need root")


@contextmanager
def loop_device(backing: Path) -> Iterator[Path]:
    """A block device that is a file. Where the file is shorter, reads fail with EIO."""
    require("losetup")
    _need_root("loop devices")
    if not Path("/dev/loop-control").exists():
        pytest.skip("loop devices need /dev/loop-control")
    name = run("losetup", "--find", "--show", backing).strip()
    try:
        yield Path(name)
    finally:
        completed("losetup", "--detach", name)


@contextmanager
def small_file_system(place: Path, size: int) -> Iterator[Path]:
    """A file system in memory with room for `size` bytes; its directory."""
    _need_root("file systems")
    place.mkdir()
    run("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place)
    try:
        yield place
    finally:
        run("umount", "--lazy", place)


class FreezableFileSystem:
    """An ext4 on a loop device. While it is frozen, every write to it waits, in the kernel, where no signal reaches it: so it
    thaws by itself after FROZEN_SECONDS, for the sake of a test that failed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rescue: threading.Timer | None = None

    def freeze(self) -> None:
        self._rescue = threading.Timer(FROZEN_SECONDS, self.thaw)
        self._rescue.start()
        run("fsfreeze", "--freeze", self.path)

    def thaw(self) -> None:
        rescue, self._rescue = self._rescue, None
        if rescue is not None:
            rescue.cancel()
            run("fsfreeze", "--unfreeze", self.path)


@contextmanager
def freezable_file_system(place: Path, size: int) -> Iterator[FreezableFileSystem]:
    """It thaws by itself at the end."""
    require("mkfs.ext4", "fsfreeze")
    image = make_disk(place.with_suffix(".image"), size)
    run("mkfs.ext4", "-q", "-F", image)
    place.mkdir()
    with loop_device(image) as device:
        run("mount", device, place)
        system = FreezableFileSystem(place)
        try:
            yield system
        finally:
            system.thaw()
            subprocess.run(["umount", place], check=True)
