"""Large requests share a budget over all connections: they wait for it, get it back, and nobody can sit on it."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

import pytest

from nbdmirror.devices.memory import MemoryDevice
from nbdmirror.protocol import constants as c
from nbdmirror.server.budget import LARGE, Budget
from nbdmirror.server.export import Export
from nbdmirror.server.listener import Listener
from nbdmirror.server.shared import Shared
from nbdmirror.units import KiB, MiB
from tests.support import wire_client as wire
from tests.support.tools import pattern
from tests.support.wire_client import WireClient

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

LENGTH: Final = 3 * MiB
TOTAL: Final = 2 * LENGTH
CLIENTS: Final = 6
_MORE_THAN_THE_SOCKET_HOLDS: Final = 36 * MiB
CONTENT: Final = pattern(CLIENTS * LENGTH)


class Watched(Budget):
    """A budget that knows how much of it was ever spent at a time."""

    most = 0

    def _grant(self, *args: object) -> None:
        super()._grant(*args)  # type: ignore[arg-type]
        self.most = max(self.most, self.spent)


@asynccontextmanager
async def listening(directory: Path, device: MemoryDevice, patience: float = 60.0) -> AsyncIterator[tuple[str, Watched]]:
    path = str(directory / "s")
    listener = Listener.unix(path, {"": Export("", device)})
    budget = Watched(TOTAL, patience)
    listener._shared = Shared(budget=budget)
    await listener.start()
    try:
        yield path, budget
    finally:
        await listener.aclose()
    assert budget.spent == 0
    assert 0 < budget.most <= TOTAL


async def connect(path: str) -> WireClient:
    client = await WireClient.connect_unix(path)
    await client.open()
    return client


def disk() -> MemoryDevice:
    device = MemoryDevice(len(CONTENT))
    assert device.pwrite_now(CONTENT, 0)
    return device


async def until_spent(budget: Budget, amount: int) -> None:
    async with asyncio.timeout(10):
        while budget.spent != amount:
            await asyncio.sleep(0)


@pytest.mark.parametrize("per_client", [1, 10])
async def test_reads_of_many_clients_wait_and_are_all_answered(sock_dir: Path, per_client: int) -> None:
    async with listening(sock_dir, disk()) as (path, budget):
        clients = [await connect(path) for _ in range(CLIENTS)]
        for number, client in enumerate(clients):
            for cookie in range(per_client):
                await client.request(c.CMD_READ, number * LENGTH, LENGTH, cookie=cookie)
        await until_spent(budget, TOTAL)

        async def take(number: int, client: WireClient) -> None:
            for _ in range(per_client):
                assert (await client.reply()).data == CONTENT[number * LENGTH : (number + 1) * LENGTH]

        await asyncio.gather(*(take(number, client) for number, client in enumerate(clients)))
        for client in clients:
            await client.aclose()


async def test_writes_of_many_clients_wait_and_all_arrive(sock_dir: Path) -> None:
    device = MemoryDevice(len(CONTENT))
    async with listening(sock_dir, device) as (path, _):

        async def write(number: int) -> None:
            async with await connect(path) as client:
                offset = number * LENGTH
                reply = await client.ask(c.CMD_WRITE, offset, payload=CONTENT[offset : offset + LENGTH])
                assert not reply.error

        await asyncio.gather(*(write(number) for number in range(CLIENTS)))
    found = bytearray(len(CONTENT))
    assert device.pread_now(found, 0)
    assert found == CONTENT


async def test_refused_and_vanished_ones_give_it_back(sock_dir: Path) -> None:
    async with listening(sock_dir, disk()) as (path, budget):
        async with await connect(path) as client:
            for _ in range(3):
                reply = await client.ask(c.CMD_WRITE, len(CONTENT) - 512, payload=bytes(LENGTH))
                assert reply.error == c.ENOSPC
        for sent in (0, 1, LENGTH - 1):
            client = await connect(path)
            await client.send(wire.request(c.CMD_WRITE, 0, LENGTH) + bytes(sent))
            await until_spent(budget, LENGTH)
            client.abort()
            await client.aclose()
            await until_spent(budget, 0)
        client = await connect(path)
        for cookie in range(4):
            await client.request(c.CMD_READ, 0, LENGTH, cookie=cookie)
        await until_spent(budget, TOTAL)
        client.abort()
        await client.aclose()
        await until_spent(budget, 0)


async def test_small_requests_never_wait_for_it(sock_dir: Path) -> None:
    async with listening(sock_dir, disk()) as (path, budget):
        greedy = await connect(path)
        for cookie in range(4):
            await greedy.request(c.CMD_READ, 0, LENGTH, cookie=cookie)
        await until_spent(budget, TOTAL)
        async with await connect(path) as client:
            assert (await client.ask(c.CMD_READ, 0, LARGE)).data == CONTENT[:LARGE]
            assert not (await client.ask(c.CMD_WRITE, 0, payload=CONTENT[:LARGE])).error
        await greedy.aclose()


@pytest.mark.parametrize("how", ["reads nothing", "sends nothing more"])
async def test_who_sits_on_it_while_others_wait_is_dropped(sock_dir: Path, how: str) -> None:
    async with listening(sock_dir, disk(), patience=0.2) as (path, budget):
        idlers = [await connect(path) for _ in range(2)]
        for idler in idlers:
            if how == "reads nothing":
                for cookie in range(_MORE_THAN_THE_SOCKET_HOLDS // LENGTH):
                    await idler.request(c.CMD_READ, 0, LENGTH, cookie=cookie)
            else:
                await idler.send(wire.request(c.CMD_WRITE, 0, LENGTH) + bytes(64 * KiB))
        await until_spent(budget, TOTAL)
        async with await connect(path) as client:
            assert (await client.ask(c.CMD_READ, LENGTH, LENGTH)).data == CONTENT[LENGTH : 2 * LENGTH]
        for idler in idlers:
            assert len(await idler.read_until_closed()) < _MORE_THAN_THE_SOCKET_HOLDS
            await idler.aclose()
