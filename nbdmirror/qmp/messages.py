"""What a QMP server says: greeting, return, error and event, each one line.

Rules (QMP specification, "Protocol Specification"):
1. One JSON object per line, pure ASCII, ended by CRLF: clients split on that alone.
2. `id` is echoed when the command had one, whatever it is; `null` is an id, its absence is `NO_ID`.
3. What can't be said in JSON (NaN, infinities, foreign types) raises TypeError or ValueError before a byte is queued.
4. Nothing here reads a clock: a timestamp is an argument.
"""

from __future__ import annotations

import enum
import json
from dataclasses import dataclass
from typing import Any, Final

from nbdmirror.errors import NbdMirrorError

CRLF: Final = b"\r\n"


class ErrorClass(enum.StrEnum):
    """The error classes of QMP (QMP reference, "QapiErrorClass"); scripts look at these, never at the description."""

    GENERIC_ERROR = "GenericError"
    COMMAND_NOT_FOUND = "CommandNotFound"
    DEVICE_NOT_ACTIVE = "DeviceNotActive"
    DEVICE_NOT_FOUND = "DeviceNotFound"
    KVM_MISSING_CAP = "KVMMissingCap"


class QmpError(NbdMirrorError):
    """An error that knows its QMP class: what the protocol itself refuses, and what is not a GenericError."""

    def __init__(self, error_class: ErrorClass, desc: str) -> None:
        self.error_class = error_class
        self.desc = desc
        super().__init__(desc)

    @classmethod
    def generic(cls, desc: str) -> QmpError:
        """A GenericError, which nearly everything is."""
        return cls(ErrorClass.GENERIC_ERROR, desc)


class NoId(enum.Enum):
    """The type of `NO_ID`: the command came without an id, so its answer has none."""

    NO_ID = enum.auto()


NO_ID: Final = NoId.NO_ID


@dataclass(frozen=True, slots=True)
class Version:
    """The version object of the greeting and of `query-version` (QMP reference, "VersionInfo")."""

    major: int
    minor: int
    micro: int
    package: str

    def as_json(self) -> dict[str, Any]:
        """As it goes on the wire."""
        return {"qemu": {"micro": self.micro, "minor": self.minor, "major": self.major}, "package": self.package}


@dataclass(frozen=True, slots=True)
class Timestamp:
    """When an event happened (QMP specification, "Asynchronous events")."""

    seconds: int
    microseconds: int

    @classmethod
    def from_ns(cls, nanoseconds: int) -> Timestamp:
        """Of nanoseconds since the epoch."""
        seconds, rest = divmod(nanoseconds, 1_000_000_000)
        return cls(seconds, rest // 1000)


def encode_greeting(version: Version) -> bytes:
    """The first line of every connection (QMP specification, "Server Greeting"). No capability is offered."""
    return _line([("QMP", {"version": version.as_json(), "capabilities": []})])


def encode_return(value: object, command_id: object = NO_ID) -> bytes:
    """The answer of a command that went well (QMP specification, "Success"); None is the empty object."""
    return _line([("return", {} if value is None else value), ("id", command_id)])


def encode_error(error: QmpError, command_id: object = NO_ID) -> bytes:
    """The answer of a command that did not (QMP specification, "Error")."""
    return _line([("error", {"class": error.error_class.value, "desc": error.desc}), ("id", command_id)])


def encode_event(name: str, data: dict[str, Any] | None, timestamp: Timestamp) -> bytes:
    """News that nobody asked for (QMP specification, "Asynchronous events"); `data` is left out when there is none."""
    stamp = {"seconds": timestamp.seconds, "microseconds": timestamp.microseconds}
    return _line([("timestamp", stamp), ("event", name), ("data", NO_ID if data is None else data)])


def _line(members: list[tuple[str, object]]) -> bytes:
    message = {name: value for name, value in members if value is not NO_ID}
    try:
        text = json.dumps(message, allow_nan=False)
    except RecursionError:
        # An id may be nested as deeply as the parser lets it in, which is deeper than json's encoder goes.
        text = _dump_deep(message)
    return text.encode("ascii") + CRLF


def _dump_deep(value: object) -> str:
    """`json.dumps` without recursion. What is still to be written is a stack: texts, and values one level apart."""
    out: list[str] = []
    todo: list[tuple[bool, Any]] = [(False, value)]
    while todo:
        is_text, item = todo.pop()
        if is_text:
            out.append(item)
        elif isinstance(item, dict):
            todo.append((True, "}"))
            for number, (key, member) in reversed(list(enumerate(item.items()))):
                todo += [(False, member), (True, (", " if number else "") + json.dumps(key) + ": ")]
            todo.append((True, "{"))
        elif isinstance(item, (list, tuple)):
            todo.append((True, "]"))
            for number, member in reversed(list(enumerate(item))):
                todo += [(False, member), (True, ", " if number else "")]
            todo.append((True, "["))
        else:
            out.append(json.dumps(item, allow_nan=False))
    return "".join(out)
