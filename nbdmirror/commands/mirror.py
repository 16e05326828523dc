"""Starting mirror jobs: blockdev-mirror and drive-mirror, which differ in how they find the target."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Coroutine
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

from nbdmirror.commands.block import DEFAULT_CONNECTIONS, DEFAULT_REQUEST_TIMEOUT
from nbdmirror.commands.saved_jobs import Resume, SavedJob, SavedJobs
from nbdmirror.devices.file import FileDevice
from nbdmirror.devices.nbd import NbdDevice
from nbdmirror.devices.nbd_link import Link, LinkOptions
from nbdmirror.devices.open import open_device
from nbdmirror.errors import NbdMirrorError, StateError
from nbdmirror.inventory import Inventory, Node
from nbdmirror.jobs.job import Emit, Job
from nbdmirror.mirror.bitmap_form import BitmapForm, Mode, Sync
from nbdmirror.mirror.copier import DEFAULT_BUFFER, DEFAULT_REQUEST_SIZE, DEFAULT_REQUESTS, CopyOptions
from nbdmirror.mirror.job import MirrorJob
from nbdmirror.mirror.options import DEFAULT_GRANULARITY, CopyMode, MirrorOptions
from nbdmirror.mirror.record import Keep, Record
from nbdmirror.mirror.trouble import OnError
from nbdmirror.qmp.registry import Registry
from nbdmirror.qmp.schema import NonNegative, Positive, UInt32

_log: Final = logging.getLogger(__name__)

# Guests give a disk up after 30 s.
DEFAULT_PENDING_SECONDS: Final = 20
# Once a guest's disk is the target, its requests are held for so long when the target is lost.
_HOLD_SECONDS: Final = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class MirrorArguments:
    """What both commands take. `buf_size` bounds the data in flight, in bytes; 0 is the default.

    `x_pending_timeout` is how long a job that waits to be finalized holds the guest, in seconds; 0: as long as it takes.
    `x_reconnect` is how long a target that is lost is waited for, in seconds; None: as the node says, or as long as it takes.
    """

    job_id: str | None = None
    device: str
    target: str
    sync: Sync
    bitmap: str | None = None
    bitmap_mode: Mode | None = None
    speed: NonNegative = 0
    granularity: UInt32 = 0
    buf_size: int = 0
    copy_mode: CopyMode = CopyMode.BACKGROUND
    on_source_error: OnError = OnError.REPORT
    on_target_error: OnError = OnError.REPORT
    auto_finalize: bool = True
    auto_dismiss: bool = True
    target_is_zero: bool = False
    x_requests: Positive = DEFAULT_REQUESTS
    x_request_size: Positive = DEFAULT_REQUEST_SIZE
    x_pending_timeout: NonNegative = DEFAULT_PENDING_SECONDS
    x_reconnect: UInt32 | None = None

    def options(self, *, unmap: bool) -> MirrorOptions:
        """How to mirror; raises StateError."""
        if self.buf_size < 0:
            raise StateError("Invalid parameter 'buf-size'")
        return MirrorOptions(
            sync="none" if self.sync == "none" else "full",  # raw disks have no backing, so their top is all of them
            granularity=self.granularity or DEFAULT_GRANULARITY,
            target_is_zero=self.target_is_zero,
            pending_seconds=self.x_pending_timeout or None,
            copy_mode=self.copy_mode,
            reconnect_seconds=self.x_reconnect,
            on_source_error=self.on_source_error,
            on_target_error=self.on_target_error,
            copy=CopyOptions(
                request_size=self.x_request_size,
                requests=self.x_requests,
                buffer=self.buf_size or DEFAULT_BUFFER,
                unmap=unmap,
            ),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockdevMirror(MirrorArguments):
    """blockdev-mirror: `target` is a node."""

    x_unmap: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class DriveMirror(MirrorArguments):
    """drive-mirror: `target` is a path or URI. Disks are never probed, so `format` chooses nothing; nor are targets created.

    `x_request_timeout` is how long its server may be silent, in seconds, 0: for ever. Without `x_tls_verify` any will do.
    """

    format_: Literal["raw", "nbd"] = "raw"
    node_name: str | None = None
    mode: Literal["existing"]
    unmap: bool = True
    x_connections: Positive = DEFAULT_CONNECTIONS
    x_request_timeout: UInt32 = DEFAULT_REQUEST_TIMEOUT
    x_tls_verify: bool = True


class MirrorCommands:
    """Handlers that start jobs."""

    def __init__(self, inventory: Inventory, emit: Emit, saved: SavedJobs | None = None) -> None:
        self._inventory = inventory
        self._emit = emit
        self._saved = saved
        self._tasks: set[asyncio.Task[None]] = set()
        self._resuming: set[asyncio.Task[None]] = set()
        # Saved jobs whose targets are being opened.
        self._awaited: set[str] = set()
        self._is_ending = False

    def register(self, registry: Registry) -> None:
        """Name the handlers."""
        registry.command("blockdev-mirror")(self.blockdev_mirror)
        registry.command("drive-mirror")(self.drive_mirror)

    def blockdev_mirror(self, wanted: BlockdevMirror, /) -> None:
        """Mirror one node to another."""
        source, target = self._inventory.node(wanted.device), self._inventory.node(wanted.target)
        options = wanted.options(unmap=wanted.x_unmap)
        if options.reconnect_seconds is None:
            options = replace(options, reconnect_seconds=_base(target).reconnect_seconds)
        self._start(wanted, source, target, options)

    async def drive_mirror(self, wanted: DriveMirror, /) -> None:
        """Mirror a node to a path or URI, which is opened for the job and closed with it, unless it was pivoted to."""
        self._inventory.node(wanted.device)
        options = wanted.options(unmap=wanted.unmap)
        self._check_job_id(wanted.job_id)
        name = wanted.node_name or self._inventory.implicit_name()
        if wanted.node_name is not None:
            self._inventory.check_node_name(wanted.node_name)
        link = LinkOptions(_HOLD_SECONDS, request_timeout=wanted.x_request_timeout or None)
        connections, verify = wanted.x_connections, wanted.x_tls_verify
        disk = await open_device(wanted.target, connections=connections, link=link, tls_verify=verify)
        target = Node(name, "file" if isinstance(disk, FileDevice) else "nbd", disk, implicit=True)
        try:
            if wanted.node_name is not None:  # another client may have taken the name, or removed the source, meanwhile
                self._inventory.check_node_name(wanted.node_name)
            source = self._inventory.node(wanted.device)
            self._check_nodes(source, target)
            own = await self._save(wanted, source, target, options)
            try:
                self._start(wanted, self._inventory.node(wanted.device), target, options, own)
            except NbdMirrorError:
                if wanted.job_id not in self._inventory.jobs:
                    await self._forget(str(wanted.job_id))
                raise
        except NbdMirrorError:
            await disk.aclose()
            raise
        self._inventory.add_node(target)

    # --- jobs that outlive the daemon ------------------------------------------------------------------------------

    async def _save(self, wanted: DriveMirror, source: Node, target: Node, options: MirrorOptions) -> Record | None:
        """Save the job where it can be resumed: by a persistent bitmap, the user's or, made here and returned, its own."""
        bitmap = None if wanted.bitmap is None else source.bitmaps.get(wanted.bitmap)
        has_own = wanted.bitmap is None and wanted.bitmap_mode is None and wanted.sync in ("full", "top")
        is_live = bitmap is not None and bitmap.persistent and wanted.bitmap_mode is None and wanted.sync == "full"
        if self._saved is None or source.is_read_only or not (has_own or is_live):
            return None
        job_id = self._check_job_id(wanted.job_id)
        name = f"#mirror-{job_id}" if has_own else str(wanted.bitmap)
        if has_own:
            granularity = max(options.granularity, target.device.limits.minimum, source.device.limits.minimum)
            stale = source.bitmaps.get(name)
            if stale is not None:
                await self._inventory.keeper.remove(stale)
            bitmap = await self._inventory.keeper.create(source, name, granularity, recording=True)
            bitmap.bits.fill()
            await self._inventory.keeper.settle(bitmap)
        await self._saved.put(job_id, SavedJob(asdict(wanted), name, has_own, target.disk.size))
        return Record(bitmap, Keep.LIVE) if has_own and bitmap is not None else None

    async def _forget(self, job_id: str) -> None:
        """A job has ended: it is not resumed any more."""
        saved = None if self._saved is None else self._saved.get(job_id)
        if self._saved is None or saved is None:
            return
        try:
            await self._saved.drop(job_id)
            node = self._inventory.nodes.get(str(saved.arguments["device"]))
            bitmap = None if node is None else node.bitmaps.get(saved.bitmap)
            if saved.own and bitmap is not None:
                await self._inventory.keeper.remove(bitmap)
        except NbdMirrorError as error:
            _log.error("job '%s' has ended, but is still saved: %s", job_id, error)

    def resume_all(self, how: Resume) -> None:
        """Start what was saved when the daemon last ended, as soon as its target can be reached."""
        for saved in self._saved or ():
            self._run(self._resume(saved, how), self._resuming)

    async def _resume(self, saved: SavedJob, how: Resume) -> None:
        try:
            wanted = _restored(saved.arguments)
            await self._start_again(wanted, saved, how)
        except (NbdMirrorError, TypeError, ValueError, LookupError) as error:
            _log.error("job '%s' is not resumed: %s", saved.arguments.get("job_id"), error)

    async def _start_again(self, wanted: DriveMirror, saved: SavedJob, how: Resume) -> None:
        source = self._inventory.node(wanted.device)
        _, bitmap = self._inventory.bitmap(source.name, saved.bitmap)
        if bitmap.inconsistent:
            _log.warning("job '%s': its bitmap is inconsistent, everything is copied again", wanted.job_id)
            source.bitmaps.clear(bitmap)
            bitmap.bits.fill()
            await self._inventory.keeper.settle(bitmap)
        bitmap.check_modifiable()
        user = f"saved job {self._check_job_id(wanted.job_id)}"
        self._awaited.add(str(wanted.job_id))
        bitmap.users.append(user)
        try:
            link = LinkOptions(_HOLD_SECONDS, math.inf, wanted.x_request_timeout or None)
            connections, verify = wanted.x_connections, wanted.x_tls_verify
            disk = await open_device(wanted.target, connections=connections, link=link, tls_verify=verify)
        finally:
            bitmap.users.remove(user)
            self._awaited.remove(str(wanted.job_id))
        driver = "file" if isinstance(disk, FileDevice) else "nbd"
        target = Node(wanted.node_name or self._inventory.implicit_name(), driver, disk, implicit=True)
        try:
            if disk.size != saved.size:
                raise StateError(f"its target '{disk.name}' has {disk.size} bytes now and had {saved.size}: it is another one")
            options = replace(wanted.options(unmap=wanted.unmap), verify=how is Resume.VERIFY, target_is_zero=False)
            self._start(wanted, source, target, options, Record(bitmap, Keep.LIVE))
        except NbdMirrorError:
            await disk.aclose()
            raise
        self._inventory.add_node(target)
        if how is Resume.MANUAL:
            self._inventory.job(str(wanted.job_id)).pause()

    def _run(self, work: Coroutine[None, None, None], tasks: set[asyncio.Task[None]]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    async def keep_saved(self) -> None:
        """The daemon ends: jobs that end from now on are to be resumed, and nobody waits for a target any more."""
        self._is_ending = True
        tasks = list(self._resuming)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def aclose(self) -> None:
        """Finish with the jobs that have ended."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # --- starting --------------------------------------------------------------------------------------------------

    def _check_job_id(self, job_id: str | None) -> str:
        if job_id is None:
            raise StateError("An explicit job ID is required")
        if job_id in self._inventory.jobs or job_id in self._awaited:
            raise StateError(f"Job ID '{job_id}' already in use")
        return job_id

    def _start(
        self, wanted: MirrorArguments, source: Node, target: Node, options: MirrorOptions, own: Record | None = None
    ) -> None:
        self._check_nodes(source, target)
        form = BitmapForm(wanted.sync, wanted.bitmap, wanted.bitmap_mode, wanted.granularity)
        record = own or form.record(
            lambda name: self._inventory.bitmap(source.name, name)[1],
            source.device.limits.minimum,
            target.device.limits.minimum,
        )
        job = MirrorJob(
            self._check_job_id(wanted.job_id),
            source.device,
            target.device,
            self._emit,
            pivot=lambda: self._inventory.pivot(source, target),
            seal=lambda: self._inventory.seal(source),
            options=options,
            link=_link(target),
            record=record,
            speed=wanted.speed,
            auto_finalize=wanted.auto_finalize,
            auto_dismiss=wanted.auto_dismiss,
        )
        self._inventory.add_job(job)
        source.users.add("mirror source")
        target.users.add("mirror target")
        job.on_end = lambda ended: self._ended(ended, source, target)
        job.start()

    def _check_nodes(self, source: Node, target: Node) -> None:
        if "mirror source" in source.users:
            raise StateError("Need a root block node")
        # Over our own export every copied chunk would be a write of a guest, and dirty again.
        if source is target or _is_same_file(source, target) or target.disk.name in self._inventory.own_uris:
            raise StateError("Can't mirror node into itself")
        if target.users or source.users:
            raise StateError("block device is in use by block job: mirror")
        if self._inventory.is_exported(target):
            raise StateError(f"Node {target.name} is in use by an export, and would be changed under its clients")
        if target.is_read_only:
            raise StateError("Block node is read-only")
        if target.device.in_flight:
            raise StateError(f"Node {target.name} still works on requests of a job that has ended")

    def _ended(self, job: Job, source: Node, target: Node) -> None:
        self._inventory.forget_job(job)
        source.users.discard("mirror source")
        target.users.discard("mirror target")
        if target.implicit and not self._inventory.is_exported(target):
            del self._inventory.nodes[target.name]
            self._run(target.disk.aclose(), self._tasks)
        if not self._is_ending:
            self._run(self._forget(job.id), self._tasks)


def _restored(arguments: dict[str, Any]) -> DriveMirror:
    """What was saved with `asdict`."""
    kinds = {"copy_mode": CopyMode, "on_source_error": OnError, "on_target_error": OnError}
    return DriveMirror(**{**arguments, **{name: kind(arguments[name]) for name, kind in kinds.items()}})


def _base(node: Node) -> Node:
    """The node of the disk itself."""
    while node.child is not None:
        node = node.child
    return node


def _link(node: Node) -> Link | None:
    disk = _base(node).disk
    return disk.link if isinstance(disk, NbdDevice) else None


def _is_same_file(one: Node, other: Node) -> bool:
    """Whether two nodes are one file by two names: what is copied could then undo what was written meanwhile."""
    if not isinstance(one.disk, FileDevice) or not isinstance(other.disk, FileDevice):
        return False
    try:
        return Path(one.disk.name).samefile(other.disk.name)
    except OSError:
        return False
