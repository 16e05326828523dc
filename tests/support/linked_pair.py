"""A client and a server in memory: what one says is what the other hears, cut into pieces of any size."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from nbdmirror.extents import ExtentList, zero_runs
from nbdmirror.protocol import constants as c
from nbdmirror.protocol.connection import ServerConnection
from nbdmirror.protocol.constants import OptionReply, TlsMode
from nbdmirror.protocol.messages import (
    DONE,
    Disconnected,
    ExportInfo,
    ExportQuery,
    HandshakeEvent,
    ListQuery,
    MetaContextQuery,
    ReadReply,
    Refusal,
    StartTls,
    StatusReply,
)
from nbdmirror.protocol.transmission import refusal_of
from tests.support.wire_client import ClientCore

if TYPE_CHECKING:
    from collections.abc import Iterable

    from nbdmirror.protocol.messages import Answer, Request

ALL_FLAGS: Final = (
    c.TFLAG_HAS_FLAGS
    | c.TFLAG_SEND_FLUSH
    | c.TFLAG_SEND_FUA
    | c.TFLAG_SEND_TRIM
    | c.TFLAG_SEND_WRITE_ZEROES
    | c.TFLAG_SEND_DF
    | c.TFLAG_CAN_MULTI_CONN
    | c.TFLAG_SEND_CACHE
    | c.TFLAG_SEND_FAST_ZERO
)


def export(name: str = "", size: int = 2 * 1024 * 1024, flags: int = ALL_FLAGS, **rest: Any) -> ExportInfo:
    return ExportInfo(name, size, flags, **rest)


class LinkedPair:
    """A client and a server in memory. `heard` is what the server made of the client's bytes, `sent` what it answered.

    Every question of the haggling is answered from `exports` (by name), every request from `disk`, at once. TLS is only
    acted: from STARTTLS on both sides take every byte for one that was encrypted.
    """

    def __init__(self, exports: Iterable[ExportInfo] | None = None, tls: TlsMode = TlsMode.OFF) -> None:
        self.exports = {each.name: each for each in (exports if exports is not None else [export()])}
        self.server = ServerConnection(tls)
        self.client = ClientCore()
        self.heard: list[tuple[Any, ...]] = []
        self.sent = bytearray()
        self.ended = False
        self.contexts: dict[int, str] = {}
        self.info = export()
        self.disk = bytearray()
        self._send()

    def say(self, data: bytes | bytearray, piece: int | None = None) -> None:
        """Bytes from the client arrive, at most `piece` of them at a time."""
        view, at = memoryview(data), 0
        while at < len(view) and not self.ended:
            buffer = self.server.get_buffer()
            assert len(buffer) > 0
            count = min(len(buffer), len(view) - at, piece or len(view))
            buffer[:count] = view[at : at + count]
            self.server.buffer_updated(count)
            at += count
            self._drain()

    def _drain(self) -> None:
        while not self.ended and not self.server.is_open:
            event = self.server.next_event()
            if event is None:
                break
            self._on_event(event)
        while not self.ended and self.server.is_open:
            asked = self.server.next_request()
            if asked is None:
                break
            self._on_request(asked)
        self._send()

    def _send(self) -> None:
        for part in self.server.data_to_send():
            self.sent += part
            self.client.feed(part)

    def _on_event(self, event: HandshakeEvent) -> None:
        self.heard.append((repr(event),))
        match event:
            case ExportQuery(name) if name in self.exports:
                self.server.accept(self.exports[name])
            case MetaContextQuery(name) if name in self.exports:
                self.server.offer_contexts(self.exports[name].contexts)
            case ListQuery():
                self.server.list_exports([(each.name, each.description) for each in self.exports.values()])
            case ExportQuery() | MetaContextQuery():
                self.server.refuse(OptionReply.ERR_UNKNOWN, "no such export")
            case Disconnected():
                self.ended = True
            case StartTls():
                self.server.tls_started()
            case opened:
                self.info, self.contexts = opened.info, opened.contexts
                self.client.structured, self.client.extended = opened.structured, opened.extended
                self.disk = bytearray(opened.info.size)

    def _on_request(self, asked: Request) -> None:
        payload = None if asked.payload is None else bytes(asked.payload)
        self.heard.append((*asked[:5], payload))
        if asked.command == c.CMD_DISC:
            self.ended = True
            return
        self.server.reply(asked, self.answer(asked))

    def answer(self, asked: Request) -> Answer:
        """What a disk in memory says."""
        refusal = refusal_of(asked, self.info, structured=self.server.structured)
        if refusal is not None:
            return refusal
        start, end = asked.offset, asked.offset + asked.length
        match asked.command:
            case c.CMD_READ:
                data = self.disk[start:end]
                return ReadReply(data, zero_runs(data, len(data), 4096))
            case c.CMD_WRITE:
                assert asked.payload is not None
                self.disk[start:end] = asked.payload
            case c.CMD_WRITE_ZEROES | c.CMD_TRIM:
                self.disk[start:end] = bytes(asked.length)
            case c.CMD_BLOCK_STATUS if not self.contexts:
                return Refusal(c.EINVAL, "no meta context was negotiated")
            case c.CMD_BLOCK_STATUS:
                return StatusReply([(number, ExtentList.all_data(start, asked.length)) for number in self.contexts])
        return DONE
