"""ActiveWrites: in copy-mode write-blocking, the guard that carries each of the guest's writes over before it is answered.

Rules:
1. A write waits until nothing else has its chunks; then it goes to the source, then to the target as `carry` says. The guest's
   write fails only if the source does: what the target does not take stays dirty, and is the error policy's business.
2. No guest waits for ever. When a disk has not answered for PATIENCE_SECONDS, the write is answered as the source did it; its
   chunks stay dirty, and are left alone until the target is done with them. That counts as an error of the target.
3. What is under way when the job pauses or ends is marked instead of carried over.
4. Nothing is durable on the target before it is flushed there, FUA or not: only what was flushed leaves the record.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from nbdmirror.devices.tracked import WriteKind
from nbdmirror.errors import DeviceError
from nbdmirror.mirror import carry, pace
from nbdmirror.mirror.plan import plan
from nbdmirror.mirror.trouble import CopyFailed
from nbdmirror.units import GiB

if TYPE_CHECKING:
    from collections.abc import Callable

    from nbdmirror.bitmap.recorder import Ticket, WriteRecorder
    from nbdmirror.bitmap.sync_state import SyncState
    from nbdmirror.devices.tracked import Write
    from nbdmirror.jobs.job import Job
    from nbdmirror.mirror.copier import Copier

_log: Final = logging.getLogger(__name__)

# What is asked of the source's block status at a time.
_RUN: Final = GiB


@dataclass(eq=False, slots=True)
class _Errand:
    """A write on its way to the target; `steps` tells that the target answers."""

    write: Write
    ticket: Ticket
    steps: int = 0


class ActiveWrites:
    """A WriteGuard of the source. `recorder` lines its writes up; `on_success` and `on_failure` hear what came of them."""

    def __init__(
        self,
        job: Job,
        state: SyncState,
        recorder: WriteRecorder,
        copier: Copier,
        on_success: Callable[[int], None],
        on_failure: Callable[[CopyFailed], None],
    ) -> None:
        self._job = job
        self._state = state
        self._recorder = recorder
        self._copier = copier
        self._geometry = copier.geometry(state.dirty.granularity)
        self._on_success = on_success
        self._on_failure = on_failure
        # By the id of the Write, which lives from `before` to `after`.
        self._begun: dict[int, Ticket] = {}
        self._waiting: dict[Ticket, asyncio.Future[None]] = {}
        self.tasks: set[asyncio.Task[None]] = set()

    # --- the guard -------------------------------------------------------------------------------------------------

    def passes(self, offset: int, length: int) -> bool:  # noqa: ARG002
        """See WriteGuard."""
        return not self._recorder.lines_up

    async def before(self, write: Write) -> None:
        """See WriteGuard: wait for the write's turn."""
        ticket = self._recorder.claim(write.offset, write.length)
        if ticket is None:
            return
        if not self._state.may_begin(ticket.active) and not await self._turn(ticket):
            self._recorder.withdraw(write.offset, write.length, ticket)
            if self._recorder.lines_up:
                self._on_failure(self._silence())
            return
        self._state.active_begins(ticket.active)
        self._begun[id(write)] = ticket

    async def _turn(self, ticket: Ticket) -> bool:
        """Wait for it; False where it does not come."""
        turn = self._waiting[ticket] = asyncio.get_running_loop().create_future()
        await asyncio.wait((turn,), timeout=pace.PATIENCE_SECONDS)
        del self._waiting[ticket]
        return self._state.may_begin(ticket.active)

    def advance(self) -> None:
        """Something has let go of its chunks, or writes are only marked now: whoever waited for that goes on."""
        for ticket, turn in self._waiting.items():
            if not turn.done() and (self._state.may_begin(ticket.active) or not self._recorder.lines_up):
                turn.set_result(None)

    async def after(self, write: Write) -> None:
        """See WriteGuard: carry the write over."""
        ticket = self._begun.pop(id(write), None)
        if ticket is None or ticket.is_over or not self._recorder.lines_up:
            return
        ticket.is_carrying = True
        errand = _Errand(write, ticket)
        task = asyncio.get_running_loop().create_task(self._run(errand))
        self.tasks.add(task)
        task.add_done_callback(self._landed)
        while not task.done():
            steps = errand.steps
            await asyncio.wait((task,), timeout=pace.PATIENCE_SECONDS)
            if not task.done() and errand.steps == steps:
                self._state.active_is_late(ticket.active)
                self._on_failure(self._silence())
                return

    async def before_flush(self) -> None:
        """See WriteGuard: a flush of the source is nothing to the target."""

    def _silence(self) -> CopyFailed:
        context = f"no answer from '{self._copier.target.name}' for {pace.PATIENCE_SECONDS:g} s"
        return CopyFailed("write", DeviceError(errno.ETIMEDOUT, context))

    # --- errands ---------------------------------------------------------------------------------------------------

    async def _run(self, errand: _Errand) -> None:
        on_both, failure, length = False, None, 0
        try:
            length = await self._carry(errand)
            on_both = True
        except CopyFailed as error:
            failure = error
        except Exception:
            _log.exception("job '%s': a fault in nbdmirror while carrying over %r", self._job.id, errand.ticket.active)
            failure = CopyFailed("write", DeviceError(0, "internal error"))
        finally:
            self._recorder.carried(errand.ticket, on_both=on_both)
        if failure is not None:
            self._on_failure(failure)
        elif length > 0:
            self._on_success(length)

    def _landed(self, task: asyncio.Task[None]) -> None:
        self.tasks.discard(task)
        self._job.wake()

    async def _carry(self, errand: _Errand) -> int:
        """Returns the bytes of the write that were sent."""
        write, dirty = errand.write, self._state.dirty
        if write.kind is WriteKind.TRIM:
            await self._copy_chunks(errand)
            return write.length
        start, end = carry.to_send(errand.ticket.active, write.offset, write.length, dirty)
        if start >= end:
            return 0
        block = self._geometry.alignment
        first, last = carry.aligned(start, end, block, dirty.size)
        if write.kind is WriteKind.ZERO:
            units = carry.zeroes(start, end, block, dirty.size)
        elif (first, last) == (start, end):
            await self._send(errand, start, end)
            return end - start
        else:
            self._copier.progress.filled += (last - first) - (end - start)
            units = carry.copies(first, last)
        for unit in units:
            await self._copier.carry_out(unit)
            errand.steps += 1
        return end - start

    async def _send(self, errand: _Errand, start: int, end: int) -> None:
        data = memoryview(errand.write.data)
        for at in range(start, end, carry.MOST_DATA):
            stop = min(at + carry.MOST_DATA, end)
            await self._copier.send(data[at - errand.write.offset : stop - errand.write.offset], at)
            errand.steps += 1

    async def _copy_chunks(self, errand: _Errand) -> None:
        active, dirty = errand.ticket.active, self._state.dirty
        at, length = dirty.range_of(active.first, active.end)
        end = at + length
        while at < end:
            length = min(_RUN, end - at)
            extents = await self._copier.status(at, length, min(length, dirty.granularity))
            for unit in plan(extents, self._geometry):
                await self._copier.carry_out(unit)
                errand.steps += 1
                at = unit.end
