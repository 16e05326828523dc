"""The link of a disk in memory, which the test breaks and mends: `devices.nbd_link.Link` as far as jobs know it.

rig = Rig(linked=True)
rig.link.lose()         what was not flushed is gone from the target, as in a crash, and everything held there fails
rig.link.restore()
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from nbdmirror.devices.memory import MemoryDevice
from nbdmirror.errors import DeviceError

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support.rig import HeldDisk

_ALL: Final = ("pwrite", "zero", "trim", "flush", "extents")


class FakeLink:
    """See above. `acknowledged` counts."""

    def __init__(self, disk: HeldDisk, *, notices_silence: bool = True) -> None:
        self.reconnect_delay = 20.0
        self.on_lost: Callable[[], None] | None = None
        self.on_change: Callable[[], None] | None = None
        self.is_reconnecting = False
        self.notices_silence = notices_silence
        self.acknowledged = 0
        self.state = "connected"
        self._disk = disk

    def acknowledge_loss(self) -> None:
        self.acknowledged += 1

    def lose(self) -> None:
        """In a link's order: who lost something hears of it first, then that the link is down, then what fails."""
        self._disk.broken = dict.fromkeys(_ALL, DeviceError(errno.ENOTCONN, "held"))
        self.revert()
        self.is_reconnecting, self.state = True, "reconnecting"
        self._tell()
        self._fail_held()

    def revert(self) -> None:
        """A session is lost with what was not flushed, while others may live on."""
        MemoryDevice.pwrite_now(self._disk, self._disk.durable, 0)
        if self.on_lost is not None:
            self.on_lost()

    def restore(self) -> None:
        self._disk.broken = {}
        self.is_reconnecting, self.state = False, "connected"
        self._tell()

    def fail(self) -> None:
        """Another export is there now: nothing is tried any more."""
        self._disk.broken = dict.fromkeys(_ALL, DeviceError(errno.ESTALE, "held"))
        self.is_reconnecting, self.state = False, "failed"
        self._tell()

    def _tell(self) -> None:
        if self.on_change is not None:
            self.on_change()

    def _fail_held(self) -> None:
        for held in self._disk.calls:
            if held.is_held:
                held.fail(self._disk.broken[held.name])
