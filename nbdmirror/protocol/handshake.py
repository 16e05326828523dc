"""The haggling: fixed newstyle negotiation, from the greeting to the export that was agreed on.

Source: NBD protocol, sections "Fixed newstyle negotiation", "Option types", "Metadata querying" and "TLS support".

Rules:
1. An option that is unknown or malformed is answered with an error and its data is skipped: haggling goes on. Only what
   the text lets a server hang up for (bad magic, unknown client flags, EXPORT_NAME that fails, absurd lengths, a flood)
   raises ProtocolError.
2. No length inside an option is believed before it was checked against the option's own length, and trailing bytes are
   refused: a parser that stops early would read the next option from the wrong place.
3. One question is open at a time: after a query event nothing is parsed until it has been answered.
4. Meta contexts belong to the export name they were selected for, and a new selection replaces the old one even when it
   fails.
5. Extended headers include what structured replies give. Once they are agreed on there is no way back to structured replies,
   nor by EXPORT_NAME, whose reply could not say so.
6. After `shut_down` every option but ABORT is answered with ERR_SHUTDOWN.
7. Nothing that was negotiated in clear text survives STARTTLS, and clear text behind it is never looked at: somebody on the way
   may have put either there. A client has to wait for the answer, so bytes that are there already end the connection.
8. Where TLS is required, nothing is looked at or told before it, not even whether an option is known. After it, or where
   there is none, TLS is never asked for.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final, TypeVar

from nbdmirror.errors import ProtocolError
from nbdmirror.protocol import constants as c
from nbdmirror.protocol.constants import Info, Option, OptionReply, TlsMode
from nbdmirror.protocol.messages import (
    Disconnected,
    ExportInfo,
    ExportQuery,
    HandshakeEvent,
    ListQuery,
    MetaContextQuery,
    Opened,
    StartTls,
    option_reply,
    wire_text,
)
from nbdmirror.protocol.receiver import WINDOW_MAX

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from nbdmirror.protocol.receiver import Receiver

Q = TypeVar("Q", ExportQuery, ListQuery, MetaContextQuery, StartTls)

_OPTION_HEAD: Final = struct.Struct(">QII")
# How many options a client may send, and how many more for each export that it may ask about. nbdkit's numbers.
_OPTIONS: Final = 32
_OPTIONS_PER_EXPORT: Final = 32
# Option data that is looked at: INFO with 65535 requests and a full name fits, and so does the receiver's window.
_MAX_DATA: Final = WINDOW_MAX - _OPTION_HEAD.size
_MAX_QUERIES: Final = 1024


class _OptionError(Exception):
    """This option is answered with an error; haggling goes on."""

    def __init__(self, reply: OptionReply, message: str) -> None:
        self.reply = reply
        super().__init__(message)


class _Fields:
    """A bounded reader of an option's data."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def take(self, length: int) -> bytes:
        if length > len(self._data) - self._at:
            raise _OptionError(OptionReply.ERR_INVALID, "a length inside the option exceeds the option's own")
        self._at += length
        return self._data[self._at - length : self._at]

    def u16(self) -> int:
        return int.from_bytes(self.take(2), "big")

    def string(self) -> str:
        length = int.from_bytes(self.take(4), "big")
        raw = self.take(length)
        if length > c.MAX_STRING:
            raise _OptionError(OptionReply.ERR_TOO_BIG, f"a string of {length} bytes; at most {c.MAX_STRING} are allowed")
        return decode_string(raw)

    def finish(self) -> None:
        if self._at != len(self._data):
            raise _OptionError(OptionReply.ERR_INVALID, f"{len(self._data) - self._at} bytes too many in the option")


def decode_string(raw: bytes) -> str:
    """A protocol string: UTF-8 without NUL."""
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        raise _OptionError(OptionReply.ERR_INVALID, "a string is not UTF-8") from None
    if "\0" in text:
        raise _OptionError(OptionReply.ERR_INVALID, "a string contains NUL")
    return text


