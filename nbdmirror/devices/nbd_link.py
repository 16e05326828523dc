"""Link: the connections of one NbdDevice, made anew when they are lost, and the truth about what a loss may have cost.

Rules:
1. What was in flight on a lost connection fails, once, and is not sent again: nobody but the caller knows whether it may be.
2. While no connection is left, requests are held for up to `reconnect_delay` seconds after the loss, and fail at once with
   ENOTCONN after that. Connecting goes on in the background, with growing pauses, for as long as the link is open, whatever the
   delay; requests succeed again when it has succeeded.
3. A *session* is the connections that were made at one time. While one of them lives, so does the server with what it has not
   written to its disk yet. Connections made later are another session even if the earlier one lives: nothing proves that
   the same process answers. So FLUSH goes to one connection of each session.
4. When the last connection of a session is lost and something had been written over it that no flush has covered, that may
   be gone: a *loss*. `on_lost` is called at once, before any caller hears of a failure and before a later request can
   succeed. From then on every flush fails with ESTALE until the owner has called `acknowledge_loss`, by which he
   promises to write again what he had begun to write, and not flushed, by then. Without an owner flushes fail for good.
   `on_change` is called when no connection is left, when there is one again, and when there never will be.
5. After reconnecting it must be the same export (`ExportInfo.change_since`). If not, the link has failed and no further
   attempt is made.
6. A server that hangs (`Patience`) is given up on all connections: the old commands may yet be carried out, and no new one
   must overtake them. A new session is used once the server has closed the old connections, or after _WAKE_SECONDS.
   Against a network that breaks connections under a server that lives and lags there is no such guard: NBD has no fences.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from nbdmirror.devices.nbd_connection import CONNECT_TIMEOUT
from nbdmirror.devices.nbd_session import Session, all_done, close_all, connect_together, least_busy
from nbdmirror.errors import DeviceError, UsageError
from nbdmirror.protocol.constants import FUA

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from nbdmirror.devices.nbd_connection import NbdConnection
    from nbdmirror.devices.nbd_wake import Wake
    from nbdmirror.devices.uri import NbdEndpoint

log = logging.getLogger(__name__)

# Seconds between attempts: doubled from the first pause to the longest, which is how late a server that is back may be noticed.
# Even a killed server's last commands are over by the first; and with some connections left, the rest has time.
_FIRST_PAUSE: Final = 0.1
_LONGEST_PAUSE: Final = 2.0
_LONGEST_PAUSE_IN_USE: Final = 30.0
# Seconds for one attempt: as long as three TCP connects may take with one packet lost each.
_ATTEMPT_TIMEOUT: Final = 5.0
# Seconds for a server that answers again to finish with the connections that were given up (rule 6).
_WAKE_SECONDS: Final = 5.0


@dataclass(frozen=True, slots=True)
class LinkOptions:
    """Seconds: how long requests are held after a loss, how long the first connection is tried for (0: once), and how long
    the server may be silent while it owes answers (None: for ever).
    """

    reconnect_delay: float = 0.0
    open_timeout: float = 0.0
    request_timeout: float | None = None


# Nothing is held, and no answer is too late.
DEFAULT_LINK: Final = LinkOptions()


class Link:
    """Connections to an export, some or none of them alive. Construct it with `open` or `over`.

    `info` is what the server said at first, `connections` are those that live, `generation` counts the sessions, `losses`
    the losses (rule 4). `reconnect_delay` may be changed; that counts from the next loss on.
    """

    def __init__(
        self, endpoint: NbdEndpoint | None, connections: Sequence[NbdConnection], options: LinkOptions = DEFAULT_LINK
    ) -> None:
        self.name = connections[0].name
        self.info = connections[0].info
        self.generation = 0
        self.losses = 0
        self.on_lost: Callable[[], None] | None = None
        self.on_change: Callable[[], None] | None = None
        self.reconnect_delay = options.reconnect_delay
        self.connections: list[NbdConnection] = []
        self._endpoint = endpoint
        self._options = options
        self._wanted = len(connections)
        self._loop = asyncio.get_running_loop()
        self._session_of: dict[NbdConnection, Session] = {}
        self._acknowledged = 0
        self._hold_until = 0.0
        self._failure: DeviceError | None = None
        self._trouble: DeviceError | None = None
        # Done when requests need not wait any longer, for better or worse.
        self._settled: asyncio.Future[None] = self._loop.create_future()
        self._down = asyncio.Event()
        self._mending: asyncio.Task[None] | None = None
        self._wakes: list[Wake] = []
        self._closed = False
        self._admit(connections)

    @classmethod
    async def open(cls, endpoint: NbdEndpoint, *, connections: int, options: LinkOptions) -> Link:
        """Connect within `open_timeout`. Raises DeviceError, or UsageError where libnbd or verifiable TLS is missing."""
        loop = asyncio.get_running_loop()
        deadline, pause = loop.time() + options.open_timeout, _FIRST_PAUSE
        while True:
            timeout = min(CONNECT_TIMEOUT, deadline - loop.time()) if options.open_timeout else CONNECT_TIMEOUT
            try:
                made = await connect_together(endpoint, connections, timeout=timeout, request_timeout=options.request_timeout)
            except DeviceError:
                left = deadline - loop.time()
                await asyncio.sleep(max(min(pause, left), 0))
                if left <= pause:
                    raise
                pause = min(2 * pause, _LONGEST_PAUSE)
            else:
                return cls(endpoint, made, options)

    @classmethod
    def over(cls, connection: NbdConnection) -> Link:
        """A link that lasts as long as this one connection."""
        return cls(None, [connection])

    # --- what the owner asks ---------------------------------------------------------------------------------------

    @property
    def state(self) -> str:
        """For people: connected, reconnecting, failed or closed, and what is the matter."""
        if self._closed:
            return "closed"
        if len(self.connections) == self._wanted:
            return "connected"
        if self.connections:
            return f"connected ({len(self.connections)} of {self._wanted})"
        if self._failure is not None:
            return f"failed: {self._failure.context}"
        return "reconnecting" if self._trouble is None else f"reconnecting: {self._trouble}"

    @property
    def is_reconnecting(self) -> bool:
        """Whether no connection is left, and one is being made."""
        return not (self.connections or self._closed or self._failure is not None)

    @property
    def notices_silence(self) -> bool:
        """Whether a server that does not answer is given up some time."""
        return self._options.request_timeout is not None

    async def reconnected(self) -> None:
        """Wait until a connection lives, however long that takes. Raises DeviceError if none ever will."""
        while not self.connections:
            self._raise_if_over()
            await asyncio.wait({self._settled})

    def acknowledge_loss(self) -> None:
        """The owner has taken down that whatever was begun and not flushed until now has to be written again."""
        self._acknowledged = self.losses

    # --- what the device uses --------------------------------------------------------------------------------------

    async def ready(self) -> None:
        """Wait until a connection lives, for as long as requests are held (rule 2). Raises DeviceError after that."""
        while not self.connections:
            self._raise_if_over()
            left = self._hold_until - self._loop.time()
            if left <= 0:
                raise self._not_connected()
            await asyncio.wait({self._settled}, timeout=left)

    def pick(self) -> NbdConnection:
        """The connection for the next command that writes nothing, or with FUA. Raises DeviceError when there is none."""
        if not self.connections:
            self._raise_if_over()
            raise self._not_connected()
        return least_busy(self.connections)

    def pick_for_write(self, flags: int) -> NbdConnection:
        """The connection for the next write, zero or trim, which is to be sent at once."""
        connection = self.pick()
        if not flags & FUA:
            self._session_of[connection].write_begins()
        return connection

    async def flush(self) -> None:
        """Make durable what has been written. Raises DeviceError, ESTALE where part of that may be gone (rule 4)."""
        self._raise_if_lost()
        await self.ready()
        self._raise_if_lost()
        covered = {session: session.covered_now() for session in self._session_of.values()}
        if self.info.capabilities.flush:  # a server that offers none promises no more than it did by answering
            await all_done(least_busy(session.connections).flush() for session in covered)
        for session, count in covered.items():
            session.flush_ended(count)

    async def aclose(self) -> None:
        """Say goodbye on every connection, for a bounded time; what is held fails. Idempotent."""
        self._closed = True
        self._settle()
        try:
            if self._mending is not None:
                self._mending.cancel()
                await asyncio.wait({self._mending})
            await asyncio.gather(*(connection.aclose() for connection in self.connections))
        finally:
            self._close_wakes()

    # --- losing ----------------------------------------------------------------------------------------------------

    def _gone(self, connection: NbdConnection) -> None:
        session = self._session_of.pop(connection)
        session.connections.remove(connection)
        self.connections = [other for other in self.connections if other is not connection]
        if self._closed:
            return
        if not self.connections:
            log.info("%s: the connection is lost", self.name)
            self._hold_until = self._loop.time() + self.reconnect_delay
            self._settled = self._loop.create_future()
            self._down.set()
        if self._endpoint is None:
            self._fail("the server that was started for it has ended")
        elif self._failure is None and (self._mending is None or self._mending.done()):
            self._mending = self._loop.create_task(self._mend(self._endpoint))
        if not session.connections and session.is_unflushed:
            self.losses += 1
            if self.on_lost is not None:
                self.on_lost()
        if not self.connections:
            self._tell()

    def _tell(self) -> None:
        if self.on_change is not None:
            self.on_change()

    def _hung(self) -> None:
        """The server is silent: rule 6."""
        log.warning("%s: no answer for too long, giving the connection up", self.name)
        for connection in self.connections:
            if (wake := connection.give_up()) is not None:
                self._wakes.append(wake)
        if self._closed:
            self._close_wakes()

    def _fail(self, reason: str) -> None:
        """Nothing is tried any more."""
        self._failure = DeviceError(errno.ESTALE, f"{self.name}: {reason}")
        log.error("%s; it is not connected to any more", self._failure.context)
        self._settle()
        self._tell()

    def _settle(self) -> None:
        if not self._settled.done():
            self._settled.set_result(None)

    def _close_wakes(self) -> None:
        for wake in self._wakes:
            wake.close()
        self._wakes.clear()

    # --- mending ---------------------------------------------------------------------------------------------------

    async def _mend(self, endpoint: NbdEndpoint) -> None:
        """Connect until there are as many connections as at first, or the link has failed."""
        pause = _FIRST_PAUSE
        try:
            while len(self.connections) < self._wanted and self._failure is None:
                if not self.connections:
                    await asyncio.sleep(pause)
                elif await self._goes_down(pause):
                    pause = _FIRST_PAUSE
                    continue
                pause = min(2 * pause, _LONGEST_PAUSE_IN_USE if self.connections else _LONGEST_PAUSE)
                try:
                    await self._connect_missing(endpoint)
                except DeviceError as error:
                    self._trouble = error
                    log.debug("%s", error)
        except UsageError as error:  # a certificate that can no longer be read, or the like
            self._fail(str(error))
        except Exception:
            log.exception("%s: a fault in nbdmirror while connecting", self.name)
            self._fail("internal error")

    async def _goes_down(self, seconds: float) -> bool:
        """Wait so long; True, at once, when the last connection is lost meanwhile."""
        try:
            async with asyncio.timeout(seconds):
                return await self._down.wait()
        except TimeoutError:
            return False

    async def _connect_missing(self, endpoint: NbdEndpoint) -> None:
        missing = self._wanted - len(self.connections)
        timeout = self._options.request_timeout
        made = await connect_together(endpoint, missing, timeout=_ATTEMPT_TIMEOUT, request_timeout=timeout)
        try:
            await self._let_wakes_end()
        except BaseException:
            await close_all(made)
            raise
        if change := made[0].info.change_since(self.info) or self._cannot_share(made[0]):
            await close_all(made)
            self._fail(change)
            return
        self._admit(made)

    def _cannot_share(self, connection: NbdConnection) -> str:
        several = self._wanted > 1 and not connection.info.capabilities.multi_conn
        return "it no longer takes several connections" if several else ""

    async def _let_wakes_end(self) -> None:
        """The server answers again: now it has to finish with what was given up (rule 6)."""
        deadline = self._loop.time() + _WAKE_SECONDS
        while self._wakes:
            await self._wakes[0].ended(max(deadline - self._loop.time(), 0))
            del self._wakes[0]

    def _admit(self, made: Sequence[NbdConnection]) -> None:
        """Use new connections, those that still live, as a session."""
        alive = [connection for connection in made if connection.is_alive]
        if not alive:
            raise DeviceError(errno.ENOTCONN, f"{self.name}: the connection is lost")
        if self.generation and not self.connections:
            log.info("%s: connected again", self.name)
        session = Session(alive)
        for connection in alive:
            self._session_of[connection] = session
            connection.on_gone, connection.on_hung = self._gone, self._hung
        self.connections = [*self.connections, *alive]
        self.generation += 1
        self._trouble = None
        self._down.clear()
        self._settle()
        self._tell()

    # --- failing ---------------------------------------------------------------------------------------------------

    def _raise_if_over(self) -> None:
        if self._closed:
            raise DeviceError(errno.ENOTCONN, f"{self.name}: the connection is closed")
        if self._failure is not None:
            raise self._failure

    def _raise_if_lost(self) -> None:
        if self.losses != self._acknowledged:
            raise DeviceError(
                errno.ESTALE, f"{self.name}: the connection was lost, and with it perhaps what had been written and not flushed"
            )

    def _not_connected(self) -> DeviceError:
        why = "" if self._trouble is None else f" ({self._trouble.reason})"
        return DeviceError(errno.ENOTCONN, f"{self.name}: the connection is lost{why}")
