"""WriteRecorder: a SyncState as the observer of a disk's writes; it wakes the job that copies.

Rules:
1. Bytes become chunks here and nowhere else, rounding outward.
2. While it `lines_up`, a write arrives as an active one, for the disk's guard to claim and carry over; else it is marked.
3. Writes of one range are told apart by nothing but their order, and need not be. Where the wrong one is taken for ended, its
   chunks are dirty, and stay guarded by the other until the last one has ended. Only what waits for its turn can't have ended.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from nbdmirror.bitmap.sync_state import ActiveWrite, SyncState


class Ticket:
    """An active write from its arrival to its end."""

    __slots__ = ("active", "is_answered", "is_carrying", "is_claimed", "is_over", "on_both")

    def __init__(self, active: ActiveWrite) -> None:
        self.active = active
        self.is_claimed = False
        # Under way to the target, which may last longer than the guest waits.
        self.is_carrying = False
        self.is_answered = False
        self.is_over = False
        self.on_both = False

    @property
    def is_waiting(self) -> bool:
        """Whether a guard keeps it from the disk."""
        return self.is_claimed and not self.active.begun


class WriteRecorder:
    """Tells `state` of every write, and calls `wake` when one has ended: only then may its chunks be taken.

    `missed` is set with every write that went to the source alone, or did not get to both; who has made up for it resets it.
    `make_way` is called with the chunks of each write that arrives as an active one.
    """

    __slots__ = ("_end", "_span", "_start", "_state", "_tickets", "_wake", "lines_up", "make_way", "missed")

    def __init__(self, state: SyncState, wake: Callable[[], None], make_way: Callable[[int, int], None]) -> None:
        self.lines_up = False
        self.missed = True
        self.make_way = make_way
        self._state = state
        self._span = state.dirty.span
        self._start = state.write_begins
        self._end = state.write_ends
        self._wake = wake
        self._tickets: dict[tuple[int, int], list[Ticket]] = {}

    def write_begins(self, offset: int, length: int) -> None:
        """See WriteObserver."""
        if self.lines_up:
            self._arrives(offset, length)
        else:
            self.missed = True
            self._start(*self._span(offset, length))

    def _arrives(self, offset: int, length: int) -> None:
        first, end = self._span(offset, length)
        active = self._state.active_arrives(first, end, self._state.dirty.span_within(offset, length))
        self._tickets.setdefault((offset, length), []).append(Ticket(active))
        self.make_way(first, end)

    def claim(self, offset: int, length: int) -> Ticket | None:
        """The ticket of a write, for its guard; None where it is only marked."""
        for ticket in self._tickets.get((offset, length), ()):
            if not ticket.is_claimed:
                ticket.is_claimed = True
                return ticket
        return None

    def withdraw(self, offset: int, length: int, ticket: Ticket) -> None:
        """A write that waited goes to the source alone."""
        self.missed = True
        self._remove(offset, length, ticket)
        self._state.active_withdraws(ticket.active)
        self._wake()

    def carried(self, ticket: Ticket, *, on_both: bool) -> None:
        """The target has done it as well, or failed."""
        ticket.is_carrying = False
        ticket.on_both = on_both
        if ticket.is_answered and not ticket.is_over:
            self._ends(ticket)

    def write_ends(self, offset: int, length: int) -> None:
        """See WriteObserver."""
        ended = self._tickets and [ticket for ticket in self._tickets.get((offset, length), ()) if not ticket.is_waiting]
        if not ended:
            self._end(*self._span(offset, length))
            self._wake()
            return
        ticket = max(ended, key=_likelihood)
        self._remove(offset, length, ticket)
        ticket.is_answered = True
        if not ticket.is_carrying:
            self._ends(ticket)

    def _ends(self, ticket: Ticket) -> None:
        ticket.is_over = True
        self.missed = self.missed or not ticket.on_both
        self._state.active_ends(ticket.active, on_both=ticket.on_both)
        self._wake()

    def _remove(self, offset: int, length: int, ticket: Ticket) -> None:
        tickets = self._tickets[offset, length]
        tickets.remove(ticket)
        if not tickets:
            del self._tickets[offset, length]


def _likelihood(ticket: Ticket) -> tuple[bool, bool]:
    """Which of several writes has ended: one that is on both disks, else one that had begun."""
    return ticket.on_both or ticket.is_carrying, ticket.active.begun
