"""Disks: those that `serve` was told of, each with its node and its export; they may be others from one reload to the next.

Rules:
1. All new disks are open before anything changes; if one can't be opened, nothing does. That may take its time, so what is in
   use is asked again before an export is hidden, and a disk is closed when nobody can find it any more.
2. What is in use stays as it is, with a warning: an export that has clients or requests in flight, a disk that a job works on.
3. A disk is open once: of two nodes over one file neither would see the other's writes, and a mirror of it would miss them.
"""

from __future__ import annotations

import itertools
import logging
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from nbdmirror.commands.export import SERVED_EXPORT
from nbdmirror.devices.file import FileDevice
from nbdmirror.devices.open import open_device
from nbdmirror.errors import DeviceError, NbdMirrorError, UsageError
from nbdmirror.inventory import Inventory, LiveBitmaps, Node
from nbdmirror.server.export import Export
from nbdmirror.server.nbd_server import BlockExport

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from nbdmirror.devices.base import BlockDevice
    from nbdmirror.serving import DiskOptions

_log: Final = logging.getLogger(__name__)


class Disks:
    """The disks of a daemon. `exports` is what clients may ask for, by name."""

    def __init__(self, inventory: Inventory) -> None:
        self.exports: dict[str, Export] = {}
        self._inventory = inventory
        self._served: dict[str, DiskOptions] = {}

    async def serve(self, wanted: Sequence[DiskOptions]) -> None:
        """Serve these disks, and no others any more; raises NbdMirrorError where that can't be (rule 1)."""
        names = {options.export_name: options for options in wanted}
        leaving = [each for name, each in self._served.items() if _differ(each, names.get(name)) and not self._is_kept(each)]
        staying = self._served.keys() - {each.export_name for each in leaving}
        new = [options for options in wanted if options.export_name not in staying]
        async with AsyncExitStack() as opened:
            disks = []
            for options in new:
                disks.append(await open_device(options.disk, read_only=options.read_only))
                opened.push_async_callback(disks[-1].aclose)
            self._check(leaving, new, disks)
            for disk in disks:
                if not any(_is_one_disk(disk, node.disk) for node in self._inventory.nodes.values()):
                    await disk.lock()
            opened.pop_all()
        # Meanwhile clients may have come; from here to where the exports are hidden nothing waits.
        nodes = [node for each in leaving if not self._is_kept(each) for node in self._hide(each)]
        for node in nodes:
            await self._close(node)
        for options, disk in zip(new, disks, strict=True):
            if options.export_name in self.exports or not await self._add(options, disk):
                await disk.aclose()
        for name in self.exports.keys() & names.keys():
            self.exports[name].description = names[name].description

    def would_change(self, wanted: Sequence[DiskOptions]) -> bool:
        """Whether `serve` would open or close a disk for these."""
        names = {options.export_name: options for options in wanted}
        return names.keys() != self._served.keys() or any(_differ(each, names[name]) for name, each in self._served.items())

    # --- steps -----------------------------------------------------------------------------------------------------

    def _check(self, leaving: Sequence[DiskOptions], new: Sequence[DiskOptions], disks: Sequence[BlockDevice]) -> None:
        """Raises NbdMirrorError where a name or a disk is taken (rule 3)."""
        gone = {node.name for options in leaving for node in self._nodes_of(options)}
        open_already = {name: node.disk for name, node in self._inventory.nodes.items() if name not in gone}
        for options, disk in zip(new, disks, strict=True):
            if options.node_name not in gone:
                self._inventory.check_node_name(options.node_name)
            _check_closed(disk, open_already)
            open_already[options.node_name] = disk

    async def _add(self, options: DiskOptions, disk: BlockDevice) -> bool:
        """Enter a disk that was checked; False where somebody, here or at the control socket, has been faster."""
        try:
            await disk.lock()  # once more: one that was open until now could not be locked before
            _check_closed(disk, {name: node.disk for name, node in self._inventory.nodes.items()})
            node = self._inventory.add_node(Node(options.node_name, _driver_of(disk), disk))
        except NbdMirrorError as error:
            _log.error("export '%s' is not there: %s", options.export_name, error)
            return False
        export = Export(
            options.export_name,
            node.device,
            description=options.description,
            read_only=options.read_only,
            bitmaps=LiveBitmaps(self._inventory, node.device),
        )
        self.exports[export.name] = export
        export_id = self._free_id(export.name)
        self._inventory.exports[export_id] = BlockExport(export_id, export, "")
        self._served[export.name] = options
        return True

    def _free_id(self, name: str) -> str:
        """The id of the next export: that which everybody knows for the first, then its name, as far as nobody has it."""
        taken = self._inventory.exports
        ids = itertools.chain((SERVED_EXPORT, name), (f"{name}#{number}" for number in itertools.count(2)))
        return next(each for each in ids if each and each not in taken)

    def _is_kept(self, options: DiskOptions) -> bool:
        """Whether a disk that is not wanted any more is in use (rule 2)."""
        export, nodes = self.exports[options.export_name], self._nodes_of(options)
        users = set[str]().union(*(node.users for node in nodes))
        users.update(f"export '{each.id}'" for node in nodes for each in self._inventory.exports_of(node) if each.server)
        clients = len(export.sessions)
        if clients:
            users.add(f"{clients} clients" if clients > 1 else "a client")
        elif export.tally.in_flight:
            users.add("requests of a client that has gone")
        if users:
            _log.warning("export '%s' stays as it is: in use by %s", options.export_name, ", ".join(sorted(users)))
        return bool(users)

    def _nodes_of(self, options: DiskOptions) -> list[Node]:
        """The node that the export is made from, and, after a pivot, the one that it was made from."""
        export, nodes = self.exports[options.export_name], self._inventory.nodes
        found = {node.name: node for node in (self._inventory.node_of(export.device), nodes.get(options.node_name)) if node}
        return list(found.values())

    def _hide(self, options: DiskOptions) -> list[Node]:
        """Let nobody find the export any more; returns the nodes that are to be closed."""
        nodes = self._nodes_of(options)
        export = self.exports.pop(options.export_name)
        for each in [each for each in self._inventory.exports.values() if each.export is export]:
            del self._inventory.exports[each.id]
        del self._served[options.export_name]
        return nodes

    async def _close(self, node: Node) -> None:
        try:
            if not node.is_read_only:
                await node.disk.flush()
            await self._inventory.remove_node(node.name)
        except DeviceError as error:
            _log.error("what was written last may not be durable: %s", error)
        except NbdMirrorError as error:  # somebody came for it meanwhile
            _log.warning("%s", error)


def _differ(served: DiskOptions, wanted: DiskOptions | None) -> bool:
    """Whether the one would have to be opened anew to be the other."""
    return wanted is None or replace(served, description="") != replace(wanted, description="")


def _check_closed(disk: BlockDevice, open_already: Mapping[str, BlockDevice]) -> None:
    """Raises UsageError where the disk is open under another name."""
    for name, other in open_already.items():
        if _is_one_disk(other, disk):
            raise UsageError(f"'{disk.name}' is open already, as node '{name}'")


def _is_one_disk(one: BlockDevice, other: BlockDevice) -> bool:
    if not isinstance(one, FileDevice) or not isinstance(other, FileDevice):
        return one.name == other.name
    try:
        return Path(one.name).samefile(other.name)
    except OSError:
        return False


def _driver_of(disk: BlockDevice) -> str:
    if not isinstance(disk, FileDevice):
        return "nbd"
    return "host_device" if disk.is_block else "file"
