"""The transmission phase: requests out of bytes, replies into bytes, and the check that every request must pass.

Source: NBD protocol, sections "Transmission phase", "Request message", "Structured reply types" and "Request types".

Rules:
1. The payload of a WRITE is always consumed, also when the request will be refused; a payload over the limit is skipped as
   it comes, one far over it ends the connection. No WRITE is answered before its payload has come: libnbd takes a reply to
   a request that it is still sending for one to no request at all, and gives the connection up.
2. `refusal_of` is the only judge of ranges and flags: whoever serves a request that it passed need not look again.
3. READ is answered in chunks when structured replies were negotiated, errors then carry their text; what has no data to
   return is answered with a simple reply either way.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from nbdmirror.errors import ProtocolError
from nbdmirror.protocol import constants as c
from nbdmirror.protocol import messages as m
from nbdmirror.protocol.receiver import IN_WINDOW

if TYPE_CHECKING:
    from nbdmirror.protocol.messages import Answer, ExportInfo, Opened, ReadReply, Refusal, Request, StatusReply
    from nbdmirror.protocol.receiver import Receiver

_REQUEST: Final = struct.Struct(">IHHQQI")
_HEAD: Final = _REQUEST.size
# A WRITE this much over the limit is no honest mistake: do not wait for all of it.
_MAX_SKIP: Final = 128 * 1024 * 1024

# Flags that a command takes. FUA is accepted on every command (section "Command flags").
_FLAGS: Final = (
    c.FUA | c.DF,  # READ
    c.FUA,  # WRITE
    c.FUA,  # DISC
    c.FUA,  # FLUSH
    c.FUA,  # TRIM
    c.FUA,  # CACHE
    c.FUA | c.NO_HOLE | c.FAST_ZERO,  # WRITE_ZEROES
    c.FUA | c.REQ_ONE,  # BLOCK_STATUS
)
_WRITES: Final = frozenset((c.CMD_WRITE, c.CMD_TRIM, c.CMD_WRITE_ZEROES))


class Transmission:
    """One connection's requests and replies after haggling ended with `opened`."""

    def __init__(self, receiver: Receiver, opened: Opened) -> None:
        self.out: list[bytes | bytearray | memoryview] = []
        self.structured = opened.structured
        self._receiver = receiver
        self._limit = opened.info.maximum_payload
        self._awaiting: tuple[int, int, int, int] | None = None
        self._too_long: Request | None = None

    def next_request(self) -> Request | None:
        """The next whole request in what has been received, else None."""
        receiver = self._receiver
        if self._awaiting is not None:
            return self._finish_payload()
        if receiver.is_skipping:
            return None
        if self._too_long is not None:
            skipped, self._too_long = self._too_long, None
            return skipped
        if not receiver.need(_HEAD):
            return None
        magic, flags, command, cookie, offset, length = _REQUEST.unpack_from(receiver.window, receiver.start)
        if magic != c.REQUEST_MAGIC:
            raise ProtocolError(f"the client sent {magic:#x} where a request should begin")
        if command != c.CMD_WRITE:
            receiver.start += _HEAD
            return m.Request(command, flags, cookie, offset, length)
        return self._write_request(flags, cookie, offset, length)

    def _write_request(self, flags: int, cookie: int, offset: int, length: int) -> Request | None:
        receiver = self._receiver
        if length > self._limit:
            if length > _MAX_SKIP:
                raise ProtocolError(f"the client announced a write of {length} bytes; the limit is {self._limit}")
            receiver.consume(_HEAD)
            receiver.skip(length)
            self._too_long = m.Request(c.CMD_WRITE, flags, cookie, offset, length)
            return self.next_request()
        if length <= IN_WINDOW:
            if not receiver.need(_HEAD + length):
                return None
            payload = receiver.view(length, skip=_HEAD)
            receiver.start += _HEAD + length
            receiver.small_request_seen()
            return m.Request(c.CMD_WRITE, flags, cookie, offset, length, payload)
        receiver.consume(_HEAD)
        receiver.begin_payload(length)
        self._awaiting = (flags, cookie, offset, length)
        return self._finish_payload()

    def _finish_payload(self) -> Request | None:
        payload = self._receiver.finish_payload()
        if payload is None or self._awaiting is None:
            return None
        (flags, cookie, offset, length), self._awaiting = self._awaiting, None
        return m.Request(c.CMD_WRITE, flags, cookie, offset, length, payload)

    def reply(self, request: Request, answer: Answer) -> None:
        """Queue the answer to a request."""
        if type(answer) is m.ReadReply:
            self._reply_read(request, answer)
        elif type(answer) is m.Done:
            self.out.append(m.simple_reply(request.cookie))
        elif type(answer) is m.StatusReply:
            self._reply_status(request, answer)
        elif type(answer) is m.Refusal:
            self._reply_error(request, answer)
        else:
            raise AssertionError(f"{answer!r} answers nothing")

    def _reply_read(self, request: Request, answer: ReadReply) -> None:
        out, cookie, offset = self.out, request.cookie, request.offset
        if not self.structured:
            out += (m.simple_reply(cookie), answer.data)
            return
        runs = answer.runs
        if runs is None:
            out += (m.data_chunk(cookie, c.REPLY_FLAG_DONE, offset, request.length), answer.data)
            return
        view = memoryview(answer.data)
        for start, end, zero in runs:
            flags = c.REPLY_FLAG_DONE if end == request.length else 0
            if zero:
                out.append(m.hole_chunk(cookie, flags, offset + start, end - start))
            else:
                out += (m.data_chunk(cookie, flags, offset + start, end - start), view[start:end])

    def _reply_status(self, request: Request, answer: StatusReply) -> None:
        last = len(answer.extents) - 1
        for number, (context_id, extents) in enumerate(answer.extents):
            flags = c.REPLY_FLAG_DONE if number == last else 0
            self.out.append(m.status_chunk(request.cookie, flags, context_id, extents))

    def _reply_error(self, request: Request, answer: Refusal) -> None:
        if self.structured:
            self.out.append(m.error_chunk(request.cookie, answer.error, answer.message))
        else:
            self.out.append(m.simple_reply(request.cookie, answer.error))


