"""A chunk of two halves, and everything of it that is outside SyncState: the world of the tests of active writes."""

from __future__ import annotations

from typing import Final, NamedTuple

CHUNK: Final = 512
Halves = tuple[int, int]
GARBAGE: Final = (-1, -1)
ORIGINAL: Final = (0, 0)
# By number: the passive write, the active write of all, the active write of the right half.
NEW: Final = (10, 11, 12)
BROKEN: Final = (90, 91, 92)
WHOLE: Final = (True, True, False)
PASSIVE, *ACTIVE = range(3)

# A write is IDLE, for an active one ARRIVED, then BEGUN, CHANGED, for an active one SENT, then OVER; WITHDRAWN is BEGUN on
# the source alone, PASSED is CHANGED there. A copy is IDLE, may be LINED, TAKEN, READ, SENT, then OVER.
IDLE, ARRIVED, BEGUN, CHANGED, SENT, WITHDRAWN, PASSED, TAKEN, READ, OVER, LINED = range(11)


def put(old: Halves, number: int, value: int) -> Halves:
    """What a write of `value` leaves of a content."""
    return (value, value) if WHOLE[number] else (old[0], value)


def put_all(contents: frozenset[Halves], number: int, value: int) -> frozenset[Halves]:
    return frozenset(put(old, number, value) for old in contents)


class World(NamedTuple):
    """Everything of the chunk that is outside SyncState; see `test_sync_state`."""

    source: Halves = ORIGINAL
    cached: frozenset[Halves] = frozenset({GARBAGE})
    durable: frozenset[Halves] = frozenset({GARBAGE})
    flushing: frozenset[Halves] | None = None
    writes: tuple[int, ...] = (IDLE,) * 3
    # What the source held when an active write began.
    before: tuple[Halves, ...] = (ORIGINAL,) * 3
    copies: tuple[tuple[int, Halves], ...] = ()
    flushes_left: int = 0
    troubles_left: int = 0
    recorded: bool = True

    def write_target(self, number: int, value: int) -> World:
        """A write reached the target: it reads so from now on, and may be durable at any time."""
        durable = self.durable | put_all(self.durable | self.cached, number, value)
        flushing = None if self.flushing is None else self.flushing | put_all(self.flushing | self.cached, number, value)
        return self._replace(cached=put_all(self.cached, number, value), durable=durable, flushing=flushing)

    def copy_to_target(self, content: Halves) -> World:
        """The same for a copy of the whole chunk."""
        flushing = None if self.flushing is None else self.flushing | {content}
        return self._replace(cached=frozenset({content}), durable=self.durable | {content}, flushing=flushing)

    def with_write(self, number: int, phase: int) -> World:
        """Write `number` has come to `phase`."""
        return self._replace(writes=(*self.writes[:number], phase, *self.writes[number + 1 :]))

    def with_copy(self, number: int, phase: int, content: Halves = GARBAGE) -> World:
        """Copy `number` has come to `phase`."""
        return self._replace(copies=(*self.copies[:number], (phase, content), *self.copies[number + 1 :]))

    def folded(self) -> World:
        """Without telling copies apart."""
        return self._replace(copies=tuple(sorted(self.copies)))
