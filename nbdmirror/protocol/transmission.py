"""The transmission phase: requests out of bytes, and the check that every request must pass.

Source: NBD protocol, sections "Transmission phase", "Request message" and "Request types", and its extension for extended
headers.

Rules:
1. The payload of a WRITE is always consumed, also when the request will be refused; a payload over the limit is skipped as
   it comes, one far over it ends the connection. No WRITE is answered before its payload has come: libnbd takes a reply to
   a request that it is still sending for one to no request at all, and gives the connection up.
2. `refusal_of` is the only judge of ranges and flags: whoever serves a request that it passed need not look again.
3. With extended headers a length has 64 bits, and a payload follows a WRITE and whatever else has the flag PAYLOAD_LEN. The
   text wants the flag on a WRITE, too, but QEMU's client (10.0) sends the payload without it. A payload on any other command
   is consumed before the request is refused, and one over the limit ends the connection, as the text wants it here. The flag
   is taken off a WRITE, so that whoever serves requests never knows how they were framed.
4. A payload of more than `large_payload` bytes gets its buffer only when the owner says that there is room: until then
   `next_request` returns None, and `awaits_room` is its length.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from nbdmirror.errors import ProtocolError
from nbdmirror.protocol import constants as c
from nbdmirror.protocol import messages as m
from nbdmirror.protocol.receiver import IN_WINDOW

if TYPE_CHECKING:
    from nbdmirror.protocol.messages import ExportInfo, Opened, Refusal, Request
    from nbdmirror.protocol.receiver import Receiver

_REQUEST: Final = struct.Struct(">IHHQQI")
_EXTENDED_REQUEST: Final = struct.Struct(">IHHQQQ")
# A global is read faster than a global's attribute, and a tuple's own constructor is twice as fast as a NamedTuple's.
_WRITE: Final = c.CMD_WRITE
_new: Final = tuple.__new__
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
# The transmission flags without which a command, or a flag of one, is no part of what the export offers.
_COMMANDS_NEED: Final = (
    0,  # READ
    0,  # WRITE
    0,  # DISC
    c.TFLAG_SEND_FLUSH,
    c.TFLAG_SEND_TRIM,
    c.TFLAG_SEND_CACHE,
    c.TFLAG_SEND_WRITE_ZEROES,
    0,  # BLOCK_STATUS: whether contexts were granted is the export's to know
)
_FLAGS_NEED: Final = (
    (c.FUA, c.TFLAG_SEND_FUA),
    (c.DF, c.TFLAG_SEND_DF),
    (c.FAST_ZERO, c.TFLAG_SEND_FAST_ZERO),
)
_WRITES: Final = frozenset((c.CMD_WRITE, c.CMD_TRIM, c.CMD_WRITE_ZEROES))


class Transmission:
    """One connection's requests after haggling ended with `opened`."""

    def __init__(self, receiver: Receiver, opened: Opened, large_payload: int = c.MAX_PAYLOAD) -> None:
        self.structured = opened.structured
        framing = _EXTENDED_REQUEST if opened.extended else _REQUEST
        self._unpack = framing.unpack_from
        self._head = framing.size
        self._magic = c.EXTENDED_REQUEST_MAGIC if opened.extended else c.REQUEST_MAGIC
        self._payload_flag = c.PAYLOAD_LEN if opened.extended else 0
        self._receiver = receiver
        self._limit = opened.info.maximum_payload
        self._awaiting: tuple[int, int, int, int] | None = None
        self._skipped: Request | None = None
        self._is_between = True  # no payload is awaited, whether to be kept or to be skipped
        self._large_payload = large_payload
        self._has_room = False
        self.awaits_room = 0

    @property
    def unfinished(self) -> Request | None:
        """The WRITE whose payload has come only in part. A short one is not known before it is whole."""
        return None if self._awaiting is None else m.Request(c.CMD_WRITE, *self._awaiting)

    def next_request(self) -> Request | None:
        """The next whole request in what has been received, else None."""
        if not self._is_between:
            return self._after_payload()
        receiver, head = self._receiver, self._head
        start = receiver.start
        if receiver.end - start < head:
            receiver.need(head)
            return None
        magic, flags, command, cookie, offset, length = self._unpack(receiver.window, start)
        if magic != self._magic:
            raise ProtocolError(f"the client sent {magic:#x} where a request should begin")
        if command != _WRITE and not flags & self._payload_flag:
            receiver.start = start + head
            return _new(m.Request, (command, flags, cookie, offset, length, None))
        if self._payload_flag:
            return self._extended_request(m.Request(command, flags, cookie, offset, length))
        return self._write_request(flags, cookie, offset, length)

    def admit_payload(self) -> None:
        """Rule 4: the payload that awaits room may come."""
        self._has_room, self.awaits_room = True, 0

    def _after_payload(self) -> Request | None:
        """The request whose payload was awaited, once it has come."""
        if self._awaiting is not None:
            return self._finish_payload()
        if self._receiver.is_skipping:
            return None
        skipped, self._skipped = self._skipped, None
        self._is_between = True
        return skipped

    def _extended_request(self, request: Request) -> Request | None:
        """A WRITE, or a command with a payload (rule 3)."""
        command, flags, cookie, offset, length, _ = request
        if command != c.CMD_WRITE and (not flags & c.PAYLOAD_LEN or command == c.CMD_DISC):
            self._receiver.consume(self._head)
            return request
        if length > self._limit:
            raise ProtocolError(f"the client announced a payload of {length} bytes; the limit is {self._limit}")
        if command == c.CMD_WRITE:
            return self._write_request(flags & ~c.PAYLOAD_LEN, cookie, offset, length)
        return self._skip_payload(request)

    def _skip_payload(self, request: Request) -> Request | None:
        """Answer the request, which will be refused, when its payload has come and gone."""
        self._receiver.consume(self._head)
        self._receiver.skip(request.length)
        self._skipped = request
        self._is_between = False
        return self._after_payload()

    def _write_request(self, flags: int, cookie: int, offset: int, length: int) -> Request | None:
        receiver = self._receiver
        if length > self._limit:
            if length > _MAX_SKIP:
                raise ProtocolError(f"the client announced a write of {length} bytes; the limit is {self._limit}")
            return self._skip_payload(m.Request(c.CMD_WRITE, flags, cookie, offset, length))
        if length <= IN_WINDOW:
            begin = receiver.start + self._head
            end = begin + length
            if receiver.end < end:
                receiver.need(self._head + length)
                return None
            receiver.start = end
            return _new(m.Request, (_WRITE, flags, cookie, offset, length, receiver.window_view[begin:end]))
        if length > self._large_payload and not self._has_room:
            self.awaits_room = length
            return None
        self._has_room = False
        receiver.consume(self._head)
        receiver.begin_payload(length)
        self._awaiting = (flags, cookie, offset, length)
        self._is_between = False
        return self._finish_payload()

    def _finish_payload(self) -> Request | None:
        payload = self._receiver.finish_payload()
        if payload is None or self._awaiting is None:
            return None
        (flags, cookie, offset, length), self._awaiting = self._awaiting, None
        self._is_between = True
        return m.Request(c.CMD_WRITE, flags, cookie, offset, length, payload)


