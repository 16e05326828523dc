"""Exports: block-export-add, block-export-del, query-block-exports, and the older nbd-server-add and nbd-server-remove.

Rules:
1. Everything is checked before anything is done, in QEMU's order; an export appears whole or not at all.
2. A deletion is answered at once. BLOCK_EXPORT_DELETED comes when nothing of the export is in flight any more; until then it
   is listed as shutting down.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, Final, Literal

from nbdmirror.bitmap.named import NamedBitmap
from nbdmirror.commands.bitmap_actions import BitmapName, BitmapOrName
from nbdmirror.errors import NotFoundError, StateError
from nbdmirror.inventory import Inventory, Node
from nbdmirror.jobs.job import Emit
from nbdmirror.qmp.registry import Registry
from nbdmirror.server.export import Export
from nbdmirror.server.nbd_server import BlockExport, NbdServer
from nbdmirror.server.session import Session

Mode = Literal["safe", "hard"]

_log: Final = logging.getLogger(__name__)

# A little longer than a listener gives its clients' requests.
_CLOSE_SECONDS: Final = 35.0
# The id of the export that `serve` was started with.
SERVED_EXPORT: Final = "default"
_ID: Final = re.compile(r"[A-Za-z][A-Za-z0-9._-]*")


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """Arguments of block-export-add."""

    type_: Literal["nbd"]
    id_: str
    node_name: str
    name: str | None = None
    description: str = ""
    writable: bool = False
    writethrough: bool = False
    bitmaps: tuple[BitmapOrName, ...] = ()
    allocation_depth: bool = False


class ExportCommands:
    """Handlers about exports."""

    def __init__(self, inventory: Inventory, emit: Emit) -> None:
        self._inventory = inventory
        self._emit = emit
        self._deletions: set[asyncio.Task[None]] = set()

    def register(self, registry: Registry) -> None:
        """Name the handlers."""
        registry.command("block-export-add")(self.block_export_add)
        registry.command("block-export-del")(self.block_export_del)
        registry.command("query-block-exports")(self.query_block_exports)
        registry.command("nbd-server-add")(self.nbd_server_add)
        registry.command("nbd-server-remove")(self.nbd_server_remove)

    # --- adding ----------------------------------------------------------------------------------------------------

    def block_export_add(self, options: ExportOptions, /) -> None:
        """Offer a node on the NBD server."""
        if not _ID.fullmatch(options.id_):
            raise StateError("Invalid block export id")
        if options.id_ in self._inventory.exports:
            raise StateError(f"Block export id '{options.id_}' is already in use")
        node = self._inventory.nodes.get(options.node_name)
        if node is None:
            raise NotFoundError(f"Cannot find device='' nor node-name='{options.node_name}'")
        if options.writable and node.is_read_only:
            raise StateError("Cannot export read-only node as writable")
        self._inventory.check_exportable(node, writable=options.writable)
        server = self._inventory.nbd_server
        if server is None:
            raise StateError("NBD server not running")
        name = options.node_name if options.name is None else options.name
        server.check_offer(name, options.description)
        bitmaps = self._bitmaps(node, options)
        self._offer(server, node, name, options).show(bitmaps)

    def _offer(self, server: NbdServer, node: Node, name: str, options: ExportOptions) -> BlockExport:
        export = Export(
            name,
            node.device,
            description=options.description,
            read_only=not options.writable,
            multi_conn=server.multi_conn,
            allocation_depth=options.allocation_depth,
            writethrough=options.writethrough,
        )
        server.exports[name] = export
        uri = server.uri(name)
        self._inventory.own_uris.add(uri)
        added = self._inventory.exports[options.id_] = BlockExport(options.id_, export, uri, server)
        return added

    def _bitmaps(self, node: Node, options: ExportOptions) -> list[NamedBitmap]:
        found: dict[str, NamedBitmap] = {}
        for wanted in options.bitmaps:
            bitmap = self._bitmap(node, wanted, writable=options.writable)
            bitmap.check_usable()
            if bitmap.bits.size != node.device.size:
                raise StateError(f"Bitmap '{bitmap.name}' is of a disk of {bitmap.bits.size} bytes, not {node.device.size}")
            if bitmap.name in found:
                raise StateError(f"Bitmap '{bitmap.name}' is named twice: clients could not tell one from the other")
            found[bitmap.name] = bitmap
        return list(found.values())

    def _bitmap(self, node: Node, wanted: str | BitmapName, *, writable: bool) -> NamedBitmap:
        if isinstance(wanted, BitmapName):
            return self._inventory.bitmap(wanted.node, wanted.name)[1]
        bitmap = node.bitmaps.get(wanted)
        if bitmap is None and node.child is not None:
            bitmap = node.child.bitmaps.get(wanted)
        if bitmap is None:
            raise NotFoundError(f"Bitmap '{wanted}' is not found")
        if bitmap.recording and not writable and not node.is_read_only:
            raise StateError(f"Enabled bitmap '{wanted}' incompatible with readonly export")
        return bitmap

    def nbd_server_add(
        self, device: str, name: str | None = None, description: str = "", *, writable: bool = False, bitmap: str | None = None
    ) -> None:
        """The older form of block-export-add: the name is the id, too, and what is read-only is exported so without asking."""
        node = self._inventory.node(device)
        name = device if name is None else name
        self.block_export_add(
            ExportOptions(
                "nbd",
                name,
                node.name,
                name,
                description,
                writable=writable and not node.is_read_only,
                bitmaps=() if bitmap is None else (bitmap,),
            )
        )

    # --- deleting --------------------------------------------------------------------------------------------------

    def block_export_del(self, id_: str, mode: Mode = "safe") -> None:
        """Delete an export, in mode safe only if nobody is connected to it."""
        export = self._inventory.exports.get(id_)
        if export is None:
            raise NotFoundError(f"Export '{id_}' is not found")
        if export.shutting_down:
            raise StateError(f"Export '{id_}' is already shutting down")
        if export.server is None:
            raise StateError(f"Export '{id_}' is the one that the daemon was started with; it ends with the daemon")
        if mode == "safe" and export.export.sessions:
            raise StateError(f"export '{id_}' still in use")
        self._begin(self._finish(export, export.disconnect()))

    def nbd_server_remove(self, name: str, mode: Mode = "safe") -> None:
        """The older form of block-export-del."""
        self.block_export_del(name, mode)

    async def _finish(self, export: BlockExport, sessions: list[Session]) -> None:
        for session in sessions:
            await session.wait_idle()
        self._forget(export)

    def _forget(self, export: BlockExport) -> None:
        export.release_bitmaps()
        del self._inventory.exports[export.id]
        self._inventory.own_uris.discard(export.uri)
        self._emit("BLOCK_EXPORT_DELETED", {"id": export.id})

    def _begin(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        """What has begun is finished, also where the client that asked for it has gone."""
        task = asyncio.get_running_loop().create_task(work)
        self._deletions.add(task)
        task.add_done_callback(self._deletions.discard)
        return task

    async def close_server(self, server: NbdServer) -> None:
        """End the NBD server with all its exports, newest first."""
        await asyncio.shield(self._begin(self._close_server(server)))

    async def _close_server(self, server: NbdServer) -> None:
        others = set(self._deletions) - {asyncio.current_task()}
        mine = [each for each in reversed(self._inventory.exports.values()) if each.server is server and not each.shutting_down]
        for export in mine:
            export.shutting_down = True
        await server.aclose()
        await asyncio.gather(*others)
        for export in mine:
            self._forget(export)

    async def aclose(self) -> None:
        """End the NBD server, if there is one, and wait for what is being deleted: the disks are closed next."""
        server, self._inventory.nbd_server = self._inventory.nbd_server, None
        if server is not None:
            self._begin(self._close_server(server))
        if self._deletions:
            _, late = await asyncio.wait(self._deletions, timeout=_CLOSE_SECONDS)
            for task in late:
                task.cancel()
                _log.error("requests of an export that was deleted did not finish within %.0f s", _CLOSE_SECONDS)

    # --- asking ----------------------------------------------------------------------------------------------------

    def query_block_exports(self) -> list[dict[str, Any]]:
        """Every export, newest first."""
        return [self._info(export) for export in reversed(self._inventory.exports.values())]

    def _info(self, each: BlockExport) -> dict[str, Any]:
        export = each.export
        node = self._inventory.node_of(export.device)
        return {
            "id": each.id,
            "type": "nbd",
            "node-name": node.name if node else "",
            "shutting-down": each.shutting_down,
            "x-name": export.name,
            "x-uri": each.uri,
            "x-clients": len(export.sessions),
            "x-read-only": export.read_only,
            "x-bitmaps": list(export.bitmaps),
        }
