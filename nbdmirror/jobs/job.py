"""Job: one background operation with an id, a status, verbs and events.

Rules:
1. `_become` is the only way to change the status: it checks the table, logs and emits JOB_STATUS_CHANGE.
2. Verbs only set what the job's own task will see at its next pause point; the task alone does the work. A verb that the
   status does not take raises StateError and changes nothing.
3. Whatever happens, a job that was started ends in NULL (or waits in CONCLUDED for `dismiss`): an error of a disk, or a bug
   of ours, ends it with a message.
4. A paused job does nothing: what was in flight has finished before the status says so.
"""

from __future__ import annotations

import asyncio
import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, ClassVar, Final, TypeVar

from nbdmirror.errors import DeviceError, NbdMirrorError, StateError
from nbdmirror.jobs.status import JobStatus, JobVerb, check_transition, check_verb

Emit = Callable[[str, dict[str, Any]], None]
Result = TypeVar("Result")

_log: Final = logging.getLogger(__name__)
_JOB_ID: Final = re.compile(r"[A-Za-z][A-Za-z0-9._-]*")


class Cancelled(Exception):  # noqa: N818  # the word of QEMU's events
    """The job was told to stop without finishing."""


class Job(ABC):
    """A job; subclasses do their work in `run`. `emit` carries events upward, `on_end` is called once in NULL."""

    kind: ClassVar[str]

    def __init__(
        self, job_id: str, emit: Emit, *, speed: int = 0, auto_finalize: bool = True, auto_dismiss: bool = True
    ) -> None:
        if not _JOB_ID.fullmatch(job_id):
            raise StateError(f"Invalid job ID '{job_id}'")
        self.id = job_id
        self.status = JobStatus.CREATED
        self.speed = speed
        self.auto_finalize = auto_finalize
        self.auto_dismiss = auto_dismiss
        self.error: str | None = None
        self.error_detail: str | None = None
        self.was_cancelled = False
        self.on_end: Callable[[Job], None] = lambda _job: None
        self._emit = emit
        self._pause_wanted = False
        self._cancel_wanted = False
        self._finalized = False
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    # --- what subclasses give --------------------------------------------------------------------------------------

    @abstractmethod
    async def run(self) -> None:
        """Do the work, with `pause_point` at every step; call `pend` once it is done. Raises DeviceError or Cancelled."""

    @abstractmethod
    async def quiesce(self) -> None:
        """Finish what is in flight; nothing of it may be going on afterwards."""

    @property
    @abstractmethod
    def progress(self) -> tuple[int, int]:
        """`(done, total)` in bytes."""

    @property
    @abstractmethod
    def is_busy(self) -> bool:
        """Whether something is being done right now."""

    @property
    def io_status(self) -> str:
        """`ok`; or `failed` or `nospace` where an error has paused the job."""
        return "ok"

    @abstractmethod
    def statistics(self) -> dict[str, Any]:
        """Counters of the job's own, under names that begin with `x-`."""

    @abstractmethod
    def complete(self) -> None:
        """Hand over and end; once ready."""

    @abstractmethod
    def cancel_gently(self) -> None:
        """End with what was asked for so far, where that is of use; `cancel` otherwise."""

    @property
    def is_ready(self) -> bool:
        """Whether `complete` is possible."""
        return self.status in (JobStatus.READY, JobStatus.STANDBY)

    # --- life ------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin; events follow."""
        self._emit("JOB_STATUS_CHANGE", {"status": self.status, "id": self.id})
        self._become(JobStatus.RUNNING)
        self._task = asyncio.get_running_loop().create_task(self._main(), name=f"job {self.id}")

    async def _main(self) -> None:
        try:
            await self.run()
        except Cancelled:
            await self._abort(None)
        except DeviceError as error:
            await self._abort(error.reason, str(error))
        except NbdMirrorError as error:
            await self._abort(str(error))
        except Exception as error:
            _log.exception("job '%s' failed because of a fault in nbdmirror", self.id)
            await self._abort(f"internal error: {error}")

    async def _abort(self, error: str | None, detail: str | None = None) -> None:
        """End without success: cancelled where `error` is None."""
        await self.quiesce()
        if self.status in (JobStatus.PAUSED, JobStatus.STANDBY):
            self._become(JobStatus.RUNNING if self.status == JobStatus.PAUSED else JobStatus.READY)
        self.was_cancelled = error is None
        self.error = error or "Operation canceled"
        self.error_detail = detail or self.error
        self._become(JobStatus.ABORTING)
        if error is None:
            self._emit("BLOCK_JOB_CANCELLED", self._event_data())
        else:
            _log.error("job '%s' failed: %s", self.id, self.error_detail)
            self._emit("BLOCK_JOB_COMPLETED", {**self._event_data(), "error": error})
        self._end()

    def pend(self) -> None:
        """The work is done."""
        self._become(JobStatus.WAITING)
        self._become(JobStatus.PENDING)
        if not self.auto_finalize:
            self._emit("BLOCK_JOB_PENDING", {"type": self.kind, "id": self.id})

    async def finalized(self, within: float | None) -> bool:
        """Wait to be finalized, where that was asked for; False after so many seconds. Raises Cancelled."""
        with suppress(TimeoutError):
            async with asyncio.timeout(within):
                while not (self.auto_finalize or self._finalized):
                    await self.woken()
                    self.cancel_point()
        return self.auto_finalize or self._finalized

    def succeed(self) -> None:
        """Say so, after `finalized` and whatever had to be done then."""
        self._emit("BLOCK_JOB_COMPLETED", self._event_data())
        self._end()

    def _end(self) -> None:
        self._become(JobStatus.CONCLUDED)
        if self.auto_dismiss:
            self._vanish()

    def _vanish(self) -> None:
        self._become(JobStatus.NULL)
        self.on_end(self)

    def _become(self, status: JobStatus) -> None:
        check_transition(self.id, self.status, status)
        _log.info("job '%s': %s -> %s", self.id, self.status, status)
        self.status = status
        self._emit("JOB_STATUS_CHANGE", {"status": status, "id": self.id})

    def _become_ready(self) -> None:
        self._become(JobStatus.READY)
        self._emit("BLOCK_JOB_READY", self._event_data())

    def _event_data(self) -> dict[str, Any]:
        done, total = self.progress
        return {"type": self.kind, "device": self.id, "len": total, "offset": done, "speed": self.speed}

    async def join(self) -> None:
        """Wait until the job's task has ended (for shutting down)."""
        if self._task is not None:
            await asyncio.wait((self._task,))

    # --- pause points ----------------------------------------------------------------------------------------------

    async def pause_point(self) -> None:
        """Stay here while the job is paused; raises Cancelled when it has been cancelled."""
        if self.is_to_pause():
            await self.quiesce()
        if self.is_to_pause():  # neither resumed nor cancelled meanwhile
            back = self.status
            self._become(JobStatus.STANDBY if back == JobStatus.READY else JobStatus.PAUSED)
            while self.is_to_pause():
                await self.woken()
            self._become(back)
        self.cancel_point()

    def is_to_pause(self) -> bool:
        """Whether the next pause point will be one."""
        return self._pause_wanted and not self._cancel_wanted

    def is_to_cancel(self) -> bool:
        """Whether the job has been cancelled."""
        return self._cancel_wanted

    def cancel_point(self) -> None:
        """Raises Cancelled when the job has been cancelled; for where pausing would hold others up."""
        if self._cancel_wanted:
            raise Cancelled

    async def unless_cancelled(self, work: Coroutine[Any, Any, Result], within: float | None = None) -> Result:
        """The result of `work`; for whatever may never end. It is given up when the job is cancelled, which raises
        Cancelled, or when `within` seconds have passed, which raises TimeoutError."""
        task = asyncio.ensure_future(work)
        task.add_done_callback(lambda _: self.wake())
        try:
            async with asyncio.timeout(within):
                while not task.done() and not self._cancel_wanted:
                    await self.woken()
        finally:
            if not task.done() or self._cancel_wanted:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        self.cancel_point()
        return task.result()

    def wake(self) -> None:
        """Something has changed: let the task look."""
        self._wake.set()

    async def woken(self) -> None:
        """Wait for a `wake`."""
        await self._wake.wait()
        self._wake.clear()

    async def nap(self, seconds: float) -> None:
        """Sleep, but not past a `wake`."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.woken()

    # --- verbs -----------------------------------------------------------------------------------------------------

    def pause(self) -> None:
        """Stop at the next pause point."""
        check_verb(self.id, self.status, JobVerb.PAUSE)
        if self._pause_wanted:
            raise StateError("Job is already paused")
        self._pause_wanted = True
        self.wake()

    def resume(self) -> None:
        """Go on."""
        if not self._pause_wanted:
            raise StateError("Can't resume a job that was not paused")
        check_verb(self.id, self.status, JobVerb.RESUME)
        self._pause_wanted = False
        self.wake()

    def cancel(self) -> None:
        """End at once, without success."""
        check_verb(self.id, self.status, JobVerb.CANCEL)
        self._cancel_wanted = True
        self.wake()

    def set_speed(self, speed: int) -> None:
        """Limit what is copied to `speed` bytes per second; 0 is no limit."""
        check_verb(self.id, self.status, JobVerb.SET_SPEED)
        if speed < 0:
            raise StateError("Parameter 'speed' expects a non-negative value")
        self.speed = speed
        self.wake()

    def finalize(self) -> None:
        """Let a pending job end."""
        check_verb(self.id, self.status, JobVerb.FINALIZE)
        self._finalized = True
        self.wake()

    def dismiss(self) -> None:
        """Forget a concluded job."""
        check_verb(self.id, self.status, JobVerb.DISMISS)
        self._vanish()

    @property
    def is_paused(self) -> bool:
        """Whether the job does nothing because it was told to, has to wait for something, or waits to be finalized."""
        return self._pause_wanted or self.status in (JobStatus.PAUSED, JobStatus.STANDBY, JobStatus.PENDING)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id} {self.status}>"
