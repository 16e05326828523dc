"""MirrorJob: copies what is dirty until source and target are in step, keeps them so, and hands over.

    start     observe the source's writes; take over the bitmap that is worked by, if there is one
    converge  `convergence`: pass after pass, by `transfer`, which `copier` carries out
    READY     what is written is copied soon after, or before it is answered (`active`); the copy mode can be changed
    end       `ending`: drain, copy the rest, flush, hand over

Rules:
1. READY is said once, after a moment at which nothing was dirty or being copied, and after the target was flushed.
2. The guest's own requests never fail because of the job. What fails is dirty again, and `trouble` says what to do about it.
3. Until the target is known and the job goes on, and while it pauses or a disk recovers, writes are only marked.
4. While the target is out of reach the job pauses by itself (`outage`), and goes on by itself.
5. However the job ends, the source and the bitmap are given back, and the bitmap holds no less than what is still to be copied.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal

from nbdmirror.bitmap.dirty import DirtyBitmap
from nbdmirror.bitmap.recorder import WriteRecorder
from nbdmirror.bitmap.sync_state import SyncState
from nbdmirror.errors import DeviceError, StateError
from nbdmirror.jobs.job import Job
from nbdmirror.jobs.status import VERBS, JobStatus, JobVerb, check_verb
from nbdmirror.mirror import pace
from nbdmirror.mirror.active import ActiveWrites
from nbdmirror.mirror.convergence import Convergence
from nbdmirror.mirror.copier import Copier
from nbdmirror.mirror.ending import Ending
from nbdmirror.mirror.flusher import Flusher
from nbdmirror.mirror.options import CopyMode
from nbdmirror.mirror.outage import Outage
from nbdmirror.mirror.progress import Progress
from nbdmirror.mirror.quiet import until_quiet
from nbdmirror.mirror.rates import Rates
from nbdmirror.mirror.transfer import Transfer
from nbdmirror.mirror.trouble import Action, CopyFailed, Trouble
from nbdmirror.mirror.verify import verify
from nbdmirror.mirror.zero_map import ZeroMap

if TYPE_CHECKING:
    from collections.abc import Callable

    from nbdmirror.devices.base import BlockDevice
    from nbdmirror.devices.tracked import TrackedDevice
    from nbdmirror.jobs.job import Emit
    from nbdmirror.mirror.options import MirrorOptions
    from nbdmirror.mirror.outage import TargetLink
    from nbdmirror.mirror.record import Record

_log: Final = logging.getLogger(__name__)

_CAN_PAUSE: Final = VERBS[JobVerb.PAUSE]


class MirrorJob(Job):
    """Mirrors `source` to `target`. `pivot` is called, drained, when the job was told to complete and has; `seal` where it was
    told to complete in place."""

    kind: ClassVar[str] = "mirror"

    def __init__(
        self,
        job_id: str,
        source: TrackedDevice,
        target: BlockDevice,
        emit: Emit,
        *,
        pivot: Callable[[], None],
        seal: Callable[[], None],
        options: MirrorOptions,
        link: TargetLink | None = None,
        record: Record | None = None,
        speed: int = 0,
        auto_finalize: bool = True,
        auto_dismiss: bool = True,
    ) -> None:
        super().__init__(job_id, emit, speed=speed, auto_finalize=auto_finalize, auto_dismiss=auto_dismiss)
        self.source = source
        self.target = target
        self.options = options
        self.counters = Progress()
        self.record = record
        granularity = max(options.granularity, target.limits.minimum, source.limits.minimum)
        if record is not None:
            granularity = record.bitmap.bits.granularity
        self.state = SyncState(DirtyBitmap(source.size, granularity))
        self._zero_map = ZeroMap(source.size, granularity)
        self._copier = Copier(source, target, self._zero_map, self.counters, options.copy)
        self._trouble = Trouble(options.on_source_error, options.on_target_error)
        self._transfer = Transfer(self, self.state, self._copier, self._trouble, self._settled, self._fail, self._freed)
        self._recorder = WriteRecorder(self.state, self._on_write, self._transfer.make_way)
        self._active = ActiveWrites(self, self.state, self._recorder, self._copier, self._settled, self._fail)
        self.copy_mode = options.copy_mode
        self._outage = Outage(link, options.reconnect_seconds, self._on_loss, self._on_link_change)
        self._flusher = Flusher(
            self, self.state, target, record, self._on_loss, self._fail, is_wanted=options.flush, may_be_lost=link is not None
        )
        self._convergence = Convergence(self, source, self.state, self._transfer, self.counters)
        self._final = Ending(
            self, self.state, self._transfer, self._flusher, self._convergence, self.counters, self._trouble, self._fail
        )
        self._pivot = pivot
        self._seal = seal
        self._ending: Literal["", "complete", "in place", "cancel"] = ""
        self._waiting_for_write = False
        self._phase: Literal["prepare", "copy", "follow", "finish"] = "prepare"
        self._rates = Rates()
        # Whether writes may be carried over: what the target holds is known, and the job goes on.
        self._is_under_way = False
        self._target_answers = True
        self._has_handed_over = False

    # --- the run ---------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """See Job. No write that comes after this is missed, not even before the task first runs."""
        self._outage.attach()
        self.source.observe(self._recorder)
        if self.record is not None:
            self.record.hand_over(self.state, f"job {self.id}")
        super().start()
        if self.copy_mode is CopyMode.WRITE_BLOCKING:
            self.source.guard(self._active)

    async def run(self) -> None:
        """See Job."""
        try:
            self.options.check_sizes(self.source.size, self.target.size)
            await self._prepare()
            self._is_under_way = True
            self._steer()
            self._phase = "copy"
            await self._converge()
            self._phase = "follow"
            self._become_ready()
            await self._stay_in_step()
            self._phase = "finish"
            await self._final.reach(self.options.pending_seconds, self._hand_over)
            self.succeed()
        except CopyFailed as failure:
            raise failure.cause from None
        finally:
            self._is_under_way = False
            self._steer()
            await self.quiesce()  # until then what is copied and written still counts
            await self._let_go()

    async def _let_go(self) -> None:
        """Leave the source, and the bitmap that was worked by, to others."""
        if self._has_handed_over:
            return
        if self._target_answers:
            await self._flusher.last()
        self._outage.detach()
        self._stop_listening()
        if self.record is not None:
            self.record.failed(self.state)
            self.record.give_back()

    def _stop_listening(self) -> None:
        self.source.unguard(self._active)
        self.source.forget(self._recorder)
        self._recorder.missed = True

    async def _prepare(self) -> None:
        if self.options.sync != "none" and self.record is None:
            self.state.dirty.fill()
        copies_all = self.state.dirty.count == self.state.dirty.chunks > 0
        if self.options.verify:
            record = self.record.bitmap.bits if self.record is not None else None
            await self.unless_cancelled(verify(self.source, self.target, self.state, record))
        if self.options.target_is_zero:
            self._zero_map.set_zero(0, self.source.size)
        elif copies_all:
            try:
                await self.unless_cancelled(self._copier.learn_zeroes())
            except DeviceError as error:
                _log.info("job '%s': the target does not tell its extents (%s); zeroes are written everywhere", self.id, error)

    async def _converge(self) -> None:
        """Copy until there is a moment at which nothing is left; and flush."""
        while True:
            await self._convergence.catch_up()
            if await self._flusher.flush():
                return
            await self._transfer.rest()

    async def _stay_in_step(self) -> None:
        """READY: copy what is written, until told to end."""
        while not self._ending:
            # Pass by pass: under a guest that never stops writing one sweep of everything would never end.
            await self._transfer.sweep(max(self.state.remaining_bytes, pace.SMALL))
            self._note_sync()
            if self.state.is_synced and not self._ending:
                await self._wait_for_write()
            if not self._ending:
                await self.nap(pace.GATHER_SECONDS)
            await self.pause_point()

    async def _wait_for_write(self) -> None:
        """Nothing is left to copy. Meanwhile there is time to flush, where a record waits for that."""
        self._waiting_for_write = True
        if self._flusher.is_behind:
            await self.nap(self._flusher.seconds)
            if self.state.is_synced:
                await self._flusher.flush()
        else:
            await self.woken()
        self._waiting_for_write = False

    def _hand_over(self) -> None:
        """Source and target are the same, and stay so until this is done."""
        match self._ending:
            case "complete":
                self._pivot()
            case "in place":
                self._seal()
        self._outage.detach()
        self._stop_listening()
        if self.record is not None:
            self.record.succeeded(self.state)
            self.record.give_back()
        self._has_handed_over = True

    def _note_sync(self) -> None:
        """Everything has been made up for: from here on nothing is missed that is carried over."""
        if self.state.is_synced and self._recorder.lines_up:
            self._recorder.missed = False

    def _steer(self) -> None:
        """Carry writes over, or only mark them: whatever the target can be trusted with just now."""
        self._recorder.lines_up = (
            self.copy_mode is CopyMode.WRITE_BLOCKING
            and self._is_under_way
            and not (self._pause_wanted or self._cancel_wanted or self._outage.is_waited_for)
            and self._trouble.is_over(time.monotonic())
        )
        self._active.advance()

    def _settled(self, length: int) -> None:
        """So many bytes have arrived."""
        self.counters.offset += length
        self._trouble.succeeds()
        self._steer()
        self._flusher.settled(length)
        self._rates.note(time.monotonic(), *self.progress)

    def _fail(self, failure: CopyFailed) -> None:
        """Something could not be copied, and is dirty again: do as the policy says."""
        self._recorder.missed = True
        if self._outage.explains(failure) and self.status in _CAN_PAUSE:
            self._trouble.out_of_reach(failure, time.monotonic())
            self._steer()
            self.wake()
            return
        action = self._trouble.strikes(failure, time.monotonic())
        if action is not None:
            if action is not Action.REPORT:  # which the job's end tells
                _log.warning("job '%s': %s failed, %s: %s", self.id, failure.operation, action, failure)
            self._emit("BLOCK_JOB_ERROR", {"device": self.id, "operation": failure.operation, "action": action})
        if action is Action.STOP:
            self._pause_wanted = True
        self._steer()
        self.wake()

    def is_to_pause(self) -> bool:
        """See Job; also while the target is out of reach, unless nobody may wait for it any more."""
        waits = self._outage.is_waited_for and not self._cancel_wanted and self.status in _CAN_PAUSE
        return super().is_to_pause() or waits

    def _on_loss(self) -> None:
        """What was not flushed may be gone from the target."""
        self._recorder.missed = True
        self.state.target_lost()
        self._zero_map.clear_all()
        self.wake()

    def _on_link_change(self) -> None:
        """The target is out of reach, or in reach again, or is not waited for any longer."""
        if self._outage.is_waited_for:
            _log.warning("job '%s': the target is lost and waited for: %s", self.id, self._outage.state)
        self._steer()
        self.wake()

    async def quiesce(self) -> None:
        """See Job."""
        self._transfer.give_back()
        kinds = (self._transfer.tasks, self._active.tasks, self._flusher.tasks)
        self._target_answers = await until_quiet(self, self._trouble, *kinds)

    def _freed(self) -> None:
        """Chunks are no longer taken: a write may be waiting for them."""
        self._active.advance()

    def _on_write(self) -> None:
        self._active.advance()
        if self._waiting_for_write or self._transfer.is_in_line:
            self.wake()

    # --- verbs -----------------------------------------------------------------------------------------------------

    def complete(self) -> None:
        """Hand over: drain, copy the rest, flush, pivot."""
        self._complete("complete")

    def complete_in_place(self) -> None:
        """The same without pivot: the source takes no more writes, and both disks stay the same."""
        self._complete("in place")

    def _complete(self, how: Literal["complete", "in place"]) -> None:
        check_verb(self.id, self.status, JobVerb.COMPLETE)
        if self._ending not in ("", how):
            raise StateError(f"The active block job '{self.id}' cannot be completed")
        self._ending = how
        self.wake()

    def cancel_gently(self) -> None:
        """After READY: end in step, as a copy of one point in time, without pivot. Before: `cancel`."""
        check_verb(self.id, self.status, JobVerb.CANCEL)
        if self._pause_wanted:
            raise StateError(f"The block job for device '{self.id}' is currently paused")
        if not self.is_ready:
            self.cancel()
            return
        self._ending = self._ending or "cancel"
        self.wake()

    def change(self, copy_mode: CopyMode) -> None:
        """Change when writes are copied; this takes effect for those that begin from now on."""
        check_verb(self.id, self.status, JobVerb.CHANGE)
        if copy_mode is self.copy_mode:
            return
        self.copy_mode = copy_mode
        if copy_mode is CopyMode.WRITE_BLOCKING:
            self.source.guard(self._active)
        else:
            self.source.unguard(self._active)
        self._steer()
        self.wake()

    def pause(self) -> None:
        """See Job; meanwhile writes are only marked."""
        super().pause()
        self._steer()

    def resume(self) -> None:
        """See Job; what failed before is tried again."""
        super().resume()
        self._trouble.resumed()
        self._outage.try_again()
        self._steer()

    def cancel(self) -> None:
        """See Job; no write is carried over any more."""
        super().cancel()
        self._steer()

    def set_speed(self, speed: int) -> None:
        """See Job; what waits for the old limit goes on by the new one."""
        super().set_speed(speed)
        self._transfer.throttle.set_speed(speed, time.monotonic())

    # --- questions -------------------------------------------------------------------------------------------------

    @property
    def progress(self) -> tuple[int, int]:
        """See Job."""
        return self.counters.offset, self.counters.total(self.state.remaining_bytes if self.status != JobStatus.CREATED else 0)

    @property
    def is_busy(self) -> bool:
        """Whether something is being copied right now."""
        return self._transfer.in_flight > 0

    @property
    def is_actively_synced(self) -> bool:
        """Whether source and target are the same but for writes that are not answered yet, and stay so until an error."""
        return not self._recorder.missed

    @property
    def io_status(self) -> str:
        """See Job."""
        return self._trouble.io_status

    def statistics(self) -> dict[str, Any]:
        """Counters in bytes, and how it goes on, for people and scripts."""
        return {
            "x-phase": "reconnecting" if self._outage.is_waited_for else self._phase,
            **self._outage.statistics(),
            "x-converges": not self._convergence.is_stuck,
            **self.counters.statistics(),
            "x-dirty-bytes": self.state.dirty.dirty_bytes,
            "x-in-flight": self._transfer.in_flight,
            **self._rates.statistics(time.monotonic(), *self.progress),
            **self._trouble.statistics(),
        }
