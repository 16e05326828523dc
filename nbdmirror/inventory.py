"""Inventory: the nodes, exports and jobs of a daemon, by name.

Rules:
1. "No such node", "no such job" are raised here and nowhere else, with QEMU's texts.
2. A node is a disk, the filter through which it is written, and its bitmaps. A pivot gives the filter of the source, and with
   it every export above, to the target's node; the source's node gets a new filter and is idle from then on. Bitmaps, and the
   guards that keep them durable, stay with their node: they tell of that disk.
3. What is in use is not removed: a node knows its users by a word each.
"""

from __future__ import annotations

import re
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from nbdmirror.bitmap.named import BitmapSet
from nbdmirror.devices.aligned import AlignedDevice
from nbdmirror.devices.read_only import ReadOnlyDevice
from nbdmirror.devices.tracked import TrackedDevice
from nbdmirror.errors import InactiveError, NotFoundError, StateError

if TYPE_CHECKING:
    from collections.abc import Collection

    from nbdmirror.bitmap.named import NamedBitmap
    from nbdmirror.devices.base import BlockDevice
    from nbdmirror.devices.tracked import WriteGuard
    from nbdmirror.jobs.job import Job
    from nbdmirror.server.export import Export

_NODE_NAME: Final = re.compile(r"[A-Za-z][A-Za-z0-9._-]*")
_NODE_NAME_MAX: Final = 31
_HISTORY: Final = 64


@dataclass(slots=True, eq=False)
class Node:
    """An open disk. `driver` is QEMU's word for its kind; `implicit` nodes are closed with the job that opened them."""

    name: str
    driver: str
    disk: BlockDevice
    implicit: bool = False
    device: TrackedDevice = field(init=False)
    bitmaps: BitmapSet = field(init=False)
    guards: list[WriteGuard] = field(default_factory=list)
    users: set[str] = field(default_factory=set)
    sealed: bool = False

    def __post_init__(self) -> None:
        self.device = TrackedDevice(self.disk)
        self.bitmaps = BitmapSet(self._writes_in_flight)
        self.device.observe(self.bitmaps)

    def _writes_in_flight(self) -> Collection[tuple[int, int]]:
        return self.device.writes_in_flight()  # of the filter that is above the disk now: a pivot gives it another

    def guard(self, guard: WriteGuard) -> None:
        """Let `guard` hold the writes to this disk, through whichever filter they come."""
        self.guards.append(guard)
        self.device.guard(guard)

    def unguard(self, guard: WriteGuard) -> None:
        """The reverse."""
        self.guards.remove(guard)
        self.device.unguard(guard)

    @property
    def is_read_only(self) -> bool:
        """Whether it was opened, or is served, without permission to write, or takes no more writes."""
        return self.sealed or self.disk.capabilities.read_only


class Inventory:
    """What there is. Exports are looked up by the server itself, in `exports`; `own_uris` are where they can be reached."""

    def __init__(self) -> None:
        self.nodes: dict[str, Node] = {}
        self.exports: dict[str, Export] = {}
        self.jobs: dict[str, Job] = {}
        self.history: deque[Job] = deque(maxlen=_HISTORY)
        self.own_uris: set[str] = set()
        self._implicit_names = 0

    # --- nodes -----------------------------------------------------------------------------------------------------

    def check_node_name(self, name: str) -> None:
        """Raises StateError for a name that is not well formed or is taken."""
        if not _NODE_NAME.fullmatch(name):
            raise StateError(f"Invalid node-name: '{name}'")
        if len(name) > _NODE_NAME_MAX:
            raise StateError("Node name too long")
        if name in self.nodes:
            raise StateError(f"Duplicate nodes with node-name='{name}'")

    def add_node(self, node: Node) -> Node:
        """Enter a node."""
        if not node.implicit:
            self.check_node_name(node.name)
        self.nodes[node.name] = node
        return node

    def implicit_name(self) -> str:
        """A name that no user can have chosen."""
        self._implicit_names += 1
        return f"#node{self._implicit_names:03}"

    def node(self, name: str) -> Node:
        """The node of that name; raises NotFoundError."""
        node = self.nodes.get(name)
        if node is None:
            raise NotFoundError(f"Cannot find device='{name}' nor node-name='{name}'")
        return node

    def bitmap(self, node_name: str, name: str) -> tuple[Node, NamedBitmap]:
        """A node and its bitmap of that name; raises NotFoundError."""
        node = self.nodes.get(node_name)
        if node is None:
            raise NotFoundError(f"Node '{node_name}' not found")
        bitmap = node.bitmaps.get(name)
        if bitmap is None:
            raise NotFoundError(f"Dirty bitmap '{name}' not found")
        return node, bitmap

    def node_of(self, export: Export) -> Node | None:
        """The node that an export is made from."""
        return next((node for node in self.nodes.values() if node.device is export.device), None)

    def is_exported(self, node: Node) -> bool:
        """Whether an export is made from the node."""
        return any(export.device is node.device for export in self.exports.values())

    async def remove_node(self, name: str) -> None:
        """Close a node that nobody uses; raises NotFoundError and StateError."""
        node = self.nodes.get(name)
        if node is None:
            raise NotFoundError(f"Failed to find node with node-name='{name}'")
        if node.users or self.is_exported(node):
            raise StateError(f"Node {name} is in use")
        del self.nodes[name]
        await node.disk.aclose()

    def pivot(self, source: Node, target: Node) -> None:
        """Let every user of the source go on with the target's disk. The source must be drained."""
        device = source.device
        device.replace_below(AlignedDevice.over(target.disk))
        device.forget(source.bitmaps)
        target.device.forget(target.bitmaps)
        for guard in source.guards:
            device.unguard(guard)
        source.device, target.device = TrackedDevice(source.disk), device
        for node in (source, target):
            node.device.observe(node.bitmaps)
            for guard in node.guards:
                node.device.guard(guard)

    def seal(self, node: Node) -> None:
        """Let nobody write to a node any more, whoever is connected. It must be drained."""
        node.device.replace_below(ReadOnlyDevice(node.disk))
        node.sealed = True
        for export in self.exports.values():
            if export.device is node.device:
                export.read_only = True

    # --- jobs ------------------------------------------------------------------------------------------------------

    def add_job(self, job: Job) -> None:
        """Enter a job; raises StateError where the id is taken."""
        if job.id in self.jobs:
            raise StateError(f"Job ID '{job.id}' already in use")
        self.jobs[job.id] = job

    def forget_job(self, job: Job) -> None:
        """A job has ended: it is history."""
        del self.jobs[job.id]
        self.history.append(job)

    def job(self, job_id: str) -> Job:
        """The job of that id; raises NotFoundError."""
        job = self.jobs.get(job_id)
        if job is None:
            raise NotFoundError("Job not found")
        return job

    def block_job(self, job_id: str) -> Job:
        """The same for the verbs of block jobs, whose error has a class of its own; raises InactiveError."""
        job = self.jobs.get(job_id)
        if job is None:
            raise InactiveError(f"Block job '{job_id}' not found")
        return job
