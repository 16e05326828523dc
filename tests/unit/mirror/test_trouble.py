"""The error policies by themselves: which action, said how often, and how long is waited."""

from __future__ import annotations

import errno
from itertools import pairwise
from typing import Literal

import pytest

from nbdmirror.errors import DeviceError
from nbdmirror.mirror.trouble import FIRST_WAIT, LONGEST_WAIT, Action, CopyFailed, OnError, Trouble, action_for

NOT_ENOUGH = [errno.ENOSPC, errno.EDQUOT]


def failed(operation: Literal["read", "write"] = "write", error: int = errno.EIO) -> CopyFailed:
    return CopyFailed(operation, DeviceError(error, "disk"))


@pytest.mark.parametrize("error", [errno.EIO, *NOT_ENOUGH])
@pytest.mark.parametrize("policy", OnError)
def test_what_a_policy_comes_to(policy: OnError, error: int) -> None:
    if policy in (OnError.ENOSPC, OnError.AUTO):
        assert action_for(policy, error) is (Action.STOP if error in NOT_ENOUGH else Action.REPORT)
    else:
        assert action_for(policy, error) == policy


def test_source_and_target_have_a_policy_each() -> None:
    trouble = Trouble(OnError.IGNORE, OnError.STOP)
    assert trouble.strikes(failed("read"), 0) is Action.IGNORE
    assert trouble.strikes(failed("write"), 0) is Action.STOP
    assert trouble.failure is None


def test_the_first_failure_that_is_reported_is_the_end() -> None:
    trouble = Trouble(OnError.REPORT, OnError.STOP)
    first = failed("read")
    assert trouble.strikes(first, 0) is Action.REPORT
    assert trouble.strikes(failed("write"), 0) is None
    assert trouble.failure is first
    assert trouble.io_status == "ok"


@pytest.mark.parametrize("error", [errno.EIO, *NOT_ENOUGH])
def test_a_stop_is_said_once_until_it_is_resumed(error: int) -> None:
    trouble = Trouble(OnError.STOP, OnError.STOP)
    for _ in range(2):
        assert trouble.strikes(failed(error=error), 0) is Action.STOP
        assert trouble.io_status == ("nospace" if error in NOT_ENOUGH else "failed")
        assert trouble.strikes(failed("read"), 0) is None
        trouble.resumed()
        assert trouble.io_status == "ok"
    assert not trouble.delay(0)


def test_what_is_ignored_waits_longer_and_longer() -> None:
    trouble = Trouble(OnError.IGNORE, OnError.IGNORE)
    now, waits = 100.0, []
    for _ in range(12):
        assert trouble.strikes(failed(), now) is Action.IGNORE
        assert trouble.strikes(failed(), now) is None, "the same episode"
        waits.append(trouble.delay(now))
        now += waits[-1] + 1e-6
        assert trouble.delay(now) == 0
    assert waits[0] == pytest.approx(FIRST_WAIT)
    assert all(later >= earlier - 1e-6 for earlier, later in pairwise(waits))
    assert waits[-1] == pytest.approx(LONGEST_WAIT)
    trouble.succeeds()
    trouble.strikes(failed(), now)
    assert trouble.delay(now) == pytest.approx(FIRST_WAIT)


@pytest.mark.parametrize("policy", OnError)
def test_in_the_end_every_failure_is_reported(policy: OnError) -> None:
    trouble = Trouble(policy, policy)
    trouble.is_final()
    assert trouble.strikes(failed(error=errno.ENOSPC), 0) is Action.REPORT
    assert trouble.failure is not None


def test_what_is_told_of_it() -> None:
    trouble = Trouble(OnError.IGNORE, OnError.IGNORE)
    assert trouble.statistics() == {"x-errors": 0}
    trouble.strikes(failed("read"), 0)
    trouble.strikes(failed("write", errno.ENOSPC), 0)
    last = {"operation": "write", "errno": errno.ENOSPC, "text": "disk: No space left on device"}
    assert trouble.statistics() == {"x-errors": 2, "x-last-error": last}
