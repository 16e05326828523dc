"""Nodes: blockdev-add, blockdev-del, query-block, query-named-block-nodes.

`discard` and `detect-zeroes` take one value each, so that scripts may name it: what a client trims is always passed on, and
what it writes is written. A node over another, driver raw, changes nothing of what is read and written: it is there because
scripts have one. Who adds it over a named node gives up using that one by itself.
"""

from __future__ import annotations

import errno
import stat
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from nbdmirror.commands.bitmap import bitmap_infos
from nbdmirror.devices.base import BlockDevice
from nbdmirror.devices.file import FileDevice
from nbdmirror.devices.nbd import NbdDevice
from nbdmirror.devices.nbd_link import LinkOptions
from nbdmirror.devices.uri import NbdEndpoint
from nbdmirror.errors import DeviceError, NbdMirrorError, StateError, UsageError
from nbdmirror.inventory import Inventory, Node
from nbdmirror.qmp.registry import Registry
from nbdmirror.qmp.schema import Named, Positive, UInt32

DEFAULT_CONNECTIONS: Final = 4
# Nobody there to talk to, as QEMU says it; what goes wrong after that has words of its own.
_UNREACHABLE: Final = frozenset((errno.ENOENT, errno.ECONNREFUSED, errno.EACCES))
# The bytes that stat(2) counts blocks in.
_STAT_BLOCK: Final = 512
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
    discard: Literal["unmap"] = "unmap"
    detect_zeroes: Literal["off"] = "off"


@dataclass(frozen=True, slots=True)
class HostDeviceOptions:
    """blockdev-add of a block device."""

    driver: Literal["host_device"]
    filename: str
    node_name: str | None = None
    read_only: bool = False
    discard: Literal["unmap"] = "unmap"
    detect_zeroes: Literal["off"] = "off"


@dataclass(frozen=True, slots=True)
class NbdOptions:
    """blockdev-add of an NBD export. Times in seconds; `x_request_timeout` 0: a server may be silent for ever."""

    driver: Literal["nbd"]
    server: UnixAddress | InetAddress
    export: str = ""
    node_name: str | None = None
    read_only: bool = False
    discard: Literal["unmap"] = "unmap"
    detect_zeroes: Literal["off"] = "off"
    tls_creds: str | None = None
    tls_hostname: str = ""
    reconnect_delay: UInt32 | None = None
    open_timeout: UInt32 = 0
    x_connections: Positive = DEFAULT_CONNECTIONS
    x_request_timeout: UInt32 = DEFAULT_REQUEST_TIMEOUT


@dataclass(frozen=True, slots=True)
class RawOptions:
    """blockdev-add of a node over another, which is named, or made here and belongs to it."""

    driver: Literal["raw"]
    file: Annotated[str | FileOptions | HostDeviceOptions | NbdOptions, Named("BlockdevRef")]
    node_name: str | None = None
    read_only: bool = False
    discard: Literal["unmap"] = "unmap"
    detect_zeroes: Literal["off"] = "off"


