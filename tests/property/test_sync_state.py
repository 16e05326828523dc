"""The rules of `SyncState`, held against every order of events that a disk, a guest and a target can produce.

One chunk is modelled by what it contains, as a number:

    source     what the guest's disk holds
    cached     what a read of the target may return: one value, or several after its cache was lost
    durable    what the target's medium may hold after a power cut: every value written since it was last made durable

A flush makes durable what the target held when the flush began or was given since; a flush that fails, or a target that
restarts, leaves any of `durable` behind. The walk goes through every order of two guest writes, three copies, two flushes
and one trouble (a copy that fails, or a target that loses its cache), driving the real `SyncState`, and checks in every
state it reaches what a user relies on:

    1. a target that is not durably the same is on record, in memory and in the record that survives a crash;
    2. `is_synced` is only said of a target that reads the same;
    3. no chunk is copied twice at once, none is taken while it is being written;
    4. from here on, finishing what is under way, copying what is dirty and flushing makes both sides the same.

Every weaker set of rules must fail on the content of the disks (1, 2 and 4), not only on the form (3).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

import pytest

from nbdmirror.bitmap.dirty import DirtyBitmap
from nbdmirror.bitmap.sync_state import SyncState
from tests.support import weaker_rules
from tests.support.state_walk import BrokenRuleError, Walk, clone, facts

if TYPE_CHECKING:
    from collections.abc import Iterator

CHUNK: Final = 512
WRITES: Final = 2
COPIES: Final = 3
FLUSHES: Final = 2
TROUBLES: Final = 1

# Contents. Guest write number n leaves WRITTEN + n.
GARBAGE: Final = -1
ORIGINAL: Final = 0
WRITTEN: Final = 1

# A write is IDLE, BEGUN, CHANGED, then OVER; a copy IDLE, TAKEN, READ, SENT, then OVER.
IDLE, BEGUN, CHANGED, TAKEN, READ, SENT, OVER = range(7)


class World(NamedTuple):
    """Everything of one chunk that is outside SyncState."""

    source: int = ORIGINAL
    cached: frozenset[int] = frozenset({GARBAGE})
    durable: frozenset[int] = frozenset({GARBAGE})
    # What the flush under way will have made durable, None while there is none.
    flushing: frozenset[int] | None = None
    writes: tuple[int, ...] = (IDLE,) * WRITES
    copies: tuple[tuple[int, int], ...] = ((IDLE, GARBAGE),) * COPIES
    flushes_left: int = FLUSHES
    # Copies that may fail, and times that the target may lose what it did not flush.
    troubles_left: int = TROUBLES
    recorded: bool = True

    def write_target(self, content: int) -> World:
        """The target answered a write: it reads so from now on, and may be durable at any time."""
        flushing = None if self.flushing is None else self.flushing | {content}
        return self._replace(cached=frozenset({content}), durable=self.durable | {content}, flushing=flushing)

    def with_write(self, number: int, phase: int) -> World:
        """Guest write `number` has come to `phase`."""
        return self._replace(writes=(*self.writes[:number], phase, *self.writes[number + 1 :]))

    def with_copy(self, number: int, phase: int, content: int = GARBAGE) -> World:
        """Copy `number` has come to `phase`, holding `content`."""
        return self._replace(copies=(*self.copies[:number], (phase, content), *self.copies[number + 1 :]))

    def folded(self) -> World:
        """The same, without telling apart worlds that differ only in which copy it was."""
        return self._replace(copies=tuple(sorted(self.copies)))

    @property
    def is_being_written(self) -> bool:
        """Whether a guest write is between begin and end."""
        return any(phase in (BEGUN, CHANGED) for phase in self.writes)

    @property
    def is_being_copied(self) -> bool:
        """Whether a copy is between take and settle."""
        return any(phase in (TAKEN, READ, SENT) for phase, _ in self.copies)


@dataclass
class Step:
    """A world, the state that watched it come about, and the way there."""

    world: World
    state: SyncState
    path: tuple[str, ...] = ()
    # Whether rules of form count, by whose breach alone nobody loses data.
    strict: bool = True

    def then(self, name: str) -> Step:
        """A copy to try one more event on."""
        return Step(self.world, clone(self.state), (*self.path, name), self.strict)

    def key(self) -> tuple[object, ...]:
        """What the future depends on."""
        return (self.world.folded(), facts(self.state))

    # --- what happens ----------------------------------------------------------------------------------------------

    def begin_write(self, number: int) -> None:
        self.state.write_begins(0, 1)
        self.world = self.world.with_write(number, BEGUN)._replace(recorded=True)

    def change_disk(self, number: int) -> None:
        self.world = self.world.with_write(number, CHANGED)._replace(source=WRITTEN + number)

    def end_write(self, number: int) -> None:
        self.state.write_ends(0, 1)
        self.world = self.world.with_write(number, OVER)

    def take(self, number: int) -> bool:
        run = self.state.take(1)
        if run is None:
            return False
        assert run == (0, 1)
        if self.strict and self.world.is_being_copied:
            raise BrokenRuleError("a chunk was taken that is being copied")
        if self.strict and self.world.is_being_written:
            raise BrokenRuleError("a chunk was taken that is being written")
        self.world = self.world.with_copy(number, TAKEN)
        return True

    def read_source(self, number: int) -> None:
        self.world = self.world.with_copy(number, READ, self.world.source)

    def send(self, number: int) -> None:
        content = self.world.copies[number][1]
        self.world = self.world.write_target(content).with_copy(number, SENT, content)

    def send_badly(self, number: int) -> None:
        """The target failed in the middle of the write: it holds anything, and says so."""
        self.world = self.world.write_target(GARBAGE)
        self.settle(number, copied=False)

    def settle(self, number: int, *, copied: bool) -> None:
        self.state.settle(0, 1, copied=copied)
        troubles = self.world.troubles_left if copied else self.world.troubles_left - 1
        self.world = self.world.with_copy(number, OVER)._replace(troubles_left=troubles)

    def begin_flush(self) -> None:
        self.state.flush_begins()
        self.world = self.world._replace(flushing=self.world.cached, flushes_left=self.world.flushes_left - 1)

    def end_flush(self) -> None:
        assert self.world.flushing is not None
        retired = list(self.state.flush_ends())
        recorded = self.world.recorded and not retired
        self.world = self.world._replace(durable=self.world.flushing, flushing=None, recorded=recorded)

    def lose_cache(self) -> None:
        """The flush failed, or the target restarted: what it reads as from now on is any of what it may have kept."""
        self.state.target_lost()
        troubles = self.world.troubles_left - 1
        self.world = self.world._replace(cached=self.world.durable, flushing=None, troubles_left=troubles)

    # --- what can happen next --------------------------------------------------------------------------------------

    def successors(self) -> Iterator[Step]:
        """Every event that can come next, each tried on a copy."""
        yield from self._after_writes()
        yield from self._after_copies()
        world = self.world
        if world.flushing is not None:
            step = self.then("flush ends")
            step.end_flush()
            yield step
        elif world.flushes_left:
            step = self.then("flush begins")
            step.begin_flush()
            yield step
        if world.troubles_left:
            step = self.then("cache lost")
            step.lose_cache()
            yield step

    def _after_writes(self) -> Iterator[Step]:
        for number, phase in enumerate(self.world.writes):
            if phase == IDLE:
                step = self.then(f"write {number} begins")
                step.begin_write(number)
                yield step
                step = self.then(f"write {number} at once")
                step.begin_write(number)
                step.change_disk(number)
                step.end_write(number)
                yield step
            elif phase == BEGUN:
                step = self.then(f"write {number} changes the disk")
                step.change_disk(number)
                yield step
                step = self.then(f"write {number} fails")
                step.end_write(number)
                yield step
            elif phase == CHANGED:
                step = self.then(f"write {number} ends")
                step.end_write(number)
                yield step

    def _after_copies(self) -> Iterator[Step]:
        idle = [number for number, (phase, _) in enumerate(self.world.copies) if phase == IDLE]
        if idle:
            step = self.then(f"copy {idle[0]} takes")
            if step.take(idle[0]):
                yield step
        for number, (phase, _) in enumerate(self.world.copies):
            if phase == TAKEN:
                step = self.then(f"copy {number} reads")
                step.read_source(number)
                yield step
            elif phase == READ:
                step = self.then(f"copy {number} writes the target")
                step.send(number)
                yield step
                if self.world.troubles_left:
                    step = self.then(f"copy {number} fails half-way")
                    step.send_badly(number)
                    yield step
            elif phase == SENT:
                step = self.then(f"copy {number} settles")
                step.settle(number, copied=True)
                yield step
            if phase in (TAKEN, READ, SENT) and self.world.troubles_left:
                step = self.then(f"copy {number} settles as failed")
                step.settle(number, copied=False)
                yield step

    # --- what must hold --------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Rules 1 and 2 of this module, and that the record is no smaller than the state."""
        world, state = self.world, self.state
        on_record = state.is_recorded(0)
        if (world.cached | world.durable) != {world.source}:
            if not on_record:
                raise BrokenRuleError("the target differs, and the state does not know")
            if not world.recorded:
                raise BrokenRuleError("the target differs, and the record does not know")
        if self.strict and on_record and not world.recorded:
            raise BrokenRuleError("the record was retired while the state still holds the chunk")
        if state.is_synced and world.cached != {world.source}:
            raise BrokenRuleError("called synced, but the target reads otherwise")

    def check_drain(self) -> None:
        """Rule 4: finish, copy, flush; then both sides are the same."""
        end = self.then("drained")
        end.finish()
        end.copy_the_rest()
        end.begin_flush()
        end.end_flush()
        if end.world.cached | end.world.durable != {end.world.source}:
            raise BrokenRuleError("drained, copied and flushed, but the target is not the same")
        if not self.strict:
            return
        if end.state.is_recorded(0) or end.world.recorded:
            raise BrokenRuleError("the chunk stays on record for ever")
        if not end.state.is_synced or end.state.remaining_bytes:
            raise BrokenRuleError("nothing is left to do, but the state is not synced")

    def finish(self) -> None:
        """All that is under way comes to its end."""
        for number, phase in enumerate(self.world.writes):
            if phase == BEGUN:
                self.change_disk(number)
            if phase in (BEGUN, CHANGED):
                self.end_write(number)
        for number, (phase, _) in enumerate(self.world.copies):
            if phase == TAKEN:
                self.read_source(number)
            if phase in (TAKEN, READ):
                self.send(number)
            if phase in (TAKEN, READ, SENT):
                self.settle(number, copied=True)
        if self.world.flushing is not None:
            self.end_flush()

    def copy_the_rest(self) -> None:
        """One copy must do: nothing else goes on."""
        if self.state.take(1) is not None:
            self.world = self.world.write_target(self.world.source)
            self.state.settle(0, 1, copied=True)
        if self.state.take(1) is not None:
            raise BrokenRuleError("copying does not come to an end")


