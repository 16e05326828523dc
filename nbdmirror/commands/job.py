"""Jobs: the verbs in both their families, and what can be asked of jobs."""

from __future__ import annotations

from collections.abc import Callable
from operator import methodcaller
from typing import Any, Literal

from nbdmirror.errors import StateError
from nbdmirror.inventory import Inventory
from nbdmirror.jobs.job import Job
from nbdmirror.mirror.job import MirrorJob
from nbdmirror.mirror.options import CopyMode
from nbdmirror.qmp.registry import Registry
from nbdmirror.qmp.schema import NonNegative


class JobCommands:
    """Handlers about jobs."""

    def __init__(self, inventory: Inventory) -> None:
        self._inventory = inventory

    def register(self, registry: Registry) -> None:
        """Name the handlers."""
        registry.command("block-job-cancel")(self.block_job_cancel)
        registry.command("block-job-set-speed")(self.block_job_set_speed)
        registry.command("query-jobs")(self.query_jobs)
        registry.command("query-block-jobs")(self.query_block_jobs)
        registry.command("x-nbdmirror-query-job-history")(self.query_job_history)
        registry.command("block-job-change")(self.block_job_change)
        registry.command("block-job-complete")(self.block_job_complete)
        registry.command("job-complete")(self.job_complete)
        for verb in ("pause", "resume", "finalize", "dismiss"):
            act = methodcaller(verb)
            # The younger two verbs of the older family call the job's id by its name.
            by_name = self._by_id(act, self._inventory.block_job)
            registry.command(f"block-job-{verb}")(by_name if verb in ("finalize", "dismiss") else self._by_device(act))
            registry.command(f"job-{verb}")(self._by_id(act, self._inventory.job))
        registry.command("job-cancel")(self._by_id(methodcaller("cancel"), self._inventory.job))

    def _by_device(self, act: Callable[[Job], None]) -> Callable[[str], None]:
        """A verb of the block-job-* family, which calls the job's id `device`."""

        def handler(device: str) -> None:
            act(self._inventory.block_job(device))

        return handler

    def _by_id(self, act: Callable[[Job], None], find: Callable[[str], Job]) -> Callable[[str], None]:
        """A verb that calls the job's id `id`."""

        def handler(id_: str) -> None:
            act(find(id_))

        return handler

    def block_job_cancel(self, device: str, *, force: bool = False) -> None:
        """Before READY, or with `force`, at once; else end as a consistent copy without pivot."""
        job = self._inventory.block_job(device)
        if force:
            job.cancel()
        else:
            job.cancel_gently()

    def block_job_complete(self, device: str, *, x_pivot: bool = True) -> None:
        """Once READY: hand over to the target; without pivot, leave both disks the same and the source read-only."""
        _complete(self._inventory.block_job(device), pivot=x_pivot)

    def job_complete(self, id_: str, *, x_pivot: bool = True) -> None:
        """The same in the job-* family."""
        _complete(self._inventory.job(id_), pivot=x_pivot)

    def block_job_change(self, id_: str, type_: Literal["mirror"], copy_mode: CopyMode) -> None:  # noqa: ARG002
        """Change when a mirror copies what the guest writes."""
        _mirror(self._inventory.block_job(id_)).change(copy_mode)

    def block_job_set_speed(self, device: str, speed: NonNegative) -> None:
        """Change the rate limit, in bytes per second."""
        self._inventory.block_job(device).set_speed(speed)

    # --- asking ----------------------------------------------------------------------------------------------------

    def query_jobs(self) -> list[dict[str, Any]]:
        """Every job, in the form of the job-* family."""
        return [_job_info(job) for job in self._inventory.jobs.values()]

    def query_block_jobs(self) -> list[dict[str, Any]]:
        """Every job, in the form of the block-job-* family, with counters that QEMU does not have."""
        return [_block_job_info(job) for job in self._inventory.jobs.values()]

    def query_job_history(self) -> list[dict[str, Any]]:
        """Jobs that have ended, oldest first, as they were then; `x-cancelled` tells a cancelled one from one that failed."""
        return [_block_job_info(job) for job in self._inventory.history]


def _complete(job: Job, *, pivot: bool) -> None:
    if pivot:
        job.complete()
    else:
        _mirror(job).complete_in_place()


def _mirror(job: Job) -> MirrorJob:
    if not isinstance(job, MirrorJob):
        raise StateError("Job type does not support change")
    return job


def _job_info(job: Job) -> dict[str, Any]:
    done, total = job.progress
    info = {"id": job.id, "type": job.kind, "status": job.status, "current-progress": done, "total-progress": total}
    return info if job.error is None else {**info, "error": job.error}


def _block_job_info(job: Job) -> dict[str, Any]:
    done, total = job.progress
    info: dict[str, Any] = {
        "type": job.kind,
        "device": job.id,
        "len": total,
        "offset": done,
        "busy": job.is_busy,
        "paused": job.is_paused,
        "speed": job.speed,
        "io-status": job.io_status,
        "ready": job.is_ready,
        "status": job.status,
        "auto-finalize": job.auto_finalize,
        "auto-dismiss": job.auto_dismiss,
        "x-cancelled": job.was_cancelled,
        **job.statistics(),
    }
    if isinstance(job, MirrorJob):
        info["actively-synced"] = job.is_actively_synced
        info["x-copy-mode"] = job.copy_mode
    if job.error is not None:
        info["error"] = job.error
        info["x-error-detail"] = job.error_detail
    return info
