"""Rule sets that are weaker than SyncState's for active writes, each in one point."""

from __future__ import annotations

from bitarray import bitarray

from nbdmirror.bitmap.sync_state import ActiveWrite, SyncState


class BeginsBesideACopy(SyncState):
    def may_begin(self, active: ActiveWrite) -> bool:
        held, self._copying = self._copying, bitarray(self.dirty.chunks, endian="little")
        may = super().may_begin(active)
        self._copying = held
        return may


class BeginsBesideAnother(SyncState):
    def may_begin(self, active: ActiveWrite) -> bool:
        held, self._active = self._active, [active]
        may = super().may_begin(active)
        self._active = held
        return may


class TakesWhatIsWritten(SyncState):
    def take(self, most: int) -> tuple[int, int] | None:
        held, self._active = self._active, []
        run = super().take(most)
        self._active = held
        return run


class UnmarksWhatItCoversInPart(SyncState):
    def active_ends(self, active: ActiveWrite, *, on_both: bool) -> None:
        active.clears.setall(1)
        super().active_ends(active, on_both=on_both)


class IsNotSpoiledByALaterWrite(SyncState):
    def write_begins(self, first: int, end: int) -> None:
        held, self._active = self._active, []
        super().write_begins(first, end)
        self._active = held


class IsNotSpoiledByAnEarlierWrite(SyncState):
    def active_begins(self, active: ActiveWrite) -> None:
        held, self._writing = self._writing, {}
        super().active_begins(active)
        self._writing = held


class IsNotSpoiledByALoss(SyncState):
    def target_lost(self) -> None:
        held, self._active = self._active, []
        super().target_lost()
        self._active = held


class UnmarksWhatFailed(SyncState):
    def active_ends(self, active: ActiveWrite, *, on_both: bool) -> None:
        super().active_ends(active, on_both=True)


class RetiresAtTheEnd(SyncState):
    """What is on both is taken for durable."""

    def active_ends(self, active: ActiveWrite, *, on_both: bool) -> None:
        held = self._unflushed.copy()
        super().active_ends(active, on_both=on_both)
        self._unflushed = held


class CallsItSyncedBeforeItIs(SyncState):
    """A chunk that was dirty before counts as synced while it is written as a whole."""

    @property
    def is_synced(self) -> bool:
        return self.dirty.count == sum(active.clears.count() for active in self._active) and not self._copying_count


class WithdrawsUnseen(SyncState):
    def active_withdraws(self, active: ActiveWrite) -> None:
        held, self._active = [other for other in self._active if other is not active], []
        self.write_begins(active.first, active.end)
        self._active = held
