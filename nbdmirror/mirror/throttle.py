"""Throttle: a token bucket for the rate limit; time is an argument.

Rules:
1. A request is charged before it is sent: `delay` says how long to wait first, so nothing bursts past the limit.
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

    def delay(self, length: int, now: float) -> float:
        """Charge `length` bytes at time `now`; returns the seconds to wait before they may be sent."""
        if not self.speed:
            return 0.0
        start = max(self._free_at, now - BURST_SECONDS)
        self._free_at = start + length / self.speed
        return max(0.0, start - now)

    def set_speed(self, speed: int, now: float) -> None:
        """Change the limit; what was charged at the old one is forgotten."""
        self.speed = speed
        self._free_at = now
