"""Rates: how fast a job copies and how fast the guest makes it more work, over the last seconds; time is an argument.

Rules:
1. A rate is that between now and the oldest sample kept; there is none before the first second is over.
2. Samples are kept for WINDOW_SECONDS, one per STEP_SECONDS.
"""

from __future__ import annotations

from collections import deque
from typing import Any, Final, NamedTuple

WINDOW_SECONDS: Final = 10.0
STEP_SECONDS: Final = 0.5
_SOONEST_SECONDS: Final = 1.0


class _Sample(NamedTuple):
    at: float
    done: int
    total: int


class Rates:
    """Fed with the job's `done` and `total` in bytes; `total` grows with what the guest makes dirty."""

    def __init__(self) -> None:
        self._samples: deque[_Sample] = deque()

    def note(self, now: float, done: int, total: int) -> None:
        """How far the job is at time `now`."""
        if not self._samples or now - self._samples[-1].at >= STEP_SECONDS:
            self._samples.append(_Sample(now, done, total))
        while now - self._samples[0].at > WINDOW_SECONDS and len(self._samples) > 1:
            self._samples.popleft()

    def statistics(self, now: float, done: int, total: int) -> dict[str, Any]:
        """Bytes per second, and the seconds until nothing is left if both go on so: by the names that QMP clients see."""
        self.note(now, done, total)
        first = self._samples[0]
        seconds = now - first.at
        if seconds < _SOONEST_SECONDS:
            return {}
        copied, dirtied = (done - first.done) / seconds, max(0, total - first.total) / seconds
        rates: dict[str, Any] = {"x-copy-rate": round(copied), "x-dirty-rate": round(dirtied)}
        if copied > dirtied:
            rates["x-eta"] = round((total - done) / (copied - dirtied), 1)
        return rates
