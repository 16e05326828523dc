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

import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

import pytest
from bitarray import bitarray
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from nbdmirror.bitmap.dirty import DirtyBitmap
from nbdmirror.bitmap.sync_state import SyncState

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


class BrokenRuleError(AssertionError):
    """A rule did not hold."""


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
        return Step(self.world, _clone(self.state), (*self.path, name), self.strict)

    def key(self) -> tuple[object, ...]:
        """What the future depends on."""
        return (self.world.folded(), _facts(self.state))

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


def _clone(state: SyncState) -> SyncState:
    """A state of its own with the same facts. `copy.deepcopy` says the same in ten times the time."""
    twin = type(state)(_clone_dirty(state.dirty))
    for name, value in vars(state).items():
        if name != "dirty":
            setattr(twin, name, copy.copy(value))
    return twin


def _clone_dirty(dirty: DirtyBitmap) -> DirtyBitmap:
    twin = DirtyBitmap(dirty.size, dirty.granularity)
    for first, end in dirty.runs():
        twin.add_chunks(first, end)
    return twin


def _facts(state: SyncState) -> tuple[object, ...]:
    """Every attribute of a state of one chunk, in a form that can be compared."""
    rest = tuple(
        (name, tuple(value) if isinstance(value, dict | set) else str(value))
        if name != "_writing"
        else (name, tuple(sorted(value.items())))
        for name, value in sorted(vars(state).items())
        if name != "dirty"
    )
    return (state.dirty.is_dirty(0), state.dirty.count, *rest)


@dataclass
class Walk:
    """Every state that can be reached from the two beginnings, until the first violation."""

    rules: type[SyncState]
    strict: bool = True
    states: int = 0
    violation: BrokenRuleError | None = None
    path: tuple[str, ...] = field(default=())

    def run(self) -> Walk:
        """Breadth first, so that the path of a violation is a shortest one."""
        todo = [self._beginning(dirty=True), self._beginning(dirty=False)]
        seen = {step.key() for step in todo}
        while todo:
            level: list[Step] = []
            for step in todo:
                self.states += 1
                try:
                    step.check()
                    step.check_drain()
                    for after in step.successors():
                        key = after.key()
                        if key not in seen:
                            seen.add(key)
                            level.append(after)
                except BrokenRuleError as violation:
                    self.violation, self.path = violation, step.path
                    return self
            todo = level
        return self

    def _beginning(self, *, dirty: bool) -> Step:
        """A mirror that has everything to do, or one that goes on where it was the same."""
        bitmap = DirtyBitmap(CHUNK, CHUNK)
        if dirty:
            bitmap.fill()
            return Step(World(), self.rules(bitmap), strict=self.strict)
        same = frozenset({ORIGINAL})
        return Step(World(cached=same, durable=same, recorded=False), self.rules(bitmap), strict=self.strict)


def test_the_rules_hold_in_every_order_of_events() -> None:
    walk = Walk(SyncState).run()
    assert walk.violation is None, f"{walk.violation} after: {', '.join(walk.path)}"
    # If the model lost one of its events, the walk would become short before it became wrong.
    assert walk.states > 30_000


# --- what is weaker --------------------------------------------------------------------------------------------------


class MarksOnlyAfterTheWrite(SyncState):
    def write_begins(self, first: int, end: int) -> None:
        pass

    def write_ends(self, first: int, end: int) -> None:
        self.dirty.add_chunks(first, end)


class MarksOnlyAfterTheWriteButCounts(SyncState):
    """Nothing is taken while it is written, but until the write ends nobody is told of it."""

    def write_begins(self, first: int, end: int) -> None:
        self._writing[first, end] = self._writing.get((first, end), 0) + 1

    def write_ends(self, first: int, end: int) -> None:
        super().write_ends(first, end)
        self.dirty.add_chunks(first, end)


class MarksTwiceAndClearsOnSettle(SyncState):
    def write_ends(self, first: int, end: int) -> None:
        super().write_ends(first, end)
        self.dirty.add_chunks(first, end)

    def take(self, most: int) -> tuple[int, int] | None:
        run = super().take(most)
        if run is not None:
            self.dirty.add_chunks(*run)
        return run

    def settle(self, first: int, end: int, *, copied: bool) -> None:
        super().settle(first, end, copied=copied)
        if copied:
            self.dirty.discard_chunks(first, end)


class CopiesTwiceAtOnce(SyncState):
    def take(self, most: int) -> tuple[int, int] | None:
        held, self._copying = self._copying, bitarray(self.dirty.chunks, endian="little")
        run = super().take(most)
        self._copying |= held
        return run


class TakesWhileWriting(SyncState):
    def take(self, most: int) -> tuple[int, int] | None:
        held, self._writing = self._writing, {}
        run = super().take(most)
        self._writing = held
        return run


