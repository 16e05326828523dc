"""MirrorJob: copies what is dirty until source and target are in step, keeps them so, and hands over.

Rules:
1. Chunks are taken, then the source is asked for their block status, then they are read (SyncState's rule 2); units that were
   planned are given back when the guest has written to them since, so a stale status is never acted on.
2. READY is said once, after a moment at which nothing was dirty or being copied, and after the target was flushed. At
   completion the source is drained first, so that what is then copied and flushed stays so until the exports have moved.
3. A failed unit is dirty again before anything else happens; the guest's own requests never fail because of the job.
4. A guest that rewrites faster than passes get shorter is held back in turns of HOLD_SECONDS, but only where that can
   succeed soon; a slow target never slows a guest for long.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal

from nbdmirror.bitmap.dirty import DirtyBitmap
from nbdmirror.bitmap.recorder import WriteRecorder
from nbdmirror.bitmap.sync_state import SyncState
from nbdmirror.errors import DeviceError, StateError
from nbdmirror.extents import ExtentList
from nbdmirror.jobs.job import Cancelled, Job
from nbdmirror.jobs.status import JobStatus, JobVerb, check_verb
from nbdmirror.mirror import pace
from nbdmirror.mirror.copier import Copier, CopyFailed
from nbdmirror.mirror.plan import Unit, plan
from nbdmirror.mirror.progress import Progress
from nbdmirror.mirror.throttle import Throttle
from nbdmirror.mirror.zero_map import ZeroMap
from nbdmirror.units import GiB, KiB

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from nbdmirror.devices.base import BlockDevice
    from nbdmirror.devices.tracked import TrackedDevice
    from nbdmirror.jobs.job import Emit
    from nbdmirror.mirror.options import MirrorOptions

_log: Final = logging.getLogger(__name__)

# What one question for block status covers: long holes are one answer, and what is planned is still fresh when begun.
_RUN: Final = GiB
# A run shorter than this is copied without asking: reading a chunk and looking for zeroes costs less than the answer of a
# thread, for which all other copying waits. With asking, a guest that rewrote chunks at random was caught up with at a third of
# the rate.
_WORTH_ASKING: Final = 512 * KiB
# How long a job that ends waits for requests to a target that does not answer.
_ABANDON_SECONDS: Final = 2.0


class MirrorJob(Job):
    """Mirrors `source` to `target`; `pivot` is called, drained, when the job was told to complete and has."""

    kind: ClassVar[str] = "mirror"

    def __init__(
        self,
        job_id: str,
        source: TrackedDevice,
        target: BlockDevice,
        emit: Emit,
        *,
        pivot: Callable[[], None],
        options: MirrorOptions,
        speed: int = 0,
        auto_finalize: bool = True,
        auto_dismiss: bool = True,
    ) -> None:
        super().__init__(job_id, emit, speed=speed, auto_finalize=auto_finalize, auto_dismiss=auto_dismiss)
        self.source = source
        self.target = target
        self.options = options
        self.counters = Progress()
        granularity = max(options.granularity, target.limits.minimum, source.limits.minimum)
        self.state = SyncState(DirtyBitmap(source.size, granularity))
        self._recorder = WriteRecorder(self.state, self._on_write)
        self._zero_map = ZeroMap(source.size, granularity)
        self._copier = Copier(source, target, self._zero_map, self.counters, options.copy)
        self._geometry = self._copier.geometry(granularity)
        self._throttle = Throttle(speed)
        self._pivot = pivot
        self._planned: deque[Unit] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self._failure: CopyFailed | None = None
        self._ending: Literal["", "complete", "cancel"] = ""
        self._finishing = False
        self._waiting_for_write = False

    # --- the run ---------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """See Job. No write that comes after this is missed, not even before the task first runs."""
        self.source.observe(self._recorder)
        super().start()

    async def run(self) -> None:
        """See Job."""
        try:
            self.options.check_sizes(self.source.size, self.target.size)
            await self._prepare()
            await self._converge()
            await self._flush_target()
            self._become_ready()
            await self._stay_in_step()
            await self._finish()
        except CopyFailed as failure:
            raise failure.cause from None
        finally:
            await self.quiesce()  # until then what is copied and written still counts
            self.source.forget(self._recorder)

    async def _prepare(self) -> None:
        if self.options.sync != "none":
            self.state.dirty.fill()
        if self.options.target_is_zero:
            self._zero_map.set_zero(0, self.source.size)
        elif self.options.sync != "none":
            try:
                await self.unless_cancelled(self._copier.learn_zeroes())
            except DeviceError as error:
                _log.info("job '%s': the target does not tell its extents (%s); zeroes are written everywhere", self.id, error)

    async def _converge(self) -> None:
        """Copy, pass after pass, until there is a moment at which nothing is left."""
        left = self.state.remaining_bytes
        while True:
            started, before = time.monotonic(), self.counters.offset
            if not await self._sweep(budget=left):
                await self.nap(pace.RELEASE_SECONDS)  # all that is dirty is being written just now
            if self.state.is_synced:
                return
            rate = (self.counters.offset - before) / max(time.monotonic() - started, 1e-6)
            was_left, left = left, self.state.remaining_bytes
            worth_it = not self.speed and left > was_left * pace.SHRINKING and left <= rate * pace.CLOSE_IN_SECONDS
            if worth_it and await self._close_in():
                return

    async def _close_in(self) -> bool:
        """Hold the guest's writes for short turns. True once nothing is left, False if the turns get nowhere."""
        left = self.state.remaining_bytes
        for turn in range(pace.CLOSE_IN_TURNS):
            async with self._guest_held():
                await self._sweep(deadline=time.monotonic() + pace.HOLD_SECONDS)
                if self.state.is_synced:
                    return True
            await self.nap(pace.RELEASE_SECONDS)
            if turn % pace.CLOSE_IN_CHECK == pace.CLOSE_IN_CHECK - 1:
                was_left, left = left, self.state.remaining_bytes
                if left > was_left * pace.CLOSING_IN:
                    return False
        return False

    async def _stay_in_step(self) -> None:
        """READY: copy what is written, until told to end."""
        while not self._ending:
            await self._sweep()
            if self.state.is_synced and not self._ending:
                self._waiting_for_write = True
                await self._woken()
                self._waiting_for_write = False
            if not self._ending:
                await self.nap(pace.GATHER_SECONDS)
            await self.pause_point()

    async def _finish(self) -> None:
        """Drain the source, copy what is left, flush; then pivot, or leave the copy as it is."""
        await self._shrink()
        async with self._guest_held():
            self._finishing = True
            while not self.state.is_synced:
                await self._sweep()
            await self._flush_target()
            self.cancel_point()
            await self.conclude()
            self.source.forget(self._recorder)
            if self._ending == "complete":
                self._pivot()
        self.succeed()

    async def _shrink(self) -> None:
        """Before draining: passes for as long as they make what is left smaller, so that the drain is short."""
        left = self.state.remaining_bytes
        while left > pace.SMALL:
            await self._sweep(budget=left)
            was_left, left = left, self.state.remaining_bytes
            if left > was_left * pace.SHRINKING:
                return

    @asynccontextmanager
    async def _guest_held(self) -> AsyncIterator[None]:
        """Inside, the source is drained. A source that does not finish its writes can't keep the job from being cancelled."""
        async with AsyncExitStack() as stack:
            await self.unless_cancelled(stack.enter_async_context(self.source.drained()))
            yield

    async def _flush_target(self) -> None:
        self.state.flush_begins()
        try:
            if self.options.flush:
                await self.unless_cancelled(self.target.flush())
        except Cancelled:
            self.state.target_lost()
            raise
        except DeviceError as error:
            self.state.target_lost()
            self._report("write")
            raise CopyFailed("write", error) from error
        self.state.flush_ends()

    # --- copying ---------------------------------------------------------------------------------------------------

    async def _sweep(self, budget: int | None = None, deadline: float | None = None) -> int:
        """Copy until nothing more can be taken, `budget` bytes were begun or the deadline (monotonic seconds) has passed;
        then wait for what is in flight. Returns the bytes begun; raises CopyFailed.

        While the guest is held back, with a deadline or at the end, pausing has to wait and the rate limit does not count;
        and with a deadline, what the target takes HOLD_SECONDS longer for stays in flight."""
        begun = 0
        held = deadline is not None or self._finishing
        while True:
            if not held:
                await self.pause_point()
            self.cancel_point()
            if self._failure is not None:
                await self.quiesce()
                raise self._failure
            over = (budget is not None and begun >= budget) or (
                deadline is not None and (self._pause_wanted or time.monotonic() > deadline)
            )
            full = len(self._tasks) >= self.options.copy.requests
            unit = None if over or full else await self._next_unit()
            if unit is not None:
                if held or await self._admit(unit):
                    begun += unit.length
                    self._launch(unit)
            elif self._tasks and deadline is None:
                await self._woken()
            elif self._tasks and deadline is not None and (left := deadline + pace.HOLD_SECONDS - time.monotonic()) > 0:
                await self.nap(left)
            else:
                self._give_back_planned()
                return begun

    async def _next_unit(self) -> Unit | None:
        """The next unit to copy, its chunks taken; None when there is none."""
        dirty = self.state.dirty
        while True:
            while self._planned:
                unit = self._planned.popleft()
                span = dirty.span(unit.offset, unit.length)
                if dirty.next_run(*span) is None:
                    return unit
                self.state.settle(*span, copied=False)  # written since it was planned: its status is stale
            run = self.state.take(max(1, _RUN // dirty.granularity))
            if run is None:
                return None
            await self._plan(*run)

    async def _plan(self, first: int, end: int) -> None:
        dirty = self.state.dirty
        offset, length = dirty.range_of(first, end)
        try:
            if length < _WORTH_ASKING:
                extents = ExtentList.all_data(offset, length)
            else:
                extents = await self.unless_cancelled(self._copier.status(offset, length, min(length, dirty.granularity)))
        except DeviceError:
            extents = ExtentList.all_data(offset, length)  # status is advice: what fails to tell is copied
        except BaseException:
            self.state.give_back(first, end)
            raise
        planned = first
        for unit in plan(extents, self._geometry):
            self._planned.append(unit)
            planned = dirty.span(unit.offset, unit.length)[1]
        if planned < end:
            self.state.give_back(planned, end)

    async def _admit(self, unit: Unit) -> bool:
        """Wait for the rate limit. False when the job is to pause or end instead; the unit is given back then."""
        speed, until = -1, 0.0
        while True:
            now = time.monotonic()
            if speed != self._throttle.speed:  # at first, and when the limit has been changed meanwhile
                speed = self._throttle.speed
                until = now + self._throttle.delay(unit.data_length, now)
            if until <= now:
                return True
            if self._pause_wanted or self._cancel_wanted or self._failure is not None:
                self._give_back(unit)
                return False
            await self.nap(until - now)

    def _launch(self, unit: Unit) -> None:
        task = asyncio.get_running_loop().create_task(self._copy(unit))
        self._tasks.add(task)
        task.add_done_callback(self._landed)

    def _landed(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self.wake()

    async def _copy(self, unit: Unit) -> None:
        copied, failure = False, None
        try:
            await self._copier.carry_out(unit)
            copied = True
        except CopyFailed as error:
            failure = error
        except Exception:
            _log.exception("job '%s': a fault in nbdmirror while copying %r", self.id, unit)
            failure = CopyFailed("write", DeviceError(0, "internal error"))
        finally:
            self.state.settle(*self.state.dirty.span(unit.offset, unit.length), copied=copied)
        if failure is not None:
            self._fail(failure)
        else:
            self.counters.offset += unit.length

    def _fail(self, failure: CopyFailed) -> None:
        """The first failure ends the job; it is reported once."""
        if self._failure is None:
            self._failure = failure
            self._report(failure.operation)

    def _report(self, operation: str) -> None:
        self._emit("BLOCK_JOB_ERROR", {"device": self.id, "operation": operation, "action": "report"})

    def _give_back(self, unit: Unit) -> None:
        self.state.give_back(*self.state.dirty.span(unit.offset, unit.length))

    def _give_back_planned(self) -> None:
        while self._planned:
            self._give_back(self._planned.pop())

    async def quiesce(self) -> None:
        """See Job. A target that does not answer is waited for only so long when the job ends."""
        self._give_back_planned()
        while self._tasks and not self._cancel_wanted and self._failure is None:
            await self._woken()
        if self._tasks:
            _, late = await asyncio.wait(set(self._tasks), timeout=_ABANDON_SECONDS)
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late)

    def _on_write(self) -> None:
        if self._waiting_for_write:
            self.wake()

    # --- verbs -----------------------------------------------------------------------------------------------------

    def complete(self) -> None:
        """Hand over: drain, copy the rest, flush, pivot."""
        check_verb(self.id, self.status, JobVerb.COMPLETE)
        if self._ending == "cancel":
            raise StateError(f"The active block job '{self.id}' cannot be completed")
        self._ending = "complete"
        self.wake()

    def cancel_gently(self) -> None:
        """After READY: end in step, as a copy of one point in time, without pivot. Before: `cancel`."""
        check_verb(self.id, self.status, JobVerb.CANCEL)
        if not self.is_ready:
            self.cancel()
            return
        if self._pause_wanted:
            raise StateError(f"The block job for device '{self.id}' is currently paused")
        self._ending = self._ending or "cancel"
        self.wake()

    def set_speed(self, speed: int) -> None:
        """See Job; what waits for the old limit goes on by the new one."""
        super().set_speed(speed)
        self._throttle.set_speed(speed, time.monotonic())

    # --- questions -------------------------------------------------------------------------------------------------

    @property
    def progress(self) -> tuple[int, int]:
        """See Job."""
        return self.counters.offset, self.counters.total(self.state.remaining_bytes if self.status != JobStatus.CREATED else 0)

    @property
    def is_busy(self) -> bool:
        """Whether something is being copied right now."""
        return bool(self._tasks)

    def statistics(self) -> dict[str, Any]:
        """Counters in bytes, for people and scripts."""
        now = {"x-dirty-bytes": self.state.dirty.dirty_bytes, "x-in-flight": len(self._tasks)}
        return {**self.counters.statistics(), **now}
