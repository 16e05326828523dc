"""What crosses the border of the protocol core: events out of it, answers into it, and the packed form of option replies.

Rules:
1. Everything here is immutable and knows how to print itself for a log line.
2. `Request` is a NamedTuple, not a dataclass: one is made per command, and a tuple is built many times as fast as a frozen
   dataclass with slots (0.08 us by `tuple.__new__`, 0.16 us by its own, against 0.9 us).
3. A request's payload up to `receiver.IN_WINDOW` bytes lies in the connection's own window, and is overwritten by
   the next bytes that arrive: who answers later than at once must call `detached()` first.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

from nbdmirror.protocol import constants as c

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nbdmirror.extents import ExtentList

_OPTION_REPLY: Final = struct.Struct(">QIII")


class Request(NamedTuple):
    """One command of the transmission phase. Section "Request message"; offset and length in bytes."""

    command: int
    flags: int
    cookie: int
    offset: int
    length: int
    payload: memoryview | None = None

    def detached(self) -> Request:
        """The same request with a payload of its own, safe to keep while more bytes arrive."""
        return self if self.payload is None else self._replace(payload=memoryview(bytes(self.payload)))

    def __repr__(self) -> str:
        name = c.CMD_NAMES[self.command] if self.command < len(c.CMD_NAMES) else f"command {self.command}"
        words = "".join(f" {word}" for bit, word in c.FLAG_NAMES if self.flags & bit)
        return f"<Request {name} {self.offset:#x}+{self.length} cookie={self.cookie}{words}>"


@dataclass(frozen=True, slots=True)
class ExportInfo:
    """What a server says of an export when a client opens it: size in bytes, transmission flags, block sizes in bytes."""

    name: str
    size: int
    flags: int
    description: str = ""
    minimum_block: int = 1
    preferred_block: int = 4096
    maximum_payload: int = c.MAX_PAYLOAD
    contexts: tuple[str, ...] = (c.BASE_ALLOCATION,)

    @property
    def is_read_only(self) -> bool:
        """Whether writes of every kind are refused."""
        return bool(self.flags & c.TFLAG_READ_ONLY)


@dataclass(frozen=True, slots=True)
class ExportQuery:
    """The client asks for an export (EXPORT_NAME, INFO or GO): answer with `accept` or `refuse`."""

    name: str
    option: c.Option


@dataclass(frozen=True, slots=True)
class ListQuery:
    """The client asks what there is: answer with `list_exports`."""


@dataclass(frozen=True, slots=True)
class MetaContextQuery:
    """The client asks for meta contexts of an export: answer with `offer_contexts` or `refuse`."""

    export: str
    queries: tuple[str, ...]
    option: c.Option


@dataclass(frozen=True, slots=True)
class Opened:
    """Haggling is over: requests follow.

    `structured` says that replies have chunks, `extended` that the chunks and the requests have extended headers;
    `contexts` maps the granted ids to meta context names.
    """

    info: ExportInfo
    structured: bool
    contexts: dict[int, str] = field(default_factory=dict)
    extended: bool = False


@dataclass(frozen=True, slots=True)
class Disconnected:
    """The client said goodbye (ABORT or DISC): finish what it was promised, send what is left, close."""


@dataclass(frozen=True, slots=True)
class StartTls:
    """The client has been told to begin its TLS handshake: send what is queued, then answer with `tls_started`.

    What arrives from here on is for the TLS layer; only what that has decrypted goes to the connection.
    """


HandshakeEvent = ExportQuery | ListQuery | MetaContextQuery | StartTls | Opened | Disconnected


@dataclass(frozen=True, slots=True)
class Done:
    """The request succeeded and has no data to return."""


# The only one: "is it DONE" is all that the hot path asks.
DONE: Final = Done()


class ReadReply(NamedTuple):
    """The content of a READ, cut into `runs` (start, end, is zero). The reply has chunks."""

    data: bytearray
    runs: Sequence[tuple[int, int, bool]]


class StatusReply(NamedTuple):
    """Block status: the extents of each granted context, by its id."""

    extents: Sequence[tuple[int, ExtentList]]


class Refusal(NamedTuple):
    """The request failed with an NBD error number (section "Error values") and a line for the user."""

    error: int
    message: str = ""


# A bytearray is the content of a READ, whole.
Answer = bytearray | Done | ReadReply | StatusReply | Refusal


def option_reply(option: int, reply: int, data: bytes = b"") -> bytes:
    """One reply of the haggling, section "Option replies"."""
    return _OPTION_REPLY.pack(c.OPTION_REPLY_MAGIC, option, reply, len(data)) + data


def wire_text(message: str) -> bytes:
    """A message as a protocol string: UTF-8, cut between characters at what a string may have (section "Values")."""
    return message.encode(errors="replace")[: c.MAX_STRING].decode(errors="ignore").encode()
