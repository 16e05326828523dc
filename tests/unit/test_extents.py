from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdmirror.errors import ProtocolError
from nbdmirror.extents import DATA, HOLE, ZERO, Extent, ExtentList, is_zero, zero_runs

MiB = 1024 * 1024


# --- extents ---------------------------------------------------------------------------------------------------------


def test_extent() -> None:
    extent = Extent(4096, 512, HOLE)
    assert extent.end == 4608
    assert not extent.is_zero
    assert Extent(0, 1, ZERO).is_zero
    assert Extent(0, 1, HOLE | ZERO).is_zero


@pytest.mark.parametrize(("flags", "words"), [(0, "DATA"), (1, "HOLE"), (2, "ZERO"), (3, "HOLE|ZERO"), (4, "0x4"), (7, "0x7")])
def test_extent_prints_itself(flags: int, words: str) -> None:
    assert repr(Extent(4096, 512, flags)) == f"<Extent 0x1000+512 {words}>"


def test_list_grows_in_order() -> None:
    extents = ExtentList(1000, 600)
    assert (len(extents), extents.length, extents.is_complete) == (0, 0, False)
    extents.add(100, DATA)
    extents.add(200, HOLE)
    assert list(extents) == [Extent(1000, 100, DATA), Extent(1100, 200, HOLE)]
    assert extents[1] == Extent(1100, 200, HOLE)
    assert (len(extents), extents.length, extents.is_complete) == (2, 300, False)
    extents.add(300, ZERO)
    assert extents.is_complete
    assert repr(extents) == f"ExtentList([{extents[0]!r}, {extents[1]!r}, {extents[2]!r}])"


def test_neighbours_of_equal_flags_are_one() -> None:
    extents = ExtentList(0, 100)
    for length, flags in ((10, 3), (20, 3), (5, 0), (5, 0), (1, 3)):
        extents.add(length, flags)
    assert list(extents) == [Extent(0, 30, 3), Extent(30, 10, 0), Extent(40, 1, 3)]


def test_what_lies_past_the_range_is_clipped() -> None:
    extents = ExtentList(512, 100)
    extents.add(60, DATA)
    extents.add(2**40, HOLE)
    extents.add(10, DATA)
    assert list(extents) == [Extent(512, 60, DATA), Extent(572, 40, HOLE)]
    assert extents.is_complete


@pytest.mark.parametrize("length", [0, -1])
def test_empty_extents_are_refused(length: int) -> None:
    with pytest.raises(ProtocolError, match=f"an extent of {length} bytes at offset 512"):
        ExtentList(512, 100).add(length, DATA)


def test_add_until() -> None:
    extents = ExtentList(100, 100)
    extents.add_until(90, HOLE)
    extents.add_until(100, HOLE)
    assert len(extents) == 0
    extents.add_until(150, HOLE)
    extents.add_until(150, ZERO)
    extents.add_until(120, ZERO)
    extents.add_until(500, DATA)
    assert list(extents) == [Extent(100, 50, HOLE), Extent(150, 50, DATA)]


def test_all_data() -> None:
    assert list(ExtentList.all_data(7, 9)) == [Extent(7, 9, DATA)]


@given(st.integers(0, 2**40), st.integers(1, 300), st.lists(st.tuples(st.integers(1, 100), st.integers(0, 3)), max_size=20))
def test_list_holds_its_promises(offset: int, limit: int, added: list[tuple[int, int]]) -> None:
    extents = ExtentList(offset, limit)
    flat: list[int] = []
    for length, flags in added:
        extents.add(length, flags)
        flat += [flags] * length
    at = offset
    for extent in extents:
        assert extent.offset == at
        assert extent.length > 0
        at = extent.end
    assert at == offset + extents.length <= offset + limit
    assert all(one.flags != two.flags for one, two in zip(extents, list(extents)[1:], strict=False))
    assert [extent.flags for extent in extents for _ in range(extent.length)] == flat[:limit]


# --- zeroes in data --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, 1, 4096, MiB - 1, MiB, MiB + 1, 2 * MiB, 2 * MiB + 3])
def test_is_zero(length: int) -> None:
    data = bytearray(b"\xff" + bytes(length) + b"\xff")
    assert is_zero(data, 1, 1 + length)
    if length:
        assert not is_zero(data, 0, 1 + length)
        assert not is_zero(data, 1, 2 + length)
        for at in {1, length // 2 + 1, length}:
            data[at] = 1
            assert not is_zero(data, 1, 1 + length)
            data[at] = 0


@pytest.mark.parametrize(
    ("content", "grain", "runs"),
    [
        (b"", 4, []),
        (b"abcd", 4, [(0, 4, False)]),
        (bytes(4), 4, [(0, 4, True)]),
        (b"ab" + bytes(4), 2, [(0, 2, False), (2, 6, True)]),
        (b"ab\0\0\0", 2, [(0, 2, False), (2, 5, True)]),
        (b"\0\0\0\1\0\0\0", 2, [(0, 2, True), (2, 4, False), (4, 7, True)]),
        (bytes(5) + b"x", 4, [(0, 4, True), (4, 6, False)]),
        (bytes(3), 4, [(0, 3, True)]),
    ],
)
def test_zero_runs(content: bytes, grain: int, runs: list[tuple[int, int, bool]]) -> None:
    assert zero_runs(bytearray(content), len(content), grain) == runs


def test_zero_runs_looks_no_further_than_it_was_told() -> None:
    assert zero_runs(bytearray(4) + b"\1" * 4, 4, 4) == [(0, 4, True)]
    assert zero_runs(bytearray(8), 6, 4) == [(0, 6, True)]


def test_zero_runs_may_begin_anywhere() -> None:
    data = bytearray(b"ab\0\0\0\0cd\0")
    assert zero_runs(data, 5, 2, 2) == [(2, 6, True), (6, 7, False)]
    assert zero_runs(data, 3, 2, 3) == [(3, 6, True)]


def test_zero_runs_with_a_coarse_grain() -> None:
    """More than is compared with at once elsewhere: the last byte of a grain counts, too."""
    data = bytearray(4 * MiB)
    data[2 * MiB - 1] = 1
    assert zero_runs(data, 4 * MiB, 2 * MiB) == [(0, 2 * MiB, False), (2 * MiB, 4 * MiB, True)]


@given(st.lists(st.integers(0, 1), max_size=60), st.integers(1, 9))
def test_zero_runs_cover_everything_once(content: list[int], grain: int) -> None:
    data = bytearray(content)
    runs = zero_runs(data, len(data), grain)
    assert [at for start, end, _ in runs for at in range(start, end)] == list(range(len(data)))
    assert all(one[2] != two[2] for one, two in itertools.pairwise(runs))
    for start, end, zero in runs:
        assert start % grain == 0
        for at in range(start, end, grain):
            assert zero == (not any(data[at : min(at + grain, end)]))
