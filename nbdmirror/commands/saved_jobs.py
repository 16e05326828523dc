"""Saved jobs: what it takes to start a daemon's mirror jobs again after it has ended, in whatever way: STATE_DIR/jobs.json.

    {"version": 1, "jobs": {"mirror0": {"arguments": {...}, "bitmap": "#mirror-mirror0", "own": true, "size": 1073741824}}}

Rules:
1. The file is replaced as a whole, durably, before the job that it tells of copies anything. It names no progress: what is
   still to be copied is what the job's bitmap has, which is durable by itself.
2. A job leaves the file when it has ended by itself or was told to; not when the daemon ends. A bitmap that was made for the
   job alone (`own`) goes after that.
3. Nothing in the file is trusted to fit: what it names is looked up and checked like what a user asks for.
"""

from __future__ import annotations

import asyncio
import json
import os
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from nbdmirror.errors import DeviceError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

_FILE: Final = "jobs.json"
_VERSION: Final = 1


class Resume(StrEnum):
    """What becomes of saved jobs when the daemon starts."""

    AUTO = "auto"
    MANUAL = "manual"
    VERIFY = "verify"


@dataclass(frozen=True, slots=True)
class SavedJob:
    """`arguments` are drive-mirror's, by their names in Python; `size` is the target's, in bytes."""

    arguments: dict[str, Any]
    bitmap: str
    own: bool
    size: int


class SavedJobs:
    """The file in a state directory, which is this process's. Construct it with `open`."""

    def __init__(self, path: Path, jobs: dict[str, SavedJob]) -> None:
        self._path = path
        self._jobs = jobs
        self._changes = asyncio.Lock()

    @classmethod
    def open(cls, directory: str) -> SavedJobs:
        """Read the file, if there is one; raises UsageError where it makes no sense."""
        path = Path(directory) / _FILE
        try:
            content = json.loads(path.read_text())
            if content["version"] != _VERSION:
                raise UsageError(f"'{path}' is of another version of nbdmirror")
            return cls(path, {job_id: SavedJob(**job) for job_id, job in content["jobs"].items()})
        except FileNotFoundError:
            return cls(path, {})
        except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
            raise UsageError(f"'{path}' can't be read ({error}); move it away, and start the jobs anew") from None

    def __iter__(self) -> Iterator[SavedJob]:
        return iter(list(self._jobs.values()))

    def get(self, job_id: str) -> SavedJob | None:
        """What is saved of a job."""
        return self._jobs.get(job_id)

    async def put(self, job_id: str, job: SavedJob) -> None:
        """Save a job, durably; raises DeviceError, and then it is not."""
        await self._replace({**self._jobs, job_id: job})

    async def drop(self, job_id: str) -> None:
        """Forget a job, durably; raises DeviceError, and then it is still saved."""
        await self._replace({other: job for other, job in self._jobs.items() if other != job_id})

    async def _replace(self, jobs: dict[str, SavedJob]) -> None:
        async with self._changes:
            content = {"version": _VERSION, "jobs": {job_id: asdict(job) for job_id, job in jobs.items()}}
            try:
                await asyncio.to_thread(_write, self._path, json.dumps(content, indent=1))
            except OSError as error:
                raise DeviceError.of(error, f"cannot write '{self._path}'") from None
            self._jobs = jobs


def _write(path: Path, text: str) -> None:
    new = path.with_suffix(".new")
    with new.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
    fd = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
