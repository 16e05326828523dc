from __future__ import annotations

import tracemalloc

import pytest
from bitarray import bitarray

from nbdmirror.bitmap.dirty import BLOCK, DIRTY, DirtyBitmap
from nbdmirror.bitmap.recorder import WriteRecorder
from nbdmirror.bitmap.sync_state import SyncState
from nbdmirror.errors import StateError
from nbdmirror.extents import Extent

GRAIN = 4096


def bitmap(size: int = 10 * GRAIN, *dirty: int) -> DirtyBitmap:
    made = DirtyBitmap(size, GRAIN)
    for chunk in dirty:
        made.add_chunks(chunk, chunk + 1)
    return made


def dirty_chunks(made: DirtyBitmap) -> list[int]:
    return [chunk for chunk in range(made.chunks) if made.is_dirty(chunk)]


@pytest.mark.parametrize("granularity", [0, -512, 1, 256, 511, 513, 1000, 65537])
def test_granularity_is_a_power_of_two_of_at_least_512(granularity: int) -> None:
    with pytest.raises(StateError, match="power of 2"):
        DirtyBitmap(1 << 20, granularity)


@pytest.mark.parametrize(
    ("size", "granularity", "chunks"), [(0, 512, 0), (1, 512, 1), (512, 512, 1), (513, 512, 2), (1 << 40, 65536, 1 << 24)]
)
def test_last_chunk_may_reach_past_the_end(size: int, granularity: int, chunks: int) -> None:
    made = DirtyBitmap(size, granularity)
    assert (made.chunks, made.count, made.dirty_bytes) == (chunks, 0, 0)


def test_marking_rounds_outward() -> None:
    made = bitmap()
    made.add(GRAIN - 1, 2)
    assert dirty_chunks(made) == [0, 1]
    made.add(3 * GRAIN, GRAIN)
    assert dirty_chunks(made) == [0, 1, 3]
    made.add(5 * GRAIN, GRAIN + 1)
    assert dirty_chunks(made) == [0, 1, 3, 5, 6]
    made.add(10 * GRAIN - 1, 1)
    assert made.count == 6


def test_unmarking_rounds_inward() -> None:
    made = bitmap()
    made.fill()
    made.discard(1, 2 * GRAIN)
    assert dirty_chunks(made) == [0, *range(2, 10)]
    made.discard(5 * GRAIN + 1, GRAIN - 1)
    made.discard(5 * GRAIN, GRAIN - 1)
    assert made.count == 9
    made.discard(8 * GRAIN, 2 * GRAIN)
    assert dirty_chunks(made) == [0, *range(2, 8)]


def test_end_of_the_disk_completes_the_last_chunk() -> None:
    made = bitmap(2 * GRAIN + 100)
    made.fill()
    made.discard(2 * GRAIN, 99)
    assert made.count == 3
    made.discard(2 * GRAIN, 100)
    assert dirty_chunks(made) == [0, 1]


@pytest.mark.parametrize("offset", [0, 1, GRAIN, GRAIN + 1, 10 * GRAIN - 1, 10 * GRAIN])
def test_discard_of_nothing_does_nothing(offset: int) -> None:
    made = bitmap()
    made.fill()
    made.discard(offset, 0)
    assert made.count == 10


def test_count_does_not_count_twice() -> None:
    made = bitmap()
    for first, end in ((2, 5), (2, 5), (3, 4), (4, 7), (4, 4)):
        made.add_chunks(first, end)
    assert made.count == 5
    for first, end in ((0, 3), (0, 3), (6, 7), (5, 5)):
        made.discard_chunks(first, end)
    assert made.count == 3
    made.clear()
    assert (made.count, made.next_run(0)) == (0, None)


def test_dirty_bytes_end_with_the_disk() -> None:
    made = bitmap(2 * GRAIN + 100, 0)
    assert made.dirty_bytes == GRAIN
    made.add_chunks(2, 3)
    assert made.dirty_bytes == GRAIN + 100
    made.fill()
    assert made.dirty_bytes == made.size


def test_range_of_ends_with_the_disk() -> None:
    made = bitmap(2 * GRAIN + 100)
    assert made.range_of(0, 2) == (0, 2 * GRAIN)
    assert made.range_of(1, 3) == (GRAIN, GRAIN + 100)


def test_next_dirty() -> None:
    made = bitmap(4 * GRAIN + 1, 1, 2, 4)
    assert made.next_dirty(0) == (GRAIN, 2 * GRAIN)
    assert made.next_dirty(2 * GRAIN + 5) == (2 * GRAIN, GRAIN)
    assert made.next_dirty(3 * GRAIN) == (4 * GRAIN, 1)
    assert bitmap().next_dirty(0) is None


