"""The recorder: bytes to chunks, and telling writes of one range apart as far as that matters."""

from __future__ import annotations

import pytest

from nbdmirror.bitmap.dirty import DirtyBitmap
from nbdmirror.bitmap.recorder import Ticket, WriteRecorder
from nbdmirror.bitmap.sync_state import SyncState

CHUNK = 512


class Ear:
    """A recorder over four chunks, and what it said."""

    def __init__(self) -> None:
        self.state = SyncState(DirtyBitmap(4 * CHUNK, CHUNK))
        self.woken = 0
        self.ways: list[tuple[int, int]] = []
        self.recorder = WriteRecorder(self.state, self.wake, lambda first, end: self.ways.append((first, end)))
        self.recorder.missed = False

    def wake(self) -> None:
        self.woken += 1

    @property
    def dirty(self) -> list[int]:
        return [chunk for chunk in range(4) if self.state.dirty.is_dirty(chunk)]

    def arrives(self, offset: int = 0, length: int = CHUNK) -> Ticket:
        """An active write, claimed by its guard."""
        self.recorder.lines_up = True
        self.recorder.write_begins(offset, length)
        ticket = self.recorder.claim(offset, length)
        assert ticket is not None
        return ticket


def test_bytes_become_chunks() -> None:
    ear = Ear()
    ear.recorder.write_begins(CHUNK - 1, 2)
    assert ear.dirty == [0, 1]
    assert ear.recorder.missed
    assert ear.woken == 0
    ear.recorder.write_ends(CHUNK - 1, 2)
    assert ear.woken == 1
    assert ear.state.take(4) == (0, 2)


def test_active_write_that_is_on_both_disks() -> None:
    ear = Ear()
    ticket = ear.arrives()
    assert (ear.ways, ear.dirty) == ([(0, 1)], [])
    ear.state.active_begins(ticket.active)
    ticket.is_carrying = True
    ear.recorder.carried(ticket, on_both=True)
    ear.recorder.write_ends(0, CHUNK)
    assert (ear.dirty, ear.recorder.missed, ear.woken) == ([], False, 1)


@pytest.mark.parametrize("on_both", [True, False])
def test_guest_that_is_answered_before_the_target(on_both: bool) -> None:
    ear = Ear()
    ticket = ear.arrives()
    ear.state.active_begins(ticket.active)
    ticket.is_carrying = True
    ear.state.active_is_late(ticket.active)
    ear.recorder.write_ends(0, CHUNK)
    assert ear.state.take(4) is None, "the target may still write it"
    ear.recorder.carried(ticket, on_both=on_both)
    assert ear.state.take(4) == (0, 1)


def test_write_that_failed_is_not_taken_for_one_that_waits_behind_it() -> None:
    ear = Ear()
    first, second = ear.arrives(), ear.arrives()
    ear.state.active_begins(first.active)
    ear.recorder.write_ends(0, CHUNK)
    assert first.is_over
    assert not second.is_over
    assert ear.state.may_begin(second.active)
    ear.state.active_begins(second.active)
    ear.recorder.carried(second, on_both=True)
    ear.recorder.write_ends(0, CHUNK)
    assert (ear.dirty, ear.recorder.missed) == ([], True)


def test_marked_write_that_ends_while_one_of_the_same_range_waits() -> None:
    ear = Ear()
    ear.recorder.write_begins(0, CHUNK)
    waiting = ear.arrives()
    ear.recorder.write_ends(0, CHUNK)
    assert not waiting.is_over
    assert ear.state.may_begin(waiting.active)


def test_wrong_one_of_two_may_be_taken_for_ended() -> None:
    """The marked one ends, and the active one is taken for it: the chunk stays guarded until both have, and dirty."""
    ear = Ear()
    ear.recorder.write_begins(0, CHUNK)
    active = ear.arrives()
    ear.state.active_begins(active.active)
    ear.recorder.write_ends(0, CHUNK)
    assert active.is_over
    assert ear.state.take(4) is None
    ear.recorder.carried(active, on_both=True)
    ear.recorder.write_ends(0, CHUNK)
    assert ear.state.take(4) == (0, 1)


def test_write_that_will_not_wait_is_marked() -> None:
    ear = Ear()
    first, second = ear.arrives(), ear.arrives()
    ear.state.active_begins(first.active)
    ear.recorder.withdraw(0, CHUNK, second)
    ear.recorder.carried(first, on_both=True)
    ear.recorder.write_ends(0, CHUNK)
    assert ear.dirty == [0], "they may have reached the source in any order"
    ear.recorder.write_ends(0, CHUNK)
    assert ear.recorder.missed
    assert ear.state.take(4) == (0, 1)
