"""Listener: accepts clients on its sockets and knows the sessions it has started.

Rules:
1. Closing stops accepting first, then lets every session finish what it accepted. Clients that are still there then have
   a moment to hear that the server shuts down and to say goodbye; then they are hung up on.
2. With a limit on clients, whichever socket they come by, one too many is hung up on at once, with a log line. So is one whose
   address is not allowed.
3. A client has a time to open an export, TLS included; then it is hung up on. So nobody keeps a place by saying nothing, or
   one byte at a time.
4. Where the process is out of files, clients wait in the kernel's queue until others have gone: one log line, and a look
   now and then. No error of accept(2) ends the accepting.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import resource
import socket
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from nbdmirror.devices.uri import ClientTls, NbdEndpoint
from nbdmirror.protocol.constants import TlsMode
from nbdmirror.server.access import EVERYBODY
from nbdmirror.server.session import Session
from nbdmirror.server.shared import Shared
from nbdmirror.server.tls import NO_TLS
from nbdmirror.sockets import for_loop, listen_tcp, listen_unix, vsock_cid

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from nbdmirror.server.access import Access
    from nbdmirror.server.export import Export
    from nbdmirror.server.tls import Tls
    from nbdmirror.sockets import ServerSocket

_log: Final = logging.getLogger(__name__)
_CLOSE_SECONDS: Final = 30.0
# Long enough for a client across the world to try once more and hear why not, too short for anybody to wait for.
_FAREWELL_SECONDS: Final = 0.25
# QEMU's handshake-max-seconds; a client across the world needs one.
_HAGGLING_SECONDS: Final = 10.0
# So many are let in before those that are in are heard again.
_ACCEPT_AT_ONCE: Final = 64
_REST_SECONDS: Final = 0.1
# accept(2): what has befallen one client, which is no longer in the queue then. Anything else is our own trouble.
_OF_THE_CLIENT: Final = frozenset(
    {
        errno.ECONNABORTED,
        errno.EPERM,
        errno.EPROTO,
        errno.ENOPROTOOPT,
        errno.EOPNOTSUPP,
        errno.ENONET,
        errno.ENETDOWN,
        errno.ENETUNREACH,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
    }
)


def allow_many_files() -> None:
    """Let this process open as many files as the administrator lets it: each client is one."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


