"""SyncState: the working bitmap's rules, the heart of the mirror.

Four facts are kept of every chunk: `dirty` (must be copied), `copying` (taken, not settled), `writing` (guest writes in
flight, a count), `unflushed` (settled since the last flush of the target began).

Rules:
1. A write marks its chunks dirty when it begins, before the disk changes.
2. `take` never returns a chunk that is being copied or written, and clears dirty as it takes: before the block status is
   asked for and before anything is read.
3. What was taken is settled once: copied, it is unflushed; not copied, it is dirty again.
4. A chunk must stay on record while any of the four facts holds. The end of a flush retires only what had settled
   before that flush began; a flush that fails, or a target that is lost, makes everything unflushed dirty again, and what
   is being copied too: the target may have answered that write before the loss, and been believed after it.
5. An active write goes to both disks before it is answered. It counts as writing from its arrival; it begins, and changes
   a disk, only when no copy and no earlier active write has any of its chunks. So that copies get a turn, too, a dirty chunk
   that is never idle can be waited for in the same line.
6. Once on both disks, an active write unmarks a chunk that it covered wholly, or that was clean when it began; the chunk is
   unflushed then. It unmarks nothing where another write was in flight meanwhile, whose order on the two disks is not
   known, where the target was lost meanwhile, or where it was answered before the target had it.

Why each is needed, and that none can be softer: `tests/property/test_sync_state.py` and `test_active_writes.py` walk every
interleaving of writes, copies, flushes and failures over these rules and over each weaker set, which they break.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bitarray import bitarray

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nbdmirror.bitmap.dirty import DirtyBitmap


class ActiveWrite:
    """A write of chunks `[first, end)` on its way to both disks, by the numbers of its own chunks from 0 on.

    `whole` are those it covers wholly, `[first, end)`. Once it has begun, `fresh` has those that were clean before and are
    marked for this write alone, `clears` those that it unmarks in the end; a chunk that it spoils is taken out of both.
    """

    __slots__ = ("begun", "clears", "end", "first", "fresh", "whole")

    def __init__(self, first: int, end: int, whole: tuple[int, int]) -> None:
        self.first = first
        self.end = end
        self.whole = (whole[0] - first, whole[1] - first)
        self.begun = False
        self.fresh = bitarray(end - first, endian="little")
        self.clears = bitarray(end - first, endian="little")

    def overlaps(self, first: int, end: int) -> bool:
        """Whether it writes any of chunks `[first, end)`."""
        return self.first < end and first < self.end

    def covers(self, chunk: int) -> bool:
        """Whether it writes a chunk of the disk wholly."""
        return self.whole[0] <= chunk - self.first < self.whole[1]

    def is_fresh(self, chunk: int) -> bool:
        """Whether a chunk of the disk was clean when this began, and nobody else has written it since."""
        return bool(self.fresh[chunk - self.first])

    def spoil(self, first: int, end: int) -> None:
        """Somebody else writes chunks `[first, end)` meanwhile: what the disks hold of them is not known."""
        first, end = max(first, self.first) - self.first, min(end, self.end) - self.first
        if first < end:
            self.fresh[first:end] = 0
            self.clears[first:end] = 0

    def __repr__(self) -> str:
        bits = f" fresh={self.fresh.to01()} clears={self.clears.to01()}" if self.begun else ""
        return f"<ActiveWrite {self.first}..{self.end} whole={self.whole}{bits}>"


class SyncState:
    """The state of every chunk of `dirty`, which may be a bitmap that somebody else reads, too."""

    def __init__(self, dirty: DirtyBitmap) -> None:
        self.dirty = dirty
        self._copying = bitarray(dirty.chunks, endian="little")
        self._copying_count = 0
        self._writing: dict[tuple[int, int], int] = {}
        # In the order of their arrival.
        self._active: list[ActiveWrite] = []
        self._unflushed = bitarray(dirty.chunks, endian="little")
        self._flushing: bitarray | None = None
        self._cursor = 0

    # --- guest writes ----------------------------------------------------------------------------------------------

    def write_begins(self, first: int, end: int) -> None:
        """A write to chunks `[first, end)` is about to change the disk."""
        self.dirty.add_chunks(first, end)
        span = (first, end)
        self._writing[span] = self._writing.get(span, 0) + 1
        for active in self._active:
            active.spoil(first, end)

    def write_ends(self, first: int, end: int) -> None:
        """That write changes nothing more, whether it succeeded or not."""
        span = (first, end)
        left = self._writing[span] - 1
        if left:
            self._writing[span] = left
        else:
            del self._writing[span]

    # --- guest writes that go to both disks ------------------------------------------------------------------------

    def active_arrives(self, first: int, end: int, whole: tuple[int, int]) -> ActiveWrite:
        """A write to chunks `[first, end)`, which covers those of `whole` wholly, wants to begin: nothing changes yet."""
        active = ActiveWrite(first, end, whole)
        self._active.append(active)
        return active

    def may_begin(self, active: ActiveWrite) -> bool:
        """Whether nothing that it has to wait for has any of its chunks."""
        if self._copying.find(1, active.first, active.end) >= 0:
            return False
        for other in self._active:
            if other is active:
                return True
            if other.overlaps(active.first, active.end):
                return False
        raise AssertionError("an active write that has not arrived, or has ended")

    def active_begins(self, active: ActiveWrite) -> None:
        """It is about to change the disks, the source first."""
        active.begun = True
        active.fresh.setall(1)
        self.dirty.mask_clean(active.fresh, active.first)
        active.clears |= active.fresh
        active.clears[slice(*active.whole)] = 1
        for first, end in self._writing:
            active.spoil(first, end)
        self.dirty.add_chunks(active.first, active.end)

    def active_ends(self, active: ActiveWrite, *, on_both: bool) -> None:
        """It changes nothing more. `on_both`: source and target have done it; otherwise its chunks stay dirty."""
        self._active.remove(active)
        if on_both:
            for first, end in _runs(active.clears):
                self.dirty.discard_chunks(active.first + first, active.first + end)
                self._unflushed[active.first + first : active.first + end] = 1

    def active_is_late(self, active: ActiveWrite) -> None:
        """It is answered before the target has it: its chunks stay dirty, and nobody else's until it ends."""
        active.spoil(active.first, active.end)

    def active_withdraws(self, active: ActiveWrite) -> None:
        """It will not wait any longer, and begins as a write to the source alone; `write_ends` ends it."""
        self._active.remove(active)
        self.write_begins(active.first, active.end)

    def wait_in_line(self) -> ActiveWrite | None:
        """A place in the line for a dirty chunk that active writes keep from being taken; None where there is none."""
        if self.is_synced:
            return None
        for active in self._active:
            settled = ~active.fresh
            self.dirty.mask_clean(settled, active.first)
            marked = ~(settled | active.fresh)
            at = marked.find(1)
            while at >= 0 and self._is_fresh(active.first + at):  # for another one
                at = marked.find(1, at + 1)
            if at >= 0:
                chunk = active.first + at
                return self.active_arrives(chunk, chunk + 1, (chunk, chunk))
        return None

    def _is_fresh(self, chunk: int) -> bool:
        """Whether a chunk is marked for an active write alone."""
        return any(active.overlaps(chunk, chunk + 1) and active.is_fresh(chunk) for active in self._active)

    def take_turn(self, place: ActiveWrite) -> tuple[int, int] | None:
        """Take the chunk of a place that may begin, though others wait behind it. None where it is clean, or written."""
        self.leave_line(place)
        run = (place.first, place.end)
        if not self.dirty.is_dirty(place.first) or any(first <= place.first < end for first, end in self._writing):
            return None
        self._take(*run)
        return run

    def leave_line(self, place: ActiveWrite) -> None:
        """Nobody waits there any longer."""
        self._active.remove(place)

    @property
    def waiting(self) -> list[ActiveWrite]:
        """The active writes that have arrived and not begun, in order."""
        return [active for active in self._active if not active.begun]

    # --- copies ----------------------------------------------------------------------------------------------------

    def take(self, most: int) -> tuple[int, int] | None:
        """Take up to `most` chunks that are dirty and idle, in a run `[first, end)`; None when there are none.

        The search goes on where the last one ended, so a guest that rewrites one place does not keep the rest waiting.
        """
        run = self._find(self._cursor, self.dirty.chunks, most) or self._find(0, self._cursor, most)
        if run is None:
            return None
        self._take(*run)
        self._cursor = run[1] if run[1] < self.dirty.chunks else 0
        return run

    def _take(self, first: int, end: int) -> None:
        self.dirty.discard_chunks(first, end)
        self._copying[first:end] = 1
        self._copying_count += end - first

    def _find(self, start: int, limit: int, most: int) -> tuple[int, int] | None:
        while start < limit:
            run = self.dirty.next_run(start, limit)
            if run is None:
                return None
            first, end = run
            idle = self._idle_from(first)
            if idle == first:
                return first, self._busy_from(first, min(end, first + most))
            start = idle
        return None

    def _idle_from(self, chunk: int) -> int:
        """The first chunk from `chunk` on that is neither copied nor written; may be one past the last."""
        while True:
            before = chunk
            if chunk < self.dirty.chunks and self._copying[chunk]:
                free = self._copying.find(0, chunk)
                chunk = self.dirty.chunks if free < 0 else free
            for first, end in self._spans():
                if first <= chunk < end:
                    chunk = end
            if chunk == before:
                return chunk

    def _busy_from(self, first: int, end: int) -> int:
        """The first chunk of `(first, end)` that is being copied or written, or `end`."""
        copied = self._copying.find(1, first, end)
        if copied >= 0:
            end = copied
        for start, _ in self._spans():
            if first < start < end:
                end = start
        return end

    def _spans(self) -> Iterator[tuple[int, int]]:
        """The chunks of every guest write in flight, `[first, end)` each."""
        yield from self._writing
        for active in self._active:
            yield active.first, active.end

    def settle(self, first: int, end: int, *, copied: bool) -> None:
        """Chunks `[first, end)`, taken before, are done with: on the target (but not flushed there), or not."""
        self._copying[first:end] = 0
        self._copying_count -= end - first
        if copied:
            self._unflushed[first:end] = 1
        else:
            self.dirty.add_chunks(first, end)

    def give_back(self, first: int, end: int) -> None:
        """Chunks that were taken are not copied after all, because nothing was begun: dirty again, and next in line."""
        self.settle(first, end, copied=False)
        self._cursor = first

    # --- flushes of the target -------------------------------------------------------------------------------------

    def flush_begins(self) -> None:
        """A flush of the target is about to be sent; one at a time."""
        assert self._flushing is None, "a flush is under way"
        self._flushing = self._unflushed.copy()
        self._unflushed.setall(0)

    def flush_ends(self) -> Iterator[tuple[int, int]]:
        """That flush succeeded. Returns the runs of chunks that need not stay on record any longer."""
        assert self._flushing is not None, "no flush is under way"
        retired, self._flushing = self._flushing, None
        retired &= ~(self._copying | self._unflushed)
        self.dirty.mask_clean(retired)
        for first, end in self._spans():
            retired[first:end] = 0
        return _runs(retired)

    def target_lost(self) -> None:
        """The flush failed, or the target with its volatile cache is gone: what was not flushed must be copied again."""
        lost = self._unflushed | self._copying
        if self._flushing is not None:
            lost |= self._flushing
        self._flushing = None
        self._unflushed = bitarray(len(lost), endian="little")
        for first, end in _runs(lost):
            self.dirty.add_chunks(first, end)
        for active in self._active:
            active.spoil(active.first, active.end)

    @property
    def is_flushing(self) -> bool:
        """Whether a flush of the target is under way."""
        return self._flushing is not None

    # --- questions -------------------------------------------------------------------------------------------------

    def is_recorded(self, chunk: int) -> bool:
        """Whether any of the four facts holds of a chunk."""
        return bool(
            self.dirty.is_dirty(chunk)
            or self._copying[chunk]
            or self._unflushed[chunk]
            or (self._flushing is not None and self._flushing[chunk])
            or any(first <= chunk < end for first, end in self._spans())
        )

    def recorded_runs(self) -> Iterator[tuple[int, int]]:
        """The runs of chunks of which any of the four facts holds."""
        return _runs(~self._idle())

    def idle_runs(self) -> Iterator[tuple[int, int]]:
        """The runs of chunks of which none does: they need not be on record."""
        return _runs(self._idle())

    def _idle(self) -> bitarray:
        idle = ~(self._copying | self._unflushed)
        if self._flushing is not None:
            idle &= ~self._flushing
        self.dirty.mask_clean(idle)
        for first, end in self._spans():
            idle[first:end] = 0
        return idle

    @property
    def is_synced(self) -> bool:
        """Nothing is being copied, and nothing dirty but for active writes: source and target are the same, but for flushing
        and for what is being written to both just now."""
        fresh = sum(active.fresh.count() for active in self._active)
        return self.dirty.count == fresh and self._copying_count == 0

    @property
    def remaining_bytes(self) -> int:
        """Bytes that are dirty or being copied."""
        dirty = self.dirty
        copying = self._copying_count * dirty.granularity
        if dirty.chunks and self._copying[-1]:
            copying -= dirty.chunks * dirty.granularity - dirty.size
        return dirty.dirty_bytes + copying

    def __repr__(self) -> str:
        return f"<SyncState {self.dirty!r} copying={self._copying_count} writing={len(self._writing) + len(self._active)}>"


def _runs(bits: bitarray) -> Iterator[tuple[int, int]]:
    """The runs of set bits, `[first, end)` each."""
    at = 0
    while (first := bits.find(1, at)) >= 0:
        at = bits.find(0, first)
        if at < 0:
            yield first, len(bits)
            return
        yield first, at
