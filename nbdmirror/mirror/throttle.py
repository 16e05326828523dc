"""Throttle: a token bucket for the rate limit; time is an argument.

Rules:
1. A request waits until those before it are paid, and is charged when it is sent: nothing bursts past the limit, and nothing is
   held for a request that waits.
2. At most BURST_SECONDS of rate is saved up while nothing is sent.
3. A limit of 0 is none.
"""

from __future__ import annotations

from typing import Final

BURST_SECONDS: Final = 0.1


class Throttle:
    """`speed` in bytes per second."""

    def __init__(self, speed: int = 0) -> None:
        self.speed = speed
        self._free_at = 0.0

    def delay(self, now: float) -> float:
        """Seconds to wait at time `now` before anything may be sent."""
        return max(0.0, self._free_at - now) if self.speed else 0.0

    def charge(self, length: int, now: float) -> None:
        """`length` bytes are sent at time `now`."""
        if self.speed:
            self._free_at = max(self._free_at, now - BURST_SECONDS) + length / self.speed

    def set_speed(self, speed: int, now: float) -> None:
        """Change the limit; what was charged at the old one is forgotten."""
        self.speed = speed
        self._free_at = now
