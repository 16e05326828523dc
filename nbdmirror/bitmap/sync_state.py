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

Why each is needed, and that none can be softer: `tests/property/test_sync_state.py` walks every interleaving of two writes,
three copies and a failure over these rules and over each weaker set, which it breaks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bitarray import bitarray

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nbdmirror.bitmap.dirty import DirtyBitmap


class SyncState:
    """The state of every chunk of `dirty`, which may be a bitmap that somebody else reads, too."""

    def __init__(self, dirty: DirtyBitmap) -> None:
        self.dirty = dirty
        self._copying = bitarray(dirty.chunks, endian="little")
        self._copying_count = 0
        self._writing: dict[tuple[int, int], int] = {}
        self._unflushed = bitarray(dirty.chunks, endian="little")
        self._flushing: bitarray | None = None
        self._cursor = 0

    # --- guest writes ----------------------------------------------------------------------------------------------

    def write_begins(self, first: int, end: int) -> None:
        """A write to chunks `[first, end)` is about to change the disk."""
        self.dirty.add_chunks(first, end)
        span = (first, end)
        self._writing[span] = self._writing.get(span, 0) + 1

    def write_ends(self, first: int, end: int) -> None:
        """That write changes nothing more, whether it succeeded or not."""
        span = (first, end)
        left = self._writing[span] - 1
        if left:
            self._writing[span] = left
        else:
            del self._writing[span]

    # --- copies ----------------------------------------------------------------------------------------------------

    def take(self, most: int) -> tuple[int, int] | None:
        """Take up to `most` chunks that are dirty and idle, in a run `[first, end)`; None when there are none.

        The search goes on where the last one ended, so a guest that rewrites one place does not keep the rest waiting.
        """
        run = self._find(self._cursor, self.dirty.chunks, most) or self._find(0, self._cursor, most)
        if run is None:
            return None
        first, end = run
        self.dirty.discard_chunks(first, end)
        self._copying[first:end] = 1
        self._copying_count += end - first
        self._cursor = end if end < self.dirty.chunks else 0
        return run

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
            for first, end in self._writing:
                if first <= chunk < end:
                    chunk = end
            if chunk == before:
                return chunk

    def _busy_from(self, first: int, end: int) -> int:
        """The first chunk of `(first, end)` that is being copied or written, or `end`."""
        copied = self._copying.find(1, first, end)
        if copied >= 0:
            end = copied
        for start, _ in self._writing:
            if first < start < end:
                end = start
        return end

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
        for first, end in self._writing:
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
            or any(first <= chunk < end for first, end in self._writing)
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
        for first, end in self._writing:
            idle[first:end] = 0
        return idle

    @property
    def is_synced(self) -> bool:
        """Nothing dirty and nothing being copied: source and target are the same, but for flushing."""
        return self.dirty.count == 0 and self._copying_count == 0

    @property
    def remaining_bytes(self) -> int:
        """Bytes that are dirty or being copied."""
        dirty = self.dirty
        copying = self._copying_count * dirty.granularity
        if dirty.chunks and self._copying[-1]:
            copying -= dirty.chunks * dirty.granularity - dirty.size
        return dirty.dirty_bytes + copying

    def __repr__(self) -> str:
        return f"<SyncState {self.dirty!r} copying={self._copying_count} writing={len(self._writing)}>"


def _runs(bits: bitarray) -> Iterator[tuple[int, int]]:
    """The runs of set bits, `[first, end)` each."""
    at = 0
    while (first := bits.find(1, at)) >= 0:
        at = bits.find(0, first)
        if at < 0:
            yield first, len(bits)
            return
        yield first, at
