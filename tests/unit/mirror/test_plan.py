"""Plans, for any block status: units tile the chunks, steps tile the units, and a zero is one that the source promised."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdmirror.extents import DATA, HOLE, ZERO, ExtentList
from nbdmirror.mirror.plan import Copy, Geometry, Unit, Zero, plan
from nbdmirror.units import GiB, KiB, MiB

CHUNK = 4096


def geometry(
    size: int, *, granularity: int = CHUNK, unit: int = 4 * CHUNK, most_zero: int = GiB, alignment: int = 1
) -> Geometry:
    return Geometry(granularity, unit, most_zero, alignment, size)


def extents_of(offset: int, *parts: tuple[int, int], limit: int | None = None) -> ExtentList:
    extents = ExtentList(offset, sum(length for length, _ in parts) if limit is None else limit)
    for length, flags in parts:
        extents.add(length, flags)
    return extents


def promised(extents: ExtentList) -> list[tuple[int, int]]:
    """What the source promised to read as zeroes, as ranges that do not touch."""
    ranges: list[tuple[int, int]] = []
    for extent in extents:
        if not extent.is_zero:
            continue
        if ranges and ranges[-1][1] == extent.offset:
            ranges[-1] = (ranges[-1][0], extent.end)
        else:
            ranges.append((extent.offset, extent.end))
    return ranges


def check(units: list[Unit], extents: ExtentList, bounds: Geometry) -> None:
    """Every rule at once."""
    end = extents.offset + extents.length
    covered = end if end == bounds.size else end // bounds.granularity * bounds.granularity
    zeroes = promised(extents)
    at = extents.offset
    for unit in units:
        assert unit.offset == at, "units tile what is wholly covered, in order"
        assert unit.length > 0
        assert unit.end % bounds.granularity == 0 or unit.end == bounds.size, "whole chunks"
        at = unit.end
        check_steps(unit, zeroes, bounds)
    assert at == max(covered, extents.offset)


def check_steps(unit: Unit, zeroes: list[tuple[int, int]], bounds: Geometry) -> None:
    at = unit.offset
    for step in unit.steps:
        assert step.offset == at, "steps tile their unit, in order"
        assert step.length > 0
        at += step.length
        assert step.offset % bounds.alignment == 0
        assert at % bounds.alignment == 0 or at == bounds.size
        if isinstance(step, Zero):
            assert any(first <= step.offset and at <= last for first, last in zeroes), "only what was promised"
    assert at == unit.end
    if any(isinstance(step, Copy) for step in unit.steps):
        assert unit.length <= bounds.unit
    else:
        assert unit.length <= max(bounds.most_zero, bounds.unit)
    assert unit.data_length == sum(step.length for step in unit.steps if isinstance(step, Copy))


@st.composite
def cases(draw: st.DrawFn) -> tuple[ExtentList, Geometry]:
    granularity = 1 << draw(st.integers(9, 14))
    alignment = draw(st.sampled_from([1, 512, granularity]))
    chunks = draw(st.integers(1, 40))
    size = chunks * granularity - draw(st.sampled_from([0, 0, 1, 511, granularity - 1]))
    first = draw(st.integers(0, chunks - 1)) * granularity
    if alignment > 1:
        size = max(size // alignment * alignment, first + alignment)
    bounds = geometry(
        size,
        granularity=granularity,
        unit=granularity * draw(st.integers(1, 8)),
        most_zero=granularity * draw(st.integers(1, 64)),
        alignment=alignment,
    )
    extents = ExtentList(first, size - first)
    length = st.one_of(st.integers(1, 3 * granularity), st.integers(1, 20).map(lambda count: count * granularity))
    for part in draw(st.lists(st.tuples(length, st.sampled_from([DATA, HOLE, ZERO, HOLE | ZERO])), min_size=1, max_size=30)):
        extents.add(*part)
    if draw(st.booleans()):
        extents.add_until(size, DATA)
    return extents, bounds


@given(cases())
def test_any_plan_keeps_the_rules(case: tuple[ExtentList, Geometry]) -> None:
    extents, bounds = case
    check(list(plan(extents, bounds)), extents, bounds)


def test_data_is_cut_at_multiples_of_the_unit() -> None:
    units = list(plan(extents_of(CHUNK, (9 * CHUNK, DATA)), geometry(10 * CHUNK)))
    assert [(unit.offset // CHUNK, unit.length // CHUNK) for unit in units] == [(1, 3), (4, 4), (8, 2)]


def test_hole_that_is_not_promised_to_be_zero_is_copied() -> None:
    (unit,) = plan(extents_of(0, (CHUNK, HOLE)), geometry(CHUNK))
    assert unit.steps == (Copy(0, CHUNK),)


def test_zero_inside_a_chunk_is_not_read() -> None:
    extents = extents_of(0, (1000, DATA), (2000, ZERO), (1096, DATA))
    (unit,) = plan(extents, geometry(CHUNK))
    assert unit.steps == (Copy(0, 1000), Zero(1000, 2000), Copy(3000, 1096))
    (unit,) = plan(extents, geometry(CHUNK, alignment=512))
    assert unit.steps == (Copy(0, 1024), Zero(1024, 1536), Copy(2560, 1536))


def test_zero_that_is_shorter_than_a_block_is_copied() -> None:
    (unit,) = plan(extents_of(0, (600, DATA), (400, ZERO), (3096, DATA)), geometry(CHUNK, alignment=512))
    assert unit.steps == (Copy(0, CHUNK),)


def test_last_chunk_ends_with_the_disk() -> None:
    size = 2 * CHUNK + 513
    units = list(plan(extents_of(0, (2 * CHUNK, DATA), (513, HOLE | ZERO)), geometry(size)))
    assert units[-1] == Unit(2 * CHUNK, 513, (Zero(2 * CHUNK, 513),))


def test_chunk_that_is_only_partly_covered_is_left_out() -> None:
    units = list(plan(extents_of(0, (CHUNK + 1, DATA)), geometry(4 * CHUNK)))
    assert [(unit.offset, unit.length) for unit in units] == [(0, CHUNK)]
    assert list(plan(extents_of(0, (CHUNK - 1, ZERO)), geometry(4 * CHUNK))) == []


@pytest.mark.parametrize("flags", [ZERO, HOLE | ZERO])
def test_long_zero_is_few_units(flags: int) -> None:
    size = 100 * GiB
    bounds = geometry(size, granularity=64 * KiB, unit=MiB, most_zero=256 * MiB)
    units = list(plan(extents_of(0, (size, flags)), bounds))
    assert len(units) == 400
    assert all(unit.data_length == 0 for unit in units)


def test_time_is_linear_in_the_extents() -> None:
    def seconds(count: int) -> float:
        parts = [(1500, DATA), (1500, ZERO)] * (count // 2)
        extents = extents_of(0, *parts)
        bounds = geometry(extents.length, granularity=64 * KiB, unit=MiB)
        started = time.process_time()
        units = list(plan(extents, bounds))
        taken = time.process_time() - started
        assert sum(len(unit.steps) for unit in units) >= count
        return taken

    seconds(1024)
    few, many = min(seconds(2048) for _ in range(3)), min(seconds(16384) for _ in range(2))
    assert many < few * 8 * 4 + 0.05  # eight times as many; a square would be 64 times
