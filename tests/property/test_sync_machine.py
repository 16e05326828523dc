"""The rules of `SyncState` on a random walk over several chunks at once, with runs that overlap in every way.

The world is that of `test_sync_state`: contents are numbers, a target has a cache that it may lose.
"""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from nbdmirror.bitmap.dirty import DirtyBitmap
from nbdmirror.bitmap.sync_state import SyncState

CHUNK = 512
# Contents. Guest writes leave numbers above ORIGINAL.
GARBAGE = -1
ORIGINAL = 0


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
    def runs_say_what_single_chunks_do(self) -> None:
        recorded = {chunk for chunk in range(self.chunks) if self.state.is_recorded(chunk)}
        assert {chunk for run in self.state.recorded_runs() for chunk in range(*run)} == recorded
        assert {chunk for run in self.state.idle_runs() for chunk in range(*run)} == set(range(self.chunks)) - recorded

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
