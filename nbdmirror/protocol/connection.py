"""ServerConnection: the server's half of one NBD connection, without I/O.

Rules:
1. A Handshake, then a Transmission, over one Receiver: the first request may share a segment with the last option.
2. The owner alternates `get_buffer` / `buffer_updated` with draining `next_event` (haggling) or `next_request`
   (transmission), and sends what `data_to_send` returns, in order.
3. Nothing here looks a name up, judges a client or touches a disk: it asks by events and is told by answers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nbdmirror.protocol.constants import MAX_PAYLOAD, TlsMode
from nbdmirror.protocol.handshake import Handshake
from nbdmirror.protocol.messages import HandshakeEvent, Opened
from nbdmirror.protocol.receiver import Receiver
from nbdmirror.protocol.replies import Replies, replies_for
from nbdmirror.protocol.transmission import Transmission

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from nbdmirror.protocol.constants import OptionReply
    from nbdmirror.protocol.messages import Answer, ExportInfo, Request


class ServerConnection:
    """The state of one client's connection to a server with so many `exports`.

    `take_buffer` makes the buffers of big payloads; those of more than `large_payload` bytes wait for `admit_payload`.

    Once it is open, requests go past this object, because what only passes on would cost as much as what it passes on to:

    - `next_request`: the next request of the transmission; None when it needs more bytes.
    - `reply`: queue the answer to a request; answers may be given in any order. `reply_content` and `reply_done` are the
      same for the most frequent answers, the content of a READ, whole, and DONE.
    """

    next_request: Callable[[], Request | None]
    reply: Callable[[Request, Answer], None]
    reply_content: Callable[[Request, bytearray], None]
    reply_done: Callable[[Request], None]

    def __init__(
        self,
        tls: TlsMode = TlsMode.OFF,
        exports: int = 1,
        take_buffer: Callable[[int], bytearray] = bytearray,
        large_payload: int = MAX_PAYLOAD,
    ) -> None:
        self._large_payload = large_payload
        self._receiver = Receiver(take_buffer)
        self._handshake = Handshake(self._receiver, tls, exports)
        self._transmission: Transmission | None = None
        self._replies: Replies | None = None
        self.get_buffer = self._receiver.get_buffer
        self.buffer_updated = self._receiver.buffer_updated

    @property
    def is_open(self) -> bool:
        """Whether haggling has ended with an export."""
        return self._transmission is not None

    @property
    def structured(self) -> bool:
        """Whether replies have chunks."""
        return self._transmission is not None and self._transmission.structured

    def next_event(self) -> HandshakeEvent | None:
        """The next event of the haggling; None when it needs more bytes. After Opened, `next_request` takes over."""
        event = self._handshake.next_event()
        if isinstance(event, Opened):
            self._transmission = Transmission(self._receiver, event, self._large_payload)
            self._replies = replies_for(event)
            self._replies.out += self._handshake.out
            self.next_request = self._transmission.next_request
            self.reply, self.reply_content = self._replies.reply, self._replies.content
            self.reply_done = self._replies.done
        return event

    @property
    def unfinished(self) -> Request | None:
        """The WRITE whose payload has come only in part."""
        return None if self._transmission is None else self._transmission.unfinished

    @property
    def awaits_room(self) -> int:
        """The length of the large payload that comes next and waits for `admit_payload`, or 0."""
        return 0 if self._transmission is None else self._transmission.awaits_room

    def admit_payload(self) -> None:
        """There is room for the payload that awaits it: `next_request` goes on."""
        assert self._transmission is not None, "no export has been opened"
        self._transmission.admit_payload()

    def data_to_send(self) -> list[bytes | bytearray | memoryview]:
        """What is to be sent, in order; it is handed over once."""
        phase: Handshake | Replies = self._replies or self._handshake
        out, phase.out = phase.out, []
        return out

    def shut_down(self) -> None:
        """Answer options with ERR_SHUTDOWN from now on; requests are the owner's to refuse."""
        self._handshake.shut_down()

    def accept(self, info: ExportInfo) -> None:
        """Answer an ExportQuery: the export exists, and is so."""
        self._handshake.accept(info)

    def refuse(self, reply: OptionReply, message: str) -> None:
        """Answer any query with an error; raises ProtocolError where only hanging up can say it."""
        self._handshake.refuse(reply, message)

    def tls_started(self) -> None:
        """Answer StartTls: the TLS handshake is over, and what arrives was encrypted."""
        self._handshake.tls_started()

    def list_exports(self, exports: Sequence[tuple[str, str]]) -> None:
        """Answer a ListQuery with (name, description) pairs."""
        self._handshake.list_exports(exports)

    def offer_contexts(self, available: Sequence[str]) -> None:
        """Answer a MetaContextQuery with the names of the export's meta contexts."""
        self._handshake.offer_contexts(available)
