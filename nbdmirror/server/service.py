"""Service: the requests of one client that has opened an export, from the protocol core to the disk and back.

Rules:
1. Everything that one receive brought is served as one batch and answered by one write. A task is started only for a
   request that cannot be answered at once; a task per request would cost more than the request.
2. What is in flight is bounded in count and bytes, and a client that does not read its replies is not read from: whatever
   it does, it holds a bounded amount of memory. Requests of more than `budget.LARGE` bytes take it from what all connections
   share, before their buffer is made and until their reply is on its way.
3. A request that was accepted is finished, also when the client has gone: a write half done would be worse than one
   unasked for. Only its reply is dropped. A large READ that still waits for its turn then is not begun.
"""

from __future__ import annotations

import asyncio
import logging
from enum import Enum
from typing import TYPE_CHECKING, Any, Final, Protocol, cast

from nbdmirror.protocol.constants import CMD_DISC, CMD_READ, CMD_WRITE, ESHUTDOWN
from nbdmirror.protocol.messages import DONE, Refusal, Request
from nbdmirror.protocol.receiver import IN_WINDOW
from nbdmirror.server.budget import LARGE, Budget, Holder
from nbdmirror.units import KiB, MiB

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from nbdmirror.protocol.connection import ServerConnection
    from nbdmirror.protocol.messages import Answer
    from nbdmirror.server.export import OpenExport
    from nbdmirror.server.shared import Shared

_log: Final = logging.getLogger(__name__)

# QEMU and nbdkit serve 16 requests of a connection at a time; more only helps a disk that sorts a deep queue.
MAX_IN_FLIGHT: Final = 64
# Of requests that are not large: 16 of the largest of them.
MAX_BYTES_IN_FLIGHT: Final = 16 * MiB
# Replies gathered in one batch before they are sent, so a batch of large reads starts to travel early.
_BATCH_BYTES: Final = 512 * KiB
_TOO_LATE: Final = Refusal(ESHUTDOWN, "the server is shutting down")


class After(Enum):
    """What is to be done after a batch."""

    READ_ON = "all of it has been served"
    HOLD = "what is left has to wait until something is done"
    CLOSE = "the client said goodbye"


class Link(Holder, Protocol):
    """The session, as far as serving needs it."""

    write_paused: bool

    @property
    def peer(self) -> str:
        """The client's name, for the log."""

    @property
    def is_gone(self) -> bool:
        """Whether the client has no connection any more."""

    def send(self) -> None:
        """Send what the core has queued."""

    def pump(self) -> None:
        """Serve what has been received, and send the answers."""

    def served(self) -> None:
        """A task has ended: send its answer, and go on."""

    def abort(self) -> None:
        """Hang up."""