class Handshake:
    """One connection's haggling: `next_event` parses, the answering methods fill `out`."""

    def __init__(self, receiver: Receiver, tls: TlsMode = TlsMode.OFF, exports: int = 1) -> None:
        self.out: list[bytes | bytearray | memoryview] = [
            struct.pack(">QQH", c.NBDMAGIC, c.IHAVEOPT, c.FLAG_FIXED_NEWSTYLE | c.FLAG_NO_ZEROES)
        ]
        self._receiver = receiver
        self._tls = tls
        self._is_encrypted = False
        self._greeted = False
        self._shutting_down = False
        self._is_fixed = False
        self._no_zeroes = False
        self._structured = False
        self._extended = False
        self._options_seen = 0
        self._most_options = _OPTIONS + _OPTIONS_PER_EXPORT * exports
        self._selected_for = ""
        self._contexts: dict[int, str] = {}
        self._question: ExportQuery | ListQuery | MetaContextQuery | StartTls | None = None
        self._wanted_infos: tuple[int, ...] = ()
        self._opened: Opened | None = None
        self._handlers: dict[int, Callable[[bytes], HandshakeEvent | None]] = {
            Option.LIST: self._on_list,
            Option.STARTTLS: self._on_starttls,
            Option.INFO: lambda data: self._on_go(Option.INFO, data),
            Option.GO: lambda data: self._on_go(Option.GO, data),
            Option.STRUCTURED_REPLY: self._on_structured_reply,
            Option.EXTENDED_HEADERS: self._on_extended_headers,
            Option.LIST_META_CONTEXT: lambda data: self._on_meta_context(Option.LIST_META_CONTEXT, data),
            Option.SET_META_CONTEXT: lambda data: self._on_meta_context(Option.SET_META_CONTEXT, data),
        }

    def next_event(self) -> HandshakeEvent | None:
        """The next event in what has been received; None when more bytes, or an answer, are needed first."""
        while self._question is None:
            if self._opened is not None:
                opened, self._opened = self._opened, None
                return opened
            if not self._greeted:
                if not self._read_client_flags():
                    return None
                continue
            option = self._read_option()
            if option is None:
                return None
            event = self._dispatch(*option)
            if event is not None:
                return event
        return None

    def _read_client_flags(self) -> bool:
        if not self._receiver.need(4):
            return False
        flags = int.from_bytes(self._receiver.view(4), "big")
        self._receiver.consume(4)
        if flags & ~(c.FLAG_FIXED_NEWSTYLE | c.FLAG_NO_ZEROES):
            raise ProtocolError(f"the client sent unknown flags {flags:#x}")
        self._no_zeroes = bool(flags & c.FLAG_NO_ZEROES)
        self._is_fixed = bool(flags & c.FLAG_FIXED_NEWSTYLE)
        if self._needs_tls and not self._is_fixed:
            raise ProtocolError("the client is too old for TLS, which is required here")
        self._greeted = True
        return True

    def _read_option(self) -> tuple[int, bytes | None] | None:
        """An option and its data, or None instead of data too long to look at."""
        receiver = self._receiver
        if receiver.is_skipping or not receiver.need(_OPTION_HEAD.size):
            return None
        magic, option, length = _OPTION_HEAD.unpack_from(receiver.window, receiver.start)
        if magic != c.IHAVEOPT:
            raise ProtocolError(f"the client sent {magic:#x} where an option should begin")
        if length > c.MAX_OPTION_LENGTH:
            raise ProtocolError(f"the client announced an option of {length} bytes")
        if length > _MAX_DATA:
            receiver.consume(_OPTION_HEAD.size)
            receiver.skip(length)
            data = None
        elif not receiver.need(_OPTION_HEAD.size + length):
            return None
        else:
            data = bytes(receiver.view(length, skip=_OPTION_HEAD.size))
            receiver.consume(_OPTION_HEAD.size + length)
        self._options_seen += 1
        if self._options_seen > self._most_options:
            raise ProtocolError(f"the client sent more than {self._most_options} options")
        return option, data

    def _dispatch(self, option: int, data: bytes | None) -> HandshakeEvent | None:
        if self._needs_tls and option not in (Option.STARTTLS, Option.ABORT):
            if option == Option.EXPORT_NAME:
                raise ProtocolError("the client asked for an export without TLS, which is required here")
            self.out.append(option_reply(option, OptionReply.ERR_TLS_REQD, b"TLS is required: STARTTLS first"))
            return None
        if option == Option.EXPORT_NAME:
            return self._on_export_name(data)
        if option == Option.ABORT:
            return self._on_abort()
        if option == Option.SET_META_CONTEXT:
            self._contexts = {}  # rule 4, for whatever reason it may fail
        handler = self._handlers.get(option)
        try:
            if self._shutting_down:
                raise _OptionError(OptionReply.ERR_SHUTDOWN, "the server is shutting down")
            if handler is None:
                raise _OptionError(OptionReply.ERR_UNSUP, f"option {option} is not supported")
            if data is None:
                raise _OptionError(OptionReply.ERR_TOO_BIG, f"more than {_MAX_DATA} bytes of option data")
            return handler(data)
        except _OptionError as error:
            self.out.append(option_reply(option, error.reply, str(error).encode()))
            return None

    # --- options ---------------------------------------------------------------------------------------------------

    def _on_export_name(self, data: bytes | None) -> HandshakeEvent:
        """The one option that has no error reply: what can't be satisfied ends the connection."""
        if self._extended:
            raise ProtocolError("the client asked for extended headers and then by EXPORT_NAME")
        if self._shutting_down:
            raise ProtocolError("the client asked for an export while the server was shutting down")
        try:
            if data is None or len(data) > c.MAX_STRING:
                raise ProtocolError("the client asked for an export name longer than 4096 bytes")
            return self._ask(ExportQuery(decode_string(data), Option.EXPORT_NAME))
        except _OptionError as error:
            raise ProtocolError(f"the client asked for an export by a bad name: {error}") from None

    def _on_abort(self) -> HandshakeEvent:
        """Its data, of any length, is of no interest."""
        self._ack(Option.ABORT)
        return Disconnected()

    def _on_list(self, data: bytes) -> HandshakeEvent:
        if data:
            raise _OptionError(OptionReply.ERR_INVALID, "LIST takes no data")
        return self._ask(ListQuery())

    def _on_starttls(self, data: bytes) -> HandshakeEvent:
        if data:
            raise _OptionError(OptionReply.ERR_INVALID, "STARTTLS takes no data")
        if self._is_encrypted:
            raise _OptionError(OptionReply.ERR_INVALID, "TLS is in use already")
        if self._tls is TlsMode.OFF:
            raise _OptionError(OptionReply.ERR_POLICY, "TLS not configured")
        if not self._is_fixed:
            raise _OptionError(OptionReply.ERR_POLICY, "TLS goes with fixed newstyle negotiation")
        if self._receiver.available:
            raise ProtocolError(f"the client sent {self._receiver.available} bytes in clear text behind STARTTLS")  # rule 7
        self._ack(Option.STARTTLS)
        return self._ask(StartTls())

    def _on_structured_reply(self, data: bytes) -> None:
        if data:
            raise _OptionError(OptionReply.ERR_INVALID, "STRUCTURED_REPLY takes no data")
        if self._extended:
            raise _OptionError(OptionReply.ERR_EXT_HEADER_REQD, "extended headers have been agreed on already")
        self._structured = True
        self._ack(Option.STRUCTURED_REPLY)

    def _on_extended_headers(self, data: bytes) -> None:
        if data:
            raise _OptionError(OptionReply.ERR_INVALID, "EXTENDED_HEADERS takes no data")
        self._structured = self._extended = True
        self._ack(Option.EXTENDED_HEADERS)

    def _on_go(self, option: Option, data: bytes) -> HandshakeEvent:
        fields = _Fields(data)
        name = fields.string()
        infos = [fields.u16() for _ in range(fields.u16())]
        fields.finish()
        self._wanted_infos = tuple(infos)
        return self._ask(ExportQuery(name, option))

    def _on_meta_context(self, option: Option, data: bytes) -> HandshakeEvent:
        if not self._structured:
            raise _OptionError(OptionReply.ERR_INVALID, "meta contexts need structured replies; negotiate them first")
        fields = _Fields(data)
        name = fields.string()
        count = int.from_bytes(fields.take(4), "big")
        if count > _MAX_QUERIES:
            raise _OptionError(OptionReply.ERR_TOO_BIG, f"{count} queries; at most {_MAX_QUERIES} are taken")
        queries = tuple(fields.string() for _ in range(count))
        fields.finish()
        return self._ask(MetaContextQuery(name, queries, option))

    def shut_down(self) -> None:
        """From now on nothing is agreed on any more."""
        self._shutting_down = True

    # --- answers ---------------------------------------------------------------------------------------------------

    def accept(self, info: ExportInfo) -> None:
        """The export of the pending ExportQuery exists, and is so."""
        query = self._answered(ExportQuery)
        if query.option == Option.EXPORT_NAME:
            padding = b"" if self._no_zeroes else bytes(124)
            self.out.append(struct.pack(">QH", info.size, self._flags(info)) + padding)
            self._open(query.name, info)
            return
        self._info(query.option, struct.pack(">HQH", Info.EXPORT, info.size, self._flags(info)))
        if Info.NAME in self._wanted_infos:
            self._info(query.option, struct.pack(">H", Info.NAME) + info.name.encode())
        if Info.DESCRIPTION in self._wanted_infos and info.description:
            self._info(query.option, struct.pack(">H", Info.DESCRIPTION) + info.description.encode())
        sizes = (info.minimum_block, info.preferred_block, info.maximum_payload)
        self._info(query.option, struct.pack(">HIII", Info.BLOCK_SIZE, *sizes))
        self._ack(query.option)
        if query.option == Option.GO:
            self._open(query.name, info)

    def refuse(self, reply: OptionReply, message: str) -> None:
        """The pending query can't be satisfied. Raises ProtocolError where the protocol has no way to say so."""
        question, self._question = self._question, None
        assert question is not None, f"refused by {message!r} what was not asked"
        if isinstance(question, ExportQuery | MetaContextQuery):
            if question.option == Option.EXPORT_NAME:
                raise ProtocolError(message)
            self.out.append(option_reply(question.option, reply, wire_text(message)))
        else:
            self.out.append(option_reply(Option.LIST, reply, wire_text(message)))

    def tls_started(self) -> None:
        """The TLS handshake is over. Haggling begins anew (rule 7), but for the greeting and the client's flags."""
        self._answered(StartTls)
        self._is_encrypted = True
        self._structured = self._extended = False
        self._selected_for = ""
        self._contexts = {}

    def list_exports(self, exports: Sequence[tuple[str, str]]) -> None:
        """Answer the pending ListQuery with (name, description) of each export."""
        self._answered(ListQuery)
        for name, description in exports:
            raw = name.encode()
            data = struct.pack(">I", len(raw)) + raw + description.encode()
            self.out.append(option_reply(Option.LIST, OptionReply.SERVER, data))
        self._ack(Option.LIST)

    def offer_contexts(self, available: Sequence[str]) -> None:
        """Answer the pending MetaContextQuery with the meta contexts that the export has."""
        query = self._answered(MetaContextQuery)
        selecting = query.option == Option.SET_META_CONTEXT
        chosen = [name for name in available if matches(name, query.queries, selecting=selecting)]
        for number, name in enumerate(chosen, 1):
            data = struct.pack(">I", number if selecting else 0) + name.encode()
            self.out.append(option_reply(query.option, OptionReply.META_CONTEXT, data))
        if selecting:
            self._selected_for = query.export
            self._contexts = dict(enumerate(chosen, 1))
        self._ack(query.option)

    # --- helpers ---------------------------------------------------------------------------------------------------

    @property
    def _needs_tls(self) -> bool:
        return self._tls is TlsMode.REQUIRE and not self._is_encrypted

    def _ask(self, question: Q) -> Q:
        self._question = question
        return question

    def _answered(self, kind: type[Q]) -> Q:
        question, self._question = self._question, None
        assert isinstance(question, kind), f"answered {kind.__name__} while {question!r} was asked"
        return question

    def _ack(self, option: int) -> None:
        self.out.append(option_reply(option, OptionReply.ACK))

    def _info(self, option: int, data: bytes) -> None:
        self.out.append(option_reply(option, OptionReply.INFO, data))

    def _flags(self, info: ExportInfo) -> int:
        """DF makes sense only where replies have chunks."""
        return info.flags if self._structured else info.flags & ~c.TFLAG_SEND_DF

    def _open(self, asked_name: str, info: ExportInfo) -> None:
        contexts = self._contexts if asked_name == self._selected_for else {}
        self._opened = Opened(info, self._structured, contexts, self._extended)


def matches(name: str, queries: Sequence[str], *, selecting: bool) -> bool:
    """Whether a meta context answers one of `queries`.

    Listing, no query at all means everything and a query that ends in a colon means all that begins so; selecting, only
    full names count. Section "Metadata querying".
    """
    if selecting:
        return name in queries
    return not queries or any(name == query or (query.endswith(":") and name.startswith(query)) for query in queries)
