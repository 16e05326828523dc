"""Following a job over the control socket until it is ready or has ended.

Rules:
1. What the daemon says now decides, not the events seen: an event only makes us ask again, so none can be missed.
2. A job that has gone is looked up in the daemon's history; only one that is in neither never was.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from nbdmirror.cli.client import ControlClient
    from nbdmirror.cli.progress import Meter

_POLL_SECONDS: Final = 0.25


class Outcome(Enum):
    """What became of a job."""

    ALIVE = "alive"
    READY = "ready"
    STOPPED = "stopped"
    PENDING = "pending"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"
    MISSING = "missing"


@dataclass(frozen=True, slots=True)
class Report:
    """An outcome, and what query-block-jobs says of the job."""

    outcome: Outcome
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def error(self) -> str:
        """Why the job failed."""
        return str(self.info.get("x-error-detail") or self.info.get("error") or "it failed")


async def look(client: ControlClient, job_id: str) -> Report:
    """How a job is now."""
    for info in await client.execute("query-block-jobs"):
        if info["device"] == job_id:
            return Report(_alive(info), info)
    for info in reversed(await client.execute("x-nbdmirror-query-job-history")):
        if info["device"] == job_id:
            return Report(_ended(info), info)
    return Report(Outcome.MISSING)


def _alive(info: dict[str, Any]) -> Outcome:
    match info["status"]:
        case "concluded" | "null":
            return _ended(info)
        case "pending":
            return Outcome.PENDING
        case "paused" | "standby" if info["io-status"] != "ok":
            return Outcome.STOPPED
        case _:
            return Outcome.READY if info["ready"] else Outcome.ALIVE


def _ended(info: dict[str, Any]) -> Outcome:
    if info["x-cancelled"]:
        return Outcome.CANCELLED
    return Outcome.FAILED if "error" in info else Outcome.DONE


async def follow(client: ControlClient, job_id: str, until: frozenset[Outcome], shown: Meter | None = None) -> Report:
    """Wait until a job's outcome is one of `until`, or none that can still change."""
    final = until | {Outcome.DONE, Outcome.FAILED, Outcome.CANCELLED, Outcome.MISSING}
    changed = asyncio.Event()
    watcher = asyncio.create_task(_watch(client, changed))
    try:
        while True:
            changed.clear()
            report = await look(client, job_id)
            if shown is not None and report.info:
                shown.show(report.info["offset"], report.info["len"], _note(report.info))
            if report.outcome in final:
                return report
            with suppress(TimeoutError):
                async with asyncio.timeout(_POLL_SECONDS):
                    await changed.wait()
    finally:
        watcher.cancel()
        await asyncio.gather(watcher, return_exceptions=True)


def _note(info: dict[str, Any]) -> str:
    """What there is to say of a job beside its bar."""
    if not info["x-converges"] and not info["ready"]:
        return f"{info['status']}; the guest writes as fast as is copied: --copy-mode write-blocking would end that"
    return str(info["status"])


async def _watch(client: ControlClient, changed: asyncio.Event) -> None:
    async for _ in client.events():
        changed.set()
