"""DirtyBitmap as a whole: merging, copies, counts, and the form that QEMU hashes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdmirror.bitmap.dirty import DirtyBitmap

if TYPE_CHECKING:
    from collections.abc import Iterable

KiB = 1024


def marked(size: int, granularity: int, offsets: Iterable[int]) -> DirtyBitmap:
    made = DirtyBitmap(size, granularity)
    for offset in offsets:
        made.add(offset, 1)
    return made


def dirty_bytes(made: DirtyBitmap) -> list[tuple[int, int]]:
    return [made.range_of(*run) for run in made.runs()]


@given(
    size=st.integers(1, 300 * KiB),
    shifts=st.tuples(st.integers(9, 16), st.integers(9, 16)),
    places=st.tuples(st.lists(st.floats(0, 0.999)), st.lists(st.floats(0, 0.999))),
)
def test_merge_is_the_union_rounded_outward(
    size: int, shifts: tuple[int, int], places: tuple[list[float], list[float]]
) -> None:
    target, source = (
        marked(size, 1 << shift, (int(at * size) for at in some)) for shift, some in zip(shifts, places, strict=True)
    )
    before = dirty_bytes(source)
    model = DirtyBitmap(size, target.granularity)
    for offset, length in dirty_bytes(target) + before:
        model.add(offset, length)
    target.merge(source)
    assert dirty_bytes(target) == dirty_bytes(model)
    assert target.count == model.count
    assert dirty_bytes(source) == before


def test_tail_of_a_coarse_source_is_clipped_at_the_end_of_the_disk() -> None:
    size = 64 * KiB + 1536
    fine, coarse = DirtyBitmap(size, 512), marked(size, 64 * KiB, [size - 1])
    fine.merge(coarse)
    assert (fine.count, dirty_bytes(fine)) == (3, [(64 * KiB, 1536)])


def test_merge_with_itself_changes_nothing() -> None:
    made = marked(KiB * KiB, 4 * KiB, [0, 300 * KiB])
    made.merge(made)
    assert (made.count, dirty_bytes(made)) == (2, [(0, 4096), (300 * KiB, 4096)])


def test_search_finds_what_was_merged_beyond_the_first_block() -> None:
    size = 4 << 30
    target, source = DirtyBitmap(size, 64 * KiB), marked(size, 4 * KiB, [3 << 30])
    assert target.next_dirty(0) is None
    target.merge(source)
    assert target.next_dirty(0) == (3 << 30, 64 * KiB)


def test_snapshot_comes_back() -> None:
    made = marked(KiB * KiB, 4 * KiB, [0, 300 * KiB])
    saved = made.snapshot()
    made.clear()
    made.add(500 * KiB, 1)
    made.restore(saved)
    assert (made.count, dirty_bytes(made)) == (2, [(0, 4096), (300 * KiB, 4096)])


@pytest.mark.parametrize(
    ("chunks", "parts", "counts"),
    [(8, 4, [1, 0, 1, 1]), (8, 3, [1, 1, 1]), (8, 100, [1, 0, 0, 0, 1, 0, 0, 1]), (8, 1, [3]), (0, 5, [])],
)
def test_counts_by_parts(chunks: int, parts: int, counts: list[int]) -> None:
    dirty = [0, 4, 7] if chunks else []
    assert marked(chunks * 512, 512, (chunk * 512 for chunk in dirty)).counts(parts) == counts


@pytest.mark.parametrize(("chunks", "size"), [(0, 8), (1, 8), (64, 8), (65, 16), (1024, 128)])
def test_serialised_in_words(chunks: int, size: int) -> None:
    assert DirtyBitmap(chunks * 512, 512).serialised() == bytes(size)


def test_serialised_lowest_bit_first() -> None:
    assert marked(65 * 512, 512, [0, 9 * 512, 64 * 512]).serialised() == bytes([1, 2, 0, 0, 0, 0, 0, 0, 1]) + bytes(7)
