"""What a job does about requests that failed: QEMU's error policies, pure; time is an argument.

Rules (QEMU's `BlockdevOnError`; what failed is dirty again before anybody asks here):
1. `report` ends the job, `stop` pauses it until somebody resumes it, `ignore` goes on; `enospc` and `auto` stop where no space
   is left and report anything else. A policy each for the source, which is read, and for the target, which is written.
2. One episode is said once: until the job is resumed, or the time to wait is over, further failures are the same news.
3. What is ignored is tried again after a while that doubles from failure to failure; something that succeeds ends that.
4. A target that is out of reach has not failed: that is tried again in the same way, whatever the policy. Until something
   has succeeded again nobody should wait for it.
"""

from __future__ import annotations

import errno
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final, Literal

if TYPE_CHECKING:
    from nbdmirror.errors import DeviceError

# The first wait is the loop's own slice, the last one short enough for a disk that came back not to be kept waiting.
FIRST_WAIT: Final = 0.1
LONGEST_WAIT: Final = 10.0

_NO_SPACE: Final = (errno.ENOSPC, errno.EDQUOT)


class CopyFailed(Exception):  # noqa: N818  # it is no fault of ours
    """A unit could not be copied: `operation` is `read` where the source failed, `write` where the target did."""

    def __init__(self, operation: Literal["read", "write"], cause: DeviceError) -> None:
        self.operation = operation
        self.cause = cause
        super().__init__(str(cause))


class OnError(StrEnum):
    """A policy."""

    REPORT = "report"
    IGNORE = "ignore"
    ENOSPC = "enospc"
    STOP = "stop"
    AUTO = "auto"


class Action(StrEnum):
    """What a policy comes to."""

    REPORT = "report"
    IGNORE = "ignore"
    STOP = "stop"


def action_for(policy: OnError, error: int) -> Action:
    """What `policy` does about an errno."""
    match policy:
        case OnError.ENOSPC | OnError.AUTO:
            return Action.STOP if error in _NO_SPACE else Action.REPORT
        case _:
            return Action(policy)


class Trouble:
    """The failures of one job. `failure` is the one that ends it."""

    def __init__(self, on_source_error: OnError, on_target_error: OnError) -> None:
        self.failure: CopyFailed | None = None
        self.io_status: Literal["ok", "failed", "nospace"] = "ok"
        self._policies = {"read": on_source_error, "write": on_target_error}
        self._count = 0
        self._last: CopyFailed | None = None
        self._wait = FIRST_WAIT
        self._until = 0.0
        self._is_out_of_reach = False

    def strikes(self, failure: CopyFailed, now: float) -> Action | None:
        """A request failed: what is to be done, None where that has been said."""
        self._count += 1
        self._last = failure
        if self.failure is not None:
            return None
        action = action_for(self._policies[failure.operation], failure.cause.errno)
        match action:
            case Action.REPORT:
                self.failure = failure
            case Action.STOP:
                if self.io_status != "ok":
                    return None
                self.io_status = "nospace" if failure.cause.errno in _NO_SPACE else "failed"
            case Action.IGNORE:
                if self.delay(now):
                    return None
                self._back_off(now)
        return action

    def out_of_reach(self, failure: CopyFailed, now: float) -> None:
        """A request did not get to the target, or its answer did not come back."""
        self._last = failure
        self._is_out_of_reach = True
        if not self.delay(now):
            self._back_off(now)

    def _back_off(self, now: float) -> None:
        self._until = now + self._wait
        self._wait = min(self._wait * 2, LONGEST_WAIT)

    def succeeds(self) -> None:
        """A request did not fail."""
        self._wait = FIRST_WAIT
        self._is_out_of_reach = False

    def resumed(self) -> None:
        """Somebody thinks that it is over."""
        self.io_status = "ok"

    def is_final(self) -> None:
        """From now on there is nothing to wait for: every failure ends the job."""
        self._policies = dict.fromkeys(self._policies, OnError.REPORT)

    def is_over(self, now: float) -> bool:
        """Whether nothing has failed that was not made good, or is worth another try."""
        return self.failure is None and self.io_status == "ok" and not self._is_out_of_reach and not self.delay(now)

    def delay(self, now: float) -> float:
        """Seconds to wait at time `now` before anything may be tried again."""
        return max(0.0, self._until - now)

    def statistics(self) -> dict[str, Any]:
        """What went wrong so far, by the names that QMP clients see."""
        if self._last is None:
            return {"x-errors": 0}
        last = {"operation": self._last.operation, "errno": self._last.cause.errno, "text": str(self._last.cause)}
        return {"x-errors": self._count, "x-last-error": last}
