"""The two tables of a job's life, written down a second time: what is in them, and what is not."""

from __future__ import annotations

import itertools

import pytest

from nbdmirror.errors import StateError
from nbdmirror.jobs.status import JobStatus, JobVerb, check_transition, check_verb

TRANSITIONS = {
    "created": "running aborting null",
    "running": "paused ready waiting aborting",
    "paused": "running",
    "ready": "standby waiting aborting",
    "standby": "ready",
    "waiting": "pending aborting",
    "pending": "concluded aborting",
    "aborting": "concluded",
    "concluded": "null",
    "null": "",
}
VERBS = {
    "cancel": "created running paused ready standby waiting pending",
    "pause": "created running paused ready standby",
    "resume": "created running paused ready standby",
    "set-speed": "created running paused ready standby",
    "complete": "ready standby",
    "finalize": "pending",
    "dismiss": "concluded",
    "change": "created running paused ready standby",
}


def test_words_are_the_control_languages() -> None:
    assert [str(status) for status in JobStatus] == list(TRANSITIONS)
    assert sorted(str(verb) for verb in JobVerb) == sorted(VERBS)


@pytest.mark.parametrize(("before", "after"), list(itertools.product(JobStatus, JobStatus)))
def test_transition(before: JobStatus, after: JobStatus) -> None:
    if after in TRANSITIONS[before].split():
        check_transition("j", before, after)
        return
    with pytest.raises(AssertionError, match=rf"job 'j' cannot go from {before} to {after}"):
        check_transition("j", before, after)


@pytest.mark.parametrize(("status", "verb"), list(itertools.product(JobStatus, JobVerb)))
def test_verb(status: JobStatus, verb: JobVerb) -> None:
    if status in VERBS[verb].split():
        check_verb("j", status, verb)
        return
    with pytest.raises(StateError) as caught:
        check_verb("j", status, verb)
    assert str(caught.value) == f"Job 'j' in state '{status}' cannot accept command verb '{verb}'"
