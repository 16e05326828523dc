"""The rules of `SyncState` for active writes, held against every order of events, as in `test_sync_state`.

Here a chunk has two halves, so that a write can cover it wholly or in part. Contents are pairs of numbers. There are a passive
write, two active ones (one of the whole chunk, one of its right half; each may fail on either disk, be answered early, or tire
of waiting), copies, a flush and one trouble. Each walk goes through every order of some of them, a cast.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

import pytest

from nbdmirror.bitmap.dirty import DirtyBitmap
from nbdmirror.bitmap.sync_state import ActiveWrite, SyncState
from tests.support import weaker_active_rules
from tests.support.halves import (
    ACTIVE,
    ARRIVED,
    BEGUN,
    BROKEN,
    CHANGED,
    CHUNK,
    GARBAGE,
    IDLE,
    LINED,
    NEW,
    ORIGINAL,
    OVER,
    PASSED,
    PASSIVE,
    READ,
    SENT,
    TAKEN,
    WHOLE,
    WITHDRAWN,
    World,
    put,
)
from tests.support.state_walk import BrokenRuleError, Walk, clone, facts

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass
class Step:
    """A world, the state that watched it come about, and the way there. `active` has the writes that are in the state, `place`
    is that of a copy in their line, `late` are those that were answered early."""

    world: World
    state: SyncState
    active: dict[int, ActiveWrite] = field(default_factory=dict)
    place: ActiveWrite | None = None
    late: frozenset[int] = frozenset()
    path: tuple[str, ...] = ()

    def then(self, name: str) -> Step:
        """A copy to try one more event on."""
        twins = {id(active): _twin(active) for active in self.state._active}
        state = clone(self.state)
        state._active = list(twins.values())
        active = {number: twins[id(active)] for number, active in self.active.items()}
        return Step(self.world, state, active, self.place and twins[id(self.place)], self.late, (*self.path, name))

    def key(self) -> tuple[object, ...]:  # see Walkable
        return (self.world.folded(), facts(self.state), tuple(self.active), self.place is not None, self.late)

    # --- what happens ----------------------------------------------------------------------------------------------

    def arrive(self, number: int) -> None:
        self.active[number] = self.state.active_arrives(0, 1, (0, 1) if WHOLE[number] else (1, 1))
        self.world = self.world.with_write(number, ARRIVED)._replace(recorded=True)

    def begin(self, number: int) -> None:
        """Of an active write, when the state lets it."""
        self.state.active_begins(self.active[number])
        before = (*self.world.before[:number], self.world.source, *self.world.before[number + 1 :])
        self.world = self.world.with_write(number, BEGUN)._replace(before=before)

    def withdraw(self, number: int) -> None:
        self.state.active_withdraws(self.active.pop(number))
        self.world = self.world.with_write(number, WITHDRAWN)

    def change_source(self, number: int, phase: int) -> None:
        source = put(self.world.source, number, NEW[number])
        self.world = self.world.with_write(number, phase)._replace(source=source)

    def fail_source(self, number: int) -> None:
        """The source holds anything where it was written, and says so."""
        self.world = self.world._replace(source=put(self.world.source, number, BROKEN[number]))

    def send(self, number: int) -> None:
        """To the target; but what is dirty anyway is not patched in part."""
        if WHOLE[number] or self.active[number].is_fresh(0):
            self.world = self.world.write_target(number, NEW[number])
        self.world = self.world.with_write(number, SENT)

    def end_active(self, number: int, *, on_both: bool) -> None:
        self.state.active_ends(self.active.pop(number), on_both=on_both)
        self.world = self.world.with_write(number, OVER)

    def end_passive(self, number: int) -> None:
        self.state.write_ends(0, 1)
        self.world = self.world.with_write(number, OVER)

    def take_turn(self, number: int) -> bool:
        """Of a copy that waits in line; False while it has to."""
        assert self.place is not None
        if not self.state.may_begin(self.place):
            return False
        run, self.place = self.state.take_turn(self.place), None
        self.world = self.world.with_copy(number, IDLE if run is None else TAKEN)
        return True

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
        self.state.target_lost()
        troubles = self.world.troubles_left - 1
        self.world = self.world._replace(cached=self.world.durable, flushing=None, troubles_left=troubles)

    # --- what can happen next --------------------------------------------------------------------------------------

    def successors(self) -> Iterator[Step]:
        """Every event that can come next, each tried on a copy."""
        yield from self._after_passive()
        for number in ACTIVE:
            yield from self._after_active(number)
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

    def _after_passive(self) -> Iterator[Step]:
        phase = self.world.writes[PASSIVE]
        if phase == IDLE:
            step = self.then("passive write begins")
            step.state.write_begins(0, 1)
            step.world = step.world.with_write(PASSIVE, WITHDRAWN)._replace(recorded=True)
            yield step
        yield from self._on_source_alone(PASSIVE)

    def _on_source_alone(self, number: int) -> Iterator[Step]:
        phase = self.world.writes[number]
        if phase == WITHDRAWN:
            step = self.then(f"write {number} changes the source alone")
            step.change_source(number, PASSED)
            yield step
        elif phase == PASSED:
            step = self.then(f"write {number} ends")
            step.end_passive(number)
            yield step

    def _after_active(self, number: int) -> Iterator[Step]:
        phase = self.world.writes[number]
        if phase == IDLE:
            step = self.then(f"active {number} arrives")
            step.arrive(number)
            yield step
        elif phase == ARRIVED:
            if self.state.may_begin(self.active[number]):
                step = self.then(f"active {number} begins")
                step.begin(number)
                yield step
            step = self.then(f"active {number} withdraws")
            step.withdraw(number)
            yield step
        elif phase == BEGUN:
            step = self.then(f"active {number} changes the source")
            step.change_source(number, CHANGED)
            yield step
            step = self.then(f"active {number} fails on the source")
            step.fail_source(number)
            step.end_active(number, on_both=False)
            yield step
        elif phase == CHANGED:
            step = self.then(f"active {number} is sent")
            step.send(number)
            yield step
            if number not in self.late:
                step = self.then(f"active {number} is late")
                step.state.active_is_late(step.active[number])
                step.late |= {number}
                yield step
            step = self.then(f"active {number} fails on the target")
            step.world = step.world.write_target(number, GARBAGE[0])
            step.end_active(number, on_both=False)
            yield step
        elif phase == SENT:
            step = self.then(f"active {number} ends")
            step.end_active(number, on_both=True)
            yield step
        yield from self._on_source_alone(number)

    def _after_copies(self) -> Iterator[Step]:
        idle = [number for number, (phase, _) in enumerate(self.world.copies) if phase == IDLE]
        if idle:
            step = self.then(f"copy {idle[0]} takes")
            if step.state.take(1) is not None:
                step.world = step.world.with_copy(idle[0], TAKEN)
                yield step
            elif self.place is None and (place := step.state.wait_in_line()) is not None:
                step.place = place
                step.world = step.world.with_copy(idle[0], LINED)
                yield step
        for number, (phase, content) in enumerate(self.world.copies):
            if phase == LINED:
                step = self.then(f"copy {number} takes its turn")
                if step.take_turn(number):
                    yield step
            elif phase == TAKEN:
                step = self.then(f"copy {number} reads")
                step.world = step.world.with_copy(number, READ, step.world.source)
                yield step
            elif phase == READ:
                step = self.then(f"copy {number} writes the target")
                step.world = step.world.copy_to_target(content).with_copy(number, SENT, content)
                yield step
            elif phase == SENT:
                step = self.then(f"copy {number} settles")
                step.settle(number, copied=True)
                yield step
                if self.world.troubles_left:
                    step = self.then(f"copy {number} settles as failed")
                    step.settle(number, copied=False)
                    yield step

    # --- what must hold --------------------------------------------------------------------------------------------

    def check(self) -> None:
        """What differs is on record; what is called synced is, but for what is being written to both."""
        world, state = self.world, self.state
        if (world.cached | world.durable) != {world.source}:
            if not state.is_recorded(0):
                raise BrokenRuleError("the target differs, and the state does not know")
            if not world.recorded:
                raise BrokenRuleError("the target differs, and the record does not know")
        if state.is_synced:
            self._check_synced()

    def _check_synced(self) -> None:
        """Each half reads as on the source; one that is being written to both may still read as it did before that."""
        world = self.world
        allowed: tuple[set[int], set[int]] = ({world.source[0]}, {world.source[1]})
        for number in self.active:
            if world.writes[number] != ARRIVED and number not in self.late:
                for half in (0, 1) if WHOLE[number] else (1,):
                    allowed[half].update((world.before[number][half], NEW[number]))
        for content in world.cached:
            if content[0] not in allowed[0] or content[1] not in allowed[1]:
                raise BrokenRuleError(f"called synced, but the target reads {content}")

    def check_drain(self) -> None:
        """Finish, copy, flush; then both sides are the same, and nothing is left to do."""
        end = self.then("drained")
        end.finish()
        if end.state.take(1) is not None:
            end.world = end.world.copy_to_target(end.world.source)
            end.state.settle(0, 1, copied=True)
        if end.state.take(1) is not None:
            raise BrokenRuleError("copying does not come to an end")
        end.begin_flush()
        end.end_flush()
        if end.world.cached | end.world.durable != {end.world.source}:
            raise BrokenRuleError("drained, copied and flushed, but the target is not the same")
        if not end.state.is_synced or end.state.is_recorded(0):
            raise BrokenRuleError("nothing is left to do, but it is not synced")

    def finish(self) -> None:
        """All that is under way comes to its end; active writes wait for copies, and for each other."""
        for number, (phase, content) in enumerate(self.world.copies):
            if phase == TAKEN:
                content = self.world.source
            if phase in (TAKEN, READ):
                self.world = self.world.copy_to_target(content)
            if phase in (TAKEN, READ, SENT):
                self.settle(number, copied=True)
        for number in range(3):
            if self.world.writes[number] == WITHDRAWN:
                self.change_source(number, PASSED)
            if self.world.writes[number] == PASSED:
                self.end_passive(number)
        for active in list(self.state._active):
            if active is self.place:
                self._finish_place()
            else:
                self._finish_active(next(number for number, other in self.active.items() if other is active))
        if self.world.flushing is not None:
            self.end_flush()

    def _finish_place(self) -> None:
        number = next(number for number, (phase, _) in enumerate(self.world.copies) if phase == LINED)
        if not self.take_turn(number):
            raise BrokenRuleError("a copy waits for nobody")
        if self.world.copies[number][0] == TAKEN:
            self.world = self.world.copy_to_target(self.world.source)
            self.settle(number, copied=True)

    def _finish_active(self, number: int) -> None:
        if self.world.writes[number] == ARRIVED:
            if not self.state.may_begin(self.active[number]):
                raise BrokenRuleError("an active write waits for nobody")
            self.begin(number)
        if self.world.writes[number] == BEGUN:
            self.change_source(number, CHANGED)
        if self.world.writes[number] == CHANGED:
            self.send(number)
        self.end_active(number, on_both=True)


def _twin(active: ActiveWrite) -> ActiveWrite:
    twin = ActiveWrite(active.first, active.end, (active.whole[0] + active.first, active.whole[1] + active.first))
    twin.begun, twin.fresh, twin.clears = active.begun, active.fresh.copy(), active.clears.copy()
    return twin


class Cast(NamedTuple):
    """What takes part in a walk: writes by their numbers, how many copies, flushes and troubles."""

    writes: tuple[int, ...]
    copies: int
    flushes: int
    troubles: int


BOTH: Final = (1, 2)
CASTS: Final = [
    Cast((0, 1, 2), 1, 0, 0),
    Cast(BOTH, 1, 1, 1),
    Cast(BOTH, 2, 0, 0),
    Cast((0, 1), 1, 1, 1),
    Cast((0, 2), 1, 1, 1),
    Cast((1,), 2, 1, 1),
    Cast((2,), 2, 1, 1),
]


def beginnings(rules: type[SyncState], cast: Cast) -> list[Step]:
    """A mirror that has everything to do, and one that goes on where it was the same."""
    full, same = DirtyBitmap(CHUNK, CHUNK), frozenset({ORIGINAL})
    full.fill()
    world = World(
        writes=tuple(IDLE if number in cast.writes else OVER for number in range(3)),
        copies=((IDLE, GARBAGE),) * cast.copies,
        flushes_left=cast.flushes,
        troubles_left=cast.troubles,
    )
    clean = world._replace(cached=same, durable=same, recorded=False)
    return [Step(world, rules(full)), Step(clean, rules(DirtyBitmap(CHUNK, CHUNK)))]


@pytest.mark.parametrize("cast", CASTS)
def test_the_rules_hold_in_every_order_of_events(cast: Cast) -> None:
    walk = Walk(beginnings(SyncState, cast)).run()
    assert walk.violation is None, f"{walk.violation} after: {', '.join(walk.path)}"
    assert walk.states > 1500, "the model has lost one of its events"


@pytest.mark.parametrize(
    "rules",
    [
        weaker_active_rules.BeginsBesideACopy,
        weaker_active_rules.BeginsBesideAnother,
        weaker_active_rules.TakesWhatIsWritten,
        weaker_active_rules.UnmarksWhatItCoversInPart,
        weaker_active_rules.IsNotSpoiledByALaterWrite,
        weaker_active_rules.IsNotSpoiledByAnEarlierWrite,
        weaker_active_rules.IsNotSpoiledByALoss,
        weaker_active_rules.UnmarksWhatFailed,
        weaker_active_rules.RetiresAtTheEnd,
        weaker_active_rules.CallsItSyncedBeforeItIs,
        weaker_active_rules.WithdrawsUnseen,
    ],
)
def test_no_rule_can_be_softer(rules: type[SyncState]) -> None:
    assert any(Walk(beginnings(rules, cast)).run().violation is not None for cast in CASTS), f"{rules.__name__} got through"