class BlockCommands:
    """Handlers about nodes."""

    def __init__(self, inventory: Inventory) -> None:
        self._inventory = inventory

    def register(self, registry: Registry) -> None:
        """Name the handlers."""
        registry.command("blockdev-add")(self.blockdev_add)
        registry.command("blockdev-del")(self.blockdev_del)
        registry.command("query-block")(self.query_block)
        registry.command("query-named-block-nodes")(self.query_named_block_nodes)

    async def blockdev_add(self, options: RawOptions | FileOptions | HostDeviceOptions | NbdOptions, /) -> None:
        """Open a disk and name it."""
        if options.node_name is None:
            raise StateError("'node-name' must be specified for the root node")
        self._inventory.check_node_name(options.node_name)
        if isinstance(options, RawOptions) and isinstance(options.file, str):
            child = self._inventory.node(options.file)
            if options.read_only and not child.is_read_only:
                raise StateError(f"Node {child.name} is writable, and so is what is over it; open it with 'read-only'")
            self._inventory.add_node(Node(options.node_name, options.driver, child.device, child=child))
            return
        disk = await self._open(options)
        node = Node(options.node_name, options.driver, disk, reconnect_seconds=_reconnect_seconds(options))
        try:
            await self._inventory.keeper.load_all(node)
            self._inventory.add_node(node)
        except NbdMirrorError:  # another client may have taken the name while the server was being connected to
            await self._inventory.keeper.release(node)
            await disk.aclose()
            raise

    async def blockdev_del(self, node_name: str) -> None:
        """Close a disk that nobody uses."""
        await self._inventory.remove_node(node_name)

    async def _open(self, options: RawOptions | FileOptions | HostDeviceOptions | NbdOptions) -> BlockDevice:
        read_only = options.read_only
        if isinstance(options, RawOptions):
            assert not isinstance(options.file, str), "nothing is opened below a named node"
            options = options.file
        read_only = read_only or options.read_only
        if isinstance(options, NbdOptions):
            return await self._open_nbd(options, read_only=read_only)
        if isinstance(options, HostDeviceOptions):
            _check_host_device(options.filename)
        try:
            return FileDevice.open(options.filename, read_only=read_only)
        except DeviceError as error:
            raise StateError(f"Could not open '{options.filename}': {error.reason}") from None

    async def _open_nbd(self, options: NbdOptions, *, read_only: bool) -> NbdDevice:
        endpoint, where = _endpoint(options)
        if options.tls_creds is not None:
            credentials = self._inventory.credentials(options.tls_creds)
            endpoint = replace(endpoint, tls=credentials.for_client(options.tls_hostname))
        link = LinkOptions(options.reconnect_delay or 0, options.open_timeout, options.x_request_timeout or None)
        try:
            return await NbdDevice.open(endpoint, connections=options.x_connections, read_only=read_only, link=link)
        except DeviceError as error:
            if error.errno in _UNREACHABLE:
                raise StateError(f"Failed to connect to '{where}': {error.reason}") from None
            raise
        except UsageError as error:
            raise StateError(str(error)) from None

    def query_block(self) -> list[dict[str, Any]]:
        """There is no machine that has devices: nothing."""
        return []

    def query_named_block_nodes(self, *, flat: bool = False) -> list[dict[str, Any]]:  # noqa: ARG002  no disk has backing files
        """Every node, newest first."""
        return [node_info(node) for node in reversed(self._inventory.nodes.values())]


def _reconnect_seconds(options: RawOptions | FileOptions | HostDeviceOptions | NbdOptions) -> float | None:
    inner = options.file if isinstance(options, RawOptions) else options
    return inner.reconnect_delay if isinstance(inner, NbdOptions) else None


def _endpoint(options: NbdOptions) -> tuple[NbdEndpoint, str]:
    """Where the export is, and where the server is in QEMU's words."""
    server = options.server
    try:
        if isinstance(server, UnixAddress):
            return NbdEndpoint.unix(server.path, options.export), server.path
        if not (server.port.isdecimal() and server.port.isascii()):
            reason = "Servname not supported for ai_socktype"
            raise StateError(f"address resolution failed for {server.host}:{server.port}: {reason}")
        return NbdEndpoint.tcp(server.host, int(server.port), options.export), f"{server.host}:{server.port}"
    except UsageError as error:
        raise StateError(str(error)) from None


def _check_host_device(path: str) -> None:
    try:
        mode = Path(path).stat().st_mode
    except OSError:
        return  # opening it says what is wrong
    if not stat.S_ISBLK(mode):
        raise StateError(f"'host_device' driver requires '{path}' to be either a character or block device")


def node_info(node: Node) -> dict[str, Any]:
    """A node as queries tell of it (QMP reference, "BlockDeviceInfo"); what raw disks do not have is off or zero."""
    name = _disk_of(node).name
    image = {"filename": name, "format": node.driver, "virtual-size": node.device.size, "dirty-flag": False}
    allocated = _allocated(_disk_of(node))
    if allocated is not None:
        image["actual-size"] = allocated
    info: dict[str, Any] = {
        "node-name": node.name,
        "drv": node.driver,
        "file": name,
        "ro": node.is_read_only,
        "image": image,
        "backing_file_depth": 0,
        "cache": {"writeback": True, "direct": False, "no-flush": False},
        "detect_zeroes": "off",
        "encrypted": False,
        "write_threshold": 0,
        **dict.fromkeys(("bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr"), 0),
    }
    bitmaps = bitmap_infos(node)
    return {**info, "dirty-bitmaps": bitmaps} if bitmaps else info


def _disk_of(node: Node) -> BlockDevice:
    """The disk itself, whatever is over it."""
    return node.disk if node.child is None else _disk_of(node.child)


def _allocated(disk: BlockDevice) -> int | None:
    """The bytes that a file takes; None for what is no file."""
    if not isinstance(disk, FileDevice):
        return None
    try:
        return Path(disk.name).stat().st_blocks * _STAT_BLOCK
    except OSError:  # removed, and still open
        return None
