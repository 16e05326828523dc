"""What the connections of one listener share."""

from __future__ import annotations

from dataclasses import dataclass, field

from nbdmirror.server.budget import Budget
from nbdmirror.server.buffers import BufferPool
from nbdmirror.server.busy_poll import BusyPoll


@dataclass(frozen=True, slots=True)
class Shared:
    """One for each listener."""

    budget: Budget = field(default_factory=Budget)
    buffers: BufferPool = field(default_factory=BufferPool)
    busy_poll: BusyPoll = field(default_factory=BusyPoll)
