"""NbdDevice: an export of an NBD server as a BlockDevice, over one connection or several.

Rules (NBD protocol, "Transmission phase" and "Block size constraints"):
1. The connections are the link's (`nbd_link`): how many, what becomes of requests when they are lost, and what FLUSH covers.
2. Nothing is sent that the server did not offer. What it lacks is made up for: FUA by a flush, zeroing by written zeroes,
   trim and cache by nothing, extents by "all data". Only FAST_ZERO is refused, with ENOTSUP.
   `capabilities` says what the server itself offers.
3. Requests are cut to the server's limits. Every piece is awaited, also after one has failed: when a call has returned, its
   buffer is no longer in use. A *cancelled* call is the exception: its buffer must not be used again.
4. A server may refuse to zero or trim a long range (EOVERFLOW, EINVAL): the range is halved until it agrees, and the length
   it agreed to is remembered.
5. A request that comes while there is no connection is held as the link says. One that is on its way fails when a connection
   that it uses is lost, and later ones go to those that are left.
"""

from __future__ import annotations

import errno
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from nbdmirror.devices.base import BlockDevice, Limits
from nbdmirror.devices.identity import identity_of_export
from nbdmirror.devices.nbd_captive import CaptiveServer, command_name
from nbdmirror.devices.nbd_connection import NbdConnection
from nbdmirror.devices.nbd_link import DEFAULT_LINK, Link, LinkOptions
from nbdmirror.devices.nbd_session import all_done
from nbdmirror.errors import DeviceError
from nbdmirror.extents import HOLE, ZERO, ExtentList
from nbdmirror.protocol.constants import DEFAULT_MAX_PAYLOAD, FAST_ZERO, FUA
from nbdmirror.units import MiB, round_down

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterator, Sequence

    from nbdmirror.devices.nbd_connection import Buffer, Data
    from nbdmirror.devices.nbd_setup import BlockSizes
    from nbdmirror.devices.uri import NbdEndpoint

# Where the server advertises no block sizes, every request must be a multiple of this, if the size is one.
_SECTOR: Final = 512
_PREFERRED: Final = 4096
# The longest zero, trim or block status: its length travels in 32 bits.
_MAX_LENGTH: Final = 2**32 - 1
# A server that refuses to zero even this much refuses for another reason.
_LEAST_ZERO: Final = 64 * 1024
_TOO_LONG: Final = frozenset((errno.EOVERFLOW, errno.EINVAL))
# Zeroes for servers without WRITE_ZEROES, and how many writes of them are in flight at a time.
_ZEROES: Final = bytes(MiB)
_ZEROES_IN_FLIGHT: Final = 8


class NbdDevice(BlockDevice):
    """An open export. Construct it with `open` or `open_command`. Its `link` tells of lost connections."""

    def __init__(self, link: Link, *, read_only: bool, server: CaptiveServer | None = None) -> None:
        self.link = link
        self.name = link.name
        self.size = link.info.size
        self.limits = _limits(link.info.block_sizes, self.size)
        if self.size % self.limits.minimum:
            block = self.limits.minimum
            raise DeviceError(
                errno.EINVAL,
                f"{self.name}: its last bytes are out of reach, {self.size} is not a multiple of its block size {block}",
            )
        offered = link.info.capabilities
        self.capabilities = replace(offered, read_only=read_only or offered.read_only)
        self._server = server
        # The length of one zero or trim that the server has not refused yet.
        self._agreed = self.limits.maximum_zero

    @classmethod
    async def open(
        cls, endpoint: NbdEndpoint, *, connections: int = 4, read_only: bool = False, link: LinkOptions = DEFAULT_LINK
    ) -> NbdDevice:
        """Connect, as the link's options say. Raises DeviceError, or UsageError where libnbd or verifiable TLS is missing."""
        return await cls._over(await Link.open(endpoint, connections=connections, options=link), read_only=read_only)

    @classmethod
    async def open_command(cls, argv: Sequence[str], *, read_only: bool = False) -> NbdDevice:
        """Start a captive server by systemd socket activation. It lasts as long as the device, which has one connection."""
        server = await CaptiveServer.start(argv)
        try:
            connection = await NbdConnection.connect(server.endpoint, name=command_name(argv))
            server.hide()
            return await cls._over(Link.over(connection), read_only=read_only, server=server)
        except BaseException:
            await server.aclose()
            raise

    @classmethod
    async def _over(cls, link: Link, *, read_only: bool, server: CaptiveServer | None = None) -> NbdDevice:
        try:
            return cls(link, read_only=read_only, server=server)
        except DeviceError:
            await link.aclose()
            raise

    @property
    def connection_count(self) -> int:
        """The connections that live."""
        return len(self.link.connections)

    async def pread(self, buffer: Buffer, offset: int) -> None:
        """Fill `buffer`, in pieces where it is longer than the server sends at once."""
        if not self.link.connections:
            await self.link.ready()
        length = len(buffer)
        if length <= self.limits.maximum:
            await self.link.pick().pread(buffer, offset)
            return
        view = memoryview(buffer)
        await all_done(self.link.pick().pread(view[at : at + size], offset + at) for at, size in self._pieces(length))

    async def pwrite(self, data: Data, offset: int, flags: int = 0) -> None:
        """Write `data`, in pieces where it is longer than the server takes at once."""
        flags, flush_after = self._prepare_write(flags)
        if not self.link.connections:
            await self.link.ready()
        length = len(data)
        if length <= self.limits.maximum:
            await self.link.pick_for_write(flags).pwrite(data, offset, flags)
        else:
            view = memoryview(data)
            pieces = self._pieces(length)
            await all_done(
                self.link.pick_for_write(flags).pwrite(view[at : at + size], offset + at, flags) for at, size in pieces
            )
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
        """Make durable what has returned, if the server can; ESTALE where a lost connection may have cost some of it."""
        await self.link.flush()

    async def cache(self, offset: int, length: int) -> None:
        """Have the server read ahead, if it does so on request."""
        if self.capabilities.cache:
            await self.link.ready()
            await self.link.pick().cache(offset, min(length, self.limits.maximum_zero))

    async def extents(self, offset: int, length: int) -> ExtentList:
        """`base:allocation`; all data where the server has none, or refuses: that is always true."""
        if not self.capabilities.extents:
            return ExtentList.all_data(offset, length)
        await self.link.ready()
        connection = self.link.pick()
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

    @property
    def is_away(self) -> bool:
        """See BlockDevice."""
        return self.link.is_reconnecting

    def identity(self) -> str:
        """See BlockDevice."""
        return identity_of_export(self.name)

    async def aclose(self) -> None:
        """Say goodbye on every connection, and end a captive server, for a bounded time."""
        try:
            await self.link.aclose()
        finally:
            if self._server is not None:
                await self._server.aclose()

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
        await self.link.ready()
        step = self._agreed
        while length:
            size = min(step, length)
            try:
                await command(self.link.pick_for_write(flags), offset, size, flags)
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
        await self.link.ready()
        # As long as the block of zeroes or the server's maximum, whichever is less, but never less than its minimum.
        step = max(min(len(_ZEROES), self.limits.maximum), self.limits.minimum)
        zeroes = memoryview(_ZEROES if step <= len(_ZEROES) else bytes(step))
        for start in range(0, length, step * _ZEROES_IN_FLIGHT):
            window = range(start, min(start + step * _ZEROES_IN_FLIGHT, length), step)
            await all_done(
                self.link.pick_for_write(flags).pwrite(zeroes[: min(step, length - at)], offset + at, flags & FUA)
                for at in window
            )


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
