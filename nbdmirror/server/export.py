"""Exports: a request in, an answer from the disk out.

Rules:
1. `serve_now` answers what cannot block, at once and without a task; None means "use `serve`". Nothing has happened then.
   What is large is never answered at once.
2. Every request is judged once, by `refusal_of`; after that nobody looks at ranges or flags again.
3. `DeviceError.errno` becomes an NBD error here and nowhere else.
4. What reads as zeroes is sent as hole chunks where the client takes chunks, whether or not the disk calls it a hole.
5. Several clients may write: nothing is cached above the disk, so a flush on one connection covers the writes of all
   (CAN_MULTI_CONN).
"""

from __future__ import annotations

import errno
import logging
from typing import TYPE_CHECKING, Final

from nbdmirror.errors import DeviceError
from nbdmirror.extents import is_zero, zero_runs
from nbdmirror.protocol import constants as c
from nbdmirror.protocol.messages import DONE, Answer, ExportInfo, Opened, ReadReply, Refusal, Request
from nbdmirror.protocol.transmission import refusal_of
from nbdmirror.server.budget import LARGE
from nbdmirror.server.buffers import ReadBuffers
from nbdmirror.server.contexts import block_status, context_names
from nbdmirror.server.tally import Tally
from nbdmirror.units import KiB

if TYPE_CHECKING:
    from collections.abc import Mapping

    from nbdmirror.bitmap.dirty import DirtyBitmap
    from nbdmirror.devices.base import BlockDevice, Capabilities
    from nbdmirror.server.buffers import BufferPool
    from nbdmirror.server.session import Session

_log: Final = logging.getLogger(__name__)

# Up to this a read is looked at whole for zeroes, above it in grains of this size: 0.1 us each.
_ZERO_GRAIN: Final = 64 * KiB

_WIRE_ERRORS: Final = {
    errno.EPERM: c.EPERM,
    errno.EACCES: c.EPERM,
    errno.EROFS: c.EPERM,
    errno.ENOMEM: c.ENOMEM,
    errno.EINVAL: c.EINVAL,
    errno.ENOSPC: c.ENOSPC,
    errno.EDQUOT: c.ENOSPC,
    errno.EFBIG: c.ENOSPC,
    errno.EOVERFLOW: c.EOVERFLOW,
    errno.ENOTSUP: c.ENOTSUP,
    errno.ESHUTDOWN: c.ESHUTDOWN,
}


def refusal_from(error: DeviceError) -> Refusal:
    """The error of a disk as the protocol can say it (section "Error values"); what it cannot say is EIO."""
    return Refusal(_WIRE_ERRORS.get(error.errno, c.EIO), str(error))


class Export:
    """A disk offered under a name.

    `bitmaps` are the dirty bitmaps of the same disk that clients may look at, by name. It is looked at whenever a client
    asks: what the owner puts in or takes out later counts, too. `sessions` are the clients that have opened it.
    """

    def __init__(
        self,
        name: str,
        device: BlockDevice,
        *,
        description: str = "",
        read_only: bool = False,
        bitmaps: Mapping[str, DirtyBitmap] | None = None,
        multi_conn: bool = True,
        allocation_depth: bool = True,
        writethrough: bool = False,
    ) -> None:
        self.name = name
        self.bitmaps = {} if bitmaps is None else bitmaps
        self.device = device
        self.description = description
        self.read_only = read_only or device.capabilities.read_only
        self.multi_conn = multi_conn
        self.allocation_depth = allocation_depth
        self.writethrough = writethrough
        self.sessions: set[Session] = set()
        self.tally = Tally()

    def info(self) -> ExportInfo:
        """What a client is told when it opens the export."""
        limits = self.device.limits
        return ExportInfo(
            name=self.name,
            size=self.device.size,
            flags=_transmission_flags(self.device.capabilities, read_only=self.read_only, multi_conn=self.multi_conn),
            description=self.description,
            minimum_block=limits.minimum,
            preferred_block=max(limits.preferred, limits.minimum, 512),
            maximum_payload=c.MAX_PAYLOAD,
            contexts=context_names(self.bitmaps, allocation_depth=self.allocation_depth),
        )

    def __repr__(self) -> str:
        return f"<Export {self.name!r} {self.device!r}{' read-only' if self.read_only else ''}>"


