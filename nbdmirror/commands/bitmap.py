"""Dirty bitmaps: block-dirty-bitmap-*, x-debug-block-dirty-bitmap-sha256, and looking into one, which QMP lacks.

A command changes bits and flags in one step of the loop, so writes come before or after it. Those in flight count as after
(`bitmap.named`, rule 2).
"""

from __future__ import annotations

import hashlib
from itertools import islice
from typing import Any, Final

from nbdmirror.bitmap.named import NamedBitmap
from nbdmirror.commands.bitmap_actions import (
    Action,
    AddAction,
    BitmapActions,
    BitmapAdd,
    BitmapMerge,
    BitmapName,
    ClearAction,
    DisableAction,
    EnableAction,
    MergeAction,
    RemoveAction,
)
from nbdmirror.errors import StateError
from nbdmirror.inventory import Inventory, Node
from nbdmirror.qmp.registry import Registry
from nbdmirror.qmp.schema import NonNegative, Positive

# 3 us to find each on the loop, 40 bytes to send: 12 ms and 160 KiB. Who wants more asks again from where it ended.
MOST_EXTENTS: Final = 4096
_MOST_PARTS: Final = 4096


class BitmapCommands:
    """Handlers about bitmaps."""

    def __init__(self, inventory: Inventory, actions: BitmapActions) -> None:
        self._inventory = inventory
        self._actions = actions

    def register(self, registry: Registry) -> None:
        """Name the handlers."""
        registry.command("block-dirty-bitmap-add")(self.add)
        registry.command("block-dirty-bitmap-remove")(self.remove)
        registry.command("block-dirty-bitmap-clear")(self.clear)
        registry.command("block-dirty-bitmap-enable")(self.enable)
        registry.command("block-dirty-bitmap-disable")(self.disable)
        registry.command("block-dirty-bitmap-merge")(self.merge)
        registry.command("x-debug-block-dirty-bitmap-sha256")(self.sha256)
        registry.command("x-nbdmirror-bitmap-extents")(self.extents)
        registry.command("x-nbdmirror-bitmap-map")(self.map)

    # --- changing --------------------------------------------------------------------------------------------------

    async def add(self, data: BitmapAdd, /) -> None:
        """Create a bitmap that records, unless it is to begin disabled."""
        await self._do(AddAction("block-dirty-bitmap-add", data))

    async def remove(self, data: BitmapName, /) -> None:
        """Forget a bitmap."""
        await self._do(RemoveAction("block-dirty-bitmap-remove", data))

    async def clear(self, data: BitmapName, /) -> None:
        """Unmark everything that is not being written just now."""
        await self._do(ClearAction("block-dirty-bitmap-clear", data))

    async def enable(self, data: BitmapName, /) -> None:
        """Let writes mark it."""
        await self._do(EnableAction("block-dirty-bitmap-enable", data))

    async def disable(self, data: BitmapName, /) -> None:
        """Let writes leave it alone."""
        await self._do(DisableAction("block-dirty-bitmap-disable", data))

    async def merge(self, data: BitmapMerge, /) -> None:
        """Mark in one what is marked in others, which stay as they are."""
        await self._do(MergeAction("block-dirty-bitmap-merge", data))

    async def _do(self, action: Action) -> None:
        async with self._actions.turn:
            await self._actions.carry_out([action])

    # --- looking ---------------------------------------------------------------------------------------------------

    def sha256(self, node: str, name: str) -> dict[str, str]:
        """A hash of the bits: equal bitmaps have equal ones, QEMU's included."""
        _, bitmap = self._inventory.bitmap(node, name)
        return {"sha256": hashlib.sha256(bitmap.bits.serialised()).hexdigest()}

    def extents(self, node: str, name: str, offset: NonNegative = 0, most: Positive = MOST_EXTENTS) -> dict[str, Any]:
        """The dirty runs from `offset` on, at most `most`; `next` is where to go on, absent after the last."""
        _, bitmap = self._inventory.bitmap(node, name)
        bits = bitmap.bits
        if offset > bits.size:
            raise StateError(f"Offset {offset} is beyond the end of the disk, which has {bits.size} bytes")
        runs = list(islice(bits.runs(offset // bits.granularity), min(most, MOST_EXTENTS)))
        found: dict[str, Any] = {"size": bits.size, "granularity": bits.granularity}
        found["extents"] = [dict(zip(("offset", "length"), bits.range_of(*run), strict=True)) for run in runs]
        if runs and runs[-1][1] < bits.chunks:
            found["next"] = runs[-1][1] * bits.granularity
        return found

    def map(self, node: str, name: str, parts: Positive) -> dict[str, Any]:
        """How much is dirty in each of so many parts of the disk: fewer where it has fewer chunks. Counts are of chunks."""
        _, bitmap = self._inventory.bitmap(node, name)
        bits = bitmap.bits
        if parts > _MOST_PARTS:
            raise StateError(f"Parameter 'parts' expects at most {_MOST_PARTS}")
        return {"size": bits.size, "granularity": bits.granularity, "chunks": bits.chunks, "dirty": bits.counts(parts)}


def bitmap_info(bitmap: NamedBitmap) -> dict[str, Any]:
    """A bitmap as queries tell of it (QMP reference, "BlockDirtyInfo")."""
    info = {
        "name": bitmap.name,
        "recording": bitmap.recording,
        "persistent": bitmap.persistent,
        "busy": bitmap.busy,
        "granularity": bitmap.bits.granularity,
        "count": bitmap.bits.count * bitmap.bits.granularity,
    }
    return {**info, "inconsistent": True} if bitmap.inconsistent else info


def bitmap_infos(node: Node) -> list[dict[str, Any]]:
    """The bitmaps of a node, newest first."""
    return [bitmap_info(bitmap) for bitmap in reversed(list(node.bitmaps))]
