"""Answers into bytes: one class per kind of framing, chosen when the export is opened.

Source: NBD protocol, sections "Simple reply message", "Structured reply chunk message", "Structured reply types" and, of the
extension for extended headers, "Extended reply chunk message".

Rules:
1. The framing never changes while a connection lasts, so a reply asks nothing about it: SimpleReplies where nothing was
   negotiated, StructuredReplies, or ExtendedReplies.
2. READ is answered in chunks wherever there are chunks, and errors carry their text then. What has no data to return is a
   simple reply beside structured ones, and a NONE chunk with extended headers, which forbid simple replies.
3. The chunks of one reply do not overlap, cover the request, and only the last one is DONE.
4. An extended header repeats the offset of the request; that of the data, where it is another, stands in the payload.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from nbdmirror.protocol import constants as c
from nbdmirror.protocol import messages as m

if TYPE_CHECKING:
    from nbdmirror.extents import ExtentList
    from nbdmirror.protocol.messages import Answer, Opened, ReadReply, Refusal, Request, StatusReply

_CHUNK: Final = struct.Struct(">IHHQI")
_HOLE_CHUNK: Final = struct.Struct(">IHHQIQI")
_EXT_CHUNK: Final = struct.Struct(">IHHQQQ")
_EXT_DATA_CHUNK: Final = struct.Struct(">IHHQQQQ")
_EXT_HOLE_CHUNK: Final = struct.Struct(">IHHQQQQI")
# The two that are packed for every request of the hot path, without the look-up of their method.
_simple: Final = struct.Struct(">IIQ").pack
_data_chunk: Final = struct.Struct(">IHHQIQ").pack


class Replies:
    """What is to be sent, in `out`; the framings say how each kind of answer looks."""

    def __init__(self) -> None:
        self.out: list[bytes | bytearray | memoryview] = []

    def reply(self, request: Request, answer: Answer) -> None:
        """Queue the answer to a request."""
        if type(answer) is bytearray:
            self.content(request, answer)
        elif answer is m.DONE:
            self.done(request)
        elif type(answer) is m.ReadReply:
            self._read(request, answer)
        elif type(answer) is m.StatusReply:
            self._status(request, answer)
        elif type(answer) is m.Refusal:
            self._refuse(request, answer)
        else:
            raise AssertionError(f"{answer!r} answers nothing")

    def content(self, request: Request, data: bytearray) -> None:
        """Queue the content of a READ, whole."""
        raise NotImplementedError

    def done(self, request: Request) -> None:
        """Queue the answer that a request has succeeded."""
        raise NotImplementedError

    def _read(self, request: Request, answer: ReadReply) -> None:
        raise NotImplementedError

    def _status(self, request: Request, answer: StatusReply) -> None:
        raise NotImplementedError

    def _refuse(self, request: Request, answer: Refusal) -> None:
        raise NotImplementedError


class SimpleReplies(Replies):
    """16 bytes, and the data of a READ: nothing was negotiated."""

    def content(self, request: Request, data: bytearray) -> None:
        """See Replies."""
        self.out += (_simple(c.SIMPLE_REPLY_MAGIC, 0, request.cookie), data)

    def done(self, request: Request) -> None:
        """See Replies."""
        self.out.append(_simple(c.SIMPLE_REPLY_MAGIC, 0, request.cookie))

    def _read(self, request: Request, answer: ReadReply) -> None:
        self.content(request, answer.data)

    def _status(self, request: Request, answer: StatusReply) -> None:
        raise AssertionError(f"{answer!r} for {request!r}: block status needs chunks")

    def _refuse(self, request: Request, answer: Refusal) -> None:
        self.out.append(_simple(c.SIMPLE_REPLY_MAGIC, answer.error, request.cookie))


class _ChunkReplies(Replies):
    """What structured and extended replies have in common: all but the heads of the chunks."""

    def _head(self, request: Request, flags: int, kind: int, length: int) -> bytes:
        """The header of a chunk with `length` bytes of payload."""
        raise NotImplementedError

    def _data(self, request: Request, flags: int, start: int, length: int) -> bytes:
        """All of an OFFSET_DATA chunk but the data, which begins `start` bytes behind the request's offset."""
        raise NotImplementedError

    def _hole(self, request: Request, flags: int, start: int, length: int) -> bytes:
        """An OFFSET_HOLE chunk: zeroes that do not travel."""
        raise NotImplementedError

    def _extents(self, context_id: int, extents: ExtentList) -> bytes:
        """The payload of a block status chunk."""
        raise NotImplementedError

    _status_kind: int

    def _read(self, request: Request, answer: ReadReply) -> None:
        view = memoryview(answer.data)
        for start, end, zero in answer.runs:
            flags = c.REPLY_FLAG_DONE if end == request.length else 0
            if zero:
                self.out.append(self._hole(request, flags, start, end - start))
            else:
                self.out += (self._data(request, flags, start, end - start), view[start:end])

    def _status(self, request: Request, answer: StatusReply) -> None:
        last = len(answer.extents) - 1
        for number, (context_id, extents) in enumerate(answer.extents):
            flags = c.REPLY_FLAG_DONE if number == last else 0
            payload = self._extents(context_id, extents)
            self.out.append(self._head(request, flags, self._status_kind, len(payload)) + payload)

    def _refuse(self, request: Request, answer: Refusal) -> None:
        text = m.wire_text(answer.message)
        head = self._head(request, c.REPLY_FLAG_DONE, c.REPLY_ERROR, 6 + len(text))
        self.out.append(head + struct.pack(">IH", answer.error, len(text)) + text)