def test_runs_and_limits() -> None:
    made = bitmap(10 * GRAIN, 1, 2, 3, 6, 9)
    assert list(made.runs()) == [(1, 4), (6, 7), (9, 10)]
    assert list(made.runs(2, 9)) == [(2, 4), (6, 7)]
    assert list(made.runs(2, 3)) == [(2, 3)]
    assert made.next_run(4, 6) is None
    assert made.next_run(5, 5) is None
    assert made.next_run(10) is None


def test_extents_of_any_range() -> None:
    made = bitmap(4 * GRAIN + 100, 1, 4)
    assert list(made.extents(0, made.size)) == [
        Extent(0, GRAIN, 0),
        Extent(GRAIN, GRAIN, DIRTY),
        Extent(2 * GRAIN, 2 * GRAIN, 0),
        Extent(4 * GRAIN, 100, DIRTY),
    ]
    assert list(made.extents(GRAIN + 10, GRAIN)) == [Extent(GRAIN + 10, GRAIN - 10, DIRTY), Extent(2 * GRAIN, 10, 0)]
    assert list(made.extents(GRAIN + 10, 10)) == [Extent(GRAIN + 10, 10, DIRTY)]
    assert made.extents(5, 10).is_complete


def test_mask_clean() -> None:
    bits = bitarray("1100110011", endian="little")
    bitmap(10 * GRAIN, 0, 2, 5).mask_clean(bits)
    assert bits == bitarray("0100100011", endian="little")


def test_disk_of_no_bytes() -> None:
    made = bitmap(0)
    made.fill()
    made.clear()
    assert (made.next_run(0), made.dirty_bytes, list(made.runs())) == (None, 0, [])
    assert SyncState(made).take(10) is None


def test_search_over_many_blocks_forgets_no_bit() -> None:
    """A search that finds a block empty may skip it from then on, but only until something is marked there."""
    made = DirtyBitmap(5 * BLOCK * 512 + 512, 512)
    last = 5 * BLOCK
    made.add_chunks(last, last + 1)
    assert made.next_run(0) == (last, last + 1)
    made.add_chunks(BLOCK - 1, BLOCK + 1)
    assert made.next_run(0) == (BLOCK - 1, BLOCK + 1)
    assert made.next_run(BLOCK) == (BLOCK, BLOCK + 1)
    made.discard_chunks(BLOCK - 1, BLOCK)
    assert made.next_run(0) == (BLOCK, BLOCK + 1)
    made.discard_chunks(BLOCK, BLOCK + 1)
    assert made.next_run(0) == (last, last + 1)
    # A search that begins or ends inside a block says nothing about all of it.
    made.add_chunks(2 * BLOCK + 10, 2 * BLOCK + 11)
    assert made.next_run(2 * BLOCK + 11, 3 * BLOCK) is None
    assert made.next_run(2 * BLOCK, 2 * BLOCK + 10) is None
    assert made.next_run(0) == (2 * BLOCK + 10, 2 * BLOCK + 11)


def test_run_over_many_blocks() -> None:
    made = DirtyBitmap(5 * BLOCK * 512, 512)
    made.add_chunks(10, 4 * BLOCK + 5)
    assert made.next_run(0) == (10, 4 * BLOCK + 5)
    assert made.next_run(0, 3 * BLOCK) == (10, 3 * BLOCK)
    made.discard_chunks(BLOCK, 2 * BLOCK)
    assert list(made.runs()) == [(10, BLOCK), (2 * BLOCK, 4 * BLOCK + 5)]


def test_searched_blocks_are_not_searched_again() -> None:
    """The summary is what keeps a sparse bitmap fast: an empty block loses its bit, a partly searched one doesn't."""
    made = DirtyBitmap(3 * BLOCK * 512, 512)
    made.fill()
    made.discard_chunks(0, 3 * BLOCK)
    assert made.next_run(5) is None
    assert made._summary == bitarray("100")
    assert made.next_run(0) is None
    assert not made._summary.any()
    made.fill()
    made.clear()
    assert not made._summary.any()


def test_prints_itself() -> None:
    assert repr(bitmap(10 * GRAIN, 1)) == "<DirtyBitmap 1/10 chunks of 4096 bytes dirty>"
    assert repr(SyncState(bitmap())) == "<SyncState <DirtyBitmap 0/10 chunks of 4096 bytes dirty> copying=0 writing=0>"


# --- what stands on it -----------------------------------------------------------------------------------------------


def test_take_goes_on_where_it_ended() -> None:
    state = SyncState(bitmap(10 * GRAIN, 0, 5, 9))
    assert state.take(1) == (0, 1)
    state.write_begins(0, 1)
    state.write_ends(0, 1)
    state.settle(0, 1, copied=True)
    assert [state.take(1), state.take(1), state.take(1)] == [(5, 6), (9, 10), (0, 1)]


