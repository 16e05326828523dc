"""Listener: accepts clients on one socket and knows the sessions it has started.

Rules:
1. Closing stops accepting first, then lets every session finish what it accepted. Clients that are still there then have
   a moment to hear that the server shuts down and to say goodbye; then they are hung up on.
2. With a limit on clients, one too many is hung up on at once, with a log line. With a limit on handshakes, who has not opened
   an export by then is hung up on, too.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import weakref
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from nbdmirror.devices.uri import NbdEndpoint
from nbdmirror.protocol.constants import TlsMode
from nbdmirror.server.access import EVERYBODY
from nbdmirror.server.session import Session
from nbdmirror.server.tls import NO_TLS
from nbdmirror.sockets import listen_tcp, listen_unix, remove_unix

if TYPE_CHECKING:
    from collections.abc import Mapping

    from nbdmirror.server.access import Access
    from nbdmirror.server.export import Export
    from nbdmirror.server.tls import Tls

_log: Final = logging.getLogger(__name__)
_CLOSE_SECONDS: Final = 30.0
# Long enough for a client across the world to try once more and hear why not, too short for anybody to wait for.
_FAREWELL_SECONDS: Final = 0.25


class Listener:
    """One listening socket. `max_clients` and `haggling` 0 mean no limit; `farewell` is for clients, at the end."""

    def __init__(
        self,
        sock: socket.socket,
        exports: Mapping[str, Export],
        *,
        max_clients: int = 0,
        haggling: float = 0,
        farewell: float = _FAREWELL_SECONDS,
        tls: Tls = NO_TLS,
        access: Access = EVERYBODY,
    ) -> None:
        self._sock = sock
        self._exports = exports
        self._max_clients = max_clients
        self._haggling = haggling
        self._farewell = farewell
        self._tls = tls
        self._access = access
        self._sessions: set[Session] = set()
        self._server: asyncio.Server | None = None
        self._path = sock.getsockname() if sock.family == socket.AF_UNIX else None

    @classmethod
    def unix(
        cls,
        path: str,
        exports: Mapping[str, Export],
        *,
        max_clients: int = 0,
        haggling: float = 0,
        tls: Tls = NO_TLS,
    ) -> Listener:
        """Listen on a Unix socket."""
        return cls(listen_unix(path), exports, max_clients=max_clients, haggling=haggling, tls=tls)

    @classmethod
    def tcp(
        cls,
        host: str,
        port: int,
        exports: Mapping[str, Export],
        *,
        max_clients: int = 0,
        haggling: float = 0,
        tls: Tls = NO_TLS,
        access: Access = EVERYBODY,
    ) -> Listener:
        """Listen on TCP."""
        sock = listen_tcp(host, port)
        return cls(sock, exports, max_clients=max_clients, haggling=haggling, tls=tls, access=access)

    @property
    def address(self) -> tuple[str, int] | str:
        """The path of a Unix socket, or host and port."""
        name = self._sock.getsockname()
        return name if isinstance(name, str) else (name[0], name[1])

    def uri(self, name: str) -> str:
        """Where clients find an export of that name."""
        address = self.address
        if isinstance(address, str):
            endpoint = NbdEndpoint.unix(str(Path(address).absolute()), name)
        else:
            endpoint = NbdEndpoint.tcp(*address, name)
        return replace(endpoint, tls=self._tls.mode is TlsMode.REQUIRE).uri

    async def start(self) -> None:
        """Begin to accept."""
        loop = asyncio.get_running_loop()
        if self._path is not None:
            self._server = await loop.create_unix_server(self._session, sock=self._sock)
        else:
            self._server = await loop.create_server(self._session, sock=self._sock)

    def _session(self) -> asyncio.BaseProtocol:
        if self._max_clients and len(self._sessions) >= self._max_clients:
            _log.warning("a client was refused: %d are connected already, which is the limit", len(self._sessions))
            return _Refused()
        session = Session(self._exports, self._sessions.discard, self._tls, self._access)
        self._sessions.add(session)
        if self._haggling:
            # By a weak reference: the timer outlives short visits, of which there may be many.
            asyncio.get_running_loop().call_later(self._haggling, self._check_open, weakref.ref(session))
        return session

    def _check_open(self, reference: weakref.ref[Session]) -> None:
        session = reference()
        if session is not None:
            session.end_haggling(self._haggling)

    async def aclose(self) -> None:
        """Stop accepting, finish what was accepted, close."""
        if self._server is not None:
            self._server.close()
        self._sock.close()
        if self._path is not None:
            remove_unix(self._path)
        sessions = list(self._sessions)
        for session in sessions:
            session.shut_down()
        waits = [asyncio.ensure_future(session.wait_idle()) for session in sessions]
        if waits:
            _, late = await asyncio.wait(waits, timeout=_CLOSE_SECONDS)
            for wait in late:
                wait.cancel()
                _log.error("a client's requests did not finish within %.0f s of shutting down", _CLOSE_SECONDS)
        await _all_closed(sessions, self._farewell)
        for session in list(self._sessions):
            session.hang_up()


async def _all_closed(sessions: list[Session], timeout: float) -> None:
    """Wait until every session is closed, at most `timeout` seconds."""
    waits = [asyncio.ensure_future(session.wait_closed()) for session in sessions]
    if waits:
        _, late = await asyncio.wait(waits, timeout=timeout)
        for wait in late:
            wait.cancel()


class _Refused(asyncio.Protocol):
    """Hangs up at once."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.close()