def beginnings(rules: type[SyncState], *, strict: bool) -> list[Step]:
    """A mirror that has everything to do, and one that goes on where it was the same."""
    full, same = DirtyBitmap(CHUNK, CHUNK), frozenset({ORIGINAL})
    full.fill()
    clean = World(cached=same, durable=same, recorded=False)
    return [Step(World(), rules(full), strict=strict), Step(clean, rules(DirtyBitmap(CHUNK, CHUNK)), strict=strict)]


def test_the_rules_hold_in_every_order_of_events() -> None:
    walk = Walk(beginnings(SyncState, strict=True)).run()
    assert walk.violation is None, f"{walk.violation} after: {', '.join(walk.path)}"
    # If the model lost one of its events, the walk would become short before it became wrong.
    assert walk.states > 30_000


@pytest.mark.parametrize(
    "rules",
    [
        weaker_rules.MarksOnlyAfterTheWrite,
        weaker_rules.MarksOnlyAfterTheWriteButCounts,
        weaker_rules.MarksTwiceAndClearsOnSettle,
        weaker_rules.CopiesTwiceAtOnce,
        weaker_rules.TakesWhileWriting,
        weaker_rules.ForgetsAFailure,
        weaker_rules.RetiresOnSettle,
        weaker_rules.RetiresOnAnyFlush,
        weaker_rules.RetiresWhatIsDirtyAgain,
        weaker_rules.ForgetsTheLoss,
        weaker_rules.ForgetsTheFlushThatFailed,
        weaker_rules.BelievesCopiesUnderWayAtTheLoss,
    ],
)
def test_no_rule_can_be_softer(rules: type[SyncState]) -> None:
    """By the content of the disks alone: the walk is not told the rules here, only what they are for."""
    walk = Walk(beginnings(rules, strict=False)).run()
    assert walk.violation is not None, f"{rules.__name__} got through {walk.states} states"
