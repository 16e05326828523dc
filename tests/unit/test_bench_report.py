"""The benchmarks' arithmetic and tables."""

from __future__ import annotations

import math

import pytest

from tests.benchmarks.report import Table, ratio_to_best, seconds, whole


def test_the_best_peer_is_the_one_with_the_best_median() -> None:
    values = {"nbdmirror": [100.0], "a": [50.0], "b": [80.0]}
    assert (ratio_to_best(values, max).peer, ratio_to_best(values, max).middle) == ("b", 1.25)
    assert (ratio_to_best(values, min).peer, ratio_to_best(values, min).middle) == ("a", 2.0)


def test_ratios_are_taken_within_a_turn() -> None:
    # The machine was half as fast in the second turn, for everybody.
    ratio = ratio_to_best({"nbdmirror": [200.0, 100.0, 240.0], "a": [100.0, 50.0, 80.0]}, max)
    assert (ratio.middle, ratio.low, ratio.high) == (2.0, 2.0, 3.0)


def test_turns_must_be_complete() -> None:
    with pytest.raises(ValueError, match="shorter"):
        ratio_to_best({"nbdmirror": [1.0, 2.0], "a": [1.0]}, max)


def test_a_cost_too_small_to_be_seen() -> None:
    assert ratio_to_best({"nbdmirror": [0.01, 0.02], "a": [0.0, 0.01]}, min).middle == 2.0
    assert math.isnan(ratio_to_best({"nbdmirror": [0.01], "a": [0.0]}, min).middle)


def test_a_table() -> None:
    table = Table("requests per second", max, whole)
    for turn in (1, 2, 3):
        table.add("read", "a", 1000.0 * turn)
        table.add("read", "b", 100.0 * turn)
        table.add("read", "nbdmirror", 1500.0 * turn)
    assert table.tools == ["nbdmirror", "a", "b"]
    assert table.markdown().splitlines() == [
        "| requests per second | nbdmirror | a | b | ours to the best peer (higher is better) |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| read | 3,000 (1,500 to 4,500) | 2,000 (1,000 to 3,000) | 200 (100 to 300) | **1.50** (1.50 to 1.50) of a |",
    ]
    assert table.as_json()["cells"]["read"]["b"] == [100.0, 200.0, 300.0]


def test_less_is_better() -> None:
    table = Table("CPU", min, seconds)
    for tool, value in (("nbdmirror", 0.5), ("a", 1.0), ("b", 2.0)):
        table.add("copy", tool, value)
    assert table.markdown().splitlines()[-1].endswith("**0.50** (0.50 to 0.50) of a |")
    assert "(lower is better)" in table.markdown()
