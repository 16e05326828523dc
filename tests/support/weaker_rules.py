"""Rule sets that are weaker than SyncState's, each in one point: a test that lets one of them through sees too little."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bitarray import bitarray

from nbdmirror.bitmap.sync_state import SyncState

if TYPE_CHECKING:
    from collections.abc import Iterator


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
