"""What can be done to dirty bitmaps, each as a step that can be taken back: what commands and transactions are made of.

Rules:
1. An action checks everything first, in QEMU's order, then changes; one that raises has changed nothing.
2. It takes effect at once, without waiting, so that no write comes between the actions of a transaction. What cannot be taken
   back, forgetting a persistent bitmap, is left to `commit`.
3. `undo` is called right after, without waiting, and in reverse order: it restores bits, flags and places exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Final, Literal, TypeAlias

from nbdmirror.bitmap.dirty import DirtyBitmap
from nbdmirror.bitmap.named import NamedBitmap
from nbdmirror.errors import StateError
from nbdmirror.inventory import BitmapKeeper, Inventory
from nbdmirror.qmp.schema import Named, UInt32

# QEMU's, for disks without clusters.
DEFAULT_GRANULARITY: Final = 65536


@dataclass(frozen=True, slots=True)
class BitmapName:
    """A bitmap by its node and name."""

    node: str
    name: str


BitmapOrName: TypeAlias = Annotated[str | BitmapName, Named("BlockDirtyBitmapOrStr")]


@dataclass(frozen=True, slots=True)
class BitmapAdd:
    """Arguments of block-dirty-bitmap-add."""

    node: str
    name: str
    granularity: UInt32 = DEFAULT_GRANULARITY
    persistent: bool = False
    disabled: bool = False


@dataclass(frozen=True, slots=True)
class BitmapMerge:
    """Arguments of block-dirty-bitmap-merge: a name alone is a bitmap of `node`."""

    node: str
    target: str
    bitmaps: list[BitmapOrName]

    def sources(self) -> Iterator[BitmapName]:
        """Each source with its node."""
        for source in self.bitmaps:
            yield BitmapName(self.node, source) if isinstance(source, str) else source


@dataclass(frozen=True, slots=True)
class Nothing:
    """The data of an abort."""


@dataclass(frozen=True, slots=True)
class AbortAction:
    """Fail the transaction."""

    type_: Literal["abort"]
    data: Nothing


@dataclass(frozen=True, slots=True)
class AddAction:
    """Create a bitmap."""

    type_: Literal["block-dirty-bitmap-add"]
    data: BitmapAdd


@dataclass(frozen=True, slots=True)
class RemoveAction:
    """Remove one."""

    type_: Literal["block-dirty-bitmap-remove"]
    data: BitmapName


@dataclass(frozen=True, slots=True)
class ClearAction:
    """Unmark everything in one."""

    type_: Literal["block-dirty-bitmap-clear"]
    data: BitmapName


@dataclass(frozen=True, slots=True)
class EnableAction:
    """Let one record."""

    type_: Literal["block-dirty-bitmap-enable"]
    data: BitmapName


@dataclass(frozen=True, slots=True)
class DisableAction:
    """Stop one recording."""

    type_: Literal["block-dirty-bitmap-disable"]
    data: BitmapName


@dataclass(frozen=True, slots=True)
class MergeAction:
    """Merge bitmaps into one."""

    type_: Literal["block-dirty-bitmap-merge"]
    data: BitmapMerge


Action: TypeAlias = AbortAction | AddAction | RemoveAction | ClearAction | EnableAction | DisableAction | MergeAction


def _nothing() -> None:
    pass


@dataclass(frozen=True, slots=True)
class Done:
    """An action that has taken effect."""

    undo: Callable[[], None]
    commit: Callable[[], None] = _nothing


class BitmapActions:
    """The actions on the bitmaps of an inventory; `keeper` is where persistent ones live."""

    def __init__(self, inventory: Inventory, keeper: BitmapKeeper) -> None:
        self._inventory = inventory
        self._keeper = keeper

    def do(self, action: Action) -> Done:
        """Carry an action out; raises StateError and NotFoundError."""
        match action:
            case AbortAction():
                raise StateError("Transaction aborted using Abort action")
            case AddAction(data=data):
                return self.add(data)
            case RemoveAction(data=data):
                return self.remove(data)
            case ClearAction(data=data):
                return self.clear(data)
            case EnableAction(data=data):
                return self.enable(data)
            case DisableAction(data=data):
                return self.disable(data)
            case MergeAction(data=data):
                return self.merge(data)

    def add(self, data: BitmapAdd) -> Done:
        """Create a bitmap that records, unless it is to begin disabled."""
        node = self._inventory.node(data.node)
        if not data.name:
            raise StateError("Bitmap name cannot be empty")
        bits = DirtyBitmap(node.device.size, data.granularity)
        if data.persistent:
            self._keeper.check(node)
        node.bitmaps.check_free(data.name)
        bitmap = NamedBitmap(data.name, bits, recording=not data.disabled, persistent=data.persistent)
        if data.persistent:
            self._keeper.keep(node, bitmap)
        node.bitmaps.add(bitmap)

        def undo() -> None:
            node.bitmaps.remove(bitmap)
            if bitmap.persistent:
                self._keeper.drop(node, bitmap)

        return Done(undo)

    def remove(self, data: BitmapName) -> Done:
        """Take a bitmap away; it is forgotten for good at the commit."""
        node, bitmap = self._inventory.bitmap(data.node, data.name)
        bitmap.check_removable()
        place = node.bitmaps.remove(bitmap)
        commit = partial(self._keeper.drop, node, bitmap) if bitmap.persistent else _nothing
        return Done(partial(node.bitmaps.put_back, bitmap, place), commit)

    def clear(self, data: BitmapName) -> Done:
        """Unmark everything that is not being written just now."""
        node, bitmap = self._inventory.bitmap(data.node, data.name)
        bitmap.check_modifiable()
        saved = bitmap.bits.snapshot()
        node.bitmaps.clear(bitmap)
        return Done(partial(bitmap.bits.restore, saved))

    def enable(self, data: BitmapName) -> Done:
        """Let writes mark it."""
        node, bitmap = self._inventory.bitmap(data.node, data.name)
        bitmap.check_usable()
        was = bitmap.recording
        node.bitmaps.record(bitmap)
        return Done(_nothing if was else partial(node.bitmaps.stop_recording, bitmap))

    def disable(self, data: BitmapName) -> Done:
        """Let writes leave it alone."""
        node, bitmap = self._inventory.bitmap(data.node, data.name)
        bitmap.check_usable()
        was = bitmap.recording
        node.bitmaps.stop_recording(bitmap)
        return Done(partial(node.bitmaps.record, bitmap) if was else _nothing)

    def merge(self, data: BitmapMerge) -> Done:
        """Mark in the target what is marked in any of the sources, which stay as they are."""
        _, target = self._inventory.bitmap(data.node, data.target)
        sources = []
        for name in data.sources():
            _, source = self._inventory.bitmap(name.node, name.name)
            target.check_modifiable()
            source.check_usable()
            if source.bits.size != target.bits.size:
                sizes = f"destination size is {target.bits.size}, source size is {source.bits.size}"
                raise StateError(f"Bitmaps are of different sizes ({sizes}) and can't be merged")
            sources.append(source)
        saved = target.bits.snapshot()
        for source in sources:
            target.bits.merge(source.bits)
        return Done(partial(target.bits.restore, saved))
