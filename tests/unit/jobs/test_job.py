"""What every job does, whatever its work is: verbs, texts, events and their order."""

from __future__ import annotations

import asyncio
import errno
from typing import TYPE_CHECKING, Any

import pytest

from nbdmirror.errors import DeviceError, StateError
from nbdmirror.jobs.job import Cancelled, Job
from nbdmirror.jobs.status import JobStatus, JobVerb
from tests.support.fakes import settled

if TYPE_CHECKING:
    from collections.abc import Callable


class TinyJob(Job):
    """Gets ready when told to, completes when told to, fails when told to."""

    kind = "tiny"

    def __init__(self, job_id: str = "j", **options: Any) -> None:
        super().__init__(job_id, self.hear, **options)
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.ended: list[Job] = []
        self.on_end = self.ended.append
        self.failure: Exception | None = None
        self.may_be_ready = self.may_end = False
        self.quiesced = 0

    def hear(self, event: str, data: dict[str, Any]) -> None:
        self.events.append((event, data))

    @property
    def words(self) -> list[str]:
        return [data["status"] if event == "JOB_STATUS_CHANGE" else event for event, data in self.events]

    async def run(self) -> None:
        while not self.may_be_ready:
            await self._step()
        self._become_ready()
        while not self.may_end:
            await self._step()
        self.pend()
        await self.finalized(None)
        self.succeed()

    async def _step(self) -> None:
        await self.woken()
        if self.failure is not None:
            raise self.failure
        await self.pause_point()

    async def quiesce(self) -> None:
        self.quiesced += 1

    @property
    def progress(self) -> tuple[int, int]:
        return 3, 7

    @property
    def is_busy(self) -> bool:
        return False

    def statistics(self) -> dict[str, Any]:
        return {}

    def complete(self) -> None:
        self.may_end = True
        self.wake()

    def cancel_gently(self) -> None:
        self.cancel()

    async def get_ready(self) -> None:
        self.may_be_ready = True
        self.wake()
        await settled()

    async def fail(self, error: Exception) -> None:
        self.failure = error
        self.wake()
        await settled()


async def started(**options: Any) -> TinyJob:
    job = TinyJob(**options)
    job.start()
    await settled()
    return job


async def in_status(status: JobStatus) -> TinyJob:
    """A job that is in this status and stays so."""
    if status is JobStatus.CREATED:
        return TinyJob()
    job = await started(auto_finalize=False, auto_dismiss=False)
    match status:
        case JobStatus.PAUSED:
            job.pause()
        case JobStatus.READY:
            await job.get_ready()
        case JobStatus.STANDBY:
            await job.get_ready()
            job.pause()
        case JobStatus.PENDING:
            await job.get_ready()
            job.complete()
        case JobStatus.CONCLUDED:
            job.cancel()
        case JobStatus.NULL:
            job.cancel()
            await settled()
            job.dismiss()
    await settled()
    assert job.status is status
    return job


STAYS = [status for status in JobStatus if status not in (JobStatus.WAITING, JobStatus.ABORTING)]
ACTS: dict[JobVerb, Callable[[Job], None]] = {
    JobVerb.CANCEL: lambda job: job.cancel(),
    JobVerb.PAUSE: lambda job: job.pause(),
    JobVerb.SET_SPEED: lambda job: job.set_speed(5),
    JobVerb.FINALIZE: lambda job: job.finalize(),
    JobVerb.DISMISS: lambda job: job.dismiss(),
}
ALIVE = {JobStatus.CREATED, JobStatus.RUNNING, JobStatus.PAUSED, JobStatus.READY, JobStatus.STANDBY}
TAKEN = {
    JobVerb.CANCEL: ALIVE | {JobStatus.PENDING},
    JobVerb.PAUSE: ALIVE,
    JobVerb.SET_SPEED: ALIVE,
    JobVerb.FINALIZE: {JobStatus.PENDING},
    JobVerb.DISMISS: {JobStatus.CONCLUDED},
}


