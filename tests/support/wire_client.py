"""The client's half of NBD, for tests: it can say anything, and believes nothing that it is told.

    ClientCore    bytes in, replies out, without I/O; raises WireError for whatever a server must not send
    WireClient    a ClientCore over a socket, to send well-formed and malformed bytes to a real server

The product's own constants name the numbers; the layouts are written out here once more, so that a mistake in the
product's packing is not repeated.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Self

from nbdmirror.protocol import constants as c
from nbdmirror.protocol.constants import Info, Option, OptionReply

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

CLIENT_FLAGS: Final = c.FLAG_FIXED_NEWSTYLE | c.FLAG_NO_ZEROES
TIMEOUT: Final = 20.0


class WireError(Exception):
    """The server sent what the protocol forbids."""


# --- what a client says ----------------------------------------------------------------------------------------------


def client_flags(flags: int = CLIENT_FLAGS) -> bytes:
    return struct.pack(">I", flags)


def option(number: int, data: bytes = b"", *, length: int | None = None, magic: int = c.IHAVEOPT) -> bytes:
    """Any option; `length` and `magic` may lie."""
    return struct.pack(">QII", magic, number, len(data) if length is None else length) + data


def string(text: str | bytes) -> bytes:
    """A string with its length in front."""
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack(">I", len(raw)) + raw


def go_data(name: str | bytes = "", infos: Sequence[int] = ()) -> bytes:
    return string(name) + struct.pack(f">H{len(infos)}H", len(infos), *infos)


def go(name: str | bytes = "", infos: Sequence[int] = (), *, number: int = Option.GO) -> bytes:
    return option(number, go_data(name, infos))


def info(name: str | bytes = "", infos: Sequence[int] = ()) -> bytes:
    return go(name, infos, number=Option.INFO)


def meta_context(number: int, name: str = "", queries: Sequence[str] = (), *, count: int | None = None) -> bytes:
    """LIST_META_CONTEXT or SET_META_CONTEXT; `count` may lie."""
    head = string(name) + struct.pack(">I", len(queries) if count is None else count)
    return option(number, head + b"".join(string(query) for query in queries))


def request(
    command: int,
    offset: int = 0,
    length: int = 0,
    *,
    payload: bytes | None = None,
    cookie: int = 0,
    flags: int = 0,
    magic: int = c.REQUEST_MAGIC,
) -> bytes:
    """Any request; a payload gives its length where none is given."""
    length = len(payload) if payload is not None and not length else length
    return struct.pack(">IHHQQI", magic, flags, command, cookie, offset, length) + (payload or b"")


def extended_request(
    command: int,
    offset: int = 0,
    length: int = 0,
    *,
    payload: bytes | None = None,
    cookie: int = 0,
    flags: int | None = None,
    magic: int = c.EXTENDED_REQUEST_MAGIC,
) -> bytes:
    """Any request with an extended header; a payload sets its flag where no flags are given."""
    if flags is None:
        flags = 0 if payload is None else c.PAYLOAD_LEN
    length = len(payload) if payload is not None and not length else length
    return struct.pack(">IHHQQQ", magic, flags, command, cookie, offset, length) + (payload or b"")


# --- what it hears ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Answered:
    """One reply to an option."""

    option: int
    reply: int
    data: bytes

    @property
    def is_error(self) -> bool:
        return bool(self.reply & 1 << 31)

    @property
    def is_last(self) -> bool:
        """Whether nothing more follows for the option."""
        return self.is_error or self.reply == OptionReply.ACK


@dataclass(slots=True)
class Reply:
    """All that came for one request; `chunks` is 0 when the reply was simple."""

    cookie: int
    error: int = 0
    message: str = ""
    data: bytes = b""
    extents: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    chunks: int = 0
    holes: int = 0


@dataclass(slots=True)
class _Sent:
    """A request whose reply is awaited, and what of it has come."""

    command: int
    offset: int
    length: int
    reply: Reply
    content: bytearray
    covered: list[tuple[int, int]] = field(default_factory=list)


class ClientCore:
    """What a client knows of its connection. `structured` and `extended` are set by the test when that was negotiated."""

    def __init__(self) -> None:
        self.structured = False
        self.extended = False
        self._buffer = bytearray()
        self._sent: dict[int, _Sent] = {}
        self._next_cookie = 1

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        self._buffer += data

    @property
    def unread(self) -> bytes:
        return bytes(self._buffer)

    @property
    def awaited(self) -> int:
        """How many requests have no reply yet."""
        return len(self._sent)

    @property
    def awaiting(self) -> frozenset[int]:
        """The cookies that have no reply yet."""
        return frozenset(self._sent)

    def _take(self, length: int) -> bytes:
        taken = bytes(self._buffer[:length])
        del self._buffer[:length]
        return taken

    # --- haggling

    def greeting(self) -> int | None:
        """The server's flags."""
        if len(self._buffer) < 18:
            return None
        magic, have_option, flags = struct.unpack(">QQH", self._take(18))
        if (magic, have_option) != (0x4E42444D41474943, 0x49484156454F5054):
            raise WireError(f"a greeting of {magic:#x} {have_option:#x}")
        return int(flags)

    def option_reply(self) -> Answered | None:
        if len(self._buffer) < 20:
            return None
        magic, number, reply, length = struct.unpack_from(">QIII", self._buffer)
        if magic != 0x3E889045565A9:
            raise WireError(f"{magic:#x} where an option reply should begin")
        if reply == OptionReply.ACK and length:
            raise WireError("an ACK with data")
        if len(self._buffer) < 20 + length:
            return None
        self._take(20)
        data = self._take(length)
        if reply & 1 << 31:
            _text(data)
        return Answered(number, reply, data)

    def option_replies(self) -> list[Answered]:
        """All that are there."""
        replies = []
        while (reply := self.option_reply()) is not None:
            replies.append(reply)
        return replies

    def export_name_reply(self, *, zeroes: bool = False) -> tuple[int, int] | None:
        """Size and transmission flags, as EXPORT_NAME gets them."""
        length = 10 + 124 * zeroes
        if len(self._buffer) < length:
            return None
        size, flags = struct.unpack_from(">QH", self._buffer)
        if any(self._take(length)[10:]):
            raise WireError("the padding is not zero")
        return size, flags

    # --- transmission

    def request(self, command: int, offset: int = 0, length: int = 0, **rest: Any) -> bytes:
        """A request with a cookie of its own, whose reply will be held against it."""
        rest.setdefault("cookie", self._next_cookie)
        self._next_cookie += 1
        if self.extended:
            raw = extended_request(command, offset, length, **rest)
            cookie, _, length = struct.unpack_from(">QQQ", raw, 8)
        else:
            raw = request(command, offset, length, **rest)
            cookie, _, length = struct.unpack_from(">QQI", raw, 8)
        if command != c.CMD_DISC:
            content = bytearray(length if command == c.CMD_READ and length < 1 << 30 else 0)
            self._sent[cookie] = _Sent(command, offset, length, Reply(cookie), content)
        return raw

    def reply(self) -> Reply | None:
        """The next reply that is whole."""
        while len(self._buffer) >= 16:
            magic = int.from_bytes(self._buffer[:4], "big")
            if magic == c.SIMPLE_REPLY_MAGIC and not self.extended:
                return self._simple()
            if magic != (c.EXTENDED_REPLY_MAGIC if self.extended else c.STRUCTURED_REPLY_MAGIC):
                raise WireError(f"{magic:#x} where a reply should begin")
            if not self.structured:
                raise WireError("a structured reply that was not negotiated")
            head = 32 if self.extended else 20
            if len(self._buffer) < head:
                return None
            flags, kind, cookie = struct.unpack_from(">HHQ", self._buffer, 4)
            length = int.from_bytes(self._buffer[24:32] if self.extended else self._buffer[16:20], "big")
            if len(self._buffer) < head + length:
                return None
            sent = self._find(cookie)
            if self.extended and int.from_bytes(self._buffer[16:24], "big") != sent.offset:
                raise WireError("a reply whose offset is not the request's")
            self._take(head)
            self._chunk(sent, kind, self._take(length))
            sent.reply.chunks += 1
            if flags & ~c.REPLY_FLAG_DONE:
                raise WireError(f"unknown chunk flags {flags:#x}")
            if flags & c.REPLY_FLAG_DONE:
                return self._finish(sent)
        return None

    def replies(self) -> list[Reply]:
        """All that are there."""
        replies = []
        while (reply := self.reply()) is not None:
            replies.append(reply)
        return replies

    def _find(self, cookie: int) -> _Sent:
        if cookie not in self._sent:
            raise WireError(f"a reply to cookie {cookie}, which awaits none")
        return self._sent[cookie]

    def _simple(self) -> Reply | None:
        error, cookie = struct.unpack_from(">IQ", self._buffer, 4)
        sent = self._find(cookie)
        has_data = sent.command == c.CMD_READ and not error
        if self.structured and has_data:
            raise WireError("a simple reply to a READ")
        if len(self._buffer) < 16 + len(sent.content) * has_data:
            return None
        self._take(16)
        if has_data:
            sent.content[:] = self._take(len(sent.content))
            sent.covered.append((0, sent.length))
        sent.reply.error = _error(error) if error else 0
        return self._finish(sent)

    def _chunk(self, sent: _Sent, kind: int, data: bytes) -> None:
        if kind == (c.REPLY_BLOCK_STATUS if self.extended else c.REPLY_BLOCK_STATUS_EXT):
            raise WireError("a block status chunk of the other framing")
        match kind:
            case c.REPLY_NONE:
                if data:
                    raise WireError("a NONE chunk with data")
            case c.REPLY_OFFSET_DATA:
                self._content(sent, int.from_bytes(data[:8], "big"), data[8:])
            case c.REPLY_OFFSET_HOLE:
                offset, length = struct.unpack(">QI", data)
                self._content(sent, offset, bytes(length))
                sent.reply.holes += length
            case c.REPLY_BLOCK_STATUS:
                _status(sent, struct.unpack(f">{len(data) // 4}I", data))
            case c.REPLY_BLOCK_STATUS_EXT:
                number, count = struct.unpack_from(">II", data)
                _status(sent, (number, *struct.unpack(f">{2 * count}Q", data[8:])))
            case c.REPLY_ERROR:
                number, length = struct.unpack_from(">IH", data)
                if length != len(data) - 6:
                    raise WireError("an error chunk whose message has another length")
                sent.reply.error, sent.reply.message = _error(number), _text(data[6:])
            case _:
                raise WireError(f"a chunk of type {kind}")

    @staticmethod
    def _content(sent: _Sent, offset: int, data: bytes) -> None:
        start = offset - sent.offset
        end = start + len(data)
        if sent.command != c.CMD_READ or start < 0 or end > sent.length or start == end:
            raise WireError(f"content at {offset}+{len(data)} that was not asked for")
        if any(start < after and first < end for first, after in sent.covered):
            raise WireError(f"content at {offset}+{len(data)} twice")
        sent.content[start:end] = data
        sent.covered.append((start, end))

    def _finish(self, sent: _Sent) -> Reply:
        del self._sent[sent.reply.cookie]
        if sent.reply.error:
            return sent.reply
        if sent.command == c.CMD_READ and sum(end - start for start, end in sent.covered) != sent.length:
            raise WireError("a READ that succeeded without all of its content")
        if sent.command == c.CMD_BLOCK_STATUS and not sent.reply.extents:
            raise WireError("a BLOCK_STATUS that succeeded without extents")
        sent.reply.data = bytes(sent.content)
        return sent.reply