def _transmission_flags(capabilities: Capabilities, *, read_only: bool, multi_conn: bool) -> int:
    """Section "Transmission flags"."""
    flags = c.TFLAG_HAS_FLAGS | c.TFLAG_SEND_FLUSH | c.TFLAG_SEND_FUA | c.TFLAG_SEND_DF | c.TFLAG_SEND_CACHE
    if multi_conn:
        flags |= c.TFLAG_CAN_MULTI_CONN
    if capabilities.rotational:
        flags |= c.TFLAG_ROTATIONAL
    if read_only:
        return flags | c.TFLAG_READ_ONLY
    return flags | c.TFLAG_SEND_TRIM | c.TFLAG_SEND_WRITE_ZEROES | c.TFLAG_SEND_FAST_ZERO


class OpenExport:
    """An export as one client has opened it: with the size and flags it was told and the meta contexts it was granted."""

    def __init__(self, export: Export, opened: Opened, pool: BufferPool) -> None:
        self.export = export
        info = opened.info
        self._device = export.device
        self._info = info
        self._structured = opened.structured
        self._contexts = opened.contexts
        self.buffers = ReadBuffers(pool)
        # What `serve_now` takes for sound without asking `refusal_of`, as numbers.
        self._last_plain = c.CMD_READ if info.is_read_only or export.writethrough else c.CMD_WRITE
        self._size = info.size
        self._most = min(info.maximum_payload, LARGE)
        self._unaligned = info.minimum_block - 1
        # What every write has besides what the client asked for; one with a flag is never answered at once.
        self._write_flags = c.FUA if export.writethrough else 0

    def serve_now(self, request: Request) -> Answer | None:
        """The answer, if it can be given without blocking.

        A plain READ or WRITE of a sound range is judged by one expression: all that it lets pass, `refusal_of` would, too.
        """
        command, flags, _, offset, length, payload = request
        if (
            flags
            or command > self._last_plain
            or not 0 < length <= self._most
            or offset + length > self._size
            or (offset | length) & self._unaligned
        ):
            return refusal_of(request, self._info, structured=self._structured) or self._serve_rare_now(request)
        try:
            if payload is not None:
                return DONE if self._device.pwrite_now(payload, offset) else None
            data = self.buffers.take(length)
            if not self._device.pread_now(data, offset):
                return None
        except DeviceError as error:
            return refusal_from(error)
        # A first byte that is set rules out a small read of zeroes for the price of an index.
        return data if data[0] and length <= _ZERO_GRAIN else self._read_reply(request, data)

    def _serve_rare_now(self, request: Request) -> Answer | None:
        """Reads with flags, which change little, and those that end with the disk in the middle of a block."""
        if request.command != c.CMD_READ or request.length > LARGE:
            return None
        data = self.buffers.take(request.length)
        try:
            return self._read_reply(request, data) if self._device.pread_now(data, request.offset) else None
        except DeviceError as error:
            return refusal_from(error)

    def abandon(self, request: Request) -> None:
        """The client has gone in the middle of a WRITE: nothing of it is on the disk, but its range is marked."""
        if refusal_of(request, self._info, structured=self._structured) is None:
            self._device.abandoned(request.offset, request.length)

    def _read_reply(self, request: Request, data: bytearray) -> Answer:
        """The data whole or, where the client takes chunks and it is worth telling, with its zeroes as holes."""
        if not self._structured or request.flags & c.DF:
            return data
        length = len(data)
        if length <= _ZERO_GRAIN:
            return ReadReply(data, ((0, length, True),)) if is_zero(data, 0, length) else data
        runs = zero_runs(data, length, _ZERO_GRAIN)
        return data if len(runs) == 1 and not runs[0][2] else ReadReply(data, runs)

    async def serve(self, request: Request) -> Answer:
        """The answer to a request that `serve_now` passed on."""
        try:
            match request.command:
                case c.CMD_READ:
                    data = bytearray(request.length)
                    await self._device.pread(data, request.offset)
                    return self._read_reply(request, data)
                case c.CMD_BLOCK_STATUS:
                    return await block_status(self._device, self.export.bitmaps, self._contexts, request)
                case _:
                    await self._change(request)
                    return DONE
        except DeviceError as error:
            _log.debug("%r on %r failed: %s", request, self.export.name, error)
            return refusal_from(error)

    async def _change(self, request: Request) -> None:
        device, offset, length = self._device, request.offset, request.length
        flags = request.flags | self._write_flags
        match request.command:
            case c.CMD_WRITE:
                assert request.payload is not None, "a write without payload is refused"
                await device.pwrite(request.payload, offset, flags)
            case c.CMD_FLUSH:
                await device.flush()
            case c.CMD_TRIM:
                await device.trim(offset, length, flags)
            case c.CMD_WRITE_ZEROES:
                await device.zero(offset, length, flags)
            case c.CMD_CACHE:
                await device.cache(offset, length)
            case _:
                raise AssertionError(f"{request!r} passed the check but is not served")
