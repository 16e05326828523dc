"""The rule that matters: what a flush has covered is on the disk, whatever happened to the server and the link before it.

The server has a volatile cache (nbdkit's cache filter, writing back): killed, it forgets what was not flushed. The owner keeps
the promise of `Link.acknowledge_loss`: what was not flushed is written again.
"""

from __future__ import annotations

import asyncio
import random
from contextlib import ExitStack
from typing import TYPE_CHECKING, Final

import pytest

from nbdmirror.devices.nbd import NbdDevice
from nbdmirror.devices.nbd_link import LinkOptions
from nbdmirror.errors import DeviceError
from tests.support import peers
from tests.support.failing import BOUND
from tests.support.relay import Relay
from tests.support.tools import content, make_disk

if TYPE_CHECKING:
    from collections.abc import Awaitable
    from pathlib import Path

pytest.importorskip("nbd", reason="libnbd's Python binding is not installed")

BLOCK: Final = 4096
BLOCKS: Final = 64
WRITERS: Final = 4


class Owner:
    """Writes to blocks of its own, and knows of each what it wrote last and whether that is flushed."""

    def __init__(self, device: NbdDevice, chance: random.Random) -> None:
        self.device = device
        self.chance = chance
        self.written: dict[int, bytes] = {}
        self.unflushed: set[int] = set()
        self.flushing: set[int] = set()
        self.to_repeat: set[int] = set()
        device.link.on_lost = self.lost

    def lost(self) -> None:
        """Before anybody else hears of it: all that is not flushed has to be written again."""
        self.to_repeat |= self.unflushed | self.flushing
        self.device.link.acknowledge_loss()

    async def write(self, block: int, data: bytes) -> None:
        self.written[block] = data
        self.unflushed.add(block)
        self.to_repeat.discard(block)
        try:
            await self.device.pwrite(data, block * BLOCK)
        except DeviceError:
            self.to_repeat.add(block)

    async def work(self, writer: int) -> None:
        """A while of writing, on blocks that no other writer has: what is in flight twice has no order."""
        for _ in range(30):
            mine = [block for block in sorted(self.to_repeat) if block % WRITERS == writer]
            block = mine[0] if mine else self.chance.randrange(writer, BLOCKS, WRITERS)
            await self.write(block, self.written[block] if mine else self.chance.randbytes(BLOCK))

    async def flush(self) -> None:
        """Until everything written is flushed."""
        while self.unflushed or self.to_repeat:
            for block in sorted(self.to_repeat):
                await self.write(block, self.written[block])
            if self.to_repeat:
                continue
            self.flushing, self.unflushed = self.unflushed, set()
            try:
                await self.device.flush()
            except DeviceError:
                self.to_repeat |= self.flushing
            self.unflushed |= self.flushing & self.to_repeat
            self.flushing = set()


@pytest.mark.parametrize("seed", range(3))
async def test_what_was_flushed_survives_servers_that_are_killed_and_links_that_are_cut(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    disk = make_disk(tmp_path / "disk", BLOCK * BLOCKS)
    with ExitStack() as servers:

        def serve(after: peers.Peer | None = None) -> peers.Peer:
            return servers.enter_context(peers.nbdkit("file", str(disk), "cache=writeback", filters=["cache"], after=after))

        async def carried_out(*works: Awaitable[None]) -> None:
            """Keep a server running: nbdkits have been seen to abort when a connection breaks with replies pending."""
            nonlocal peer
            pending = {asyncio.ensure_future(work) for work in works}
            async with asyncio.timeout(BOUND):
                while pending:
                    done, pending = await asyncio.wait(pending, timeout=0.05)
                    for task in done:
                        task.result()
                    if peer.wait(0):
                        peer = serve(peer)

        peer = serve()
        relay = servers.enter_context(Relay(peer.endpoint))
        device = await NbdDevice.open(relay.endpoint, connections=3, link=LinkOptions(reconnect_delay=BOUND))
        owner = Owner(device, chance)
        for _ in range(12):
            works = [asyncio.ensure_future(owner.work(writer)) for writer in range(WRITERS)]
            await asyncio.wait(works, timeout=chance.random() * 0.02)
            match chance.choice(["kill", "kill", "cut", "nothing"]):
                case "kill":
                    peer.kill()
                case "cut":
                    relay.cut()
            await carried_out(*works)
            if relay.count and chance.random() < 0.3:
                relay.cut(0)  # now that nothing is in flight: a server that lives may be late with what was
            if chance.random() < 0.5:
                await carried_out(owner.flush())
        await carried_out(owner.flush())
        assert device.link.losses
        peer.kill()
        for block, data in owner.written.items():
            assert content(disk, block * BLOCK, BLOCK) == data, f"block {block}"
        await device.aclose()
