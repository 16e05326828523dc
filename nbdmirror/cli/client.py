"""The client half of the control socket: what every command uses that talks to a running daemon.

    async with ControlClient(path) as client:
        jobs = await client.execute("query-jobs")
        async for event in client.events(): ...

Rules:
1. Whatever goes wrong is an NbdMirrorError of one line: DaemonError when the daemon can't be reached or has gone,
   InactiveError and QmpError when it refused the command, UsageError when the command can't be sent at all.
2. The library's own log lines say the same with less context, so they are shown as debug messages only.
3. Events are kept from the moment of connecting, in order, until they are asked for; none is kept twice.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import deque
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar

from qemu.qmp import ConnectError, EventListener, ExecInterruptedError, ExecuteError, Message, QMPClient, QMPError
from qemu.qmp.protocol import Runstate

from nbdmirror.errors import InactiveError, NbdMirrorError, UsageError
from nbdmirror.qmp.messages import ErrorClass, QmpError
from nbdmirror.sockets import MAX_SOCKET_PATH

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
    from types import TracebackType

Result = TypeVar("Result")

# A daemon answers at once or is stuck; nothing that it does before the greeting takes time.
CONNECT_SECONDS: Final = 10.0

_log: Final = logging.getLogger(__name__)


class DaemonError(NbdMirrorError):
    """There is no daemon behind the control socket, or it went away."""


def _nothing(_event: Message) -> bool:
    """The library's own listener can't be removed, and remembers what it hears for ever: let it hear nothing."""
    return False


class _Inbox(EventListener):
    """Events until they are asked for."""

    def __init__(self) -> None:
        super().__init__()
        self._events: deque[Message] = deque()
        self._changed = asyncio.Event()
        self._closed = False

    async def put(self, event: Message) -> None:
        """Called by the library, for each event."""
        self._events.append(event)
        self._changed.set()

    def close(self) -> None:
        """No event will come any more."""
        self._closed = True
        self._changed.set()

    async def take(self) -> Message | None:
        """The next event; None when there will be none."""
        while not self._events and not self._closed:
            self._changed.clear()
            await self._changed.wait()
        return self._events.popleft() if self._events else None


class ControlClient:
    """One connection to a daemon's control socket, to be used with `async with`."""

    def __init__(self, path: str, *, timeout: float = CONNECT_SECONDS) -> None:
        self.path: Final = path
        self._timeout = timeout
        self._client = QMPClient()
        self._client.logger = _quiet_logger()
        self._client.events.event_filter = _nothing
        self._inbox = _Inbox()
        self._watcher: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        # Checked here because uvloop cuts a longer path and would ask another socket.
        if len(os.fsencode(self.path)) > MAX_SOCKET_PATH:
            raise UsageError(f"'{self.path}' can't be a socket: its path is longer than {MAX_SOCKET_PATH} bytes")
        self._client.register_listener(self._inbox)
        try:
            async with asyncio.timeout(self._timeout):
                await self._client.connect(self.path)
        except TimeoutError:
            raise DaemonError(f"the daemon at '{self.path}' does not answer; is it stopped, or not nbdmirror?") from None
        except ConnectError as error:
            raise self._unreachable(error) from None
        self._watcher = asyncio.create_task(self._watch(), name=f"watch {self.path}")
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)
        await self._disconnect()

    async def execute(self, command: str, arguments: Mapping[str, Any] | None = None) -> Any:  # noqa: ANN401  JSON
        """The result of a command; raises InactiveError, QmpError, DaemonError or UsageError."""
        try:
            return await self._client.execute(command, dict(arguments or {}) or None)
        except ExecuteError as error:
            raise _refused(error) from None
        except ExecInterruptedError:
            raise self._gone(f"before it answered '{command}'") from None
        except QMPError as error:
            raise DaemonError(f"the daemon at '{self.path}' can't be understood: {_one_line(error)}") from None
        except (TypeError, ValueError) as error:
            raise UsageError(f"the arguments of '{command}' can't be sent: {_one_line(error)}") from None
        except OSError:
            raise self._gone(f"before it took '{command}'") from None

    async def events(self) -> AsyncGenerator[dict[str, Any], None]:
        """Events from the moment of connecting on; raises DaemonError when the daemon has gone."""
        while (event := await self._inbox.take()) is not None:
            yield dict(event)
        raise self._gone("while its events were followed")

    async def _watch(self) -> None:
        """The library's listeners are not told of the end, and would wait for ever."""
        while self._client.runstate is Runstate.RUNNING:
            await self._client.runstate_changed()
        self._inbox.close()

    async def _disconnect(self) -> None:
        try:
            await self._client.disconnect()
        except (QMPError, OSError, EOFError) as error:
            # How the connection ended no longer matters: whoever waited for something has been told.
            _log.debug("%s: %s", self.path, _one_line(error))

    def _gone(self, when: str) -> DaemonError:
        return DaemonError(f"the daemon at '{self.path}' went away {when}; see its log")

    def _unreachable(self, error: ConnectError) -> NbdMirrorError:
        cause = error.exc
        match cause:
            case FileNotFoundError():
                return DaemonError(f"no daemon at '{self.path}': no such socket; start one with 'nbdmirror serve --qmp'")
            case ConnectionRefusedError():
                return DaemonError(f"no daemon at '{self.path}': nobody listens there any more; start it again")
            case PermissionError():
                return DaemonError(f"not permitted to use '{self.path}': it belongs to the user who runs the daemon")
            case EOFError() | ConnectionError():
                return DaemonError(f"the daemon at '{self.path}' hung up; is it shutting down?")
            case QMPError():
                return DaemonError(f"what listens at '{self.path}' does not speak QMP: {_one_line(cause)}")
        return DaemonError(f"can't connect to '{self.path}': {_one_line(cause)}")


def run_client(path: str, work: Callable[[ControlClient], Awaitable[Result]]) -> Result:
    """Connect, do the work, disconnect, in an event loop of its own: what a command of the CLI is made of."""

    async def run() -> Result:
        async with ControlClient(path) as client:
            return await work(client)

    return asyncio.run(run())


def _refused(error: ExecuteError) -> NbdMirrorError:
    desc = _one_line(error)
    if error.error_class == ErrorClass.DEVICE_NOT_ACTIVE:
        return InactiveError(desc)
    try:
        return QmpError(ErrorClass(error.error_class), desc)
    except ValueError:
        return QmpError.generic(desc)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _as_debug(record: logging.LogRecord) -> bool:
    record.levelno, record.levelname = logging.DEBUG, "DEBUG"
    return _log.isEnabledFor(logging.DEBUG)


def _quiet_logger() -> logging.Logger:
    logger = _log.getChild("qemu")
    logger.addFilter(_as_debug)
    return logger