class ForgetsAFailure(SyncState):
    def settle(self, first: int, end: int, *, copied: bool) -> None:
        marked = self.dirty.is_dirty(first)
        super().settle(first, end, copied=copied)
        if not marked:
            self.dirty.discard_chunks(first, end)


class RetiresOnSettle(SyncState):
    def settle(self, first: int, end: int, *, copied: bool) -> None:
        super().settle(first, end, copied=copied)
        self._unflushed[first:end] = 0


class RetiresOnAnyFlush(SyncState):
    """What settled while the flush was under way is retired by it, too."""

    def flush_ends(self) -> Iterator[tuple[int, int]]:
        assert self._flushing is not None
        self._flushing |= self._unflushed
        self._unflushed.setall(0)
        return super().flush_ends()


class RetiresWhatIsDirtyAgain(SyncState):
    def flush_ends(self) -> Iterator[tuple[int, int]]:
        flushed = self._flushing is not None and self._flushing.any()
        list(super().flush_ends())
        return iter([(0, 1)] if flushed else [])


class ForgetsTheLoss(SyncState):
    def target_lost(self) -> None:
        self._flushing = None
        self._unflushed.setall(0)


class ForgetsTheFlushThatFailed(SyncState):
    def target_lost(self) -> None:
        self._flushing = None
        super().target_lost()


class BelievesCopiesUnderWayAtTheLoss(SyncState):
    def target_lost(self) -> None:
        held, self._copying = self._copying, bitarray(self.dirty.chunks, endian="little")
        super().target_lost()
        self._copying = held


@pytest.mark.parametrize(
    "rules",
    [
        MarksOnlyAfterTheWrite,
        MarksOnlyAfterTheWriteButCounts,
        MarksTwiceAndClearsOnSettle,
        CopiesTwiceAtOnce,
        TakesWhileWriting,
        ForgetsAFailure,
        RetiresOnSettle,
        RetiresOnAnyFlush,
        RetiresWhatIsDirtyAgain,
        ForgetsTheLoss,
        ForgetsTheFlushThatFailed,
        BelievesCopiesUnderWayAtTheLoss,
    ],
)
def test_no_rule_can_be_softer(rules: type[SyncState]) -> None:
    """By the content of the disks alone: the walk is not told the rules here, only what they are for."""
    walk = Walk(rules, strict=False).run()
    assert walk.violation is not None, f"{rules.__name__} got through {walk.states} states"


# --- many chunks -----------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Write:
    """A guest's write in flight."""

    first: int
    end: int
    changed: bool = False


@dataclass(eq=False)
class Copy:
    """A run that was taken; `content` once it was read, `sent` once the target has it."""

    first: int
    end: int
    content: list[int] | None = None
    sent: bool = False


