"""Walking every state that a SyncState and the disks around it can come to, breadth first."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, Protocol, Self, TypeVar

from nbdmirror.bitmap.dirty import DirtyBitmap

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from nbdmirror.bitmap.sync_state import SyncState


class BrokenRuleError(AssertionError):
    """A rule did not hold."""


def clone(state: SyncState) -> SyncState:
    """A state of its own with the same facts. `copy.deepcopy` says the same in ten times the time."""
    twin = type(state)(_clone_bits(state.dirty))
    for name, value in vars(state).items():
        if name != "dirty":
            setattr(twin, name, copy.copy(value))
    return twin


def _clone_bits(dirty: DirtyBitmap) -> DirtyBitmap:
    twin = DirtyBitmap(dirty.size, dirty.granularity)
    for first, end in dirty.runs():
        twin.add_chunks(first, end)
    return twin


def facts(state: SyncState) -> tuple[object, ...]:
    """Every attribute of a state of one chunk, in a form that can be compared."""
    rest = tuple(
        (name, tuple(value) if isinstance(value, dict | set) else str(value))
        if name != "_writing"
        else (name, tuple(sorted(value.items())))
        for name, value in sorted(vars(state).items())
        if name != "dirty"
    )
    return (state.dirty.is_dirty(0), state.dirty.count, *rest)


class Walkable(Protocol):
    """A state, the world around it, and the way there."""

    path: tuple[str, ...]

    def key(self) -> object:
        """What the future depends on."""

    def successors(self) -> Iterable[Self]:
        """Every event that can come next, each tried on a copy."""

    def check(self) -> None:
        """Raises BrokenRuleError."""

    def check_drain(self) -> None:
        """Raises BrokenRuleError where it can't come to a good end from here."""


S = TypeVar("S", bound=Walkable)


@dataclass
class Walk(Generic[S]):
    """Every state that can be reached from the beginnings, until the first violation."""

    beginnings: Sequence[S]
    states: int = 0
    violation: BrokenRuleError | None = None
    path: tuple[str, ...] = field(default=())

    def run(self) -> Walk[S]:
        """Breadth first, so that the path of a violation is a shortest one."""
        todo = list(self.beginnings)
        seen = {step.key() for step in todo}
        while todo:
            level: list[S] = []
            for step in todo:
                self.states += 1
                try:
                    step.check()
                    step.check_drain()
                    for after in step.successors():
                        key = after.key()
                        if key not in seen:
                            seen.add(key)
                            level.append(after)
                except BrokenRuleError as violation:
                    self.violation, self.path = violation, step.path
                    return self
            todo = level
        return self
