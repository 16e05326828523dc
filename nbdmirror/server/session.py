"""Session: one client's socket joined to the protocol core.

Rules:
1. Everything that one receive brought is served as one batch and answered by one write. A task is started only for a
   request that cannot be answered at once; a task per request would cost more than the request.
2. What is in flight is bounded in count and bytes, and a client that does not read its replies is not read from: whatever
   it does, it holds a bounded amount of memory.
3. A request that was accepted is finished, also when the client has gone: a write half done would be worse than one
   unasked for. Only its reply is dropped.
4. At the end of the server requests that were accepted are finished; those that come later are refused with ESHUTDOWN and
   options with ERR_SHUTDOWN, until the client or `hang_up` ends it.
5. The peer's faults end its own connection with one log line; a fault of ours does, too, with a traceback. Other clients
   notice neither.
6. TLS is the transport's business. From STARTTLS until its handshake has ended nothing is parsed or sent here, and afterwards
   nothing ever goes straight to the socket.
"""

from __future__ import annotations

import asyncio
import logging
import os
from typing import TYPE_CHECKING, Final, cast

from nbdmirror.errors import ProtocolError
from nbdmirror.protocol.connection import ServerConnection
from nbdmirror.protocol.constants import CMD_DISC, CMD_READ, CMD_WRITE, ESHUTDOWN, OptionReply
from nbdmirror.protocol.messages import (
    Disconnected,
    ExportQuery,
    ListQuery,
    MetaContextQuery,
    Opened,
    Refusal,
    Request,
    StartTls,
)
from nbdmirror.protocol.receiver import IN_WINDOW
from nbdmirror.server.access import EVERYBODY
from nbdmirror.server.export import OpenExport
from nbdmirror.server.tls import NO_TLS, reason_of, start_tls, subject_of
from nbdmirror.sockets import widen_unix_send_buffer
from nbdmirror.units import KiB, MiB

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from nbdmirror.server.access import Access
    from nbdmirror.server.export import Export
    from nbdmirror.server.tls import Tls

_log: Final = logging.getLogger(__name__)

# QEMU and nbdkit serve 16 requests of a connection at a time; more only helps a disk that sorts a deep queue.
MAX_IN_FLIGHT: Final = 64
# One of the largest requests, or all of the 1 MiB ones.
MAX_BYTES_IN_FLIGHT: Final = 64 * MiB
# Unsent replies, in bytes: reading stops above the first and goes on below the second.
_WRITE_HIGH: Final = MiB
_WRITE_LOW: Final = 256 * KiB
# Replies gathered in one batch before they are sent, so a batch of large reads starts to travel early.
_BATCH_BYTES: Final = 512 * KiB
_IOV_MAX: Final = 1024
_TOO_LATE: Final = Refusal(ESHUTDOWN, "the server is shutting down")


