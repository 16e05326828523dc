"""Monitor: the commands of a registry on Unix sockets, and news to everybody who listens.

Rules:
1. A client's commands are executed and answered one at a time, in order; clients do not wait for each other.
2. A socket is nobody else's from the moment it exists (mode 0600), is taken over only when nobody answers on it, and is
   unlinked at the end only if it is still ours.
3. No client can block or exhaust the daemon: who does not read his answers is not read either, and who leaves more than
   `max_unread` bytes of events unread is dropped, with one line in the log.
4. Errors get their QMP class here and nowhere else. What is not an NbdMirrorError is our bug: the log gets the traceback,
   the client 'internal error', and everybody goes on.
5. Events go to all clients that have negotiated, in the order of `emit`; those of a command may precede its answer.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from nbdmirror.errors import InactiveError, NbdMirrorError
from nbdmirror.qmp.connection import Answered, Command, QmpConnection
from nbdmirror.qmp.messages import ErrorClass, QmpError, Timestamp, encode_event
from nbdmirror.sockets import KEEP_FILE, listen_unix

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from nbdmirror.qmp.registry import Registry
    from nbdmirror.sockets import ServerSocket

_log = logging.getLogger(__name__)

# More than the longest answer to the longest command: an id of 1 MiB comes back as at most 3 MiB of ASCII.
MAX_UNREAD: Final = 8 * 1024 * 1024
# Answers beyond this wait for the client to read before its next command is taken.
_ENOUGH_UNREAD: Final = 64 * 1024
_READ_SIZE: Final = 64 * 1024
# How long a client has at the end to take what was queued for it.
_GOODBYE_SECONDS: Final = 1.0


class _Listener(NamedTuple):
    server: asyncio.Server
    socket: ServerSocket


class Monitor:
    """Serves a registry. `clock` gives nanoseconds since the epoch, for the timestamps of events."""

    def __init__(
        self,
        registry: Registry,
        *,
        clock: Callable[[], int] = time.time_ns,
        max_unread: int = MAX_UNREAD,
    ) -> None:
        self.registry: Final = registry
        self.max_unread: Final = max_unread
        self.closed = False
        self._clock = clock
        self._listeners: list[_Listener] = []
        self._clients: dict[_Client, asyncio.Task[None]] = {}

    async def listen(self, path: str | Path) -> None:
        """Listen on one more socket; raises ListenError or UsageError, naming the path, where that can't be."""
        await self.listen_on(listen_unix(str(path)))

    async def listen_on(self, server_socket: ServerSocket) -> None:
        """Listen on a Unix socket that is there already (socket activation); it is closed with the monitor."""
        sock = server_socket.sock
        where = str(sock.getsockname())
        server = await asyncio.start_unix_server(
            lambda r, w: self._serve(where, r, w), sock=sock, limit=_READ_SIZE, **KEEP_FILE
        )
        self._listeners.append(_Listener(server, server_socket))

    async def _serve(self, where: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        client = _Client(self, where, reader, writer)
        task = asyncio.current_task()
        assert task is not None
        self._clients[client] = task
        try:
            await client.run()
        except OSError as error:
            _log.debug("control client of %s went away: %s", where, error)
        except asyncio.CancelledError:
            # Only `aclose` cancels; the task ends here, and streams would log a cancelled one as an error.
            _log.debug("control client of %s cut off", where)
        finally:
            self._clients.pop(client, None)
            await client.aclose()

    def emit(self, event: str, data: dict[str, Any] | None = None) -> None:
        """Tell every negotiated client; raises TypeError or ValueError when JSON can't say `data`."""
        line = encode_event(event, data, Timestamp.from_ns(self._clock()))
        for client in list(self._clients):
            client.send_event(line)

    async def aclose(self) -> None:
        """Stop listening, let clients take what is queued for them, close. Commands in progress are cancelled."""
        self.closed = True
        for listener in self._listeners:
            listener.socket.remove_file()
            listener.server.close()
            listener.socket.close()
        self._listeners.clear()
        # A handler that closes its own monitor must not wait for itself: its client is answered, and ends after that.
        tasks = [task for task in self._clients.values() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class _Client:
    """One connection: reads, executes, answers."""

    def __init__(
        self,
        monitor: Monitor,
        where: str,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self._monitor = monitor
        self._where = where
        self._reader = reader
        self._writer = writer
        self._connection = QmpConnection(monitor.registry.version)
        writer.transport.set_write_buffer_limits(high=_ENOUGH_UNREAD)

    async def run(self) -> None:
        """Until the client hangs up or the monitor closes."""
        await self._flush()
        while not self._monitor.closed and (data := await self._reader.read(_READ_SIZE)):
            self._connection.feed(data)
            while not self._monitor.closed and (item := self._connection.next_command()) is not None:
                match item:
                    case Command():
                        await self._execute(item)
                    case Answered(error) if error is not None:
                        _log.debug("control client of %s refused: %s", self._where, error)
                await self._flush()

    async def _execute(self, command: Command) -> None:
        try:
            self._connection.reply(command.id, await self._monitor.registry.dispatch(command.name, command.arguments))
        except Exception as error:
            # A bug in one command must not end the service of the others.
            if not isinstance(error, NbdMirrorError):
                _log.exception("internal error in the command %s", command.name)
            self._connection.fail(command.id, as_qmp_error(error))

    def send_event(self, line: bytes) -> None:
        """Queue an event without waiting; drop the client when it has left too much unread."""
        self._connection.send_event(line)
        self._write()

    def _write(self) -> None:
        transport = self._writer.transport
        if transport.is_closing():
            return
        self._writer.write(self._connection.data_to_send())
        unread = transport.get_write_buffer_size()
        if unread > self._monitor.max_unread:
            _log.warning("control client of %s dropped: it left %d bytes unread", self._where, unread)
            transport.abort()

    async def _flush(self) -> None:
        self._write()
        await self._writer.drain()

    async def aclose(self) -> None:
        """Close when the client has taken what is queued, or at once when it does not."""
        self._writer.close()
        try:
            async with asyncio.timeout(_GOODBYE_SECONDS):
                await self._writer.wait_closed()
        except (OSError, TimeoutError):
            self._writer.transport.abort()


def as_qmp_error(error: BaseException) -> QmpError:
    """An exception as QMP says it (QMP reference, "QapiErrorClass")."""
    match error:
        case QmpError():
            return error
        case InactiveError():
            return QmpError(ErrorClass.DEVICE_NOT_ACTIVE, str(error))
        case NbdMirrorError():
            return QmpError.generic(str(error))
    return QmpError.generic("internal error")
