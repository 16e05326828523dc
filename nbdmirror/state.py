"""The state directory of a daemon: which bitmaps outlive it, of which disks, and who else may look.

    DIR/lock              locked while a daemon uses the directory: by one that records, or by any that only read
    DIR/bitmaps/*.nbm     the bitmaps (`bitmap.image` has the format); what is called otherwise is left alone

Rules:
1. A file belongs to the disk whose identity and size it has. One that can't be read, or has the identity and another size,
   keeps the disk from being served: its writes would be missing from that file if it were ever used again. One of another disk
   is left alone, but as long as it is there no bitmap of its name is made, unless that disk is being served, too.
2. No file is changed before all of them have been looked at; none is ever deleted but with its bitmap, by request.
3. A bitmap joins its disk while no write is in flight, and leaves it after its file is durably gone.
4. Disks that are only read have bitmaps that are only read, in memory of their own; the files stay as they are.
"""

from __future__ import annotations

import asyncio
import logging
import os
import uuid
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from nbdmirror.bitmap.dirty import DirtyBitmap
from nbdmirror.bitmap.guards import Guard, guard_of
from nbdmirror.bitmap.image import (
    PAGE,
    STATE_OFFSET,
    SUFFIX,
    Head,
    ImageError,
    State,
    Sync,
    Worth,
    file_name,
    region_size_of,
)
from nbdmirror.bitmap.mapped import MappedFile
from nbdmirror.bitmap.named import NamedBitmap
from nbdmirror.bitmap.store import BitmapStore, OnInconsistent, bits_in, recovered
from nbdmirror.devices.lock import lock
from nbdmirror.errors import DeviceError, StateError, UsageError
from nbdmirror.units import KiB

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AsyncExitStack

    from nbdmirror.inventory import Node

_log: Final = logging.getLogger(__name__)

DEFAULT_GRANULARITY: Final = 64 * KiB
_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
_OUTCOMES: Final = {
    None: "changes may be missing, so it is inconsistent; clear it, remove it, or take it as all dirty "
    "(--on-inconsistent all-dirty)",
    Worth.REGIONS: "regions that were being written count as dirty",
    OnInconsistent.ALL_DIRTY: "taken as all dirty",
    OnInconsistent.FLUSHED: "taken as it is, with all that clients had flushed",
}


@dataclass(frozen=True, slots=True)
class BitmapRequest:
    """A bitmap that there has to be. `granularity` in bytes; None takes what there is, or the default."""

    name: str
    granularity: int | None = None


@dataclass(frozen=True, slots=True)
class StateOptions:
    """What is to outlive the daemon and how. Without a directory nothing does, and bitmaps are in memory alone."""

    directory: str | None = None
    bitmaps: tuple[BitmapRequest, ...] = ()
    sync: Sync = Sync.LAZY
    on_inconsistent: OnInconsistent = OnInconsistent.FAIL


@dataclass(frozen=True, slots=True, eq=False)
class _Kept:
    """A bitmap that is kept durable: `guard` holds the writes of `node` for it."""

    node: Node
    store: BitmapStore
    guard: Guard | None


