"""Session: connections to one export that were made at one time, and how much of what was written over them is flushed.

Rules:
1. Connections are made at one time, several only if the server promises that a flush on one covers what the others had
   answered (CAN_MULTI_CONN), and all must show the same export.
2. Writes are counted as they are sent, before anything can go wrong with them; a write with FUA needs no flush and is not.
3. A flush covers what had been answered when it was sent. With a command in flight at that moment nobody looks closer: then it
   counts for nothing here, and the session stays unflushed until a flush that is sent to idle connections.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from typing import TYPE_CHECKING, Final

from nbdmirror.devices.nbd_connection import NbdConnection
from nbdmirror.errors import DeviceError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from nbdmirror.devices.uri import NbdEndpoint

log = logging.getLogger(__name__)

# Seconds for each connection after the first: a server that already has one and takes no more may just never answer.
_EXTRA_TIMEOUT: Final = 3.0


class Session:
    """The bookkeeping of `connections`, which all live."""

    def __init__(self, connections: Iterable[NbdConnection]) -> None:
        self.connections = list(connections)
        self._written = 0
        self._flushed = 0

    def write_begins(self) -> None:
        """A write without FUA is about to be sent."""
        self._written += 1

    @property
    def is_unflushed(self) -> bool:
        """Whether something may have been written that no flush has covered."""
        return self._written != self._flushed

    def covered_now(self) -> int:
        """What a flush that is sent now will cover, for `flush_ended`."""
        return self._flushed if any(connection.in_flight for connection in self.connections) else self._written

    def flush_ended(self, covered: int) -> None:
        """That flush succeeded."""
        self._flushed = max(self._flushed, covered)


def least_busy(connections: Sequence[NbdConnection]) -> NbdConnection:
    """The connection with the fewest commands in flight."""
    best = connections[0]
    if len(connections) > 1:
        least = best.in_flight
        for connection in connections:
            if connection.in_flight < least:
                best, least = connection, connection.in_flight
    return best


async def all_done(commands: Iterable[asyncio.Future[None]]) -> None:
    """Send all and wait for all; raises what the first in order failed with, once none is in flight any more."""
    futures: list[asyncio.Future[None]] = []
    unsent: list[BaseException] = []
    try:
        for future in commands:
            futures.append(future)  # noqa: PERF402  those sent must be known even if the next can't be
    except DeviceError as error:
        unsent.append(error)
    try:
        if futures:
            await asyncio.wait(futures)
    except asyncio.CancelledError:
        for future in futures:
            future.cancel()
        raise
    failures = [failure for future in futures if (failure := future.exception()) is not None] + unsent
    if failures:
        try:
            raise failures[0]
        finally:  # the exception knows this frame: were it known here, too, the buffers would stay until the next gc
            del failures, futures, unsent, future


async def connect_together(
    endpoint: NbdEndpoint, count: int, *, timeout: float, request_timeout: float | None
) -> list[NbdConnection]:
    """Up to `count` connections to one export: fewer, with a warning, where the server takes no more."""
    first = await NbdConnection.connect(endpoint, timeout=timeout, request_timeout=request_timeout)
    if count == 1 or not first.info.capabilities.multi_conn:
        return [first]
    try:
        return [first, *await _connect_more(endpoint, first, count - 1, min(timeout, _EXTRA_TIMEOUT), request_timeout)]
    except BaseException:
        await first.aclose(0)
        raise


async def _connect_more(
    endpoint: NbdEndpoint, first: NbdConnection, count: int, timeout: float, request_timeout: float | None
) -> list[NbdConnection]:
    connecting = (NbdConnection.connect(endpoint, timeout=timeout, request_timeout=request_timeout) for _ in range(count))
    tasks = [asyncio.ensure_future(one) for one in connecting]
    try:
        results = await asyncio.gather(*(_attempt(task) for task in tasks))
    except BaseException:  # what is connected already must not stay so
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        await close_all(task.result() for task in tasks if not task.cancelled() and not task.exception())
        raise
    connected = [result for result in results if isinstance(result, NbdConnection)]
    failures = [result for result in results if isinstance(result, DeviceError)]
    if failures:
        log.warning("going on with %d of %d connections: %s", 1 + len(connected), 1 + count, failures[0])
    for connection in connected:
        if change := connection.info.change_since(first.info):
            await close_all(connected)
            raise DeviceError(errno.ESTALE, f"{first.name}: {change}")
    return connected


async def _attempt(task: asyncio.Future[NbdConnection]) -> NbdConnection | DeviceError:
    try:
        return await task
    except DeviceError as error:
        return error


async def close_all(connections: Iterable[NbdConnection]) -> None:
    """Drop connections that nothing was sent over."""
    await asyncio.gather(*(connection.aclose(0) for connection in connections))
