"""One client's half of QMP without I/O: bytes in, commands out, answers queued.

Rules (QMP specification, "Protocol Specification"):
1. Input is a stream of JSON values (`json_stream`). A bad one is answered with an error and costs its sender that one
   value, never the connection. No input raises an exception.
2. Until `qmp_capabilities` has succeeded nothing else is executed and no event is sent; afterwards it is refused.
3. One value is taken per call of `next_command`, and only when asked: who does not read his answers is not read either.
4. Every answer and event is one whole line in one queue, so nothing can come inside a response.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from nbdmirror.qmp.json_stream import JsonStream
from nbdmirror.qmp.messages import (
    NO_ID,
    ErrorClass,
    QmpError,
    Version,
    encode_error,
    encode_greeting,
    encode_return,
)
from nbdmirror.qmp.registry import Signature, qmp_capabilities


@dataclass(frozen=True, slots=True)
class Command:
    """A well-formed command, yet to be looked up. `id` is NO_ID when it has none."""

    name: str
    arguments: dict[str, Any]
    id: Any = NO_ID


@dataclass(frozen=True, slots=True)
class Answered:
    """One value that the connection answered itself; `error` is None when it was the negotiation, and went well."""

    error: QmpError | None = None


class QmpConnection:
    """Feed it what the client sent, execute what `next_command` gives, `reply` or `fail`, send `data_to_send`."""

    _NEGOTIATION: Final = Signature(qmp_capabilities)

    __slots__ = ("_out", "_stream", "negotiated")

    def __init__(self, version: Version) -> None:
        self.negotiated = False
        self._stream = JsonStream()
        self._out = [encode_greeting(version)]

    def feed(self, data: bytes) -> None:
        """Take bytes from the client."""
        self._stream.feed(data)

    def next_command(self) -> Command | Answered | None:
        """The next thing the client said; None when it has to say more. What is refused here is answered here."""
        command_id: Any = NO_ID
        try:
            value = self._stream.next_value()
            if value is None:
                return None
            if isinstance(value[0], dict):
                command_id = value[0].get("id", NO_ID)
            return self._admit(_command(value[0], command_id))
        except QmpError as error:
            self.fail(command_id, error)
            return Answered(error)

    def _admit(self, command: Command) -> Command | Answered:
        """Hold a command against the negotiation (QMP specification, "Capabilities Negotiation"); raises QmpError."""
        not_found = ErrorClass.COMMAND_NOT_FOUND
        match self.negotiated, command.name:
            case False, "qmp_capabilities":
                self._NEGOTIATION.bind(command.arguments)()
                self.negotiated = True
                self.reply(command.id, None)
                return Answered()
            case False, _:
                raise QmpError(not_found, "Expecting capabilities negotiation with 'qmp_capabilities'")
            case True, "qmp_capabilities":
                raise QmpError(not_found, "Capabilities negotiation is already complete, command ignored")
        return command

    def reply(self, command_id: object, value: object) -> None:
        """Answer a command; raises TypeError or ValueError, with nothing queued, when JSON can't say the value."""
        self._out.append(encode_return(value, command_id))

    def fail(self, command_id: object, error: QmpError) -> None:
        """Answer a command with an error."""
        self._out.append(encode_error(error, command_id))

    def send_event(self, line: bytes) -> None:
        """Queue an event as `encode_event` made it; dropped before the negotiation, where none may be sent."""
        if self.negotiated:
            self._out.append(line)

    def data_to_send(self) -> bytes:
        """What is queued, once."""
        data = b"".join(self._out)
        self._out.clear()
        return data


def _command(value: object, command_id: object) -> Command:
    """Check the form of a command (QMP specification, "Issuing Commands"); raises QmpError.

    `exec-oob` is a member only for those who enabled out-of-band execution, which is not offered.
    """
    if not isinstance(value, dict):
        raise QmpError.generic("QMP input must be a JSON object")
    for member, content in value.items():
        match member, content:
            case ("execute", str()) | ("arguments", dict()) | ("id", _):
                pass
            case "execute", _:
                raise QmpError.generic("QMP input member 'execute' must be a string")
            case "arguments", _:
                raise QmpError.generic("QMP input member 'arguments' must be an object")
            case _:
                raise QmpError.generic(f"QMP input member '{member}' is unexpected")
    if "execute" not in value:
        raise QmpError.generic("QMP input lacks member 'execute'")
    return Command(value["execute"], value.get("arguments", {}), command_id)
