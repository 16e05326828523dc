"""The benchmarks' goals: what is met, and what a line of the report says."""

from __future__ import annotations

from tests.benchmarks.goals import Absolute, AtLeast, AtMost, Row, markdown
from tests.benchmarks.load import Load
from tests.benchmarks.report import whole


def row(goal: AtLeast | AtMost | Absolute, **values: list[float]) -> Row:
    made = Row("reading", "tmpfs", goal, whole)
    for tool, turns in values.items():
        for value in turns:
            made.add(tool, value)
    return made


def test_a_ratio_that_rounds_to_the_goal_has_not_met_it() -> None:
    assert row(AtLeast(1.5), nbdmirror=[150.0], a=[100.0]).is_met
    assert not row(AtLeast(1.5), nbdmirror=[149.9], a=[100.0]).is_met
    assert not row(AtMost(1.0), nbdmirror=[100.1], a=[100.0]).is_met


def test_the_better_peer_is_the_one_to_beat() -> None:
    assert not row(AtLeast(1.0), nbdmirror=[150.0], a=[100.0], b=[160.0]).is_met
    assert not row(AtMost(1.0), nbdmirror=[150.0], a=[100.0], b=[160.0]).is_met


def test_an_absolute_goal_is_about_us_alone() -> None:
    assert row(Absolute(10, "MiB"), nbdmirror=[9.0, 11.0, 10.0], a=[1.0]).is_met
    assert not row(Absolute(10, "MiB"), nbdmirror=[11.0], a=[100.0]).is_met


def test_a_table_of_rows() -> None:
    made = row(AtLeast(1.5), nbdmirror=[1500.0], a=[1000.0])
    made.add("b", 100.0, cpu=(2e-6, 1 / 2**30), also=3.0)
    missed = row(Absolute(10, "s"), nbdmirror=[11.0])
    assert markdown([made, missed]).splitlines()[2:] == [
        "| reading | tmpfs | 1,500 | 1,000 | 100, 3.0 | 1.50 (1.50 to 1.50) of a | ≥ 1.5 | met | 2.00 | 1.00 |",
        "| reading | tmpfs | 11 |  |  |  | ≤ 10 s | **not met** |  |  |",
    ]


def test_loads_say_what_they_are() -> None:
    assert str(Load("randread", 4096, 32)) == "4 KiB random read, depth 32"
    assert str(Load("randrw", 4096, 16, 8)) == "4 KiB random 70/30, depth 16 each, 8 connections"
    assert str(Load("write", 1 << 20, 8)) == "1 MiB sequential write, depth 8"
