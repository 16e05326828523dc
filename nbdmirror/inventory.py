"""Inventory: the nodes, exports and jobs of a daemon, by name.

Rules:
1. "No such node", "no such job" are raised here and nowhere else, with QEMU's texts.
2. A node is a disk, the filter through which it is written, and its bitmaps. A pivot gives the filter of the source, and with
   it every export above, to the target's node; the source's node gets a new filter and is idle from then on. Bitmaps, and the
   guards that keep them durable, stay with their node: they tell of that disk.
3. What is in use is not removed: a node knows its users by a word each.
4. An export shows bitmaps of the disk that it is made from, and of no other: a pivot ends what it showed of the source's.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol

from nbdmirror.bitmap.named import BitmapSet
from nbdmirror.devices.aligned import AlignedDevice
from nbdmirror.devices.read_only import ReadOnlyDevice
from nbdmirror.devices.tracked import TrackedDevice
from nbdmirror.errors import InactiveError, NotFoundError, StateError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from nbdmirror.bitmap.dirty import DirtyBitmap
    from nbdmirror.bitmap.named import NamedBitmap
    from nbdmirror.devices.base import BlockDevice
    from nbdmirror.devices.tracked import WriteGuard
    from nbdmirror.jobs.job import Job
    from nbdmirror.server.nbd_server import BlockExport, NbdServer
    from nbdmirror.server.tls_credentials import TlsCredentials

_NODE_NAME: Final = re.compile(r"[A-Za-z][A-Za-z0-9._-]*")
_NODE_NAME_MAX: Final = 31
_HISTORY: Final = 64
# The user of a node that is below another: then it is written through that one alone.
UNDER_A_NODE: Final = "node above"


@dataclass(slots=True, eq=False)
class Node:
    """An open disk. `driver` is QEMU's word for its kind; `implicit` nodes are closed with the job that opened them.

    A node over a `child` has the child's filter for a disk, so that the child's bitmaps hear of its writes, too.
    `reconnect_seconds` is how long a job waits for it when it is lost: None, for as long as it takes.
    """

    name: str
    driver: str
    disk: BlockDevice
    implicit: bool = False
    child: Node | None = None
    reconnect_seconds: float | None = None
    device: TrackedDevice = field(init=False)
    bitmaps: BitmapSet = field(init=False)
    guards: list[WriteGuard] = field(default_factory=list)
    users: set[str] = field(default_factory=set)
    sealed: bool = False

    def __post_init__(self) -> None:
        self.device = TrackedDevice(self.disk)
        self.bitmaps = BitmapSet(self.writes_in_flight)
        self.device.observe(self.bitmaps)

    def writes_in_flight(self) -> Collection[tuple[int, int]]:
        """Those of the filter that is above the disk now: a pivot gives it another."""
        return self.device.writes_in_flight()

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


class BitmapKeeper(Protocol):
    """Where persistent bitmaps are kept. What it is told of is durable when it returns."""

    async def create(self, node: Node, name: str, granularity: int, *, recording: bool) -> NamedBitmap:
        """Make a bitmap and enter it among those of its node; raises NbdMirrorError, with nothing made."""

    async def remove(self, bitmap: NamedBitmap) -> None:
        """Forget a bitmap, which may have left its node already; raises NbdMirrorError, and then it is still kept."""

    async def settle(self, bitmap: NamedBitmap) -> None:
        """See to it that what was done to a bitmap lasts; raises NbdMirrorError. Nothing, for one that is not kept."""

    async def load_all(self, node: Node) -> None:
        """Enter the bitmaps that are kept of a disk; raises NbdMirrorError where one can't be used."""

    async def release(self, node: Node) -> None:
        """Store the bitmaps of a node that is about to be closed, and let go of them; raises NbdMirrorError."""


class NoKeeper:
    """A BitmapKeeper that has no place to keep anything."""

    async def create(self, node: Node, name: str, granularity: int, *, recording: bool) -> NamedBitmap:  # noqa: ARG002
        """See BitmapKeeper."""
        problem = "the daemon has no state directory; start it with --state-dir"
        raise StateError(f"Can't store persistent bitmaps to {node.name}: {problem}")

    async def remove(self, bitmap: NamedBitmap) -> None:
        """See BitmapKeeper."""

    async def settle(self, bitmap: NamedBitmap) -> None:
        """See BitmapKeeper."""

    async def load_all(self, node: Node) -> None:
        """See BitmapKeeper."""

    async def release(self, node: Node) -> None:
        """See BitmapKeeper."""


