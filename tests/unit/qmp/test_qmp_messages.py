"""What the server says is one line of ASCII, ended by CRLF."""

from __future__ import annotations

import json

import pytest

from nbdmirror.qmp import messages
from nbdmirror.qmp.messages import NO_ID, ErrorClass, QmpError, Timestamp, Version


def test_greeting() -> None:
    line = messages.encode_greeting(Version(10, 1, 0, "nbdmirror 0.1.0"))
    assert line == (
        b'{"QMP": {"version": {"qemu": {"micro": 0, "minor": 1, "major": 10}, "package": "nbdmirror 0.1.0"}, '
        b'"capabilities": []}}\r\n'
    )


def test_return() -> None:
    assert messages.encode_return(None) == b'{"return": {}}\r\n'
    assert messages.encode_return([], "libvirt-1") == b'{"return": [], "id": "libvirt-1"}\r\n'
    assert messages.encode_return(None, None) == b'{"return": {}, "id": null}\r\n'


def test_error() -> None:
    error = QmpError(ErrorClass.DEVICE_NOT_ACTIVE, "Block job 'é\r\n' not found")
    assert messages.encode_error(error, NO_ID) == (
        b'{"error": {"class": "DeviceNotActive", "desc": "Block job \'\\u00e9\\r\\n\' not found"}}\r\n'
    )
    assert str(error) == error.desc
    assert QmpError.generic("x").error_class == "GenericError"


def test_event() -> None:
    stamp = Timestamp.from_ns(1_700_000_000_123_456_789)
    assert json.loads(messages.encode_event("JOB_STATUS_CHANGE", {"id": "j"}, stamp)) == {
        "event": "JOB_STATUS_CHANGE",
        "data": {"id": "j"},
        "timestamp": {"seconds": 1_700_000_000, "microseconds": 123_456},
    }
    assert "data" not in json.loads(messages.encode_event("STOP", None, stamp))
    assert json.loads(messages.encode_event("STOP", {}, stamp))["data"] == {}


def test_values_that_json_does_not_have() -> None:
    with pytest.raises(ValueError, match="JSON"):
        messages.encode_return(float("nan"))
    with pytest.raises(TypeError):
        messages.encode_event("X", {"a": b""}, Timestamp(0, 0))


def test_deep_values_are_written_as_shallow_ones() -> None:
    value: object = {"k": [1, "é", None], "e": {}, "l": []}
    assert messages._dump_deep(value) == json.dumps(value)
    for _ in range(5000):
        value = [value, 1]
    line = messages.encode_return(value)
    assert line == b'{"return": ' + b"[" * 5000 + json.dumps({"k": [1, "é", None], "e": {}, "l": []}).encode() + (
        b", 1]" * 5000 + b"}\r\n"
    )
