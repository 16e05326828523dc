"""DirtyBitmap against a set of numbers, on disks of one block of bits and of several."""

from __future__ import annotations

from typing import ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from nbdmirror.bitmap import dirty
from nbdmirror.bitmap.dirty import DIRTY, DirtyBitmap

GRAIN = 512


class DirtyBitmapMachine(RuleBasedStateMachine):
    """Offsets and lengths are drawn near what matters: the edges of chunks, of blocks and of the disk."""

    # The largest disk to try, and what its interesting places are multiples of; both in chunks.
    most: ClassVar[int]
    step: ClassVar[int]

    @initialize(data=st.data())
    def make(self, data: st.DataObject) -> None:
        chunks = data.draw(st.integers(1, self.most), "chunks")
        tail = data.draw(st.sampled_from([1, 100, GRAIN]), "bytes of the last chunk")
        self.size = (chunks - 1) * GRAIN + tail
        self.bitmap = DirtyBitmap(self.size, GRAIN)
        self.model: set[int] = set()

    def place(self, data: st.DataObject, name: str) -> int:
        """An offset in bytes, at or around the edge of something."""
        edge = data.draw(st.integers(0, self.bitmap.chunks // self.step + 1), name) * self.step
        chunk = edge + data.draw(st.integers(-2, 2), "chunks off")
        offset = chunk * GRAIN + data.draw(st.sampled_from([-1, 0, 1]), "bytes off")
        return min(max(offset, 0), self.size)

    def range(self, data: st.DataObject) -> tuple[int, int]:
        start, end = sorted([self.place(data, "from"), self.place(data, "to")])
        return start, end - start

    @rule(data=st.data())
    def add(self, data: st.DataObject) -> None:
        offset, length = self.range(data)
        if length:
            self.bitmap.add(offset, length)
            self.model |= set(range(offset // GRAIN, (offset + length - 1) // GRAIN + 1))

    @rule(data=st.data())
    def discard(self, data: st.DataObject) -> None:
        offset, length = self.range(data)
        self.bitmap.discard(offset, length)
        end = offset + length
        self.model -= {
            chunk
            for chunk in range(offset // GRAIN, self.bitmap.chunks)
            if offset <= chunk * GRAIN and min((chunk + 1) * GRAIN, self.size) <= end
        }

    @rule(data=st.data())
    def one_chunk(self, data: st.DataObject) -> None:
        chunk = min(self.place(data, "at") // GRAIN, self.bitmap.chunks - 1)
        assert self.bitmap.is_dirty(chunk) == (chunk in self.model)
        self.bitmap.add_chunks(chunk, chunk + 1)
        self.model.add(chunk)

    @rule(data=st.data())
    def next_run(self, data: st.DataObject) -> None:
        start, limit = sorted([self.place(data, "start") // GRAIN, self.place(data, "limit") // GRAIN])
        found = self.bitmap.next_run(start, limit)
        ahead = sorted(chunk for chunk in self.model if start <= chunk < limit)
        if not ahead:
            assert found is None
            return
        end = ahead[0]
        while end < limit and end in self.model:
            end += 1
        assert found == (ahead[0], end)

    @rule(data=st.data())
    def next_dirty(self, data: st.DataObject) -> None:
        offset = self.place(data, "offset")
        found = self.bitmap.next_dirty(offset)
        ahead = [chunk for chunk in self.model if chunk >= offset // GRAIN]
        assert (found is None) == (not ahead)
        if found is not None:
            assert found[0] == min(ahead) * GRAIN
            assert 0 < found[1] <= self.size - found[0]

    @rule(data=st.data())
    def extents(self, data: st.DataObject) -> None:
        offset, length = self.range(data)
        extents = self.bitmap.extents(offset, length)
        assert extents.is_complete
        for extent in extents:
            first, last = extent.offset // GRAIN, (extent.end - 1) // GRAIN
            assert extent.flags in (0, DIRTY)
            assert all((chunk in self.model) == (extent.flags == DIRTY) for chunk in range(first, last + 1))

    @rule()
    def clear(self) -> None:
        self.bitmap.clear()
        self.model.clear()

    @rule()
    def fill(self) -> None:
        self.bitmap.fill()
        self.model = set(range(self.bitmap.chunks))

    @invariant()
    def count_is_kept(self) -> None:
        assert self.bitmap.count == len(self.model)
        assert self.bitmap.dirty_bytes == sum(min(GRAIN, self.size - chunk * GRAIN) for chunk in self.model)

    def teardown(self) -> None:
        if hasattr(self, "bitmap"):
            assert {chunk for first, end in self.bitmap.runs() for chunk in range(first, end)} == self.model


class OneBlock(DirtyBitmapMachine):
    most = 40
    step = 8


class SmallBlocks(DirtyBitmapMachine):
    """Blocks of 16 chunks, so that the summary has many bits and sets stay small."""

    most = 130
    step = 16


@pytest.mark.parametrize("machine", [OneBlock, SmallBlocks])
def test_bitmap_is_a_set(machine: type[DirtyBitmapMachine], monkeypatch: pytest.MonkeyPatch) -> None:
    if machine is SmallBlocks:
        monkeypatch.setattr(dirty, "BLOCK", 16)
        monkeypatch.setattr(dirty, "_BLOCK_SHIFT", 4)
    run_state_machine_as_test(machine, settings=settings(max_examples=60, stateful_step_count=30, deadline=None))


class RealBlocks(DirtyBitmapMachine):
    """Blocks as they are. Ranges stay near the edges, so the sets grow large only where `fill` makes them so."""

    most = 3 * dirty.BLOCK + 5
    step = dirty.BLOCK


def test_bitmap_of_real_blocks_is_a_set() -> None:
    run_state_machine_as_test(RealBlocks, settings=settings(max_examples=6, stateful_step_count=12, deadline=None))
