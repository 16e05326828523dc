"""Nodes and exports: blockdev-add, blockdev-del, query-named-block-nodes, query-block-exports."""

from __future__ import annotations

import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from nbdmirror.devices.file import FileDevice
from nbdmirror.devices.nbd import NbdDevice
from nbdmirror.devices.nbd_link import LinkOptions
from nbdmirror.devices.uri import NbdEndpoint
from nbdmirror.errors import StateError
from nbdmirror.inventory import Inventory, Node
from nbdmirror.qmp.registry import Registry
from nbdmirror.qmp.schema import Positive, UInt32

DEFAULT_CONNECTIONS: Final = 4
# Seconds without any sign of life after which a target's server counts as lost: long for a disk, and short of the 30 s after
# which guests give theirs up. Where it has to wait for its disk, it has ten times as long.
DEFAULT_REQUEST_TIMEOUT: Final = 10


@dataclass(frozen=True, slots=True)
class UnixAddress:
    """QEMU's SocketAddress, type unix."""

    type_: Literal["unix"]
    path: str


@dataclass(frozen=True, slots=True)
class InetAddress:
    """QEMU's SocketAddress, type inet: the port is text there."""

    type_: Literal["inet"]
    host: str
    port: str


@dataclass(frozen=True, slots=True)
class FileOptions:
    """blockdev-add of a raw file."""

    driver: Literal["file"]
    filename: str
    node_name: str | None = None
    read_only: bool = False


@dataclass(frozen=True, slots=True)
class HostDeviceOptions:
    """blockdev-add of a block device."""

    driver: Literal["host_device"]
    filename: str
    node_name: str | None = None
    read_only: bool = False


@dataclass(frozen=True, slots=True)
class NbdOptions:
    """blockdev-add of an NBD export. Times in seconds; `x_request_timeout` 0: a server may be silent for ever."""

    driver: Literal["nbd"]
    server: UnixAddress | InetAddress
    export: str = ""
    node_name: str | None = None
    read_only: bool = False
    reconnect_delay: UInt32 | None = None
    open_timeout: UInt32 = 0
    x_connections: Positive = DEFAULT_CONNECTIONS
    x_request_timeout: UInt32 = DEFAULT_REQUEST_TIMEOUT


class BlockCommands:
    """Handlers about nodes and exports."""

    def __init__(self, inventory: Inventory) -> None:
        self._inventory = inventory

    def register(self, registry: Registry) -> None:
        """Name the handlers."""
        registry.command("blockdev-add")(self.blockdev_add)
        registry.command("blockdev-del")(self.blockdev_del)
        registry.command("query-named-block-nodes")(self.query_named_block_nodes)
        registry.command("query-block-exports")(self.query_block_exports)

    async def blockdev_add(self, options: FileOptions | HostDeviceOptions | NbdOptions, /) -> None:
        """Open a disk and name it."""
        if options.node_name is None:
            raise StateError("'node-name' must be specified for the root node")
        self._inventory.check_node_name(options.node_name)
        disk: FileDevice | NbdDevice
        reconnect = None
        if isinstance(options, NbdOptions):
            disk, reconnect = await _open_nbd(options), options.reconnect_delay
        else:
            if isinstance(options, HostDeviceOptions):
                _check_host_device(options.filename)
            disk = FileDevice.open(options.filename, read_only=options.read_only)
        try:
            self._inventory.add_node(Node(options.node_name, options.driver, disk, reconnect_seconds=reconnect))
        except StateError:  # another client took the name while the server was being connected to
            await disk.aclose()
            raise

    async def blockdev_del(self, node_name: str) -> None:
        """Close a disk that nobody uses."""
        await self._inventory.remove_node(node_name)

    def query_named_block_nodes(self, *, flat: bool = False) -> list[dict[str, Any]]:  # noqa: ARG002  nothing is nested here
        """Every node, as far as raw disks have what QEMU tells of nodes."""
        return [
            {
                "node-name": node.name,
                "drv": node.driver,
                "file": node.disk.name,
                "ro": node.is_read_only,
                "image": {"filename": node.disk.name, "format": node.driver, "virtual-size": node.disk.size},
            }
            for node in self._inventory.nodes.values()
        ]

    def query_block_exports(self) -> list[dict[str, Any]]:
        """Every export, newest first."""
        exports = []
        for name, export in reversed(self._inventory.exports.items()):
            node = self._inventory.node_of(export)
            exports.append(
                {
                    "id": name or "default",
                    "type": "nbd",
                    "node-name": node.name if node else "",
                    "shutting-down": False,
                    "x-name": name,
                    "x-clients": export.clients,
                    "x-read-only": export.read_only,
                }
            )
        return exports


async def _open_nbd(options: NbdOptions) -> NbdDevice:
    server = options.server
    if isinstance(server, UnixAddress):
        endpoint = NbdEndpoint.unix(server.path, options.export)
    else:
        if not server.port.isdecimal():
            raise StateError(f"'{server.port}' is not a port number")
        endpoint = NbdEndpoint.tcp(server.host, int(server.port), options.export)
    link = LinkOptions(options.reconnect_delay or 0, options.open_timeout, options.x_request_timeout or None)
    return await NbdDevice.open(endpoint, connections=options.x_connections, read_only=options.read_only, link=link)


def _check_host_device(path: str) -> None:
    try:
        mode = Path(path).stat().st_mode
    except OSError:
        return  # opening it says what is wrong
    if not stat.S_ISBLK(mode):
        raise StateError(f"'host_device' driver requires '{path}' to be either a character or block device")
