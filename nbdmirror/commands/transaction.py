"""transaction: several bitmap actions as one, at one point in time.

Rules (QMP reference, "transaction"):
1. The disks that are named are drained first: no write is half way when the first action is taken, and none begins before the
   last. So all bitmaps, of whatever disks, agree on which writes came before.
2. All or nothing: the first action that fails takes back those before it, newest first, and its error is the answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Literal

from nbdmirror.commands.bitmap_actions import AbortAction, Action, BitmapActions, MergeAction
from nbdmirror.devices.tracked import TrackedDevice
from nbdmirror.errors import StateError
from nbdmirror.inventory import Inventory
from nbdmirror.qmp.registry import Registry


@dataclass(frozen=True, slots=True)
class TransactionProperties:
    """How actions hang together while they run: those on bitmaps do not run, so there is nothing to group."""

    completion_mode: Literal["individual", "grouped"] = "individual"


class TransactionCommands:
    """The handler of `transaction`."""

    def __init__(self, inventory: Inventory, actions: BitmapActions) -> None:
        self._inventory = inventory
        self._actions = actions

    def register(self, registry: Registry) -> None:
        """Name the handler."""
        registry.command("transaction")(self.transaction)

    async def transaction(
        self,
        actions: list[Action],
        properties: TransactionProperties = TransactionProperties(),
    ) -> None:
        """Carry out all of the actions or none."""
        grouped = properties.completion_mode == "grouped"
        nodes = [self._inventory.nodes[name] for name in _nodes_of(actions) if name in self._inventory.nodes]
        drained: set[TrackedDevice] = set()
        async with AsyncExitStack() as stack:
            # Asked anew each time: while one disk is waited for, a pivot may put another filter above the next.
            while waiting := [node.device for node in nodes if node.device not in drained]:
                device = waiting[0]
                await stack.enter_async_context(device.drained())
                drained.add(device)
            async with self._actions.turn:
                await self._actions.carry_out(_ungrouped(actions) if grouped else actions)


def _ungrouped(actions: list[Action]) -> Iterator[Action]:
    """The actions; raises StateError at the first that would have to run, and fail, together with others."""
    for action in actions:
        if not isinstance(action, AbortAction):
            what = f"Action '{action.type_}' does not support Transaction property completion-mode = grouped"
            raise StateError(what)
        yield action


def _nodes_of(actions: list[Action]) -> list[str]:
    """The nodes that the actions are about, each once."""
    names: dict[str, None] = {}
    for action in actions:
        if not isinstance(action, AbortAction):
            names[action.data.node] = None
        if isinstance(action, MergeAction):
            names.update((source.node, None) for source in action.data.sources())
    return list(names)
