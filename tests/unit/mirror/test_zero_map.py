"""What is known to read as zero: rounded inward where it is learnt, outward where it is lost."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from nbdmirror.mirror.zero_map import ZeroMap

GRAIN = 512
SIZE = 20 * GRAIN + 100


def test_nothing_is_known_at_first() -> None:
    zero_map = ZeroMap(SIZE, GRAIN)
    assert not zero_map.reads_zero(0, 1)


def test_range_must_be_known_whole() -> None:
    zero_map = ZeroMap(SIZE, GRAIN)
    zero_map.set_zero(0, 3 * GRAIN)
    assert zero_map.reads_zero(0, 3 * GRAIN)
    assert zero_map.reads_zero(GRAIN + 1, 2)
    assert not zero_map.reads_zero(0, 3 * GRAIN + 1)
    zero_map.clear(GRAIN + 5, 1)
    assert not zero_map.reads_zero(0, 3 * GRAIN)
    assert zero_map.reads_zero(0, GRAIN)
    assert zero_map.reads_zero(2 * GRAIN, GRAIN)


def test_part_of_a_chunk_teaches_nothing() -> None:
    zero_map = ZeroMap(SIZE, GRAIN)
    zero_map.set_zero(1, GRAIN - 1)
    zero_map.set_zero(GRAIN, 1)
    zero_map.set_zero(2 * GRAIN + 1, 2 * GRAIN - 2)
    assert not any(zero_map.reads_zero(chunk * GRAIN, GRAIN) for chunk in range(5))


def test_end_of_the_disk_completes_the_last_chunk() -> None:
    zero_map = ZeroMap(SIZE, GRAIN)
    zero_map.set_zero(20 * GRAIN, 100)
    assert zero_map.reads_zero(20 * GRAIN, 100)
    zero_map.clear(SIZE - 1, 1)
    assert not zero_map.reads_zero(20 * GRAIN, 100)


def test_all_can_be_forgotten() -> None:
    zero_map = ZeroMap(SIZE, GRAIN)
    zero_map.set_zero(0, SIZE)
    assert zero_map.reads_zero(0, SIZE)
    zero_map.clear_all()
    assert not any(zero_map.reads_zero(at, 1) for at in range(0, SIZE, GRAIN))


ranges = st.integers(0, SIZE - 1).flatmap(lambda offset: st.tuples(st.just(offset), st.integers(1, SIZE - offset)))


@given(st.lists(st.tuples(st.sampled_from(["zero", "data"]), ranges), max_size=30), ranges)
def test_what_it_claims_is_so(changes: list[tuple[str, tuple[int, int]]], asked: tuple[int, int]) -> None:
    """A disk that begins full of ones is zeroed and written; never is a byte claimed that is not zero."""
    disk = bytearray(b"\1") * SIZE
    zero_map = ZeroMap(SIZE, GRAIN)
    for kind, (offset, length) in changes:
        if kind == "zero":
            disk[offset : offset + length] = bytes(length)
            zero_map.set_zero(offset, length)
        else:
            zero_map.clear(offset, length)
            disk[offset : offset + length] = b"\1" * length
    offset, length = asked
    if zero_map.reads_zero(offset, length):
        assert not any(disk[offset : offset + length])
    assert disk[0] or changes
