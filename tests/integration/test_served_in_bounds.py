"""How much of one client is worked on at a time: requests in flight are bounded in count and in bytes."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

import pytest

from nbdmirror.protocol import constants as c
from nbdmirror.server import budget
from nbdmirror.server.export import Export
from nbdmirror.server.listener import Listener
from nbdmirror.server.service import MAX_BYTES_IN_FLIGHT, MAX_IN_FLIGHT
from nbdmirror.sockets import listen_unix
from nbdmirror.units import KiB, MiB
from tests.support.fakes import GatedDevice
from tests.support.wire_client import WireClient

if TYPE_CHECKING:
    from pathlib import Path

# Turns of the loop in which all that was sent would have been received, were it read.
_LONG_ENOUGH: Final = 3000


@pytest.mark.parametrize(
    ("length", "count", "most"),
    [
        (512, 3 * MAX_IN_FLIGHT, MAX_IN_FLIGHT),
        (128 * KiB, 3 * MAX_IN_FLIGHT, MAX_IN_FLIGHT),
        (MiB, 40, MAX_BYTES_IN_FLIGHT // MiB),
        (8 * MiB, 20, budget.BYTES // (8 * MiB)),
        (40 * MiB, 5, 1),
    ],
)
async def test_no_more_than_so_many(sock_dir: Path, length: int, count: int, most: int) -> None:
    device = GatedDevice(64 * MiB)
    listener = Listener([listen_unix(str(sock_dir / "s"))], {"": Export("", device)})
    await listener.start()
    async with await WireClient.connect_unix(sock_dir / "s") as client:
        await client.open()

        async def write() -> None:
            for number in range(count):
                await client.request(c.CMD_WRITE, 0, payload=bytes(length), cookie=number)

        writing = asyncio.create_task(write())
        try:
            for finished in range(count):
                while len(device.calls) < min(finished + most, count):
                    await asyncio.sleep(0)
                for _ in range(10 if finished else _LONG_ENOUGH):
                    await asyncio.sleep(0)
                assert len(device.calls) <= finished + most, "the next has to wait for one of these"
                (await device.next()).finish()
            await writing
            assert {(await client.reply()).cookie for _ in range(count)} == set(range(count))
        finally:
            writing.cancel()
            releasing = asyncio.create_task(release(device))
            await listener.aclose()
            releasing.cancel()


async def release(device: GatedDevice) -> None:
    """Hold nothing any more."""
    while True:
        (await device.next()).finish()