def test_take_cuts_runs_at_what_is_busy() -> None:
    state = SyncState(bitmap())
    state.dirty.fill()
    state.write_begins(3, 4)
    assert state.take(100) == (0, 3)
    state.dirty.fill()
    assert state.take(2) == (4, 6)
    assert state.take(100) == (6, 10)
    assert state.take(100) is None
    state.write_ends(3, 4)
    state.settle(0, 3, copied=True)
    assert state.take(100) == (0, 4)


def test_overlapping_writes_are_waited_for_one_by_one() -> None:
    state = SyncState(bitmap())
    state.write_begins(0, 3)
    state.write_begins(0, 3)
    state.write_begins(2, 6)
    state.write_ends(0, 3)
    assert state.take(100) is None
    state.write_ends(0, 3)
    assert state.take(100) == (0, 2)
    state.write_ends(2, 6)
    assert state.take(100) == (2, 6)


def test_flushes_come_one_at_a_time() -> None:
    state = SyncState(bitmap())
    with pytest.raises(AssertionError, match="no flush"):
        state.flush_ends()
    state.flush_begins()
    with pytest.raises(AssertionError, match="under way"):
        state.flush_begins()


def test_what_is_being_written_stays_on_record_by_itself() -> None:
    """Others see the bitmap, and may clear it: a write in flight is a fact of its own."""
    state = SyncState(bitmap(10 * GRAIN, 3))
    assert state.take(1) == (3, 4)
    state.settle(3, 4, copied=True)
    state.flush_begins()
    state.write_begins(3, 4)
    state.dirty.clear()
    assert list(state.flush_ends()) == []
    assert state.is_recorded(3)
    state.write_ends(3, 4)
    assert not state.is_recorded(3)


def test_recorder_turns_bytes_into_chunks_and_wakes() -> None:
    state = SyncState(bitmap())
    woken: list[tuple[int, int] | None] = []
    recorder = WriteRecorder(state, lambda: woken.append(state.take(10)), lambda _first, _end: None)
    recorder.write_begins(GRAIN - 1, 2)
    assert dirty_chunks(state.dirty) == [0, 1]
    assert woken == []
    recorder.write_ends(GRAIN - 1, 2)
    assert woken == [(0, 2)]


def test_memory_is_a_bit_per_chunk_and_hardly_more() -> None:
    tracemalloc.start()
    try:
        made = DirtyBitmap(16 << 40, 65536)
        used, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert made.chunks / 8 <= used <= made.chunks / 8 * 1.01


# --- bits in place ---------------------------------------------------------------------------------------------------


def in_place(size: int, content: bytes) -> tuple[DirtyBitmap, bytearray]:
    place = bytearray(content)
    return DirtyBitmap(size, GRAIN, bitarray(buffer=memoryview(place), endian="little")), place


def test_bits_in_place_are_those_of_the_place() -> None:
    made, place = in_place(11 * GRAIN - 1, b"\x81\x04")
    assert (made.chunks, made.count, made.dirty_bytes, dirty_chunks(made)) == (11, 3, 3 * GRAIN - 1, [0, 7, 10])
    assert list(made.runs()) == [(0, 1), (7, 8), (10, 11)]
    made.add(GRAIN, GRAIN)
    made.discard(10 * GRAIN, GRAIN)
    assert place == b"\x83\x00"
    assert made.dirty_bytes == 3 * GRAIN
    made.fill()
    assert place == b"\xff\x07"
    assert made.count == 11
    others = bitarray(11, endian="little")
    others.setall(1)
    made.discard_chunks(3, 4)
    made.mask_clean(others)
    assert others.count() == 1
    made.clear()
    assert place == b"\x00\x00"


def test_place_without_bits() -> None:
    made, _ = in_place(0, b"")
    made.fill()
    assert (made.count, made.dirty_bytes, list(made.runs())) == (0, 0, [])


def test_growth_is_told_of_new_marks_alone() -> None:
    made, _ = in_place(10 * GRAIN, b"\x01\x00")
    assert made.grown  # what was there may not be durable
    made.grown = False
    made.add(0, 1)
    made.discard(0, GRAIN)
    made.add_chunks(3, 3)
    assert not made.grown
    made.add(0, 1)
    assert made.grown
    made.grown = False
    made.add(0, 2 * GRAIN)
    assert made.grown
    made.grown = False
    made.add(0, 2 * GRAIN)
    made.clear()
    assert not made.grown
    assert not DirtyBitmap(GRAIN, GRAIN).grown
