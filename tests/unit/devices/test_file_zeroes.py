"""How a file is zeroed, by what its file system can: each kind is the real one with some of its calls refused."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

import pytest

from nbdmirror.devices import linux
from nbdmirror.devices.file import FileDevice
from nbdmirror.errors import DeviceError
from nbdmirror.protocol.constants import FAST_ZERO, FUA, NO_HOLE
from nbdmirror.units import KiB, MiB

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Collection
    from pathlib import Path

CONTENT = bytes(range(256)) * 4 * KiB  # 1 MiB
PUNCH, ZERO_RANGE, ALLOCATE = linux.FALLOC_PUNCH_HOLE, linux.FALLOC_ZERO_RANGE, 0
# What file systems refuse; ext2 is what ext4's driver makes of a file without extents.
TMPFS, EXT2, VFAT = {ZERO_RANGE}, {ZERO_RANGE, ALLOCATE}, {PUNCH, ZERO_RANGE, ALLOCATE}


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> Callable[[Collection[int]], list[int]]:
    """Refuse some modes of fallocate from now on; returns the list that notes those which are tried."""
    real = linux.fallocate

    def refuse(modes: Collection[int]) -> list[int]:
        tried: list[int] = []

        def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
            kind = mode & ~linux.FALLOC_KEEP_SIZE
            tried.append(kind)
            if kind in modes:
                raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
            real(fd, mode, offset, length)

        monkeypatch.setattr(linux, "fallocate", fallocate)
        return tried

    return refuse


@pytest.fixture
async def device(tmp_path: Path) -> AsyncIterator[FileDevice]:
    (tmp_path / "disk").write_bytes(CONTENT)
    device = FileDevice.open(tmp_path / "disk")
    yield device
    await device.aclose()


@pytest.mark.parametrize("flags", [0, NO_HOLE, FUA, NO_HOLE | FUA])
@pytest.mark.parametrize("refused", [TMPFS, EXT2, VFAT], ids=["tmpfs", "ext2", "vfat"])
async def test_zeroes_are_written_where_nothing_else_helps(
    device: FileDevice, tmp_path: Path, refusing: Callable[[Collection[int]], list[int]], refused: set[int], flags: int
) -> None:
    refusing(refused)
    await device.zero(1000, MiB - 3000, flags)
    assert (tmp_path / "disk").read_bytes() == CONTENT[:1000] + bytes(MiB - 3000) + CONTENT[-2000:]


@pytest.mark.parametrize(("refused", "flags"), [(VFAT, 0), (VFAT, NO_HOLE), (EXT2, NO_HOLE), (TMPFS, NO_HOLE)], ids=str)
async def test_a_fast_zero_that_would_be_slow_is_refused_before_anything_has_changed(
    device: FileDevice, tmp_path: Path, refusing: Callable[[Collection[int]], list[int]], refused: set[int], flags: int
) -> None:
    refusing(refused)
    for also in (0, FUA):
        with pytest.raises(DeviceError) as caught:
            await device.zero(0, MiB, flags | FAST_ZERO | also)
        assert caught.value.errno == errno.ENOTSUP
        assert (tmp_path / "disk").read_bytes() == CONTENT


async def test_a_fast_zero_that_is_fast_is_one_call(
    device: FileDevice, tmp_path: Path, refusing: Callable[[Collection[int]], list[int]]
) -> None:
    tried = refusing(())
    await device.zero(0, MiB // 2, FAST_ZERO)
    await device.zero(MiB // 2, MiB // 2, FAST_ZERO | NO_HOLE)
    assert tried[0] == PUNCH
    assert (tmp_path / "disk").read_bytes() == bytes(MiB)
