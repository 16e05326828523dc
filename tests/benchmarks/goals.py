"""Rows of a report that say what is to be reached, and whether it was: pure, numbers in, text out.

Rules:
1. A row is one kind of work in one place. Tools are measured in turns, and ratios are taken within a turn, as `report` says.
2. A goal is a bound for the median ratio to the better peer or, where `Absolute`, for our own median.
3. What was measured decides, not what was rounded: a ratio that is shown as 1.50 may have missed 1.5.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any, Final

from tests.benchmarks.report import OURS, ratio_to_best

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

_HEAD: Final = ("to the better peer", "goal", "")
_COSTS: Final = ("server's CPU s per million requests", "server's CPU s per GiB")


@dataclass(frozen=True, slots=True)
class AtLeast:
    """The ratio to the better peer, where more is better."""

    ratio: float

    def __str__(self) -> str:
        return f"≥ {self.ratio:g}"

    def is_met(self, values: Mapping[str, Sequence[float]]) -> bool:
        """Whether it was reached."""
        return ratio_to_best(values, max).middle >= self.ratio

    def best(self, values: Sequence[float]) -> float:
        """Of the peers' medians, the one to compare with."""
        return max(values)


@dataclass(frozen=True, slots=True)
class AtMost:
    """The ratio to the better peer, where less is better."""

    ratio: float

    def __str__(self) -> str:
        return f"≤ {self.ratio:g}"

    def is_met(self, values: Mapping[str, Sequence[float]]) -> bool:
        """Whether it was kept."""
        return ratio_to_best(values, min).middle <= self.ratio

    def best(self, values: Sequence[float]) -> float:
        """Of the peers' medians, the one to compare with."""
        return min(values)


@dataclass(frozen=True, slots=True)
class Absolute:
    """Our own median, where less is better, in the row's unit."""

    limit: float
    unit: str

    def __str__(self) -> str:
        return f"≤ {self.limit:g} {self.unit}"

    def is_met(self, values: Mapping[str, Sequence[float]]) -> bool:
        """Whether it was kept."""
        return median(values[OURS]) <= self.limit

    def best(self, values: Sequence[float]) -> float:
        """Of the peers' medians, the one to compare with."""
        return min(values)


Goal = AtLeast | AtMost | Absolute


@dataclass(slots=True)
class Row:
    """One kind of work in one place: what each tool did, turn by turn, and what it cost its server.

    `cpu` is seconds of CPU per request and per byte; `also` a second quantity, that nobody should win the first at the cost of.
    """

    work: str
    place: str
    goal: Goal
    show: Callable[[float], str]
    values: dict[str, list[float]] = field(default_factory=dict)
    cpu: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    also: dict[str, list[float]] = field(default_factory=dict)
    also_show: Callable[[float], str] = str

    def add(self, tool: str, value: float, cpu: tuple[float, float] | None = None, also: float | None = None) -> None:
        """One turn of one tool."""
        self.values.setdefault(tool, []).append(value)
        if cpu is not None:
            self.cpu.setdefault(tool, []).append(cpu)
        if also is not None:
            self.also.setdefault(tool, []).append(also)

    @property
    def is_met(self) -> bool:
        """Whether the goal was reached."""
        return self.goal.is_met(self.values)

    def __str__(self) -> str:
        values = ", ".join(f"{tool} {self._tool(tool)}" for tool in self.values)
        verdict = "met" if self.is_met else "not met"
        return "; ".join(
            part for part in (f"{self.work}, on {self.place}", values, self._ratio(), str(self.goal), verdict) if part
        )

    def cells(self, tools: Sequence[str]) -> list[str]:
        """The line of the table."""
        medians = [self._tool(tool) for tool in tools]
        verdict = "met" if self.is_met else "**not met**"
        return [self.work, self.place, *medians, self._ratio(), str(self.goal), verdict, *self._costs(tools)]

    def _tool(self, tool: str) -> str:
        if tool not in self.values:
            return ""
        text = self.show(median(self.values[tool]))
        return f"{text}, {self.also_show(median(self.also[tool]))}" if tool in self.also else text

    def _ratio(self) -> str:
        if len(self.values) < 2:
            return ""
        ratio = ratio_to_best(self.values, self.goal.best)
        return f"{ratio.middle:.2f} ({ratio.low:.2f} to {ratio.high:.2f}) of {ratio.peer}"

    def _costs(self, tools: Sequence[str]) -> list[str]:
        def each(index: int, factor: float) -> str:
            found = [median(pair[index] for pair in self.cpu[tool]) * factor for tool in tools if tool in self.cpu]
            return " / ".join(f"{value:.2f}" for value in found)

        return [each(0, 1e6), each(1, 2**30)]

    def as_json(self) -> dict[str, Any]:
        """Every measurement."""
        return {
            "work": self.work,
            "place": self.place,
            "goal": str(self.goal),
            "met": self.is_met,
            "values": self.values,
            "cpu": self.cpu,
            "also": self.also,
        }


def markdown(rows: Sequence[Row]) -> str:
    """The table of all rows; costs are in the order of the tools."""
    tools = sorted(dict.fromkeys(tool for row in rows for tool in row.values), key=lambda tool: tool != OURS)
    head = ["work", "on", *tools, *_HEAD, *_COSTS]
    lines = [head, ["---", "---"] + ["---:"] * len(tools) + ["---"] * (len(head) - 2 - len(tools))]
    lines += [row.cells(tools) for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