class Service:
    """`opened` as the client of `connection` uses it."""

    def __init__(self, connection: ServerConnection, opened: OpenExport, shared: Shared, link: Link) -> None:
        self.opened = opened
        self._tally = opened.export.tally
        self.working = 0  # tasks that do not wait for their turn
        self._connection = connection
        self._link = link
        self._buffers = shared.buffers
        self._serve_now: Callable[[Request], Answer | None] = opened.serve_now
        self._share = Share(shared.budget, link)
        self._tasks: set[asyncio.Task[None]] = set()
        self._bytes_in_flight = 0

    @property
    def in_flight(self) -> int:
        """How many accepted requests have not been answered."""
        return len(self._tasks)

    def serve_batch(self) -> After:
        """Serve what has been received, as far as the bounds allow."""
        connection, serve_now = self._connection, self._serve_now
        next_request, reply_content, reply_done = connection.next_request, connection.reply_content, connection.reply_done
        reads = read = writes = written = 0
        early = _BATCH_BYTES
        is_full = self._is_full()
        try:
            while not is_full:
                request = next_request()
                if request is None:
                    if not connection.awaits_room:
                        return After.READ_ON
                    is_full = not self._has_room(connection.awaits_room)
                    continue
                if request[0] == CMD_DISC:
                    return After.CLOSE
                answer = serve_now(request)
                if answer is DONE:  # at once, so it is a WRITE
                    reply_done(request)
                    writes += 1
                    written += request[4]
                    if request[4] > IN_WINDOW:
                        self._give_back(request)
                elif type(answer) is bytearray:
                    reply_content(request, answer)
                    reads += 1
                    read += request[4]
                    if read > early:
                        self._link.send()
                        early = read + _BATCH_BYTES
                        is_full = self._is_full()
                elif answer is not None:
                    connection.reply(request, answer)
                    self._tally.add(request, answer)
                    if request.command == CMD_WRITE:
                        self._share.incoming_ends()
                else:
                    self._defer(request)
                    is_full = self._is_full()
        finally:
            self._tally.add_batch(reads, read, writes, written)
        return After.HOLD

    def _give_back(self, request: Request) -> None:
        """Keep the buffer of a payload that has been written for the next one."""
        if request.payload is not None:
            self._buffers.give([cast("bytearray", request.payload.obj)])

    def _is_full(self) -> bool:
        return (
            self._link.write_paused
            or self._share.is_waiting
            or len(self._tasks) >= MAX_IN_FLIGHT
            or self._bytes_in_flight >= MAX_BYTES_IN_FLIGHT
        )

    # --- in tasks --------------------------------------------------------------------------------------------------

    def _defer(self, request: Request) -> None:
        """Serve a request that has to wait for something in a task of its own."""
        if request.payload is not None and request.length <= IN_WINDOW:
            request = request.detached()
        length = request.length if request.command in (CMD_READ, CMD_WRITE) else 0
        work: Coroutine[Any, Any, None]
        if length <= LARGE:
            self._bytes_in_flight += length
            work = self._serve(request, length)
        elif request.command == CMD_WRITE:
            self._share.incoming = 0
            work = self._serve_large_write(request)
        else:
            work = self._serve_large_read(request, self._share.ask(length))
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        self._tally.in_flight += 1
        task.add_done_callback(self._landed)

    def _landed(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._tally.in_flight -= 1

    async def _serve(self, request: Request, weight: int) -> None:
        await self._answer(request)
        self._bytes_in_flight -= weight
        self._ends()

    async def _serve_large_write(self, request: Request) -> None:
        await self._answer(request)
        self._share.budget.release(self._link, request.length)
        self._ends()

    async def _serve_large_read(self, request: Request, turn: asyncio.Future[None] | None) -> None:
        if turn is not None:
            await turn
            self._share.turn = None
        if self._link.is_gone:
            self._share.budget.release(self._link, request.length)
            return
        await self._answer(request)
        self._share.unsent += request.length
        self._ends()
        if not self._link.write_paused:
            self._share.unsent_ends()

    async def _answer(self, request: Request) -> None:
        self.working += 1
        try:
            answer = await self.opened.serve(request)
            self._connection.reply(request, answer)
            self._tally.add(request, answer)
        except Exception:
            _log.exception("%s: dropped because of a fault in the server while serving %r", self._link.peer, request)
            self._link.abort()
        finally:
            self.working -= 1

    def _ends(self) -> None:
        """The task that is running has done its work."""
        task = asyncio.current_task()
        assert task is not None
        self._tasks.discard(task)
        self._link.served()

    # --- large payloads --------------------------------------------------------------------------------------------

    def _has_room(self, length: int) -> bool:
        """Whether the large payload that comes next may come now; if not, the session goes on as soon as it may."""
        turn = self._share.ask(length)
        if turn is None:
            self._share.incoming = length
            self._connection.admit_payload()
            return True
        turn.add_done_callback(lambda done: None if done.cancelled() else self._admit_payload(length))
        return False

    def _admit_payload(self, length: int) -> None:
        self._share.turn = None
        self._share.incoming = length
        if self._link.is_gone:
            self._share.incoming_ends()
        else:
            self._connection.admit_payload()
            self._link.pump()

    # --- what the session tells ------------------------------------------------------------------------------------

    def shut_down(self) -> None:
        """Refuse what comes from now on."""
        self._serve_now = _refuse_late

    def all_sent(self) -> None:
        """The client has taken nearly all replies."""
        self._share.unsent_ends()

    def connection_lost(self) -> None:
        """The client has gone; what it has in flight goes on."""
        if (unfinished := self._connection.unfinished) is not None:
            self.opened.abandon(unfinished)
        self._share.incoming_ends()
        self._share.unsent_ends()

    async def wait_idle(self) -> None:
        """Wait until nothing is in flight any more."""
        while self._tasks:
            await asyncio.wait(set(self._tasks))


class Share:
    """One connection's part of the budget, by what it is for: a payload that comes, and replies that the transport holds.

    A request that is being worked on has its part in nobody's name: its task releases it.
    """

    __slots__ = ("_holder", "budget", "incoming", "turn", "unsent")

    def __init__(self, budget: Budget, holder: Holder) -> None:
        self.budget = budget
        self._holder = holder
        self.turn: asyncio.Future[None] | None = None
        self.incoming = 0
        self.unsent = 0

    @property
    def is_waiting(self) -> bool:
        """Whether a request waits for its turn: those behind it wait, too."""
        return self.turn is not None

    def ask(self, length: int) -> asyncio.Future[None] | None:
        """See Budget.acquire."""
        self.turn = self.budget.acquire(self._holder, length)
        return self.turn

    def incoming_ends(self) -> None:
        """The payload comes no more, or was refused."""
        length, self.incoming = self.incoming, 0
        if length:
            self.budget.release(self._holder, length)

    def unsent_ends(self) -> None:
        """The replies are on their way."""
        length, self.unsent = self.unsent, 0
        if length:
            self.budget.release(self._holder, length)


def _refuse_late(_request: Request) -> Refusal:
    return _TOO_LATE
