"""Waiting for what a job has in flight: as long as it takes for a pause, only so long for a job that ends."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from nbdmirror.jobs.job import Job
    from nbdmirror.mirror.trouble import Trouble

# How long a job that ends waits for requests to a disk that does not answer.
_ABANDON_SECONDS: Final = 2.0


async def until_quiet(job: Job, trouble: Trouble, tasks: set[asyncio.Task[None]]) -> bool:
    """Wait until `tasks` is empty, where each task takes itself out and wakes the job. False where some had to be given up."""
    while tasks and not job.is_to_cancel() and trouble.failure is None:
        await job.woken()
    if not tasks:
        return True
    _, late = await asyncio.wait(set(tasks), timeout=_ABANDON_SECONDS)
    for task in late:
        task.cancel()
    if late:
        await asyncio.wait(late)
    return not late
