"""Transfer: takes what is dirty, plans it and keeps as many copies in flight as the options allow.

Rules:
1. Chunks are taken, then the source is asked for their block status, then they are read (SyncState's rule 2); units that were
   planned are given back when the guest has written to them since, so a stale status is never acted on.
2. Whatever was taken is settled: when its copy has landed, or given back. A unit that failed is dirty again before anybody
   hears of it.
3. A chunk that is never idle is waited for in the line of active writes, within a sweep and no longer: whoever drains the
   source waits for those writes, which would wait for the sweep.
4. What is not begun does not wait with its chunks taken: not for the rate limit, not for memory, not for the end of a pause.
"""

from __future__ import annotations

import asyncio
import bisect
import logging
import time
from typing import TYPE_CHECKING, Final

from nbdmirror.errors import DeviceError
from nbdmirror.extents import ExtentList
from nbdmirror.mirror.plan import Copy, Unit, plan
from nbdmirror.mirror.throttle import Throttle
from nbdmirror.mirror.trouble import CopyFailed
from nbdmirror.units import GiB, KiB, MiB

if TYPE_CHECKING:
    from collections.abc import Callable

    from nbdmirror.bitmap.sync_state import ActiveWrite, SyncState
    from nbdmirror.jobs.job import Job
    from nbdmirror.mirror.copier import Copier
    from nbdmirror.mirror.trouble import Trouble

_log: Final = logging.getLogger(__name__)

# What one question for block status covers: long holes are one answer. Where a guest writes to what is planned before it is
# begun, the status is stale and had been asked in vain: then less is asked for at a time, at first and after each such unit.
_LONGEST_RUN: Final = GiB
_SHORTEST_RUN: Final = 8 * MiB
# A run shorter than this is copied without asking: reading a chunk and looking for zeroes costs less than the answer of a
# thread, for which all other copying waits. With asking, a guest that rewrote chunks at random was caught up with at a third of
# the rate.
_WORTH_ASKING: Final = 512 * KiB


