"""Jobs: blockdev-mirror, drive-mirror, the verbs in both their families, and what can be asked of jobs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from operator import methodcaller
from pathlib import Path
from typing import Any, Literal

from nbdmirror.commands.block import DEFAULT_CONNECTIONS
from nbdmirror.devices.file import FileDevice
from nbdmirror.devices.open import open_device
from nbdmirror.errors import NbdMirrorError, StateError
from nbdmirror.inventory import Inventory, Node
from nbdmirror.jobs.job import Emit, Job
from nbdmirror.mirror.copier import DEFAULT_REQUEST_SIZE, DEFAULT_REQUESTS, CopyOptions
from nbdmirror.mirror.job import MirrorJob
from nbdmirror.mirror.options import DEFAULT_GRANULARITY, MirrorOptions
from nbdmirror.qmp.registry import Registry
from nbdmirror.qmp.schema import NonNegative, Positive, UInt32

Sync = Literal["full", "top", "none"]


class JobCommands:
    """Handlers about jobs."""

    def __init__(self, inventory: Inventory, emit: Emit) -> None:
        self._inventory = inventory
        self._emit = emit
        self._closing: set[asyncio.Task[None]] = set()

    def register(self, registry: Registry) -> None:
        """Name the handlers."""
        registry.command("blockdev-mirror")(self.blockdev_mirror)
        registry.command("drive-mirror")(self.drive_mirror)
        registry.command("block-job-cancel")(self.block_job_cancel)
        registry.command("block-job-set-speed")(self.block_job_set_speed)
        registry.command("query-jobs")(self.query_jobs)
        registry.command("query-block-jobs")(self.query_block_jobs)
        registry.command("x-nbdmirror-query-job-history")(self.query_job_history)
        for verb in ("pause", "resume", "complete", "finalize", "dismiss"):
            act = methodcaller(verb)
            registry.command(f"block-job-{verb}")(self._by_device(act))
            registry.command(f"job-{verb}")(self._by_id(act))
        registry.command("job-cancel")(self._by_id(methodcaller("cancel")))

    def _by_device(self, act: Callable[[Job], None]) -> Callable[[str], None]:
        """A verb of the block-job-* family, which calls the job's id `device`."""

        def handler(device: str) -> None:
            act(self._inventory.block_job(device))

        return handler

    def _by_id(self, act: Callable[[Job], None]) -> Callable[[str], None]:
        """A verb of the job-* family."""

        def handler(id_: str) -> None:
            act(self._inventory.job(id_))

        return handler

    def block_job_cancel(self, device: str, *, force: bool = False) -> None:
        """Before READY, or with `force`, at once; else end as a consistent copy without pivot."""
        job = self._inventory.block_job(device)
        if force:
            job.cancel()
        else:
            job.cancel_gently()

    def block_job_set_speed(self, device: str, speed: NonNegative) -> None:
        """Change the rate limit, in bytes per second."""
        self._inventory.block_job(device).set_speed(speed)

    # --- starting --------------------------------------------------------------------------------------------------

    def blockdev_mirror(
        self,
        *,
        job_id: str | None = None,
        device: str,
        target: str,
        sync: Sync,
        speed: NonNegative = 0,
        granularity: UInt32 = 0,
        copy_mode: Literal["background"] = "background",  # noqa: ARG002  the only one, named so that scripts may name it
        on_source_error: Literal["report"] = "report",  # noqa: ARG002
        on_target_error: Literal["report"] = "report",  # noqa: ARG002
        auto_finalize: bool = True,
        auto_dismiss: bool = True,
        target_is_zero: bool = False,
        x_unmap: bool = True,
        x_requests: Positive = DEFAULT_REQUESTS,
        x_request_size: Positive = DEFAULT_REQUEST_SIZE,
    ) -> None:
        """Mirror one node to another."""
        source, node = self._inventory.node(device), self._inventory.node(target)
        options = MirrorOptions(
            sync=sync,
            granularity=granularity or DEFAULT_GRANULARITY,
            target_is_zero=target_is_zero,
            copy=CopyOptions(request_size=x_request_size, requests=x_requests, unmap=x_unmap),
        )
        self._start(job_id, source, node, options, speed=speed, auto_finalize=auto_finalize, auto_dismiss=auto_dismiss)

    async def drive_mirror(
        self,
        *,
        job_id: str | None = None,
        device: str,
        target: str,
        format_: Literal["raw", "nbd"] = "raw",  # noqa: ARG002  disks are never probed, so there is nothing to choose
        node_name: str | None = None,
        sync: Sync,
        mode: Literal["existing"],  # noqa: ARG002  the default of QEMU would create the target
        speed: NonNegative = 0,
        granularity: UInt32 = 0,
        unmap: bool = True,
        auto_finalize: bool = True,
        auto_dismiss: bool = True,
        target_is_zero: bool = False,
        x_connections: Positive = DEFAULT_CONNECTIONS,
        x_requests: Positive = DEFAULT_REQUESTS,
        x_request_size: Positive = DEFAULT_REQUEST_SIZE,
    ) -> None:
        """Mirror a node to a path or URI, which is opened for the job and closed with it, unless it was pivoted to."""
        self._inventory.node(device)
        options = MirrorOptions(
            sync=sync,
            granularity=granularity or DEFAULT_GRANULARITY,
            target_is_zero=target_is_zero,
            copy=CopyOptions(request_size=x_request_size, requests=x_requests, unmap=unmap),
        )
        self._check_job_id(job_id)
        name = node_name or self._inventory.implicit_name()
        if node_name is not None:
            self._inventory.check_node_name(node_name)
        disk = await open_device(target, connections=x_connections)
        node = Node(name, "file" if isinstance(disk, FileDevice) else "nbd", disk, implicit=True)
        try:
            if node_name is not None:  # another client may have taken the name, or removed the source, meanwhile
                self._inventory.check_node_name(node_name)
            source = self._inventory.node(device)
            self._start(job_id, source, node, options, speed=speed, auto_finalize=auto_finalize, auto_dismiss=auto_dismiss)
        except NbdMirrorError:
            await disk.aclose()
            raise
        self._inventory.add_node(node)

    def _check_job_id(self, job_id: str | None) -> str:
        if job_id is None:
            raise StateError("An explicit job ID is required")
        if job_id in self._inventory.jobs:
            raise StateError(f"Job ID '{job_id}' already in use")
        return job_id

    def _start(
        self,
        job_id: str | None,
        source: Node,
        target: Node,
        options: MirrorOptions,
        *,
        speed: int,
        auto_finalize: bool,
        auto_dismiss: bool,
    ) -> None:
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
        job = MirrorJob(
            self._check_job_id(job_id),
            source.device,
            target.device,
            self._emit,
            pivot=lambda: self._inventory.pivot(source, target),
            options=options,
            speed=speed,
            auto_finalize=auto_finalize,
            auto_dismiss=auto_dismiss,
        )
        self._inventory.add_job(job)
        source.users.add("mirror source")
        target.users.add("mirror target")
        job.on_end = lambda ended: self._ended(ended, source, target)
        job.start()

    def _ended(self, job: Job, source: Node, target: Node) -> None:
        self._inventory.forget_job(job)
        source.users.discard("mirror source")
        target.users.discard("mirror target")
        if target.implicit and not self._inventory.is_exported(target):
            del self._inventory.nodes[target.name]
            task = asyncio.get_running_loop().create_task(target.disk.aclose())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    # --- asking ----------------------------------------------------------------------------------------------------

    def query_jobs(self) -> list[dict[str, Any]]:
        """Every job, in the form of the job-* family."""
        return [_job_info(job) for job in self._inventory.jobs.values()]

    def query_block_jobs(self) -> list[dict[str, Any]]:
        """Every job, in the form of the block-job-* family, with counters that QEMU does not have."""
        return [_block_job_info(job) for job in self._inventory.jobs.values()]

    def query_job_history(self) -> list[dict[str, Any]]:
        """Jobs that have ended, oldest first, as they were then; `x-cancelled` tells a cancelled one from one that failed."""
        return [_block_job_info(job) for job in self._inventory.history]


def _is_same_file(one: Node, other: Node) -> bool:
    """Whether two nodes are one file by two names: what is copied could then undo what was written meanwhile."""
    if not isinstance(one.disk, FileDevice) or not isinstance(other.disk, FileDevice):
        return False
    try:
        return Path(one.disk.name).samefile(other.disk.name)
    except OSError:
        return False


def _job_info(job: Job) -> dict[str, Any]:
    done, total = job.progress
    info = {"id": job.id, "type": job.kind, "status": job.status, "current-progress": done, "total-progress": total}
    return info if job.error is None else {**info, "error": job.error}


def _block_job_info(job: Job) -> dict[str, Any]:
    done, total = job.progress
    info: dict[str, Any] = {
        "type": job.kind,
        "device": job.id,
        "len": total,
        "offset": done,
        "busy": job.is_busy,
        "paused": job.is_paused,
        "speed": job.speed,
        "io-status": job.io_status,
        "ready": job.is_ready,
        "status": job.status,
        "auto-finalize": job.auto_finalize,
        "auto-dismiss": job.auto_dismiss,
        "x-cancelled": job.was_cancelled,
        **job.statistics(),
    }
    if job.error is not None:
        info["error"] = job.error
        info["x-error-detail"] = job.error_detail
    return info