class StructuredReplies(_ChunkReplies):
    """Chunks with a header of 20 bytes and 32-bit lengths."""

    _status_kind = c.REPLY_BLOCK_STATUS

    def _head(self, request: Request, flags: int, kind: int, length: int) -> bytes:
        return _CHUNK.pack(c.STRUCTURED_REPLY_MAGIC, flags, kind, request.cookie, length)

    def content(self, request: Request, data: bytearray) -> None:
        """See Replies."""
        _, _, cookie, offset, length, _ = request
        magic, kind = c.STRUCTURED_REPLY_MAGIC, c.REPLY_OFFSET_DATA
        self.out += (_data_chunk(magic, c.REPLY_FLAG_DONE, kind, cookie, length + 8, offset), data)

    def _data(self, request: Request, flags: int, start: int, length: int) -> bytes:
        magic, kind = c.STRUCTURED_REPLY_MAGIC, c.REPLY_OFFSET_DATA
        return _data_chunk(magic, flags, kind, request.cookie, length + 8, request.offset + start)

    def _hole(self, request: Request, flags: int, start: int, length: int) -> bytes:
        magic, kind = c.STRUCTURED_REPLY_MAGIC, c.REPLY_OFFSET_HOLE
        return _HOLE_CHUNK.pack(magic, flags, kind, request.cookie, 12, request.offset + start, length)

    def done(self, request: Request) -> None:
        """See Replies."""
        self.out.append(_simple(c.SIMPLE_REPLY_MAGIC, 0, request.cookie))

    def _extents(self, context_id: int, extents: ExtentList) -> bytes:
        words = [context_id]
        for extent in extents:
            words += (extent.length, extent.flags)
        return struct.pack(f">{len(words)}I", *words)


class ExtendedReplies(_ChunkReplies):
    """Chunks with a header of 32 bytes and 64-bit lengths, and nothing else."""

    _status_kind = c.REPLY_BLOCK_STATUS_EXT

    def _head(self, request: Request, flags: int, kind: int, length: int) -> bytes:
        return _EXT_CHUNK.pack(c.EXTENDED_REPLY_MAGIC, flags, kind, request.cookie, request.offset, length)

    def content(self, request: Request, data: bytearray) -> None:
        """See Replies."""
        self.out += (self._data(request, c.REPLY_FLAG_DONE, 0, request.length), data)

    def _data(self, request: Request, flags: int, start: int, length: int) -> bytes:
        magic, kind, offset = c.EXTENDED_REPLY_MAGIC, c.REPLY_OFFSET_DATA, request.offset
        return _EXT_DATA_CHUNK.pack(magic, flags, kind, request.cookie, offset, length + 8, offset + start)

    def _hole(self, request: Request, flags: int, start: int, length: int) -> bytes:
        magic, kind, offset = c.EXTENDED_REPLY_MAGIC, c.REPLY_OFFSET_HOLE, request.offset
        return _EXT_HOLE_CHUNK.pack(magic, flags, kind, request.cookie, offset, 12, offset + start, length)

    def done(self, request: Request) -> None:
        """See Replies."""
        self.out.append(self._head(request, c.REPLY_FLAG_DONE, c.REPLY_NONE, 0))

    def _extents(self, context_id: int, extents: ExtentList) -> bytes:
        words: list[int] = []
        for extent in extents:
            words += (extent.length, extent.flags)
        return struct.pack(f">II{len(words)}Q", context_id, len(extents), *words)


def replies_for(opened: Opened) -> Replies:
    """The framing that was negotiated."""
    if opened.extended:
        return ExtendedReplies()
    return StructuredReplies() if opened.structured else SimpleReplies()
