"""The devices that the contract is checked on."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

import pytest

from nbdmirror.devices.file import FileDevice
from nbdmirror.devices.memory import MemoryDevice
from nbdmirror.devices.nbd import NbdDevice
from tests.support import peers

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from contextlib import AbstractAsyncContextManager, AbstractContextManager
    from pathlib import Path

    from nbdmirror.devices.base import BlockDevice

KIB: Final = 1024
# Nothing divides it: the last bytes are in a sector, a page and a chunk that end early.
ODD_SIZE: Final = 1025 * KIB + 513


@asynccontextmanager
async def memory(path: Path, size: int) -> AsyncIterator[BlockDevice]:
    yield MemoryDevice(size)


@asynccontextmanager
async def file(path: Path, size: int) -> AsyncIterator[BlockDevice]:
    image = make_image(path, size)
    device = FileDevice.open(image, read_only=False)
    try:
        yield device
    finally:
        await device.aclose()


@asynccontextmanager
async def over_nbd(server: AbstractContextManager[peers.Peer]) -> AsyncIterator[BlockDevice]:
    with server as peer:
        device = await NbdDevice.open(peer.endpoint, connections=2)
        try:
            yield device
        finally:
            await device.aclose()


def qemu_nbd(path: Path, size: int) -> AbstractAsyncContextManager[BlockDevice]:
    # qemu-nbd rounds sizes up to a sector.
    return over_nbd(peers.qemu_nbd(make_image(path, -(-size // 512) * 512)))


def nbdkit_memory(path: Path, size: int) -> AbstractAsyncContextManager[BlockDevice]:
    return over_nbd(peers.nbdkit("memory", str(size)))


def nbdkit_file(path: Path, size: int) -> AbstractAsyncContextManager[BlockDevice]:
    return over_nbd(peers.nbdkit("file", str(make_image(path, size))))


def nbd_server(path: Path, size: int) -> AbstractAsyncContextManager[BlockDevice]:
    # nbd-server rounds sizes down to a block of 512.
    return over_nbd(
        peers.nbd_server(make_image(path, -(-size // 512) * 512), options=["trim = true", "flush = true", "fua = true"])
    )


def make_image(directory: Path, size: int) -> Path:
    image = directory / "disk.img"
    with image.open("wb") as out:
        out.truncate(size)
    return image


DEVICES: Final[list[Callable[[Path, int], AbstractAsyncContextManager[BlockDevice]]]] = [
    memory,
    file,
    qemu_nbd,
    nbdkit_memory,
    nbdkit_file,
    nbd_server,
]


@pytest.fixture(params=DEVICES, ids=lambda maker: maker.__name__)
async def device(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[BlockDevice]:
    """A fresh, empty disk of about ODD_SIZE bytes."""
    if request.param not in (memory, file):
        pytest.importorskip("nbd", reason="libnbd's Python binding is not installed")
    async with request.param(tmp_path, ODD_SIZE) as opened:
        yield opened