class BitmapStores:
    """The persistent bitmaps of all disks of a daemon. Construct it with `open`."""

    def __init__(self, directory: Path, options: StateOptions, lock_fd: int) -> None:
        self._directory = directory / "bitmaps"
        self._options = options
        self._lock_fd = lock_fd
        self._boot_id = uuid.UUID(_BOOT_ID.read_text().strip()).bytes
        self._kept: dict[NamedBitmap, _Kept] = {}
        self._changes = asyncio.Lock()

    @classmethod
    async def open(cls, options: StateOptions, *, read_only: bool) -> BitmapStores:
        """Use a state directory, and make it where it is missing; raises UsageError, and StateError where it is in use."""
        assert options.directory is not None, "who has no state directory has no stores"
        path, flags = Path(options.directory), os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            if not read_only:
                for each in (path, path / "bitmaps"):
                    each.mkdir(mode=0o750, exist_ok=True)
                flags |= os.O_RDWR | os.O_CREAT
            fd = os.open(path / "lock", flags, 0o600)
        except OSError as error:
            raise UsageError(f"cannot use the state directory '{path}': {error.strerror}") from None
        try:
            await lock(fd, f"the state directory '{path}'", exclusive=not read_only)
            return cls(path, options, fd)
        except BaseException:
            os.close(fd)
            raise

    # --- loading ---------------------------------------------------------------------------------------------------

    async def load_all(self, node: Node) -> None:
        """Load every bitmap of a disk; raises StateError where one can't be used (rule 1), and DeviceError."""
        loaded = self._paths()
        paths = [path for path, head in self._files() if self._is_of(node, path, head)]
        for path in paths:
            if path in loaded:
                raise StateError(f"'{path}' is in use already, for another node of the same disk")
        if node.is_read_only:
            for bitmap in [await asyncio.to_thread(self._look_at, path) for path in paths]:
                node.bitmaps.add(bitmap)
            return
        stores: list[BitmapStore] = []
        try:
            for path in paths:
                stores.append(await asyncio.to_thread(self._open, path))  # noqa: PERF401  those that were opened are closed
            while stores:
                await self._keep(node, stores[0])
                del stores[0]
        finally:
            for store in stores:
                store.file.close()

    def _files(self) -> Iterator[tuple[Path, Head]]:
        for path in sorted(self._directory.glob(f"*{SUFFIX}")):
            with _refusing(path), path.open("rb") as file:
                head = Head.decode(file.read(PAGE))
                length = os.fstat(file.fileno()).st_size
                if length != head.file_length:
                    raise ImageError(f"it has {length} bytes instead of {head.file_length}")
            yield path, head

    def _paths(self) -> set[Path]:
        return {kept.store.file.path for kept in self._kept.values()}

    def _is_of(self, node: Node, path: Path, head: Head) -> bool:
        identity, size = node.disk.identity(), node.disk.size
        if head.identity != identity:
            if path not in self._paths():
                _log.warning("'%s' is left alone: it is of another disk (%s)", path, head.identity)
            return False
        with _refusing(path):
            if head.size != size:
                raise ImageError(f"it is of a disk of {head.size} bytes, and '{node.disk.name}' has {size}")
        return True

    def _open(self, path: Path) -> BitmapStore:
        with _refusing(path):
            file = MappedFile.open(path)
            try:
                head, state = Head.decode(file.head()), State.decode(file.head(STATE_OFFSET))
                if file.has_lost():
                    state = replace(state, unsure=state.in_use)
                    file.distrust()
                elif state.unsure:
                    file.distrust()
                bitmap = self._recovered(path, head, state, file.content)
                return BitmapStore(file, head, state, bitmap, sync_mode=self._options.sync, boot_id=self._boot_id)
            except BaseException:
                file.close()
                raise

    def _look_at(self, path: Path) -> NamedBitmap:
        with _refusing(path):
            content = memoryview(bytearray(path.read_bytes()))
            state = State.decode(bytes(content[STATE_OFFSET : STATE_OFFSET + PAGE]))
            bitmap = self._recovered(path, Head.decode(bytes(content[:PAGE])), state, content)
        bitmap.read_only = True
        return bitmap

    def _recovered(self, path: Path, head: Head, state: State, content: memoryview) -> NamedBitmap:
        policy = self._options.on_inconsistent
        bitmap = recovered(head, state, content, self._boot_id, policy)
        worth = state.worth(self._boot_id)
        if worth is not Worth.EXACT:
            what = _OUTCOMES[None if bitmap.inconsistent else Worth.REGIONS if worth is Worth.REGIONS else policy]
            _log.warning("bitmap '%s' in '%s' was in use when the host crashed: %s", head.name, path, what)
        return bitmap

    # --- adding and removing ---------------------------------------------------------------------------------------

    async def create(
        self, node: Node, name: str, granularity: int = DEFAULT_GRANULARITY, *, recording: bool = True
    ) -> NamedBitmap:
        """Make a bitmap and enter it among those of its disk; raises StateError and DeviceError."""
        async with self._changes:
            store = await asyncio.to_thread(self._create, node, name, granularity, recording=recording)
            try:
                await self._keep(node, store)
            except BaseException:
                store.file.remove()
                store.file.close()
                raise
        return store.bitmap

    def _create(self, node: Node, name: str, granularity: int, *, recording: bool) -> BitmapStore:
        disk, identity = node.disk, node.disk.identity()
        if node.bitmaps.get(name) is not None:
            raise StateError(f"Bitmap already exists: {name}")
        if node.is_read_only:
            raise StateError(f"Bitmap '{name}' can't be stored: '{disk.name}' is read-only")
        NamedBitmap(name, DirtyBitmap(0, granularity))  # what neither takes is refused before there is a file
        self._check_stranger(name)
        head = Head(name, disk.size, granularity, identity, uuid.uuid4().bytes, region_size_of(disk.size))
        state = State(0, in_use=True, recording=recording, sync=self._options.sync, boot_id=self._boot_id)
        path = self._directory / file_name(name, identity)
        try:
            file = MappedFile.create(path, head.file_length, {0: head.encode(), STATE_OFFSET: state.encode()})
        except OSError as error:
            raise DeviceError.of(error, f"cannot create '{path}' for bitmap '{name}'") from None
        bitmap = NamedBitmap(name, bits_in(head, file.content), recording=recording, persistent=True)
        return BitmapStore(file, head, state, bitmap, sync_mode=self._options.sync, boot_id=self._boot_id)

    def _check_stranger(self, name: str) -> None:
        loaded = self._paths()
        for path, head in self._files():
            if head.name == name and path not in loaded:
                raise StateError(
                    f"Bitmap already exists: {name}: '{path}' is of another disk ({head.identity}); move it away if it is not "
                    "wanted any more"
                )

    async def _keep(self, node: Node, store: BitmapStore) -> None:
        await store.start()
        guard = guard_of(store, self._options.sync, node.writes_in_flight)
        async with node.device.drained():
            node.bitmaps.add(store.bitmap)
            if guard is not None:
                node.guard(guard)
        self._kept[store.bitmap] = _Kept(node, store, guard)

    async def remove(self, bitmap: NamedBitmap) -> None:
        """Delete a bitmap's file, and take it out of its disk's; raises DeviceError, and then it stays."""
        async with self._changes:
            kept = self._kept[bitmap]
            try:
                await asyncio.to_thread(kept.store.file.remove)
            except OSError as error:
                raise DeviceError.of(error, f"cannot delete '{kept.store.file.path}'") from None
            del self._kept[bitmap]
            if kept.node.bitmaps.get(bitmap.name) is bitmap:
                kept.node.bitmaps.remove(bitmap)
            await self._let_go(kept)

    async def settle(self, bitmap: NamedBitmap) -> None:
        """Make durable what was done to a bitmap, before that is answered; raises DeviceError. For others this is nothing."""
        kept = self._kept.get(bitmap)
        if kept is not None:
            await (kept.guard or kept.store).settle()

    # --- the end ---------------------------------------------------------------------------------------------------

    async def release(self, node: Node) -> None:
        """Store the bitmaps of a disk that is about to be closed, after its last write; raises the first DeviceError."""
        failures = [await self._close(kept) for kept in list(self._kept.values()) if kept.node is node]
        for failure in filter(None, failures):
            raise failure

    async def aclose(self) -> None:
        """Store everything, after the last write, and let others in; raises the first DeviceError, when all has been tried."""
        failures = [await self._close(kept) for kept in list(self._kept.values())]
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1
        for failure in filter(None, failures):
            raise failure

    async def _close(self, kept: _Kept) -> DeviceError | None:
        del self._kept[kept.store.bitmap]
        try:
            if kept.guard is not None:
                await kept.guard.aclose()
            await kept.store.close()
        except DeviceError as error:
            return error
        finally:
            await self._let_go(kept)
        return None

    @staticmethod
    async def _let_go(kept: _Kept) -> None:
        if kept.guard is not None:
            kept.node.unguard(kept.guard)
            await kept.guard.aclose()
        kept.store.file.close()