class Transfer:
    """Copies by `state` through `copier`, at the pace of `job`: its pauses, its end, its speed.

    `on_success` hears of each unit that has arrived, in bytes, and `on_failure` of each that has not; `trouble` says what
    came of that. `on_free` is called when chunks that were taken are so no longer.
    """

    def __init__(
        self,
        job: Job,
        state: SyncState,
        copier: Copier,
        trouble: Trouble,
        on_success: Callable[[int], None],
        on_failure: Callable[[CopyFailed], None],
        on_free: Callable[[], None],
    ) -> None:
        self.throttle = Throttle(job.speed)
        self._job = job
        self._state = state
        self._copier = copier
        self._geometry = copier.geometry(state.dirty.granularity)
        self._trouble = trouble
        self._on_success = on_success
        self._on_failure = on_failure
        self._on_free = on_free
        # In descending order: the next one is the last.
        self._planned: list[Unit] = []
        self.tasks: set[asyncio.Task[None]] = set()
        # Where active writes leave nothing idle that is dirty.
        self._place: ActiveWrite | None = None
        # The most that is taken at a time, in bytes.
        self._run = _SHORTEST_RUN
        # Bytes of data that the units in flight may hold in memory.
        self._buffered = 0

    @property
    def in_flight(self) -> int:
        """How many units are being copied."""
        return len(self.tasks)

    @property
    def is_in_line(self) -> bool:
        """Whether a chunk is waited for that active writes have."""
        return self._place is not None

    # --- sweeps ----------------------------------------------------------------------------------------------------

    async def sweep(self, budget: int | None = None) -> int:
        """Copy until nothing more can be taken, or `budget` bytes were begun; then wait for what is in flight.

        Returns the bytes begun. Stays in it while the job is paused. Raises Cancelled and CopyFailed.
        """
        begun = 0
        while True:
            await self.rest()
            begun += self._take_turn()
            unit = None if budget is not None and begun >= budget else await self._next_unit()
            if unit is None and not self.tasks and self._place is None:
                self._give_back_planned()
                return begun
            if unit is None:
                if not self._has_turn():  # which may have come while the status was asked for
                    await self._job.woken()
            elif self._is_full_for(unit):
                self._planned.append(unit)
                await self._job.woken()
            elif delay := self._delay(unit):
                self._planned.append(unit)
                await self._job.nap(delay)
            else:
                begun += unit.length
                self.throttle.charge(unit.data_length, time.monotonic())
                self._launch(unit)

    async def rest(self) -> None:
        """Stay here while the job is paused, or waits for a disk to recover. Raises Cancelled and CopyFailed."""
        while True:
            await self._job.pause_point()
            self._check()
            delay = self._trouble.delay(time.monotonic())
            if not delay:
                return
            await self._job.nap(delay)

    async def sweep_held(self, deadline: float, grace: float) -> None:
        """The same while the guest is held back, until the deadline (monotonic seconds) at the latest.

        The rate limit does not count. What the target takes `grace` seconds longer for stays in flight. It ends at once
        where there is something to wait for. Raises Cancelled and CopyFailed.
        """
        while True:
            self._job.cancel_point()
            self._check()
            self._take_turn()
            left = deadline - time.monotonic()
            unit = None if left < 0 or self.is_to_rest() else await self._next_unit()
            if unit is not None and not self._is_full_for(unit):
                self._launch(unit)
                continue
            if unit is not None:
                self._planned.append(unit)
            if not self.tasks or left + grace < 0:
                self._leave_line()
                self._give_back_planned()
                return
            if not self._has_turn():
                await self._job.nap(left + grace if unit is None else left)

    def is_to_rest(self) -> bool:
        """Whether there is something to wait for: the end of a pause, or a disk to recover."""
        return self._job.is_to_pause() or self._trouble.failure is not None or self._trouble.delay(time.monotonic()) > 0

    def _check(self) -> None:
        if self._trouble.failure is not None:
            raise self._trouble.failure

    def _delay(self, unit: Unit) -> float:
        return self.throttle.delay(time.monotonic()) if unit.data_length else 0.0

    def _is_full_for(self, unit: Unit) -> bool:
        if len(self.tasks) >= self._copier.options.requests:
            return True
        return 0 < self._buffered > self._copier.buffer - unit.data_length

    # --- what is next ----------------------------------------------------------------------------------------------

    async def _next_unit(self) -> Unit | None:
        """The next unit to copy, its chunks taken; None when there is none."""
        dirty = self._state.dirty
        while True:
            while self._planned:
                unit = self._planned.pop()
                span = dirty.span(unit.offset, unit.length)
                if dirty.next_run(*span) is None:
                    return unit
                self._state.settle(*span, copied=False)  # written since it was planned: its status is stale
                self._run = _SHORTEST_RUN
                self._on_free()
            run = self._state.take(max(1, self._run // dirty.granularity))
            if run is None:
                self._place = self._place or self._state.wait_in_line()
                return None
            self._run = min(2 * self._run, _LONGEST_RUN)
            await self._plan(*run)

    def _take_turn(self) -> int:
        """Copy the chunk that was waited for, if its turn has come: at once, for others wait behind. Returns its bytes."""
        place, dirty = self._place, self._state.dirty
        if place is None or not self._has_turn():
            return 0
        self._place = None
        run = self._state.take_turn(place)
        if run is None:
            self._on_free()
            return 0
        offset, length = dirty.range_of(*run)
        self.throttle.charge(length, time.monotonic())
        self._launch(Unit(offset, length, (Copy(offset, length),)))
        return length

    def _has_turn(self) -> bool:
        """Whether the chunk that was waited for can be taken, or has been covered meanwhile."""
        place = self._place
        return place is not None and (self._state.may_begin(place) or not self._state.dirty.is_dirty(place.first))

    def _leave_line(self) -> None:
        if self._place is not None:
            self._state.leave_line(self._place)
            self._place = None
            self._on_free()

    async def _plan(self, first: int, end: int) -> None:
        dirty = self._state.dirty
        offset, length = dirty.range_of(first, end)
        try:
            if length < _WORTH_ASKING:
                extents = ExtentList.all_data(offset, length)
            else:
                extents = await self._job.unless_cancelled(self._copier.status(offset, length, min(length, dirty.granularity)))
        except BaseException:
            self._state.give_back(first, end)
            self._on_free()
            raise
        planned = first
        for unit in plan(extents, self._geometry):
            self._planned.append(unit)
            planned = dirty.span(unit.offset, unit.length)[1]
        self._planned.reverse()
        if planned < end:
            self._state.give_back(planned, end)
        for active in self._state.waiting:
            self.make_way(active.first, active.end)

    def make_way(self, first: int, end: int) -> None:
        """A write waits for chunks `[first, end)`: what was planned for them and not begun is given back."""
        offset, length = self._state.dirty.range_of(first, end)
        low = bisect.bisect_right(self._planned, -(offset + length), key=lambda unit: -unit.offset)
        high = bisect.bisect_left(self._planned, -offset, key=lambda unit: -unit.end)
        for unit in self._planned[low:high]:
            self._state.settle(*self._state.dirty.span(unit.offset, unit.length), copied=False)
        del self._planned[low:high]
        self._on_free()

    def _give_back_planned(self) -> None:
        for unit in self._planned:
            self._state.give_back(*self._state.dirty.span(unit.offset, unit.length))
        self._planned.clear()
        self._on_free()

    # --- one copy --------------------------------------------------------------------------------------------------

    def _launch(self, unit: Unit) -> None:
        self._buffered += unit.data_length
        task = asyncio.get_running_loop().create_task(self._copy(unit))
        self.tasks.add(task)
        task.add_done_callback(self._landed)

    def _landed(self, task: asyncio.Task[None]) -> None:
        self.tasks.discard(task)
        self._job.wake()

    async def _copy(self, unit: Unit) -> None:
        copied, failure = False, None
        try:
            await self._copier.carry_out(unit)
            copied = True
        except CopyFailed as error:
            failure = error
        except Exception:
            _log.exception("job '%s': a fault in nbdmirror while copying %r", self._job.id, unit)
            failure = CopyFailed("write", DeviceError(0, "internal error"))
        finally:
            self._buffered -= unit.data_length
            self._state.settle(*self._state.dirty.span(unit.offset, unit.length), copied=copied)
            self._on_free()
        if failure is not None:
            self._on_failure(failure)
        else:
            self._on_success(unit.length)

    def give_back(self) -> None:
        """Let go of everything that was not begun."""
        self._leave_line()
        self._give_back_planned()
