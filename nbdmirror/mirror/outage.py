"""Outage: a target whose connection is lost, as its job sees it: something to wait for, not an error of the target.

Rules:
1. What fails because the link is lost, or the server silent, is dirty again like anything that fails, and is copied once the
   link is back. Meanwhile the job pauses, by itself, and the guest's writes are only marked.
2. It is waited for `seconds` at most, or for as long as it takes (None). After that, and where the link has failed for good,
   every failure is an error, for the error policy. Who resumes the job wants it to be waited for once more. With 0 nothing is
   waited for, and any connection that is lost is an error.
3. What a lost session may have cost is known to be lost (`on_loss`) in the same step in which the link tells of it: there is no
   moment at which the link takes a flush for good and the job does not know.
4. While a job uses a link, requests are not held by the link but fail at once: the job knows better what to do meanwhile.
"""

from __future__ import annotations

import asyncio
import errno
from typing import TYPE_CHECKING, Any, Final, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    from nbdmirror.mirror.trouble import CopyFailed

# A connection that is lost, a server that was silent for too long, and one that says that it is about to end.
_LOST: Final = frozenset((errno.ENOTCONN, errno.ETIMEDOUT, errno.ESHUTDOWN))


class TargetLink(Protocol):
    """What a job has to know of `devices.nbd_link.Link`."""

    reconnect_delay: float
    on_lost: Callable[[], None] | None
    on_change: Callable[[], None] | None

    @property
    def state(self) -> str:
        """For people."""

    @property
    def is_reconnecting(self) -> bool:
        """Whether no connection is left, and one is being made."""

    @property
    def notices_silence(self) -> bool:
        """Whether a server that does not answer is given up some time."""

    def acknowledge_loss(self) -> None:
        """Whatever was not flushed is known to be lost."""


class Outage:
    """The outages of `link`, None where the target has none. `on_change` is called when one begins, ends or is given up."""

    def __init__(
        self, link: TargetLink | None, seconds: float | None, on_loss: Callable[[], None], on_change: Callable[[], None]
    ) -> None:
        self._link = link
        self._seconds = seconds
        self._on_loss = on_loss
        self._on_change = on_change
        self._is_given_up = False
        self._timer: asyncio.TimerHandle | None = None
        self._held = 0.0
        # How often the link was lost.
        self.count = 0

    @property
    def state(self) -> str | None:
        """How the link is, for people."""
        return None if self._link is None else self._link.state

    @property
    def is_waited_for(self) -> bool:
        """Whether the job has to wait for the link."""
        return self._link is not None and self._link.is_reconnecting and not self._is_over

    @property
    def _is_over(self) -> bool:
        return self._is_given_up or self._seconds == 0

    def explains(self, failure: CopyFailed) -> bool:
        """Whether a failure is to be made up for in silence: because the link is lost, or about to be given up."""
        if self._link is None or self._is_over or failure.operation != "write" or failure.cause.errno not in _LOST:
            return False
        return failure.cause.errno != errno.ETIMEDOUT or self._link.notices_silence

    def statistics(self) -> dict[str, Any]:
        """For people, by the names that QMP clients see."""
        return {} if self._link is None else {"x-link": self._link.state, "x-outages": self.count}

    def try_again(self) -> None:
        """Somebody thinks that it is worth waiting once more."""
        self._is_given_up = False
        if self.is_waited_for:
            self._start_waiting()

    # --- the link's news -------------------------------------------------------------------------------------------

    def attach(self) -> None:
        """Begin to listen to the link."""
        if self._link is not None:
            self._held, self._link.reconnect_delay = self._link.reconnect_delay, 0.0
            self._link.on_lost, self._link.on_change = self._lost, self._changed
            self._link.acknowledge_loss()  # of what others wrote: the job has written nothing yet
            if self._link.is_reconnecting:
                self._changed()

    def detach(self) -> None:
        """Leave the link to others."""
        self._stop_waiting()
        if self._link is not None:
            self._link.reconnect_delay = self._held
            self._link.on_lost = self._link.on_change = None

    def _lost(self) -> None:
        assert self._link is not None
        self._on_loss()
        self._link.acknowledge_loss()

    def _changed(self) -> None:
        assert self._link is not None
        if not self._link.is_reconnecting:
            self._stop_waiting()
            self._is_given_up = False
        elif self._timer is None and not self._is_given_up:
            self.count += 1
            self._start_waiting()
        self._on_change()

    def _start_waiting(self) -> None:
        self._stop_waiting()
        if self._seconds:
            self._timer = asyncio.get_running_loop().call_later(self._seconds, self._give_up)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _give_up(self) -> None:
        self._timer = None
        self._is_given_up = True
        self._on_change()
