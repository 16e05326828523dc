"""Devices over links that break, and waiting for what becomes of them."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any

from nbdmirror.devices.nbd import NbdDevice
from tests.support import peers
from tests.support.failing import BOUND

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from nbdmirror.devices.uri import NbdEndpoint


@asynccontextmanager
async def opened(endpoint: NbdEndpoint, **options: Any) -> AsyncIterator[NbdDevice]:
    """A device that is closed in the end."""
    device = await NbdDevice.open(endpoint, **options)
    try:
        yield device
    finally:
        await device.aclose()


@contextmanager
def back(first: peers.Peer, *args: str, **options: Any) -> Iterator[None]:
    """Another nbdkit where `first` was, which does not wait for its clients to leave in the end."""
    with peers.nbdkit(*args, after=first, **options) as peer:
        yield
        peer.kill()


async def lost(device: NbdDevice) -> None:
    """Until the device knows that all its connections are gone."""
    async with asyncio.timeout(BOUND):
        while device.link.connections:
            await asyncio.sleep(0.001)


async def fewer(device: NbdDevice, connections: int) -> None:
    """Until it has fewer connections."""
    async with asyncio.timeout(BOUND):
        while device.connection_count >= connections:
            await asyncio.sleep(0.001)


async def mended(device: NbdDevice, connections: int) -> None:
    """Until it has as many again."""
    async with asyncio.timeout(BOUND):
        while device.connection_count < connections:
            await asyncio.sleep(0.001)


async def read(device: NbdDevice, offset: int, length: int) -> bytes:
    buffer = bytearray(length)
    await asyncio.wait_for(device.pread(buffer, offset), BOUND)
    return bytes(buffer)
