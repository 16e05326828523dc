"""WriteRecorder: a SyncState as the observer of a disk's writes; it wakes the job that copies.

Rule: bytes become chunks here and nowhere else, rounding outward.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from nbdmirror.bitmap.sync_state import SyncState


class WriteRecorder:
    """Tells `state` of every write, and calls `wake` when one has ended: only then may its chunks be taken."""

    __slots__ = ("_end", "_span", "_start", "_wake")

    def __init__(self, state: SyncState, wake: Callable[[], None]) -> None:
        self._span = state.dirty.span
        self._start = state.write_begins
        self._end = state.write_ends
        self._wake = wake

    def write_begins(self, offset: int, length: int) -> None:
        """See WriteObserver."""
        self._start(*self._span(offset, length))

    def write_ends(self, offset: int, length: int) -> None:
        """See WriteObserver."""
        self._end(*self._span(offset, length))
        self._wake()
