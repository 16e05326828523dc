"""Waiting for what a job has in flight: as long as it takes for a pause, only so long for a job that ends."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from nbdmirror.jobs.job import Job
    from nbdmirror.mirror.trouble import Trouble

# How long a job that ends waits for requests to a disk that does not answer.
_ABANDON_SECONDS: Final = 2.0


async def until_quiet(job: Job, trouble: Trouble, *kinds: set[asyncio.Task[None]]) -> bool:
    """Wait until all of these sets are empty at once; each task takes itself out and wakes the job.

    False where some had to be given up, because the job ends and a disk does not answer.
    """
    while any(kinds) and not job.is_to_cancel() and trouble.failure is None:
        await job.woken()
    with suppress(TimeoutError):
        async with asyncio.timeout(_ABANDON_SECONDS):
            while any(kinds):  # what ends may begin something else: a copy that has arrived, a flush
                await job.woken()
    late = [task for kind in kinds for task in kind]
    for task in late:
        task.cancel()
    if late:
        await asyncio.wait(late)
    return not late