async def finished(job: TinyJob) -> None:
    """Bring it to its end, so that no task is left."""
    if job._task is not None and not job._task.done():
        job._cancel_wanted = True
        job.wake()
        await job.join()


@pytest.mark.parametrize("verb", ACTS)
@pytest.mark.parametrize("status", STAYS)
async def test_every_verb_in_every_status(status: JobStatus, verb: JobVerb) -> None:
    job = await in_status(status)
    before = job.words
    if status not in TAKEN[verb]:
        with pytest.raises(StateError) as caught:
            ACTS[verb](job)
        assert str(caught.value) == f"Job 'j' in state '{status}' cannot accept command verb '{verb}'"
        await settled()
        assert (job.status, job.words) == (status, before)
    elif verb is JobVerb.PAUSE and status in (JobStatus.PAUSED, JobStatus.STANDBY):
        with pytest.raises(StateError) as caught:
            ACTS[verb](job)
        assert str(caught.value) == "Job is already paused"
    else:
        ACTS[verb](job)
    await finished(job)


@pytest.mark.parametrize("status", [status for status in STAYS if status not in (JobStatus.PAUSED, JobStatus.STANDBY)])
async def test_resuming_what_was_not_paused_is_said_before_the_status_is_looked_at(status: JobStatus) -> None:
    job = await in_status(status)
    with pytest.raises(StateError) as caught:
        job.resume()
    assert str(caught.value) == "Can't resume a job that was not paused"
    await finished(job)


@pytest.mark.parametrize("job_id", ["", "1j", "-j", "_j", "j j", "j/1", "j\n", "é"])
def test_bad_id(job_id: str) -> None:
    with pytest.raises(StateError) as caught:
        TinyJob(job_id)
    assert str(caught.value) == f"Invalid job ID '{job_id}'"


@pytest.mark.parametrize("job_id", ["j", "J", "mirror-0", "a.b_c-d9"])
def test_good_id(job_id: str) -> None:
    assert TinyJob(job_id).id == job_id


async def test_speed_is_not_negative() -> None:
    job = await started()
    with pytest.raises(StateError) as caught:
        job.set_speed(-1)
    assert str(caught.value) == "Parameter 'speed' expects a non-negative value"
    assert job.speed == 0
    job.set_speed(7)
    assert job.speed == 7
    await finished(job)


async def test_whole_life() -> None:
    job = await started(speed=5)
    await job.get_ready()
    assert job.is_ready
    assert job.words == ["created", "running", "ready", "BLOCK_JOB_READY"]
    assert job.events[-1][1] == {"type": "tiny", "device": "j", "len": 7, "offset": 3, "speed": 5}
    job.complete()
    await settled()
    assert job.words[4:] == ["waiting", "pending", "BLOCK_JOB_COMPLETED", "concluded", "null"]
    assert job.events[6][1] == {"type": "tiny", "device": "j", "len": 7, "offset": 3, "speed": 5}
    assert job.ended == [job]
    assert (job.error, job.was_cancelled) == (None, False)
    assert all(data["id"] == "j" for event, data in job.events if event == "JOB_STATUS_CHANGE")


async def test_pending_waits_to_be_finalized() -> None:
    job = await in_status(JobStatus.PENDING)
    assert job.words[-3:] == ["waiting", "pending", "BLOCK_JOB_PENDING"]
    assert job.events[-1][1] == {"type": "tiny", "id": "j"}
    assert job.is_paused
    job.wake()
    await settled()
    assert job.status is JobStatus.PENDING
    job.finalize()
    await settled()
    assert job.words[-2:] == ["BLOCK_JOB_COMPLETED", "concluded"]
    assert job.ended == []
    job.dismiss()
    assert job.words[-1] == "null"
    assert job.ended == [job]


