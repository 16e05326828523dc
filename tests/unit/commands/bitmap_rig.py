"""An inventory with disks whose writes a test holds, and the bitmap commands over it."""

from __future__ import annotations

from typing import Any

from nbdmirror.bitmap.dirty import DirtyBitmap
from nbdmirror.bitmap.named import NamedBitmap
from nbdmirror.commands.bitmap import BitmapCommands, bitmap_infos
from nbdmirror.commands.bitmap_actions import BitmapActions
from nbdmirror.commands.transaction import TransactionCommands
from nbdmirror.errors import NbdMirrorError, StateError
from nbdmirror.inventory import Inventory, Node
from nbdmirror.qmp.messages import Version
from nbdmirror.qmp.registry import Registry
from tests.support.fakes import GatedDevice, settled

CHUNK = 65536
SIZE = 64 * CHUNK


class Shelf:
    """A BitmapKeeper that keeps names. It takes its time over everything, and fails at what `broken` names."""

    def __init__(self) -> None:
        self.kept: list[str] = []
        self.settled: list[str] = []
        self.broken = ""

    async def create(self, node: Node, name: str, granularity: int, *, recording: bool) -> NamedBitmap:
        await self._work("create")
        bitmap = NamedBitmap(name, DirtyBitmap(node.device.size, granularity), recording=recording, persistent=True)
        node.bitmaps.add(bitmap)
        self.kept.append(name)
        return bitmap

    async def remove(self, bitmap: NamedBitmap) -> None:
        await self._work("remove")
        self.kept.remove(bitmap.name)

    async def settle(self, bitmap: NamedBitmap) -> None:
        await self._work("settle")
        self.settled.append(bitmap.name)

    async def load_all(self, node: Node) -> None:
        pass

    async def release(self, node: Node) -> None:
        pass

    async def _work(self, what: str) -> None:
        await settled()
        if what == self.broken:
            raise StateError("the shelf is broken")


class BitmapRig:
    """Two disks of one size and a smaller one."""

    def __init__(self) -> None:
        self.inventory = Inventory()
        self.shelf = Shelf()
        self.disks = {name: GatedDevice(size) for name, size in (("a", SIZE), ("b", SIZE), ("elsewhere", SIZE // 2))}
        for name, disk in self.disks.items():
            self.inventory.add_node(Node(name, "file", disk))
        self._registry = Registry(Version(10, 1, 0, "test"))
        self.inventory.keeper = self.shelf
        actions = BitmapActions(self.inventory)
        BitmapCommands(self.inventory, actions).register(self._registry)
        TransactionCommands(self.inventory, actions).register(self._registry)

    async def ask(self, command: str, **arguments: Any) -> Any:
        """A command's result; raises NbdMirrorError."""
        return await self._registry.dispatch(command, arguments)

    async def refused(self, command: str, **arguments: Any) -> str:
        """The error of a command."""
        try:
            await self.ask(command, **arguments)
        except NbdMirrorError as error:
            return str(error)
        raise AssertionError(f"{command} {arguments} was taken")

    async def bitmap(self, verb: str, name: str, node: str = "a", **arguments: Any) -> None:
        """A command about one bitmap."""
        await self.ask(f"block-dirty-bitmap-{verb}", node=node, name=name, **arguments)

    def mark(self, name: str, *chunks: int, node: str = "a") -> None:
        """As if these chunks had been written."""
        bits = self.inventory.bitmap(node, name)[1].bits
        for chunk in chunks:
            bits.add(chunk * CHUNK, 1)

    def chunks(self, name: str, node: str = "a") -> list[int]:
        """What is dirty."""
        bits = self.inventory.bitmap(node, name)[1].bits
        return [chunk for chunk in range(bits.chunks) if bits.is_dirty(chunk)]

    def state(self) -> Any:
        """Everything that can be seen of bitmaps."""
        return {
            name: [(info, self.chunks(info["name"], name)) for info in bitmap_infos(node)]
            for name, node in self.inventory.nodes.items()
        }