class Listener:
    """Some listening sockets, which are closed with it.

    `max_clients` 0 means no limit; `farewell` is what clients get at the end, `haggling` what they get to open an export, 0 for
    ever, both in seconds.
    """

    def __init__(
        self,
        sockets: Sequence[ServerSocket],
        exports: Mapping[str, Export],
        *,
        max_clients: int = 0,
        farewell: float = _FAREWELL_SECONDS,
        haggling: float = _HAGGLING_SECONDS,
        tls: Tls = NO_TLS,
        access: Access = EVERYBODY,
    ) -> None:
        self._sockets = sockets
        self._exports = exports
        self._max_clients = max_clients
        self._farewell = farewell
        self._haggling = haggling
        self._tls = tls
        self._access = access
        self._sessions: dict[Session, asyncio.TimerHandle | None] = {}
        self._joining: set[asyncio.Task[None]] = set()
        self._rest: asyncio.TimerHandle | None = None
        self._is_short_of_files = False
        self._shared = Shared()

    @classmethod
    def unix(
        cls,
        path: str,
        exports: Mapping[str, Export],
        *,
        max_clients: int = 0,
        haggling: float = _HAGGLING_SECONDS,
        tls: Tls = NO_TLS,
    ) -> Listener:
        """Listen on a Unix socket."""
        return cls([listen_unix(path)], exports, max_clients=max_clients, haggling=haggling, tls=tls)

    @classmethod
    def tcp(
        cls,
        host: str,
        port: int,
        exports: Mapping[str, Export],
        *,
        max_clients: int = 0,
        haggling: float = _HAGGLING_SECONDS,
        tls: Tls = NO_TLS,
        access: Access = EVERYBODY,
    ) -> Listener:
        """Listen on TCP."""
        sockets = [listen_tcp(host, port)]
        return cls(sockets, exports, max_clients=max_clients, haggling=haggling, tls=tls, access=access)

    @property
    def address(self) -> tuple[str, int] | str:
        """The path of a Unix socket, or host and port; of the first socket where there are several."""
        name = self._sockets[0].sock.getsockname()
        return name if isinstance(name, str) else (name[0], name[1])

    def change(self, *, max_clients: int, tls: Tls, access: Access) -> None:
        """Meet clients that come from now on by these."""
        self._max_clients, self._tls, self._access = max_clients, tls, access

    def endpoints(self, name: str) -> list[NbdEndpoint]:
        """Where clients find an export of that name, by each of the sockets."""
        tls = ClientTls() if self._tls.mode is TlsMode.REQUIRE else None
        return [replace(_endpoint_of(each.sock, name), tls=tls) for each in self._sockets]

    async def start(self) -> None:
        """Begin to accept."""
        self._accept_on_all()

    def _accept_on_all(self) -> None:
        for each in self._sockets:
            asyncio.get_running_loop().add_reader(each.sock, self._accept, each.sock)

    # --- who comes -------------------------------------------------------------------------------------------------

    def _accept(self, listening: socket.socket) -> None:
        for _ in range(_ACCEPT_AT_ONCE):
            try:
                sock, address = listening.accept()
            except BlockingIOError:
                self._is_short_of_files = False
                return
            except OSError as error:
                if error.errno not in _OF_THE_CLIENT:
                    self._accept_later(error)
                    return
            else:
                self._admit(sock, address)

    def _accept_later(self, error: OSError) -> None:
        """Rule 4. The sockets would be ready at once and again, so they are not looked at for a while."""
        if not self._is_short_of_files:
            self._is_short_of_files = True
            remedy = "; raise the limit on open files" if error.errno in {errno.EMFILE, errno.ENFILE} else ""
            _log.error("clients have to wait: %s, with %d connected%s", error.strerror, len(self._sessions), remedy)
        loop = asyncio.get_running_loop()
        for each in self._sockets:
            loop.remove_reader(each.sock)
        self._rest = loop.call_later(_REST_SECONDS, self._accept_on_all)

    def _admit(self, sock: socket.socket, address: tuple[str, int]) -> None:
        if not self._is_admitted(sock, address):
            _log.warning("client %s:%d: its address is not among those allowed; refused", *address[:2])
            sock.close()
        elif self._max_clients and len(self._sessions) >= self._max_clients:
            _log.warning("a client was refused: %d are connected already, which is the limit", len(self._sessions))
            sock.close()
        else:
            loop = asyncio.get_running_loop()
            session = Session(self._exports, self._left, self._shared, self._tls, self._access)
            self._sessions[session] = None
            if self._haggling:
                self._sessions[session] = loop.call_later(self._haggling, session.end_haggling, self._haggling)
            task = loop.create_task(self._join(sock, session))
            self._joining.add(task)
            task.add_done_callback(self._joining.discard)

    def _is_admitted(self, sock: socket.socket, address: tuple[str, int]) -> bool:
        is_ip = sock.family in (socket.AF_INET, socket.AF_INET6)
        return not is_ip or self._access.admits_address(address[0].partition("%")[0])

    async def _join(self, sock: socket.socket, session: Session) -> None:
        sock.setblocking(False)
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            with suppress(OSError):  # of one that has gone
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # a host that died keeps no place for ever
        sock = for_loop(sock)
        try:
            await asyncio.get_running_loop().connect_accepted_socket(lambda: session, sock)
        except (OSError, RuntimeError):  # uvloop's word for one that was gone before it was greeted
            self._left(session)
            sock.close()

    def _left(self, session: Session) -> None:
        timer = self._sessions.pop(session, None)
        if timer is not None:
            timer.cancel()

    # --- the end ---------------------------------------------------------------------------------------------------

    async def aclose(self) -> None:
        """Stop accepting, finish what was accepted, close."""
        if self._rest is not None:
            self._rest.cancel()
        for each in self._sockets:
            each.remove_file()
        for each in self._sockets:
            if each.sock.fileno() >= 0:  # else it was closed before
                asyncio.get_running_loop().remove_reader(each.sock)
            each.close()
        if self._joining:
            await asyncio.wait(self._joining)
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


def _endpoint_of(sock: socket.socket, name: str) -> NbdEndpoint:
    address = sock.getsockname()
    if sock.family == socket.AF_UNIX:
        return NbdEndpoint.unix(str(Path(address).absolute()), name)
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        return NbdEndpoint.tcp(address[0], address[1], name)
    return NbdEndpoint("vsock", host=str(vsock_cid(sock)), port=address[1], export=name)


async def _all_closed(sessions: list[Session], timeout: float) -> None:
    """Wait until every session is closed, at most `timeout` seconds."""
    waits = [asyncio.ensure_future(session.wait_closed()) for session in sessions]
    if waits:
        _, late = await asyncio.wait(waits, timeout=timeout)
        for wait in late:
            wait.cancel()