def refusal_of(request: Request, info: ExportInfo, *, structured: bool) -> Refusal | None:
    """Why a request can't be served, or None if it can. Source: section "Request types" and "Error values"."""
    command, flags = request.command, request.flags
    if command >= len(_FLAGS):
        return m.Refusal(c.EINVAL, f"unknown command {command}")
    if flags:
        refusal = _flags_refusal(command, flags, info, structured=structured)
        if refusal is not None:
            return refusal
    if command in _WRITES and info.is_read_only:
        return m.Refusal(c.EPERM, "the export is read-only")
    if _COMMANDS_NEED[command] & ~info.flags:
        return m.Refusal(c.EINVAL, f"{c.CMD_NAMES[command]} is not offered")
    if command == c.CMD_FLUSH:
        return None
    return _range_refusal(request, info)


def _flags_refusal(command: int, flags: int, info: ExportInfo, *, structured: bool) -> Refusal | None:
    allowed = _FLAGS[command] if structured else _FLAGS[command] & ~c.DF
    if flags & ~allowed:
        return m.Refusal(c.EINVAL, f"flags {flags & ~allowed:#x} do not belong to {c.CMD_NAMES[command]}")
    for flag, needed in _FLAGS_NEED:
        # What a read-only export refuses for being so has another error.
        if flags & flag and not info.flags & needed and not (command in _WRITES and info.is_read_only):
            return m.Refusal(c.EINVAL, f"flags {flag:#x} are not offered")
    return None


def _range_refusal(request: Request, info: ExportInfo) -> Refusal | None:
    command, offset, length = request.command, request.offset, request.length
    if length == 0:
        return m.Refusal(c.EINVAL, "a request of no bytes")
    if offset + length > info.size:
        # Section "Error values": ENOSPC for what would grow the export, EINVAL for the rest.
        error = c.ENOSPC if command in (c.CMD_WRITE, c.CMD_WRITE_ZEROES) else c.EINVAL
        return m.Refusal(error, f"offset {offset} + {length} bytes is past the end at {info.size}")
    if command <= c.CMD_WRITE and length > info.maximum_payload:  # WRITE or READ: what travels
        return m.Refusal(c.EOVERFLOW, f"{length} bytes in one request; at most {info.maximum_payload} are taken")
    # A disk may end in the middle of a block: a request may, too, but none may begin there.
    if offset % info.minimum_block or (length % info.minimum_block and offset + length != info.size):
        return m.Refusal(c.EINVAL, f"not aligned to the minimum block size of {info.minimum_block}")
    return None