class MirrorMachine(RuleBasedStateMachine):
    """The same model over several chunks at once, with runs that overlap in every way."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[Write] = []
        self.copies: list[Copy] = []
        self.flushing: list[set[int]] | None = None
        self.last_content = ORIGINAL

    @initialize(chunks=st.integers(1, 12), tail=st.integers(1, CHUNK), dirty=st.booleans())
    def make(self, chunks: int, tail: int, dirty: bool) -> None:
        bitmap = DirtyBitmap((chunks - 1) * CHUNK + tail, CHUNK)
        if dirty:
            bitmap.fill()
        self.state = SyncState(bitmap)
        self.chunks, self.tail = chunks, tail
        self.source = [ORIGINAL] * chunks
        self.cached = [{GARBAGE if dirty else ORIGINAL} for _ in range(chunks)]
        self.durable = [set(contents) for contents in self.cached]
        self.record = [dirty] * chunks

    def span(self, at: int, length: int) -> tuple[int, int]:
        """A run of at least one chunk, for any two numbers."""
        first = at % self.chunks
        return first, min(first + 1 + length, self.chunks)

    # --- the guest

    @rule(at=st.integers(0, 11), length=st.integers(0, 4))
    def begin_write(self, at: int, length: int) -> None:
        first, end = self.span(at, length)
        self.state.write_begins(first, end)
        self.record[first:end] = [True] * (end - first)
        self.writes.append(Write(first, end))

    @precondition(lambda self: self.writes)
    @rule(which=st.integers(0, 5))
    def change_disk(self, which: int) -> None:
        write = self.writes[which % len(self.writes)]
        self.last_content += 1
        self.source[write.first : write.end] = [self.last_content] * (write.end - write.first)
        write.changed = True

    @precondition(lambda self: self.writes)
    @rule(which=st.integers(0, 5))
    def end_write(self, which: int) -> None:
        write = self.writes.pop(which % len(self.writes))
        self.state.write_ends(write.first, write.end)

    @rule(at=st.integers(0, 11), length=st.integers(0, 4))
    def write_at_once(self, at: int, length: int) -> None:
        self.begin_write(at, length)
        self.change_disk(len(self.writes) - 1)
        self.end_write(len(self.writes) - 1)

    # --- copies

    @rule(most=st.integers(1, 6))
    def take(self, most: int) -> None:
        spans = [(each.first, each.end) for each in self.writes] + [(each.first, each.end) for each in self.copies]
        busy = {chunk for first, end in spans for chunk in range(first, end)}
        ready = {chunk for chunk in range(self.chunks) if self.state.dirty.is_dirty(chunk)} - busy
        run = self.state.take(most)
        if run is None:
            assert not ready
            return
        first, end = run
        assert 0 < end - first <= most
        assert set(range(first, end)) <= ready
        assert not self.state.dirty.next_run(first, end)
        self.copies.append(Copy(first, end))

    @precondition(lambda self: self.copies)
    @rule(which=st.integers(0, 3))
    def read_source(self, which: int) -> None:
        copied = self.copies[which % len(self.copies)]
        if copied.content is None:
            copied.content = self.source[copied.first : copied.end]

    @precondition(lambda self: self.copies)
    @rule(which=st.integers(0, 3))
    def send(self, which: int) -> None:
        copied = self.copies[which % len(self.copies)]
        if copied.content is not None and not copied.sent:
            self.write_target(copied.first, copied.content)
            copied.sent = True

    def write_target(self, first: int, contents: list[int]) -> None:
        for chunk, content in enumerate(contents, first):
            self.cached[chunk] = {content}
            self.durable[chunk].add(content)
            if self.flushing is not None:
                self.flushing[chunk].add(content)

    @precondition(lambda self: self.copies)
    @rule(which=st.integers(0, 3))
    def settle(self, which: int) -> None:
        """Done, or failed wherever it had got to."""
        copied = self.copies.pop(which % len(self.copies))
        self.state.settle(copied.first, copied.end, copied=copied.sent)

    @precondition(lambda self: self.copies)
    @rule(which=st.integers(0, 3))
    def fail(self, which: int) -> None:
        """The target breaks off in the middle of the write."""
        copied = self.copies.pop(which % len(self.copies))
        self.write_target(copied.first, [GARBAGE] * (copied.end - copied.first))
        self.state.settle(copied.first, copied.end, copied=False)

    # --- the target

    @precondition(lambda self: self.flushing is None)
    @rule()
    def begin_flush(self) -> None:
        self.state.flush_begins()
        self.flushing = [set(contents) for contents in self.cached]

    @precondition(lambda self: self.flushing is not None)
    @rule()
    def end_flush(self) -> None:
        assert self.flushing is not None
        self.durable, self.flushing = self.flushing, None
        for first, end in self.state.flush_ends():
            self.record[first:end] = [False] * (end - first)

    @rule()
    def lose_cache(self) -> None:
        self.state.target_lost()
        self.flushing = None
        self.cached = [set(contents) for contents in self.durable]

    # --- what must hold

    @invariant()
    def what_differs_is_on_record(self) -> None:
        for chunk in range(self.chunks):
            on_record = self.state.is_recorded(chunk)
            assert self.record[chunk] or not on_record
            if self.cached[chunk] | self.durable[chunk] != {self.source[chunk]}:
                assert on_record

    @invariant()
    def synced_means_the_same(self) -> None:
        dirty = [chunk for chunk in range(self.chunks) if self.state.dirty.is_dirty(chunk)]
        copying = [chunk for run in self.copies for chunk in range(run.first, run.end)]
        assert self.state.is_synced == (not dirty and not copying)
        assert self.state.remaining_bytes == sum(
            self.tail if chunk == self.chunks - 1 else CHUNK for chunk in (*dirty, *copying)
        )
        if self.state.is_synced:
            assert self.cached == [{content} for content in self.source]

    def teardown(self) -> None:
        """From wherever it was left: finish, copy, flush, compare."""
        while self.writes:
            self.change_disk(0)
            self.end_write(0)
        while self.copies:
            self.read_source(0)
            self.send(0)
            self.settle(0)
        if self.flushing is not None:
            self.end_flush()
        for _ in range(self.chunks):
            self.take(self.chunks)
            if not self.copies:
                break
            self.read_source(0)
            self.send(0)
            self.settle(0)
        self.begin_flush()
        self.end_flush()
        assert self.state.is_synced
        assert self.durable == self.cached == [{content} for content in self.source]
        assert not any(self.record)
        assert not any(self.state.is_recorded(chunk) for chunk in range(self.chunks))


MirrorMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestMirrorMachine = MirrorMachine.TestCase
