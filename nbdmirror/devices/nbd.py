"""NbdDevice: an export of an NBD server as a BlockDevice, over one connection or several.

Rules (NBD protocol, "Transmission phase" and "Block size constraints"):
1. More than one connection only if the server promises that a flush on one covers what others had answered
   (CAN_MULTI_CONN). FLUSH is then sent once, on any of them, for writes that have returned.
2. Nothing is sent that the server did not offer. What it lacks is made up for: FUA by a flush, zeroing by written zeroes,
   trim and cache by nothing, extents by "all data". Only FAST_ZERO is refused, with ENOTSUP.
   `capabilities` says what the server itself offers.
3. Requests are cut to the server's limits. Every piece is awaited, also after one has failed: when a call has returned, its
   buffer is no longer in use. A *cancelled* call is the exception: its buffer must not be used again.
4. A server may refuse to zero or trim a long range (EOVERFLOW, EINVAL): the range is halved until it agrees, and the length
   it agreed to is remembered.
5. A connection that is lost takes its commands with it; later ones go to those that are left. With the last one lost every
   call raises ENOTCONN. Nothing reconnects by itself: what was in flight is unknown to all but the caller.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from nbdmirror.devices.base import BlockDevice, Limits
from nbdmirror.devices.identity import identity_of_export
from nbdmirror.devices.nbd_connection import CONNECT_TIMEOUT, NbdConnection
from nbdmirror.errors import DeviceError
from nbdmirror.extents import HOLE, ZERO, ExtentList
from nbdmirror.protocol.constants import DEFAULT_MAX_PAYLOAD, FAST_ZERO, FUA
from nbdmirror.units import MiB, round_down

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from nbdmirror.devices.nbd_connection import BlockSizes, Buffer, Data
    from nbdmirror.devices.uri import NbdEndpoint

log = logging.getLogger(__name__)

# Where the server advertises no block sizes, every request must be a multiple of this, if the size is one.
_SECTOR: Final = 512
_PREFERRED: Final = 4096
# The longest zero, trim or block status: its length travels in 32 bits.
_MAX_LENGTH: Final = 2**32 - 1
# A server that refuses to zero even this much refuses for another reason.
_LEAST_ZERO: Final = 64 * 1024
# Seconds for each connection after the first: a server that already has one and takes no more may just never answer.
_EXTRA_TIMEOUT: Final = 3.0
_TOO_LONG: Final = frozenset((errno.EOVERFLOW, errno.EINVAL))
# Zeroes for servers without WRITE_ZEROES, and how many writes of them are in flight at a time.
_ZEROES: Final = bytes(MiB)
_ZEROES_IN_FLIGHT: Final = 8


class NbdDevice(BlockDevice):
    """An open export. Construct it with `open` or `open_command`."""

    def __init__(self, first: NbdConnection, *, read_only: bool) -> None:
        self.name = first.name
        self.size = first.size
        self.limits = _limits(first.block_sizes, first.size)
        if self.size % self.limits.minimum:
            block = self.limits.minimum
            raise DeviceError(
                errno.EINVAL,
                f"{self.name}: its last bytes are out of reach, {self.size} is not a multiple of its block size {block}",
            )
        self.capabilities = replace(first.capabilities, read_only=read_only or first.capabilities.read_only)
        self._connections = [first]
        # The length of one zero or trim that the server has not refused yet.
        self._agreed = self.limits.maximum_zero

    @classmethod
    async def open(
        cls, endpoint: NbdEndpoint, *, connections: int = 4, read_only: bool = False, timeout: float = CONNECT_TIMEOUT
    ) -> NbdDevice:
        """Connect within `timeout` seconds. Raises DeviceError, or UsageError where libnbd or verifiable TLS is missing."""
        first = await NbdConnection.connect(endpoint, timeout=timeout)
        device = await cls._over(first, read_only=read_only)
        if first.capabilities.multi_conn:
            try:
                device._connections += await _connect_more(endpoint, first, connections - 1, timeout)
            except BaseException:
                await first.aclose(0)
                raise
        return device

    @classmethod
    async def open_command(cls, argv: Sequence[str], *, read_only: bool = False, timeout: float = CONNECT_TIMEOUT) -> NbdDevice:
        """Start a captive server by systemd socket activation. It lasts as long as its one connection."""
        return await cls._over(await NbdConnection.connect_command(argv, timeout=timeout), read_only=read_only)

    @classmethod
    async def _over(cls, connection: NbdConnection, *, read_only: bool) -> NbdDevice:
        try:
            return cls(connection, read_only=read_only)
        except DeviceError:
            await connection.aclose()
            raise

    @property
    def connection_count(self) -> int:
        """The connections that are left."""
        return sum(connection.is_alive for connection in self._connections)

    async def pread(self, buffer: Buffer, offset: int) -> None:
        """Fill `buffer`, in pieces where it is longer than the server sends at once."""
        length = len(buffer)
        if length <= self.limits.maximum:
            await self._idlest().pread(buffer, offset)
            return
        view = memoryview(buffer)
        await _all(self._idlest().pread(view[at : at + size], offset + at) for at, size in self._pieces(length))

    async def pwrite(self, data: Data, offset: int, flags: int = 0) -> None:
        """Write `data`, in pieces where it is longer than the server takes at once."""
        flags, flush_after = self._prepare_write(flags)
        length = len(data)
        if length <= self.limits.maximum:
            await self._idlest().pwrite(data, offset, flags)
        else:
            view = memoryview(data)
            pieces = self._pieces(length)
            await _all(self._idlest().pwrite(view[at : at + size], offset + at, flags) for at, size in pieces)
        if flush_after:
            await self.flush()

    async def zero(self, offset: int, length: int, flags: int = 0) -> None:
        """Make the range read as zeroes; FAST_ZERO raises ENOTSUP unless the server offers it."""
        if flags & FAST_ZERO and not self.capabilities.fast_zero:
            raise DeviceError(errno.ENOTSUP, f"{self.name}: fast zero of {length} bytes at {offset}")
        flags, flush_after = self._prepare_write(flags)
        if self.capabilities.zero:
            await self._in_agreed_lengths(NbdConnection.zero, offset, length, flags)
        else:
            await self._write_zeroes(offset, length, flags)
        if flush_after:
            await self.flush()

    async def trim(self, offset: int, length: int, flags: int = 0) -> None:
        """Discard the range; nothing happens where the server doesn't trim."""
        flags, flush_after = self._prepare_write(flags)
        if self.capabilities.trim:
            await self._in_agreed_lengths(NbdConnection.trim, offset, length, flags)
        if flush_after:
            await self.flush()

    async def flush(self) -> None:
        """Make durable what has returned, if the server can; one that offers no flush promises nothing."""
        if self.capabilities.flush:
            await self._idlest().flush()

    async def cache(self, offset: int, length: int) -> None:
        """Have the server read ahead, if it does so on request."""
        if self.capabilities.cache:
            await self._idlest().cache(offset, min(length, self.limits.maximum_zero))

    async def extents(self, offset: int, length: int) -> ExtentList:
        """`base:allocation`; all data where the server has none, or refuses: that is always true."""
        connection = self._idlest()
        if not connection.has_base_allocation:
            return ExtentList.all_data(offset, length)
        try:
            status = await connection.block_status(offset, min(length, self.limits.maximum_zero))
        except DeviceError:
            if not connection.is_alive:
                raise
            return ExtentList.all_data(offset, length)
        extents = ExtentList(offset, length)
        for size, flags in status:
            if size <= 0:  # forbidden; what came before is good
                break
            extents.add(size, flags & (HOLE | ZERO))
        return extents if len(extents) else ExtentList.all_data(offset, length)

    def identity(self) -> str:
        """See BlockDevice."""
        return identity_of_export(self.name)

    async def aclose(self) -> None:
        """Say goodbye on every connection, for a bounded time."""
        await asyncio.gather(*(connection.aclose() for connection in self._connections))

    def _idlest(self) -> NbdConnection:
        """The connection with the fewest commands in flight."""
        connections = self._connections
        if len(connections) == 1:
            return connections[0]
        best, least = connections[0], _MAX_LENGTH
        for connection in connections:
            if connection.in_flight < least and connection.is_alive:
                best, least = connection, connection.in_flight
        return best

    def _prepare_write(self, flags: int) -> tuple[int, bool]:
        """The flags to send, and whether a flush has to follow for want of FUA."""
        if self.capabilities.read_only:
            raise DeviceError(errno.EPERM, f"{self.name} is read-only")
        if flags & FUA and not self.capabilities.fua:
            return flags & ~FUA, True
        return flags, False

    def _pieces(self, length: int) -> Iterator[tuple[int, int]]:
        """`(start, size)` of each piece of a payload of `length` bytes."""
        step = self.limits.maximum
        return ((at, min(step, length - at)) for at in range(0, length, step))

    async def _in_agreed_lengths(
        self, command: Callable[[NbdConnection, int, int, int], asyncio.Future[None]], offset: int, length: int, flags: int
    ) -> None:
        """Zero or trim in pieces that the server takes (rule 4)."""
        step = self._agreed
        while length:
            size = min(step, length)
            try:
                await command(self._idlest(), offset, size, flags)
            except DeviceError as error:
                smaller = round_down(size // 2, max(self.limits.minimum, _PREFERRED))
                if error.errno not in _TOO_LONG or smaller < max(_LEAST_ZERO, self.limits.minimum):
                    raise
                step = smaller
                continue
            self._agreed = min(self._agreed, step)
            offset += size
            length -= size

    async def _write_zeroes(self, offset: int, length: int, flags: int) -> None:
        """Zeroes as data, a few writes at a time; `flags` may hold FUA, the others have no meaning here."""
        # As long as the block of zeroes or the server's maximum, whichever is less, but never less than its minimum.
        step = max(min(len(_ZEROES), self.limits.maximum), self.limits.minimum)
        zeroes = memoryview(_ZEROES if step <= len(_ZEROES) else bytes(step))
        for start in range(0, length, step * _ZEROES_IN_FLIGHT):
            window = range(start, min(start + step * _ZEROES_IN_FLIGHT, length), step)
            await _all(self._idlest().pwrite(zeroes[: min(step, length - at)], offset + at, flags & FUA) for at in window)


async def _all(commands: Iterable[asyncio.Future[None]]) -> None:
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


async def _connect_more(endpoint: NbdEndpoint, first: NbdConnection, count: int, timeout: float) -> list[NbdConnection]:
    """Up to `count` more connections to the same export: fewer, with a warning, where the server takes no more."""
    timeout = min(timeout, _EXTRA_TIMEOUT)
    tasks = [asyncio.ensure_future(NbdConnection.connect(endpoint, timeout=timeout)) for _ in range(count)]
    try:
        results = await asyncio.gather(*(_attempt(task) for task in tasks))
    except BaseException:  # what is connected already must not stay so
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        await asyncio.gather(*(task.result().aclose(0) for task in tasks if not task.cancelled() and not task.exception()))
        raise
    connected = [result for result in results if isinstance(result, NbdConnection)]
    failures = [result for result in results if isinstance(result, DeviceError)]
    if failures:
        log.warning("going on with %d of %d connections: %s", 1 + len(connected), 1 + count, failures[0])
    for connection in connected:
        if connection.size != first.size:
            await asyncio.gather(*(connection.aclose(0) for connection in connected))
            raise DeviceError(errno.ESTALE, f"{first.name}: its size changed from {first.size} to {connection.size} bytes")
    return connected


async def _attempt(task: asyncio.Future[NbdConnection]) -> NbdConnection | DeviceError:
    try:
        return await task
    except DeviceError as error:
        return error


def _limits(sizes: BlockSizes, size: int) -> Limits:
    """The server's block sizes, or what the protocol has clients assume where it advertised none."""
    minimum = sizes.minimum or (_SECTOR if size % _SECTOR == 0 else 1)
    preferred = max(sizes.preferred or _PREFERRED, minimum)
    maximum = min(sizes.maximum or DEFAULT_MAX_PAYLOAD, DEFAULT_MAX_PAYLOAD)
    return Limits(
        minimum=minimum,
        preferred=preferred,
        maximum=max(round_down(maximum, minimum), minimum),
        maximum_zero=round_down(_MAX_LENGTH, max(minimum, _PREFERRED)),
    )
