"""The life of a job as two tables: which status may follow which, and which verb is taken in which.

Source: QEMU's job state machine (qapi/job.json, "JobStatus" and "JobVerb"); names and texts are QEMU's, for scripts that read
them.

Rules:
1. A transition that is not in the table is a bug of ours and raises AssertionError; a verb at the wrong time is the user's
   and raises StateError with QEMU's text.
2. NULL is the end: nothing follows it, and the job's id is free again.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from nbdmirror.errors import StateError


class JobStatus(StrEnum):
    """Where a job is in its life."""

    CREATED = "created"
    RUNNING = "running"
    PAUSED = "paused"
    READY = "ready"
    STANDBY = "standby"
    WAITING = "waiting"
    PENDING = "pending"
    ABORTING = "aborting"
    CONCLUDED = "concluded"
    NULL = "null"


class JobVerb(StrEnum):
    """What a user can ask of a job."""

    CANCEL = "cancel"
    PAUSE = "pause"
    RESUME = "resume"
    SET_SPEED = "set-speed"
    COMPLETE = "complete"
    FINALIZE = "finalize"
    DISMISS = "dismiss"
    CHANGE = "change"


_S = JobStatus

TRANSITIONS: Final[dict[JobStatus, frozenset[JobStatus]]] = {
    _S.CREATED: frozenset((_S.RUNNING, _S.ABORTING, _S.NULL)),
    _S.RUNNING: frozenset((_S.PAUSED, _S.READY, _S.WAITING, _S.ABORTING)),
    _S.PAUSED: frozenset((_S.RUNNING,)),
    _S.READY: frozenset((_S.STANDBY, _S.WAITING, _S.ABORTING)),
    _S.STANDBY: frozenset((_S.READY,)),
    _S.WAITING: frozenset((_S.PENDING, _S.ABORTING)),
    _S.PENDING: frozenset((_S.CONCLUDED, _S.ABORTING)),
    _S.ABORTING: frozenset((_S.CONCLUDED,)),
    _S.CONCLUDED: frozenset((_S.NULL,)),
    _S.NULL: frozenset(),
}

_ALIVE: Final = frozenset((_S.CREATED, _S.RUNNING, _S.PAUSED, _S.READY, _S.STANDBY))

VERBS: Final[dict[JobVerb, frozenset[JobStatus]]] = {
    JobVerb.CANCEL: _ALIVE | {_S.WAITING, _S.PENDING},
    JobVerb.PAUSE: _ALIVE,
    JobVerb.RESUME: _ALIVE,
    JobVerb.SET_SPEED: _ALIVE,
    JobVerb.COMPLETE: frozenset((_S.READY, _S.STANDBY)),
    JobVerb.FINALIZE: frozenset((_S.PENDING,)),
    JobVerb.DISMISS: frozenset((_S.CONCLUDED,)),
    JobVerb.CHANGE: _ALIVE,
}


def check_transition(job_id: str, before: JobStatus, after: JobStatus) -> None:
    """Refuse a transition that the table does not have."""
    assert after in TRANSITIONS[before], f"job '{job_id}' cannot go from {before} to {after}"


def check_verb(job_id: str, status: JobStatus, verb: JobVerb) -> None:
    """Refuse a verb that the status does not take; raises StateError."""
    if status not in VERBS[verb]:
        raise StateError(f"Job '{job_id}' in state '{status}' cannot accept command verb '{verb}'")