async def test_cancel_while_pending() -> None:
    job = await in_status(JobStatus.PENDING)
    job.cancel()
    await settled()
    assert job.words[-3:] == ["aborting", "BLOCK_JOB_CANCELLED", "concluded"]
    assert (job.error, job.was_cancelled) == ("Operation canceled", True)


@pytest.mark.parametrize(("status", "back"), [(JobStatus.PAUSED, "running"), (JobStatus.STANDBY, "ready")])
async def test_cancel_wakes_a_paused_job_first(status: JobStatus, back: str) -> None:
    job = await in_status(status)
    job.cancel()
    await settled()
    assert job.words[-4:] == [back, "aborting", "BLOCK_JOB_CANCELLED", "concluded"]


@pytest.mark.parametrize(("status", "back"), [(JobStatus.PAUSED, "running"), (JobStatus.STANDBY, "ready")])
async def test_pause_and_resume(status: JobStatus, back: str) -> None:
    job = await in_status(status)
    assert job.quiesced == 1
    assert job.is_paused
    assert job.words[-1] == status
    for _ in range(3):
        job.wake()
        await settled()
    assert job.words[-1] == status
    job.resume()
    await settled()
    assert job.words[-1] == back
    assert not job.is_paused
    await finished(job)


async def test_pause_taken_back_before_it_took_effect() -> None:
    job = await started()
    job.pause()
    job.resume()
    await settled()
    assert job.words == ["created", "running"]
    await finished(job)


async def test_failing_disk_ends_the_job_with_the_errno_in_words() -> None:
    job = await started()
    await job.fail(DeviceError(errno.ENOSPC, "writing '/t' at 5"))
    assert job.words[2:] == ["aborting", "BLOCK_JOB_COMPLETED", "concluded", "null"]
    assert job.events[3][1]["error"] == "No space left on device"
    assert (job.error, job.error_detail) == ("No space left on device", "writing '/t' at 5: No space left on device")
    assert not job.was_cancelled
    assert job.ended == [job]


async def test_fault_of_ours_ends_the_job_too(caplog: pytest.LogCaptureFixture) -> None:
    job = await started()
    await job.fail(ZeroDivisionError("oh"))
    assert job.words[-1] == "null"
    assert job.error == "internal error: oh"
    assert "ZeroDivisionError" in caplog.text


async def test_refusal_ends_the_job() -> None:
    job = await started()
    await job.fail(StateError("no such thing"))
    assert job.error == job.error_detail == "no such thing"


async def test_nap_ends_with_a_wake() -> None:
    job = TinyJob()
    nap = asyncio.ensure_future(job.nap(1000))
    await settled()
    assert not nap.done()
    job.wake()
    await nap
    await job.nap(0)


async def test_work_is_given_up_when_the_job_is_cancelled() -> None:
    job = TinyJob()
    given_up: list[bool] = []

    async def for_ever() -> None:
        try:
            await asyncio.get_running_loop().create_future()
        except asyncio.CancelledError:
            given_up.append(True)
            raise

    work = asyncio.ensure_future(job.unless_cancelled(for_ever()))
    await settled()
    job.wake()
    await settled()
    assert not work.done()
    job.cancel()
    with pytest.raises(Cancelled):
        await work
    assert given_up == [True]


async def test_work_that_ends_gives_its_result_or_its_failure() -> None:
    job = TinyJob()

    async def fails() -> None:
        raise DeviceError(errno.EIO, "there")

    assert await job.unless_cancelled(asyncio.sleep(0, 5)) == 5
    with pytest.raises(DeviceError, match="there"):
        await job.unless_cancelled(fails())
    job.cancel()
    with pytest.raises(Cancelled):
        await job.unless_cancelled(fails())


async def test_joining_waits_for_the_end() -> None:
    await TinyJob().join()
    job = await started()
    joined = asyncio.ensure_future(job.join())
    await settled()
    assert not joined.done()
    job.cancel()
    await joined
    assert job.status is JobStatus.NULL
    assert repr(job) == "<TinyJob j null>"
