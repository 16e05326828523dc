"""Statistics and tables of the benchmarks: pure, numbers in, text out.

Rules:
1. Tools are measured in turns, A B C A B C: the n-th numbers of all tools belong together, because a noisy machine was about
   equally noisy for them. Ratios are taken within such a turn, and the median of those is reported.
2. We are compared with the better of the peers, by its median.
3. A number that a reader could mistake for exact comes with its range.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

OURS: Final = "nbdmirror"


@dataclass(frozen=True, slots=True)
class Ratio:
    """Ours to a peer's: the median of the turns' ratios, the least and the most."""

    peer: str
    middle: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"**{self.middle:.2f}** ({self.low:.2f} to {self.high:.2f}) of {self.peer}"


def ratio_to_best(values: Mapping[str, Sequence[float]], best: Callable[[Sequence[float]], float]) -> Ratio:
    """Ours to the best of the others, where `best` is max or min."""
    medians = {tool: median(of_tool) for tool, of_tool in values.items() if tool != OURS}
    aim = best(list(medians.values()))
    peer = next(tool for tool, value in medians.items() if value == aim)
    turns = [ours / theirs for ours, theirs in zip(values[OURS], values[peer], strict=True) if theirs]
    if not turns:  # less than a tick of the clock in every turn
        return Ratio(peer, float("nan"), float("nan"), float("nan"))
    return Ratio(peer, median(turns), min(turns), max(turns))


@dataclass(slots=True)
class Table:
    """One quantity, measured in several cells with several tools. `best` is max where more is better, min where less is."""

    title: str
    best: Callable[[Sequence[float]], float]
    show: Callable[[float], str]
    cells: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def add(self, cell: str, tool: str, value: float) -> None:
        """One measurement, in the order of measuring."""
        self.cells.setdefault(cell, {}).setdefault(tool, []).append(value)

    @property
    def tools(self) -> list[str]:
        """In the order in which they came, we first."""
        found = dict.fromkeys(tool for cell in self.cells.values() for tool in cell)
        return sorted(found, key=lambda tool: tool != OURS)

    def markdown(self) -> str:
        """The table; more in a ratio is better where `best` is max."""
        wish = "higher" if self.best is max else "lower"
        head = [self.title, *self.tools, f"ours to the best peer ({wish} is better)"]
        lines = [head, ["---"] + ["---:"] * (len(head) - 1)]
        for cell, values in self.cells.items():
            shown = [self._spread(values[tool]) if tool in values else "" for tool in self.tools]
            lines.append([cell, *shown, str(ratio_to_best(values, self.best))])
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def as_json(self) -> dict[str, Any]:
        """Every measurement."""
        return {"title": self.title, "best": self.best.__name__, "cells": self.cells}

    def _spread(self, values: Sequence[float]) -> str:
        return f"{self.show(median(values))} ({self.show(min(values))} to {self.show(max(values))})"


def whole(value: float) -> str:
    """A count or a rate."""
    return f"{value:,.0f}"


def seconds(value: float) -> str:
    """A few seconds, or a part of one."""
    return f"{value:.2f}"