class LiveBitmaps(Mapping[str, "DirtyBitmap"]):
    """The bitmaps of whichever node a device belongs to when it is asked, those left out that mean nothing."""

    def __init__(self, inventory: Inventory, device: TrackedDevice) -> None:
        self._inventory = inventory
        self._device = device

    def _found(self) -> dict[str, DirtyBitmap]:
        node = self._inventory.node_of(self._device)
        return {each.name: each.bits for each in node.bitmaps if not each.inconsistent} if node else {}

    def __getitem__(self, name: str) -> DirtyBitmap:
        return self._found()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found())

    def __len__(self) -> int:
        return len(self._found())


class Inventory:
    """What there is. `exports` are by id, oldest first, `own_uris` is where they are; `nbd_server` is nbd-server-start's."""

    def __init__(self) -> None:
        self.nodes: dict[str, Node] = {}
        self.exports: dict[str, BlockExport] = {}
        self.nbd_server: NbdServer | None = None
        self.objects: dict[str, TlsCredentials] = {}
        self.jobs: dict[str, Job] = {}
        self.history: deque[Job] = deque(maxlen=_HISTORY)
        self.own_uris: set[str] = set()
        self.keeper: BitmapKeeper = NoKeeper()
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
        """Enter a node, which takes its child for itself; raises StateError."""
        if not node.implicit:
            self.check_node_name(node.name)
        if node.child is not None:
            self.check_unused(node.child)
            node.child.users.add(UNDER_A_NODE)
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

    def node_of(self, device: BlockDevice) -> Node | None:
        """The node that has this filter now."""
        return next((node for node in self.nodes.values() if node.device is device), None)

    def exports_of(self, node: Node) -> list[BlockExport]:
        """The exports that are made from the node."""
        return [each for each in self.exports.values() if each.export.device is node.device]

    def is_exported(self, node: Node) -> bool:
        """Whether an export is made from the node."""
        return bool(self.exports_of(node))

    def check_unused(self, node: Node) -> None:
        """Raises StateError where a job, an export or another node uses it, or a request that was left behind."""
        if node.users or self.is_exported(node) or node.device.in_flight:
            raise StateError(f"Node {node.name} is in use")

    def check_exportable(self, node: Node, *, writable: bool) -> None:
        """Raises StateError for a node that only a job or another node may look at, or write."""
        if UNDER_A_NODE in node.users:
            raise StateError(f"Node {node.name} is in use by the node over it; export that one")
        if "mirror target" in node.users:
            wanted = "consistent read, write" if writable else "consistent read"
            user = f"by an unnamed block device (uses node '{node.name}' as 'root' child)"
            conflict = f"permissions '{wanted}' are both required {user} and unshared {user}."
            raise StateError(f"Permission conflict on node '{node.name}': {conflict}")

    async def remove_node(self, name: str) -> None:
        """Close a node that nobody uses; raises NotFoundError and StateError."""
        node = self.nodes.get(name)
        if node is None:
            raise NotFoundError(f"Failed to find node with node-name='{name}'")
        if UNDER_A_NODE in node.users:
            raise StateError(f"Block device {name} is in use")
        self.check_unused(node)
        if any(bitmap.busy for bitmap in node.bitmaps):
            raise StateError(f"Node {name} is in use")
        del self.nodes[name]
        try:
            await self.keeper.release(node)
        finally:
            if node.child is None:
                await node.disk.aclose()
            else:
                node.child.users.discard(UNDER_A_NODE)

    def pivot(self, source: Node, target: Node) -> None:
        """Let every user of the source go on with the target's disk. The source must be drained."""
        for each in self.exports_of(source):
            each.release_bitmaps()
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
        for each in self.exports_of(node):
            each.export.read_only = True

    def credentials(self, name: str) -> TlsCredentials:
        """The TLS credentials of that id; raises NotFoundError."""
        found = self.objects.get(name)
        if found is None:
            raise NotFoundError(f"No TLS credentials with id '{name}'")
        return found

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