class Session(asyncio.BufferedProtocol):
    """One client. `exports` is looked at when the client asks for a name; `on_closed` is called once at the end."""

    def __init__(
        self,
        exports: Mapping[str, Export],
        on_closed: Callable[[Session], None],
        tls: Tls = NO_TLS,
        access: Access = EVERYBODY,
    ) -> None:
        self._exports = exports
        self._on_closed = on_closed
        self._tls = tls
        self._access = access
        self._connection = ServerConnection(tls.mode)
        self._upgrade: asyncio.Task[asyncio.Transport] | None = None
        self._is_encrypted = False
        self._open: OpenExport | None = None
        self._transport: asyncio.Transport | None = None
        self._fd = -1
        self._peer = "client"
        self._tasks: set[asyncio.Task[None]] = set()
        self._bytes_in_flight = 0
        self._write_paused = False
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
        if not self._is_admitted(transport):
            return
        self._transport.set_write_buffer_limits(_WRITE_HIGH, _WRITE_LOW)
        if sock is not None:
            self._fd = sock.fileno()
            widen_unix_send_buffer(self._fd)
        self._send()

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002
        """Where the transport puts what arrives next."""
        return self._connection.get_buffer()

    def buffer_updated(self, nbytes: int) -> None:
        """Serve what has arrived."""
        self._connection.buffer_updated(nbytes)
        self._pump()

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
        if self._open is not None:
            self._open.export.sessions.discard(self)
        self._closed.set()
        self._on_closed(self)

    def pause_writing(self) -> None:
        """The client is slow to read: stop serving it."""
        self._write_paused = True

    def resume_writing(self) -> None:
        """The client has caught up."""
        self._write_paused = False
        self._send()
        self._pump()

    # --- serving ---------------------------------------------------------------------------------------------------

    def _pump(self) -> None:
        """Serve what has been received as far as the bounds allow, then send the answers."""
        if self._transport is None or self._closing or self._upgrade is not None:
            return
        try:
            if self._open is None:
                self._haggle()
            if self._open is not None:
                self._serve_batch(self._open)
        except ProtocolError as error:
            _log.warning("%s: %s; dropped", self._peer, error)
            self.abort()
        except Exception:
            _log.exception("%s: dropped because of a fault in the server", self._peer)
            self.abort()
        else:
            self._send()
            self._close_when_done()

    def _haggle(self) -> None:
        connection = self._connection
        while (event := connection.next_event()) is not None:
            match event:
                case ExportQuery(name=name) | MetaContextQuery(export=name) if name not in self._exports:
                    connection.refuse(OptionReply.ERR_UNKNOWN, f"export '{name}' not present")
                case ExportQuery(name=name):
                    connection.accept(self._exports[name].info())
                case ListQuery():
                    connection.list_exports([(export.name, export.description) for export in self._exports.values()])
                case MetaContextQuery(export=name):
                    connection.offer_contexts(self._exports[name].info().contexts)
                case Opened(info=info):
                    export = self._exports[info.name]
                    export.sessions.add(self)
                    self._open = OpenExport(export, event)
                    return
                case StartTls():
                    self._begin_tls()
                    return
                case Disconnected():
                    self._closing = True
                    return

    def _is_admitted(self, transport: asyncio.BaseTransport) -> bool:
        peer = transport.get_extra_info("peername")
        if isinstance(peer, tuple) and not self._access.admits_address(peer[0].partition("%")[0]):
            _log.warning("%s: its address is not among those allowed; refused", self._peer)
            self.abort()
            return False
        return True

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
        self._write_paused = False
        transport.set_write_buffer_limits(_WRITE_HIGH, _WRITE_LOW)
        name = subject_of(transport)
        if self._access.admits_subject(name):
            self._connection.tls_started()
            self._pump()  # the client may have gone on already
        else:
            _log.warning("%s: its certificate, for '%s', is not among those allowed; refused", self._peer, name)
            self.abort()

    def _serve_batch(self, opened: OpenExport) -> None:
        connection, serve_now = self._connection, opened.serve_now
        next_request, reply = connection.next_request, connection.reply
        gathered = 0
        while not self._is_full():
            request = next_request()
            if request is None:
                self._read_on()
                return
            if request.command == CMD_DISC:
                self._closing = True
                return
            answer = _TOO_LATE if self._shutting_down else serve_now(request)
            if answer is None:
                self._defer(opened, request)
                continue
            reply(request, answer)
            if request.command == CMD_READ:
                gathered += request.length
                if gathered > _BATCH_BYTES:
                    self._send()
                    gathered = 0
        self._read_hold()

    def _is_full(self) -> bool:
        return self._write_paused or len(self._tasks) >= MAX_IN_FLIGHT or self._bytes_in_flight >= MAX_BYTES_IN_FLIGHT

    def _defer(self, opened: OpenExport, request: Request) -> None:
        """Serve a request that has to wait for something in a task of its own."""
        if request.payload is not None and request.length <= IN_WINDOW:
            request = request.detached()
        weight = request.length if request.command in (CMD_READ, CMD_WRITE) else 0
        self._bytes_in_flight += weight
        task = asyncio.get_running_loop().create_task(self._serve(opened, request, weight))
        self._tasks.add(task)

    async def _serve(self, opened: OpenExport, request: Request, weight: int) -> None:
        try:
            answer = await opened.serve(request)
            self._connection.reply(request, answer)
        except Exception:
            _log.exception("%s: dropped because of a fault in the server while serving %r", self._peer, request)
            self.abort()
        finally:
            self._bytes_in_flight -= weight
            task = asyncio.current_task()
            assert task is not None
            self._tasks.discard(task)
        if not self._write_paused:
            self._send()
        self._close_when_done()
        if self._read_paused:
            self._pump()

    # --- sending ---------------------------------------------------------------------------------------------------

    def _send(self) -> None:
        """Send what the core has queued: straight to the socket while nothing waits before it, else by the transport."""
        out = self._connection.data_to_send()
        transport = self._transport
        if not out or transport is None or transport.is_closing():
            return
        buffers = self._open.buffers if self._open is not None else None
        if self._fd >= 0 and not transport.get_write_buffer_size():
            if buffers is not None:
                buffers.all_sent()
                buffers.handed_over()
            out = self._write_now(out)
            if not out and buffers is not None:
                buffers.all_sent()
        elif buffers is not None and self._is_encrypted:
            buffers.let_go()  # how long the TLS layer looks at them is its own affair
        elif buffers is not None:
            buffers.handed_over()
        if out:
            transport.writelines(out)

    def _write_now(self, out: list[bytes | bytearray | memoryview]) -> list[bytes | bytearray | memoryview]:
        """What the socket does not take at once."""
        try:
            sent = os.writev(self._fd, out[:_IOV_MAX])
        except BlockingIOError:
            return out
        except OSError as error:
            _log.info("%s: connection lost: %s", self._peer, error.strerror)
            self.abort()
            return []
        return _unsent(out, sent)

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
        if self._upgrade is not None:
            self.abort()

    def hang_up(self) -> None:
        """Close as soon as nothing is in flight any more."""
        self._begin_close()

    def end_haggling(self, seconds: float) -> None:
        """Hang up on a client that has had so long and has not opened an export."""
        if self._open is None and self._transport is not None:
            _log.warning("%s: opened no export within %.4g s; dropped", self._peer, seconds)
            self.abort()

    def _begin_close(self) -> None:
        self._closing = True
        self._close_when_done()

    def _close_when_done(self) -> None:
        if self._closing and not self._tasks and self._transport is not None and self._upgrade is None:
            self._send()
            self._transport.close()

    def abort(self) -> None:
        """Hang up at once; what is in flight is finished all the same."""
        self._closing = True
        if self._upgrade is not None:
            self._upgrade.cancel()
        if self._transport is not None:
            self._transport.abort()

    async def wait_idle(self) -> None:
        """Wait until nothing is in flight any more."""
        if self._upgrade is not None:
            await asyncio.wait({self._upgrade})
        while self._tasks:
            await asyncio.wait(set(self._tasks))

    async def wait_closed(self) -> None:
        """Wait until the connection is gone."""
        await self._closed.wait()

    def __repr__(self) -> str:
        return f"<Session {self._peer} {len(self._tasks)} in flight>"


def _unsent(out: list[bytes | bytearray | memoryview], sent: int) -> list[bytes | bytearray | memoryview]:
    """What remains of `out` after `sent` bytes of it went."""
    for index, piece in enumerate(out):
        if sent < len(piece):
            return [memoryview(piece)[sent:], *out[index + 1 :]]
        sent -= len(piece)
    return []


def _peer_name(transport: asyncio.BaseTransport) -> str:
    peer = transport.get_extra_info("peername")
    return f"client {peer[0]}:{peer[1]}" if isinstance(peer, tuple) and len(peer) > 1 else "client on the Unix socket"