def _text(raw: bytes) -> str:
    if len(raw) > c.MAX_STRING:
        raise WireError(f"a string of {len(raw)} bytes")
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise WireError("a string that is not UTF-8") from None


def _error(number: int) -> int:
    if number not in (c.EPERM, c.EIO, c.ENOMEM, c.EINVAL, c.ENOSPC, c.EOVERFLOW, c.ENOTSUP, c.ESHUTDOWN):
        raise WireError(f"error number {number}")
    return number


def _status(sent: _Sent, words: Sequence[int]) -> None:
    extents = list(zip(words[1::2], words[2::2], strict=True))
    if sent.command != c.CMD_BLOCK_STATUS or not extents or words[0] in sent.reply.extents:
        raise WireError("a block status that was not asked for, empty or for one context twice")
    if len(extents) > 1 << 20:
        raise WireError(f"{len(extents)} extents in one chunk")
    lengths = [length for length, _ in extents]
    if not all(lengths) or sum(lengths[:-1]) >= sent.length:
        raise WireError(f"extents of {lengths} bytes for {sent.length}")
    sent.reply.extents[words[0]] = extents


# --- a server behind a socket ----------------------------------------------------------------------------------------


class WireClient:
    """A ClientCore over a socket. Whatever has to arrive must do so within TIMEOUT seconds.

    async with await WireClient.connect_unix(path) as client:
        await client.open("disk", structured=True)
        reply = await client.ask(c.CMD_READ, 0, 4096)
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.core = ClientCore()
        self._reader = reader
        self._writer = writer

    @classmethod
    async def connect_unix(cls, path: Path | str) -> Self:
        return cls(*await asyncio.open_unix_connection(str(path)))

    @classmethod
    async def connect_tcp(cls, host: str, port: int) -> Self:
        return cls(*await asyncio.open_connection(host, port))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def send(self, data: bytes) -> None:
        """Any bytes at all."""
        self._writer.write(data)
        async with asyncio.timeout(TIMEOUT):
            await self._writer.drain()

    async def _receive(self) -> bool:
        """More bytes for the core; False at the end of the stream."""
        async with asyncio.timeout(TIMEOUT):
            data = await self._reader.read(1 << 20)
        self.core.feed(data)
        return bool(data)

    async def _more(self) -> None:
        if not await self._receive():
            raise WireError(f"the server hung up; {len(self.core.unread)} bytes were not understood")

    async def read_until_closed(self) -> bytes:
        """What is still unread when the server has hung up, by itself. A reset counts, too."""
        with contextlib.suppress(ConnectionError):
            while await self._receive():
                pass
        return self.core.unread

    async def greet(self, flags: int = CLIENT_FLAGS) -> int:
        """The greeting; returns the server's flags."""
        while (offered := self.core.greeting()) is None:
            await self._more()
        await self.send(client_flags(flags))
        return offered

    async def answers(self) -> list[Answered]:
        """The replies to one option, the last one included."""
        replies: list[Answered] = []
        while not replies or not replies[-1].is_last:
            reply = self.core.option_reply()
            if reply is None:
                await self._more()
            else:
                replies.append(reply)
        return replies

    async def option(self, number: int, data: bytes = b"") -> list[Answered]:
        """An option and its replies."""
        await self.send(option(number, data))
        return await self.answers()

    async def open(
        self, name: str = "", *, structured: bool = False, extended: bool = False, contexts: Sequence[str] = ()
    ) -> tuple[int, int]:
        """From the greeting to the transmission phase; returns size and transmission flags."""
        await self.greet()
        if extended:
            assert [each.reply for each in await self.option(Option.EXTENDED_HEADERS)] == [OptionReply.ACK]
            self.core.structured = self.core.extended = True
        if structured:
            assert [each.reply for each in await self.option(Option.STRUCTURED_REPLY)] == [OptionReply.ACK]
            self.core.structured = True
        if contexts:
            await self.send(meta_context(Option.SET_META_CONTEXT, name, contexts))
            assert (await self.answers())[-1].reply == OptionReply.ACK
        replies = await self.option(Option.GO, go_data(name))
        if replies[-1].is_error:
            raise WireError(f"GO was answered by {replies[-1]!r}")
        return export_info(replies)

    async def request(self, command: int, offset: int = 0, length: int = 0, **rest: Any) -> None:
        """Send a request whose reply will come."""
        await self.send(self.core.request(command, offset, length, **rest))

    async def reply(self) -> Reply:
        """The next reply, to whichever request."""
        while (reply := self.core.reply()) is None:
            await self._more()
        return reply

    async def ask(self, command: int, offset: int = 0, length: int = 0, **rest: Any) -> Reply:
        """A request and its reply; no other may be awaited."""
        await self.request(command, offset, length, **rest)
        return await self.reply()

    async def ask_among(self, command: int, offset: int = 0, length: int = 0, **rest: Any) -> Reply:
        """A request and the next reply, which must be its own; others may be awaited."""
        awaited = self.core.awaiting
        await self.request(command, offset, length, **rest)
        reply = await self.reply()
        if reply.cookie in awaited:
            raise WireError(f"a reply to {reply.cookie}, which was asked before")
        return reply

    def abort(self) -> None:
        """Be gone, without a word."""
        self._writer.transport.abort()

    async def aclose(self) -> None:
        self._writer.close()
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()


def export_info(replies: Sequence[Answered]) -> tuple[int, int]:
    """Size and transmission flags from the replies to INFO or GO."""
    for each in replies:
        if each.reply == OptionReply.INFO and each.data[:2] == struct.pack(">H", Info.EXPORT):
            size, flags = struct.unpack(">QH", each.data[2:])
            return size, flags
    raise WireError("no INFO_EXPORT")