def refusal_of(request: Request, info: ExportInfo, *, structured: bool) -> Refusal | None:
    """Why a request can't be served, or None if it can. Source: section "Request types" and "Error values"."""
    command, flags = request.command, request.flags
    if command >= len(_FLAGS):
        return m.Refusal(c.EINVAL, f"unknown command {command}")
    allowed = _FLAGS[command] if structured else _FLAGS[command] & ~c.DF
    if flags & ~allowed:
        return m.Refusal(c.EINVAL, f"flags {flags & ~allowed:#x} do not belong to {c.CMD_NAMES[command]}")
    if command in _WRITES and info.is_read_only:
        return m.Refusal(c.EPERM, "the export is read-only")
    if command == c.CMD_FLUSH:
        return None
    return _range_refusal(request, info)


def _range_refusal(request: Request, info: ExportInfo) -> Refusal | None:
    command, offset, length = request.command, request.offset, request.length
    if length == 0:
        return m.Refusal(c.EINVAL, "a request of no bytes")
    if offset + length > info.size:
        # Section "Error values": ENOSPC for what would grow the export, EINVAL for the rest.
        error = c.ENOSPC if command in (c.CMD_WRITE, c.CMD_WRITE_ZEROES) else c.EINVAL
        return m.Refusal(error, f"offset {offset} + {length} bytes is past the end at {info.size}")
    if command in (c.CMD_READ, c.CMD_WRITE) and length > info.maximum_payload:
        return m.Refusal(c.EOVERFLOW, f"{length} bytes in one request; at most {info.maximum_payload} are taken")
    # A disk may end in the middle of a block: a request may, too, but none may begin there.
    if offset % info.minimum_block or (length % info.minimum_block and offset + length != info.size):
        return m.Refusal(c.EINVAL, f"not aligned to the minimum block size of {info.minimum_block}")
    return None
