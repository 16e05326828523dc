"""What can be done to dirty bitmaps, each as a step that can be taken back: what commands and transactions are made of.

Rules:
1. An action checks everything first, in QEMU's order, then changes; one that raises has changed nothing.
2. Nothing waits but for the files of persistent bitmaps. Who cannot have writes in between has drained the disks; other
   commands are kept out by `turn`. So an action on bitmaps in memory is one step of the loop.
3. Undoing happens in reverse order and restores bits, flags and places exactly. What cannot be taken back, and what has to
   last before the command is answered, is left to the commit.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Final, Literal, TypeAlias

from nbdmirror.bitmap.dirty import DirtyBitmap, check_granularity
from nbdmirror.bitmap.named import NamedBitmap
from nbdmirror.errors import NbdMirrorError, StateError
from nbdmirror.inventory import BitmapKeeper, Inventory, Node
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


class Done:
    """An action that has taken effect, on `bitmap`."""

    def __init__(self, bitmap: NamedBitmap, undo: Callable[[], None]) -> None:
        self._bitmap = bitmap
        self._undo = undo

    async def undo(self, keeper: BitmapKeeper) -> None:  # noqa: ARG002
        """Take it back."""
        self._undo()

    async def before_losses(self, keeper: BitmapKeeper) -> None:
        """Make last what a later action takes away elsewhere; raises NbdMirrorError."""

    async def commit(self, keeper: BitmapKeeper) -> None:
        """Make it last; raises NbdMirrorError."""
        await keeper.settle(self._bitmap)


class Merged(Done):
    """A bitmap that has the marks of others, which they may lose next."""

    async def before_losses(self, keeper: BitmapKeeper) -> None:
        """See Done."""
        if self._bitmap.persistent:
            await keeper.settle(self._bitmap)


class Added(Done):
    """A bitmap that was made."""

    async def undo(self, keeper: BitmapKeeper) -> None:
        """Take it back: out of the node and, if it is kept, out of the files."""
        self._undo()
        if self._bitmap.persistent:
            await keeper.remove(self._bitmap)


class Removed(Done):
    """A bitmap that was removed, and is kept until the commit."""

    async def commit(self, keeper: BitmapKeeper) -> None:
        """Forget it; where that fails it is still there."""
        if self._bitmap.persistent:
            try:
                await keeper.remove(self._bitmap)
            except NbdMirrorError:
                self._undo()
                raise


class BitmapActions:
    """The actions on the bitmaps of an inventory."""

    def __init__(self, inventory: Inventory) -> None:
        self.turn = asyncio.Lock()
        self._inventory = inventory

    async def carry_out(self, actions: Iterable[Action]) -> None:
        """All of the actions or none; `turn` is held. Raises the error of the first that fails.

        Once all have been taken they stay, also where some of it could not be made to last: then that is raised.
        """
        done: list[Done] = []
        try:
            for action in actions:
                if isinstance(action, ClearAction | RemoveAction):  # what it forgets may be in what was merged before
                    for step in done:
                        await step.before_losses(self._inventory.keeper)
                done.append(await self._do(action))
        except BaseException:
            for step in reversed(done):
                await step.undo(self._inventory.keeper)
            raise
        failed: NbdMirrorError | None = None
        for step in done:
            try:
                await step.commit(self._inventory.keeper)
            except NbdMirrorError as error:
                failed = failed or error
        if failed is not None:
            raise failed

    async def _do(self, action: Action) -> Done:
        match action:
            case AbortAction():
                raise StateError("Transaction aborted using Abort action")
            case AddAction(data=data):
                return await self._add(data)
            case RemoveAction(data=data):
                return self._remove(data)
            case ClearAction(data=data):
                return self._clear(data)
            case EnableAction(data=data):
                return self._enable(data)
            case DisableAction(data=data):
                return self._disable(data)
            case MergeAction(data=data):
                return self._merge(data)

    async def _add(self, data: BitmapAdd) -> Done:
        node = self._inventory.node(data.node)
        if not data.name:
            raise StateError("Bitmap name cannot be empty")
        check_granularity(data.granularity)
        if data.persistent:
            made = await self._inventory.keeper.create(node, data.name, data.granularity, recording=not data.disabled)
        else:
            node.bitmaps.check_free(data.name)
            made = NamedBitmap(data.name, _bits(node, data.granularity), recording=not data.disabled)
            node.bitmaps.add(made)
        return Added(made, lambda: _take_out(node, made))

    def _remove(self, data: BitmapName) -> Done:
        node, bitmap = self._inventory.bitmap(data.node, data.name)
        bitmap.check_removable()
        place = node.bitmaps.remove(bitmap)
        return Removed(bitmap, partial(node.bitmaps.put_back, bitmap, place))

    def _clear(self, data: BitmapName) -> Done:
        node, bitmap = self._inventory.bitmap(data.node, data.name)
        bitmap.check_removable()  # unlike in QEMU: what is inconsistent begins anew
        undo = partial(node.bitmaps.restore, bitmap, bitmap.bits.snapshot(), inconsistent=bitmap.inconsistent)
        node.bitmaps.clear(bitmap)
        return Done(bitmap, undo)

    def _enable(self, data: BitmapName) -> Done:
        node, bitmap = self._inventory.bitmap(data.node, data.name)
        bitmap.check_usable()
        was = bitmap.recording
        node.bitmaps.record(bitmap)
        return Done(bitmap, _nothing if was else partial(node.bitmaps.stop_recording, bitmap))

    def _disable(self, data: BitmapName) -> Done:
        node, bitmap = self._inventory.bitmap(data.node, data.name)
        bitmap.check_usable()
        was = bitmap.recording
        node.bitmaps.stop_recording(bitmap)
        return Done(bitmap, partial(node.bitmaps.record, bitmap) if was else _nothing)

    def _merge(self, data: BitmapMerge) -> Done:
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
        return Merged(target, partial(target.bits.restore, saved))


def _bits(node: Node, granularity: int) -> DirtyBitmap:
    try:
        return DirtyBitmap(node.device.size, granularity)
    except (MemoryError, OverflowError):
        chunks = node.device.size // granularity
        raise StateError(f"There is not enough memory for {chunks} chunks of {granularity} bytes; choose larger ones") from None


def _nothing() -> None:
    pass


def _take_out(node: Node, bitmap: NamedBitmap) -> None:
    node.bitmaps.remove(bitmap)
