"""Heartbeat: what the service manager hears while the daemon lives: the watchdog, a line of status, more time to end.

Rules:
1. It beats in the daemon's own loop, so one that is stuck is silent, and is restarted where WatchdogSec= says so.
2. It begins with READY, which starts the watchdog, and beats at half the watchdog's interval at most. Without a service manager
   it does not beat at all.
3. While the daemon ends it asks for more time at each beat. The end is bounded by its own limits: what hangs for good is not
   waited for for ever.
"""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Final

from nbdmirror.systemd import notify

if TYPE_CHECKING:
    from collections.abc import Callable, MutableMapping

_SECONDS: Final = 5.0
# Of what is asked for at a beat: one that comes late must not be too late.
_BEATS_AHEAD: Final = 3


class Heartbeat:
    """Beats from `start` to `stop`; `status` is asked for the line that `systemctl status` shows."""

    def __init__(self, status: Callable[[], str], interval: float) -> None:
        self._status = status
        self._interval = interval
        self._said = ""
        self._is_ending = False
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Begin: the daemon is ready."""
        self._beat("READY=1")

    def ending(self) -> None:
        """From now on time is asked for."""
        self._is_ending = True
        self.stop()
        self._beat("STOPPING=1")

    def stop(self) -> None:
        """Be silent."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _beat(self, *news: str) -> None:
        said = [*news] or ["WATCHDOG=1"]
        status = "shutting down" if self._is_ending else self._status()
        if status != self._said:
            self._said = status
            said.append(f"STATUS={status}")
        if self._is_ending:
            said.append(f"EXTEND_TIMEOUT_USEC={int(self._interval * _BEATS_AHEAD * 1e6)}")
        notify("\n".join(said))
        self._timer = asyncio.get_running_loop().call_later(self._interval, self._beat)


def interval_of(environment: MutableMapping[str, str]) -> float | None:
    """Seconds between beats, or None where nobody listens; takes the watchdog's variables out, which are not for children."""
    pid, usec = environment.pop("WATCHDOG_PID", ""), environment.pop("WATCHDOG_USEC", "")
    if not environment.get("NOTIFY_SOCKET"):
        return None
    if usec.isdecimal() and int(usec) and pid in ("", str(os.getpid())):
        return min(_SECONDS, int(usec) / 2e6)
    return _SECONDS
