"""Record: a named bitmap that a mirror job works by, from the moment the job has it until it is given back.

Rules:
1. The bitmap goes on recording by itself. The job copies its bits into a state of its own in the same step in which it begins
   to observe writes, so that no write falls between.
2. A chunk leaves the bitmap only when none of the four facts of `SyncState` holds of it: it is on the target, durably, and
   nobody has written it since.
3. When that happens is the user's choice: LIVE at each flush of the target, so that `count` tells what is left and a job
   that was broken off in any way is resumed; ALWAYS at the end of the job, however it ends; ON_SUCCESS at the end of a job that
   succeeded, with the source drained; NEVER not at all.
4. The bitmap is busy from the beginning to the end, and given back once whatever the end was. After that the job, which hears
   of no write any more, does not touch it.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from nbdmirror.bitmap.named import NamedBitmap
    from nbdmirror.bitmap.sync_state import SyncState


class Keep(StrEnum):
    """When what was copied leaves the bitmap."""

    LIVE = "live"
    ALWAYS = "always"
    ON_SUCCESS = "on-success"
    NEVER = "never"


class Record:
    """`bitmap`, used by a job as `keep` says."""

    def __init__(self, bitmap: NamedBitmap, keep: Keep) -> None:
        self.bitmap = bitmap
        self.keep = keep
        self._user = ""

    def hand_over(self, state: SyncState, user: str) -> None:
        """Hold the bitmap busy for `user`, and make dirty in `state` what it has."""
        self._user = user
        self.bitmap.users.append(user)
        for first, end in self.bitmap.bits.runs():
            state.dirty.add_chunks(first, end)

    def retire(self, runs: Iterable[tuple[int, int]]) -> None:
        """A flush of the target has made these runs of chunks durable there, and nothing else holds of them."""
        if self.keep is Keep.LIVE and self._user:
            for first, end in runs:
                self.bitmap.bits.discard_chunks(first, end)

    def succeeded(self, state: SyncState) -> None:
        """Source and target are the same, durably; called with the source drained."""
        if self.keep is not Keep.NEVER:
            self._become(state)

    def failed(self, state: SyncState) -> None:
        """The job has ended otherwise, and copies nothing any more."""
        if self.keep in (Keep.LIVE, Keep.ALWAYS):
            self._become(state)

    def _become(self, state: SyncState) -> None:
        """Hold what `state` has on record and nothing else; a bitmap that did not record gets what was written, too."""
        bits = self.bitmap.bits
        for first, end in state.idle_runs():
            bits.discard_chunks(first, end)
        for first, end in state.recorded_runs():
            bits.add_chunks(first, end)

    def give_back(self) -> None:
        """The job has ended."""
        if self._user:
            self.bitmap.users.remove(self._user)
            self._user = ""