async def set_up_bitmaps(stack: AsyncExitStack, node: Node, options: StateOptions) -> BitmapStores | None:
    """Load and make what bitmaps a disk is to have, and close them with `stack`; raises UsageError, StateError, DeviceError."""
    stores = None
    if options.directory is not None:
        stores = await BitmapStores.open(options, read_only=node.is_read_only)
        stack.push_async_callback(stores.aclose)
        await stores.load_all(node)
    for request in options.bitmaps:
        bitmap = node.bitmaps.get(request.name)
        if bitmap is not None:
            _check_request(request, bitmap)
        elif node.is_read_only:
            raise UsageError(
                f"there is no bitmap '{request.name}' yet, and no writes to record: '{node.disk.name}' is read-only"
            )
        elif stores is not None:
            await stores.create(node, request.name, request.granularity or DEFAULT_GRANULARITY)
        else:
            bits = DirtyBitmap(node.disk.size, request.granularity or DEFAULT_GRANULARITY)
            node.bitmaps.add(NamedBitmap(request.name, bits))
    return stores


def _check_request(request: BitmapRequest, bitmap: NamedBitmap) -> None:
    granularity = bitmap.bits.granularity
    if request.granularity not in (None, granularity):
        raise UsageError(f"bitmap '{request.name}' has a granularity of {granularity}, not {request.granularity}: leave it out")
    if bitmap.inconsistent:
        raise StateError(
            f"bitmap '{request.name}' is inconsistent: changes may be missing since the host crashed; take it as all dirty "
            f"with --on-inconsistent all-dirty, or start without -B {request.name} and clear or remove it"
        )


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
    """What is wrong with a file, as the user hears of it."""
    try:
        yield
    except OSError as error:
        raise StateError(f"'{path}' can't be used: {error.strerror}; move it away to go on without it") from None
    except ImageError as error:
        raise StateError(f"'{path}' can't be used: {error}; move it away to go on without it") from None
