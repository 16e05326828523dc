"""Regions: who may write, what a commit writes, and what a checkpoint takes off the record."""

from __future__ import annotations

from bitarray import bitarray

from nbdmirror.bitmap.regions import Regions, recorded_ranges
from nbdmirror.units import MiB

REGION = 4 * MiB
SIZE = 10 * REGION


def made() -> Regions:
    return Regions(SIZE, REGION)


def committed(regions: Regions) -> tuple[int, bytes] | None:
    piece = regions.commit_begins()
    if piece is not None:
        regions.commit_ends()
    return piece


def on_record(*spans: tuple[int, int]) -> Regions:
    regions = made()
    for offset, length in spans:
        regions.want(offset, length)
    committed(regions)
    return regions


def map_of(*recorded: int) -> bytes:
    bits = bitarray(4096 * 8, endian="little")
    for region in recorded:
        bits[region] = 1
    return bits.tobytes()


def test_write_passes_once_its_regions_are_durably_on_record() -> None:
    regions = made()
    assert not regions.passes(REGION, 1)
    regions.want(REGION, 1)
    assert not regions.passes(REGION, 1)
    assert regions.commit_begins() == (0, map_of(1))
    assert not regions.passes(REGION, 1)
    regions.commit_ends()
    assert regions.passes(REGION, 1)
    assert regions.passes(2 * REGION - 1, 1)
    assert not regions.passes(2 * REGION - 1, 2)
    assert not regions.passes(REGION - 1, 2)
    assert regions.on_record == 1


def test_write_over_several_regions_needs_them_all() -> None:
    regions = on_record((0, 1), (2 * REGION, 1))
    assert not regions.passes(REGION - 1, REGION + 2)
    regions.want(REGION - 1, REGION + 2)
    committed(regions)
    assert regions.passes(REGION - 1, REGION + 2)


def test_commit_that_failed_counts_for_nothing_and_is_made_again() -> None:
    regions = made()
    regions.want(0, 1)
    assert regions.commit_begins() is not None
    regions.commit_fails()
    assert not regions.passes(0, 1)
    assert committed(regions) == (0, map_of(0))
    assert committed(regions) is None


def test_what_is_wanted_during_a_commit_waits_for_the_next() -> None:
    regions = made()
    regions.want(0, 1)
    regions.commit_begins()
    regions.want(REGION, 1)
    regions.commit_ends()
    assert regions.passes(0, 1)
    assert not regions.passes(REGION, 1)
    assert committed(regions) == (0, map_of(0, 1))


def test_only_the_pages_that_changed_are_written() -> None:
    regions = Regions(3 * 32768 * REGION, REGION)
    regions.want((32768 + 5) * REGION, 1)
    assert committed(regions) == (4096, map_of(5))
    regions.want(32767 * REGION, 2 * REGION)
    assert committed(regions) == (0, map_of(32767) + map_of(0, 5))


def test_idle_is_what_nothing_has_touched_since_the_last_checkpoint() -> None:
    regions = on_record((0, 3 * REGION))
    assert regions.passes(0, 1)
    assert list(regions.idle([]).search(1)) == [1, 2]
    assert list(regions.idle([(2 * REGION, 1)]).search(1)) == [1]
    regions.next_epoch()
    assert list(regions.idle([]).search(1)) == [0, 1, 2]
    assert regions.passes(REGION, 1)
    assert list(regions.idle([]).search(1)) == [0, 2]


def test_withdrawn_region_has_to_be_put_on_record_again() -> None:
    regions = on_record((0, 2 * REGION))
    idle = regions.idle([])
    assert regions.passes(0, 1)  # meanwhile
    regions.withdraw(idle)
    assert regions.passes(0, 1)
    assert not regions.passes(REGION, 1)
    assert committed(regions) == (0, map_of(0))
    assert not regions.passes(REGION, 1)


def test_withdrawal_that_failed_is_one_for_writes_and_made_again() -> None:
    regions = on_record((0, 1))
    regions.withdraw(regions.idle([]))
    regions.commit_begins()
    regions.commit_fails()
    assert not regions.passes(0, 1)
    assert committed(regions) == (0, map_of())


def test_commit_under_way_does_not_bring_back_what_is_withdrawn() -> None:
    regions = on_record((0, 1))
    regions.want(REGION, 1)
    assert regions.commit_begins() == (0, map_of(0, 1))
    regions.withdraw(regions.idle([]))
    regions.commit_ends()
    assert not regions.passes(0, 1)
    assert regions.passes(REGION, 1)
    assert committed(regions) == (0, map_of(1))


def test_withdrawal_of_many_pages_writes_them_all() -> None:
    count = 3 * 32768
    regions = Regions(count * REGION, REGION)
    regions.want(0, count * REGION)
    committed(regions)
    regions.withdraw(regions.idle([]))
    assert committed(regions) == (0, bytes(3 * 4096))


def test_ranges_of_a_map_end_with_the_disk() -> None:
    found = list(recorded_ranges(map_of(0, 1, 3), 4 * REGION - 700, REGION))
    assert found == [(0, 2 * REGION), (3 * REGION, REGION - 700)]
    assert list(recorded_ranges(map_of(9), REGION, REGION)) == []
    assert list(recorded_ranges(b"", 0, REGION)) == []
