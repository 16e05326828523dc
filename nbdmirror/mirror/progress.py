"""Progress: the job's account in bytes, and what QMP calls `offset` and `len`.

Rules:
1. `offset` is what has been brought into step, over and over where it was rewritten; it never falls.
2. `len` is `offset` plus what remains, so it grows while the guest writes and equals `offset` when the disks are in step.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Progress:
    """Counters in bytes: settled; read from the source; sent as data; zeroed on the target; zero there already, so not sent;
    read to complete blocks of the target that the guest wrote in part."""

    offset: int = 0
    read: int = 0
    sent: int = 0
    zeroed: int = 0
    skipped: int = 0
    filled: int = 0

    def statistics(self) -> dict[str, int]:
        """The counters by the names that QMP clients see."""
        return {
            "x-bytes-read": self.read,
            "x-bytes-sent": self.sent,
            "x-bytes-zeroed": self.zeroed,
            "x-bytes-skipped": self.skipped,
            "x-bytes-filled": self.filled,
        }

    def total(self, remaining: int) -> int:
        """`len`: what was done and what remains."""
        return self.offset + remaining
