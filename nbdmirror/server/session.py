"""Session: one client's socket joined to the protocol core.

Rules:
1. Requests are the Service's to serve, once an export is open; when it has enough in flight nothing more is read, and a
   client that does not read its replies is not served.
2. What the service has queued is sent with one system call where the socket takes it all.
3. At the end of the server requests that were accepted are finished; those that come later are refused with ESHUTDOWN and
   options with ERR_SHUTDOWN, until the client or `hang_up` ends it.
4. The peer's faults end its own connection with one log line; a fault of ours does, too, with a traceback. Other clients
   notice neither.
5. TLS is the transport's business. From STARTTLS until its handshake has ended nothing is parsed or sent here, and afterwards
   nothing ever goes straight to the socket.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING, Final, cast

from nbdmirror.errors import ProtocolError
from nbdmirror.protocol.connection import ServerConnection
from nbdmirror.protocol.constants import OptionReply
from nbdmirror.protocol.messages import Disconnected, ExportQuery, ListQuery, MetaContextQuery, Opened, StartTls
from nbdmirror.server.access import EVERYBODY
from nbdmirror.server.budget import LARGE
from nbdmirror.server.export import OpenExport
from nbdmirror.server.sending import send_now
from nbdmirror.server.service import After, Service
from nbdmirror.server.tls import NO_TLS, reason_of, start_tls, subject_of
from nbdmirror.sockets import widen_unix_send_buffer
from nbdmirror.units import KiB, MiB

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from nbdmirror.server.access import Access
    from nbdmirror.server.export import Export
    from nbdmirror.server.shared import Shared
    from nbdmirror.server.tls import Tls

_log: Final = logging.getLogger(__name__)

# Unsent replies, in bytes: reading stops above the first and goes on below the second.
_WRITE_HIGH: Final = MiB
_WRITE_LOW: Final = 256 * KiB


class Session(asyncio.BufferedProtocol):
    """One client. `exports` is looked at when the client asks for a name; `on_closed` is called once at the end."""

    def __init__(
        self,
        exports: Mapping[str, Export],
        on_closed: Callable[[Session], None],
        shared: Shared,
        tls: Tls = NO_TLS,
        access: Access = EVERYBODY,
    ) -> None:
        self._exports = exports
        self._on_closed = on_closed
        self._shared = shared
        self._tls = tls
        self._access = access
        self._connection = ServerConnection(tls.mode, len(exports), shared.buffers.take, LARGE)
        self._upgrade: asyncio.Task[asyncio.Transport] | None = None
        self._is_encrypted = False
        self._service: Service | None = None
        self._transport: asyncio.Transport | None = None
        self._fd = -1
        self._peer = "client"
        self._received = 0  # bytes
        self._handed_over = 0  # bytes, to the transport
        self.write_paused = False
        self._read_paused = False
        self._closing = False
        self._shutting_down = False
        self._closed = asyncio.Event()

    # --- the transport's side --------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Greet."""
        self._transport = cast("asyncio.Transport", transport)
        sock = transport.get_extra_info("socket")
        self._peer = _peer_name(transport)
        self._transport.set_write_buffer_limits(_WRITE_HIGH, _WRITE_LOW)
        if sock is not None:
            self._fd = sock.fileno()
            widen_unix_send_buffer(self._fd)
        self.send()

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002
        """Where the transport puts what arrives next."""
        return self._connection.get_buffer()

    def buffer_updated(self, nbytes: int) -> None:
        """Serve what has arrived."""
        arrived = time.monotonic()
        self._received += nbytes
        self._connection.buffer_updated(nbytes)
        self.pump()
        if self._service is not None:
            self._shared.busy_poll.answered(arrived)

    def eof_received(self) -> bool:
        """The client sends no more; it may still read, so what is in flight is answered before closing."""
        self._begin_close()
        return not self._is_encrypted  # TLS has no half of a connection

    def connection_lost(self, exc: Exception | None) -> None:
        """The socket is gone; requests in flight go on without it."""
        if self._transport is None:
            return
        if exc is not None:
            _log.info("%s: connection lost: %s", self._peer, exc)
        self._transport = None
        self._fd = -1
        self.write_paused = False
        if self._service is not None:
            self._service.opened.export.sessions.discard(self)
            self._service.connection_lost()
        self._closed.set()
        self._on_closed(self)

    def pause_writing(self) -> None:
        """The client is slow to read: stop serving it."""
        self.write_paused = True

    def resume_writing(self) -> None:
        """The client has caught up."""
        self.write_paused = False
        self.send()
        if self._service is not None and not self.write_paused:
            self._service.all_sent()
        self.pump()

    # --- serving ---------------------------------------------------------------------------------------------------

    def pump(self) -> None:
        """Serve what has been received as far as the bounds allow, then send the answers."""
        if self._transport is None or self._closing or self._upgrade is not None:
            return
        try:
            if self._service is None:
                self._haggle()
            if self._service is not None:
                self._serve(self._service)
        except ProtocolError as error:
            _log.warning("%s: %s; dropped", self._peer, error)
            self.abort()
        except Exception:
            _log.exception("%s: dropped because of a fault in the server", self._peer)
            self.abort()
        else:
            self.send()
            self._close_when_done()

    def _haggle(self) -> None:
        connection = self._connection
        while not self.write_paused:
            event = connection.next_event()
            if event is None:
                self._read_on()
                return
            match event:
                case ExportQuery(name=name) | MetaContextQuery(export=name) if name not in self._exports:
                    connection.refuse(OptionReply.ERR_UNKNOWN, f"export '{name}' not present")
                case ExportQuery(name=name):
                    connection.accept(self._exports[name].info())
                case ListQuery():
                    connection.list_exports([(export.name, export.description) for export in self._exports.values()])
                    self.send()  # it may be long: it counts as unsent before another is made
                case MetaContextQuery(export=name):
                    connection.offer_contexts(self._exports[name].info().contexts)
                case Opened(info=info):
                    export = self._exports[info.name]
                    export.sessions.add(self)
                    opened = OpenExport(export, event, self._shared.buffers)
                    self._service = Service(self._connection, opened, self._shared, self)
                    if self._shutting_down:
                        self._service.shut_down()
                    return
                case StartTls():
                    self._begin_tls()
                    return
                case Disconnected():
                    self._closing = True
                    return
        self._read_hold()

    def _serve(self, service: Service) -> None:
        after = service.serve_batch()
        if after is After.READ_ON:
            self._read_on()
        elif after is After.HOLD:
            self._read_hold()
        else:
            self._closing = True

    def end_haggling(self, seconds: float) -> None:
        """Hang up on a client that has not opened an export within the `seconds` it had."""
        if self._service is None and self._transport is not None:
            _log.warning("%s: opened no export within %.4g s; dropped", self._peer, seconds)
            self.abort()

    # --- TLS -------------------------------------------------------------------------------------------------------

    def _begin_tls(self) -> None:
        """Read no more clear text. The TLS handshake begins once the client has been told so."""
        assert self._transport is not None, "only received bytes make events"
        self._transport.pause_reading()
        self._fd = -1
        self._upgrade = asyncio.get_running_loop().create_task(start_tls(self._tls, self._transport, self))
        self._upgrade.add_done_callback(self._tls_ended)

    def _tls_ended(self, upgrade: asyncio.Task[asyncio.Transport]) -> None:
        self._upgrade = None
        error = asyncio.CancelledError() if upgrade.cancelled() else upgrade.exception()
        if error is None:
            self._go_on_encrypted(upgrade.result())
            return
        if isinstance(error, OSError):
            _log.warning("%s: the TLS handshake failed: %s; dropped", self._peer, reason_of(error))
        elif not upgrade.cancelled():
            _log.error("%s: dropped because of a fault in the server", self._peer, exc_info=error)
        self.abort()
        self.connection_lost(None)  # the loop tells the TLS layer alone

    def _go_on_encrypted(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._is_encrypted = True
        self.write_paused = False
        transport.set_write_buffer_limits(_WRITE_HIGH, _WRITE_LOW)
        name = subject_of(transport)
        if self._access.admits_subject(name):
            self._connection.tls_started()
            self.pump()  # the client may have gone on already
        else:
            _log.warning("%s: its certificate, for '%s', is not among those allowed; refused", self._peer, name)
            self.abort()

    def served(self) -> None:
        """See service.Link."""
        if not self.write_paused:
            self.send()
        self._close_when_done()
        if self._read_paused:
            self.pump()

    def moved(self) -> int | None:
        """See budget.Holder."""
        if self._transport is None or (self._service is not None and self._service.working):
            return None
        return self._received + self._handed_over - self._transport.get_write_buffer_size()

    def drop(self, reason: str) -> None:
        """See budget.Holder."""
        _log.warning("%s: %s; dropped", self._peer, reason)
        self.abort()

    # --- sending ---------------------------------------------------------------------------------------------------

    def send(self) -> None:
        """Send what the core has queued: straight to the socket while nothing waits before it, else by the transport."""
        out = self._connection.data_to_send()
        transport = self._transport
        if not out or transport is None or transport.is_closing():
            return
        buffers = self._service.opened.buffers if self._service is not None else None
        if self._fd >= 0 and not transport.get_write_buffer_size():
            if buffers is not None:
                buffers.all_sent()
                buffers.handed_over()
            try:
                out = send_now(self._fd, out)
            except OSError as error:
                _log.info("%s: connection lost: %s", self._peer, error.strerror)
                self.abort()
                return
            if not out and buffers is not None:
                buffers.all_sent()
        elif buffers is not None and self._is_encrypted:
            buffers.let_go()  # how long the TLS layer looks at them is its own affair
        elif buffers is not None:
            buffers.handed_over()
        if out:
            self._handed_over += sum(map(len, out))
            transport.writelines(out)

    # --- pausing and ending ----------------------------------------------------------------------------------------

    def _read_hold(self) -> None:
        if not self._read_paused and self._transport is not None and not self._transport.is_closing():
            self._read_paused = True
            self._transport.pause_reading()

    def _read_on(self) -> None:
        if self._read_paused and self._transport is not None:
            self._read_paused = False
            self._transport.resume_reading()

    def shut_down(self) -> None:
        """Accept no more and finish what was accepted; the connection stays, so that who comes too late hears why."""
        self._shutting_down = True
        self._connection.shut_down()
        if self._service is not None:
            self._service.shut_down()
        if self._upgrade is not None:
            self.abort()

    def hang_up(self) -> None:
        """Close as soon as nothing is in flight any more."""
        self._begin_close()

    @property
    def peer(self) -> str:
        """See service.Link."""
        return self._peer

    @property
    def is_gone(self) -> bool:
        """See service.Link."""
        return self._transport is None

    @property
    def _in_flight(self) -> int:
        return 0 if self._service is None else self._service.in_flight

    def _begin_close(self) -> None:
        self._closing = True
        self._close_when_done()

    def _close_when_done(self) -> None:
        if self._closing and not self._in_flight and self._transport is not None and self._upgrade is None:
            self.send()
            self._transport.close()

    def abort(self) -> None:
        """Hang up; what is in flight is finished all the same."""
        self._closing = True
        if self._upgrade is not None:
            self._upgrade.cancel()
        if self._transport is not None:
            self._transport.abort()

    async def wait_idle(self) -> None:
        """Wait until nothing is in flight any more."""
        if self._upgrade is not None:
            await asyncio.wait({self._upgrade})
        if self._service is not None:
            await self._service.wait_idle()

    async def wait_closed(self) -> None:
        """Wait until the connection is gone."""
        await self._closed.wait()

    def __repr__(self) -> str:
        return f"<Session {self._peer} {self._in_flight} in flight>"


def _peer_name(transport: asyncio.BaseTransport) -> str:
    peer = transport.get_extra_info("peername")
    return f"client {peer[0]}:{peer[1]}" if isinstance(peer, tuple) and len(peer) > 1 else "client on the Unix socket"
