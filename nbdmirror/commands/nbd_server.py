"""The NBD server for exports that are made while the daemon runs: nbd-server-start and nbd-server-stop.

It is one more listener beside that of `serve`, with its own address, TLS and exports: `serve`'s export is not on it, and
nbd-server-stop does not end that.
"""

from __future__ import annotations

import asyncio
import socket
from dataclasses import dataclass
from typing import Any, Literal

from nbdmirror.commands.export import ExportCommands
from nbdmirror.errors import ListenError, StateError, UsageError
from nbdmirror.inventory import Inventory
from nbdmirror.qmp.registry import Registry
from nbdmirror.qmp.schema import UInt32
from nbdmirror.server.nbd_server import NbdServer
from nbdmirror.server.tls import NO_TLS, Tls


@dataclass(frozen=True, slots=True)
class UnixPath:
    """Where a Unix socket is."""

    path: str


@dataclass(frozen=True, slots=True)
class InetPort:
    """A host and a port, which is text."""

    host: str
    port: str


@dataclass(frozen=True, slots=True)
class UnixListen:
    """QEMU's SocketAddressLegacy, type unix."""

    type_: Literal["unix"]
    data: UnixPath


@dataclass(frozen=True, slots=True)
class InetListen:
    """QEMU's SocketAddressLegacy, type inet."""

    type_: Literal["inet"]
    data: InetPort


class NbdServerCommands:
    """Handlers about the NBD server."""

    def __init__(self, inventory: Inventory, exports: ExportCommands) -> None:
        self._inventory = inventory
        self._exports = exports

    def register(self, registry: Registry) -> None:
        """Name the handlers."""
        registry.command("nbd-server-start")(self.nbd_server_start)
        registry.command("nbd-server-stop")(self.nbd_server_stop)
        registry.command("x-nbdmirror-query-nbd-server")(self.query_nbd_server)

    async def nbd_server_start(
        self,
        addr: UnixListen | InetListen,
        *,
        tls_creds: str | None = None,
        max_connections: UInt32 = 100,
        handshake_max_seconds: UInt32 = 10,
    ) -> None:
        """Listen for clients of the exports of block-export-add."""
        self._check_stopped()
        tls = NO_TLS if tls_creds is None else self._tls(tls_creds)
        address = await _address_of(addr)
        self._check_stopped()  # another client may have started one meanwhile
        server = self._inventory.nbd_server = _listen(address, tls, max_connections, handshake_max_seconds)
        await server.start()

    def _check_stopped(self) -> None:
        if self._inventory.nbd_server is not None:
            raise StateError("NBD server already running")

    def _tls(self, name: str) -> Tls:
        credentials = self._inventory.credentials(name)
        if credentials.tls is None:
            raise StateError("Expected TLS credentials for a server endpoint")
        return credentials.tls

    async def nbd_server_stop(self) -> None:
        """Stop listening, and delete all exports of the server."""
        server, self._inventory.nbd_server = self._inventory.nbd_server, None
        if server is None:
            raise StateError("NBD server not running")
        await self._exports.close_server(server)

    def query_nbd_server(self) -> dict[str, Any]:
        """Whether the server runs, and the URI of its nameless export: others have their name in it."""
        server = self._inventory.nbd_server
        return {"running": False} if server is None else {"running": True, "uri": server.uri("")}


async def _address_of(addr: UnixListen | InetListen) -> str | tuple[str, int]:
    """Where to listen, names looked up: nothing may wait for that with the loop in its hand."""
    if isinstance(addr, UnixListen):
        return addr.data.path
    host, port = addr.data.host, addr.data.port
    try:
        found = await asyncio.get_running_loop().getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except OSError as error:
        raise StateError(f"address resolution failed for {host}:{port}: {error.strerror}") from None
    return str(found[0][4][0]), int(found[0][4][1])


def _listen(address: str | tuple[str, int], tls: Tls, max_clients: int, haggling: int) -> NbdServer:
    where = f" to {address}" if isinstance(address, str) else ""
    try:
        return NbdServer(address, tls, max_clients=max_clients, haggling=haggling)
    except UsageError as error:
        raise StateError(str(error)) from None
    except ListenError as error:
        raise StateError(f"Failed to bind socket{where}: {error.reason}") from None
