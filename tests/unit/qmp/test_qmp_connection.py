"""JsonStream and QmpConnection: every refusal of the table, every cut, any bytes."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdmirror.qmp.connection import Answered, Command, QmpConnection
from nbdmirror.qmp.json_stream import MAX_TOKENS, MAX_VALUE_SIZE
from nbdmirror.qmp.messages import QmpError, Timestamp, encode_event
from tests.unit.qmp.qmp_cases import NEGOTIATED, UNNEGOTIATED, VERSION, make_registry

REGISTRY = make_registry()


def said(connection: QmpConnection) -> list[dict[str, Any]]:
    data = connection.data_to_send()
    data.decode("ascii")
    lines = data.split(b"\r\n")
    assert lines.pop() == b""
    assert not any(b"\n" in line for line in lines)
    return [json.loads(line) for line in lines]


def answer(connection: QmpConnection) -> list[dict[str, Any]]:
    """Bind everything that came and answer it, as a server does that runs nothing."""
    while (item := connection.next_command()) is not None:
        if isinstance(item, Command):
            try:
                REGISTRY.bind(item.name, item.arguments)
            except QmpError as error:
                connection.fail(item.id, error)
            else:
                connection.reply(item.id, None)
    return said(connection)


def open_connection(*, negotiated: bool = True) -> QmpConnection:
    connection = QmpConnection(VERSION)
    assert list(said(connection)[0]) == ["QMP"]
    if negotiated:
        connection.feed(b'{"execute":"qmp_capabilities"}')
        assert answer(connection) == [{"return": {}}]
    return connection


def errors(answers: list[dict[str, Any]]) -> tuple[tuple[str, str], ...]:
    return tuple((a["error"]["class"], a["error"]["desc"]) for a in answers)


@pytest.mark.parametrize(("data", "expected"), UNNEGOTIATED.items(), ids=lambda value: repr(value)[:60])
def test_refused_before_negotiation(data: bytes, expected: Any) -> None:
    connection = open_connection(negotiated=False)
    connection.feed(data)
    assert errors(answer(connection)) == expected
    assert not connection.negotiated


@pytest.mark.parametrize(("data", "expected"), NEGOTIATED.items(), ids=lambda value: repr(value)[:60])
def test_refused_whole(data: bytes, expected: Any) -> None:
    connection = open_connection()
    connection.feed(data + b"\n")
    assert errors(answer(connection)) == expected


@pytest.mark.parametrize(("data", "expected"), NEGOTIATED.items(), ids=lambda value: repr(value)[:60])
def test_refused_byte_by_byte(data: bytes, expected: Any) -> None:
    connection = open_connection()
    answers = []
    for byte in data + b"\n":
        connection.feed(bytes([byte]))
        answers += answer(connection)
    assert errors(answers) == expected


@pytest.mark.parametrize("data", NEGOTIATED, ids=lambda value: repr(value)[:60])
def test_survives_and_resynchronises(data: bytes) -> None:
    connection = open_connection()
    connection.feed(data + b'\xff{"execute":"query-version","id":7}')
    assert answer(connection)[-1] == {"return": {}, "id": 7}


def test_greeting() -> None:
    assert said(QmpConnection(VERSION)) == [
        {
            "QMP": {
                "version": {"qemu": {"micro": 0, "minor": 1, "major": 10}, "package": "nbdmirror 0"},
                "capabilities": [],
            }
        }
    ]


@pytest.mark.parametrize("enable", [b"", b',"arguments":{}', b',"arguments":{"enable":[]}'])
def test_negotiation(enable: bytes) -> None:
    connection = open_connection(negotiated=False)
    connection.feed(b'{"execute":"qmp_capabilities"' + enable + b',"id":"n"}')
    assert connection.next_command() == Answered(None)
    assert said(connection) == [{"return": {}, "id": "n"}]
    assert connection.negotiated


def test_a_known_capability_is_not_available() -> None:
    connection = open_connection(negotiated=False)
    connection.feed(b'{"execute":"qmp_capabilities","arguments":{"enable":["oob"]}}')
    assert errors(answer(connection)) == (("GenericError", "Capability oob not available"),)
    assert not connection.negotiated


def test_command() -> None:
    connection = open_connection()
    connection.feed(b"{'execute': 'x', 'arguments': {'a': [1, -2.5, true, null, 'b\\u00e9']}, 'id': null}")
    assert connection.next_command() == Command("x", {"a": [1, -2.5, True, None, "bé"]}, None)
    assert connection.next_command() is None


@pytest.mark.parametrize("command_id", [0, None, "", [], {"a": [1, {"b": 0.5}]}, -(2**63), 2**64 - 1, "\U0001f600\x7f"])
def test_id_is_echoed(command_id: Any) -> None:
    connection = open_connection()
    connection.feed(json.dumps({"execute": "query-version", "id": command_id}).encode())
    assert answer(connection) == [{"return": {}, "id": command_id}]


@pytest.mark.parametrize("extra", ['"execute": 1', '"foo": 1', '"execute": "nosuch"', '"arguments": 1', '"a": 1'])
def test_id_is_echoed_with_errors(extra: str) -> None:
    connection = open_connection()
    connection.feed(b'{"id": [7], ' + extra.encode() + b"}")
    assert [reply["id"] for reply in answer(connection)] == [[7]]


def test_deepest_id_is_echoed() -> None:
    deep = b"[" * 1023 + b"]" * 1023
    connection = open_connection()
    connection.feed(b'{"execute":"query-version","id":' + deep + b"}")
    assert isinstance(connection.next_command(), Command)
    connection.feed(b'{"execute":"nosuch","foo":1,"id":{"k":[1,' + deep[2:-2] + b"]}}")
    assert isinstance(connection.next_command(), Answered)
    assert connection.data_to_send().endswith(b'"id": {"k": [1, ' + deep[2:-2] + b"]}}\r\n")


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (b"18446744073709551615", 2**64 - 1),
        (b"18446744073709551616", 2.0**64),
        (b"-9223372036854775809", -(2.0**63)),
        (b"9" * 300, float("9" * 300)),
        (b"-0", 0),
        (b"1e3", 1000.0),
    ],
)
def test_numbers(number: bytes, expected: float) -> None:
    connection = open_connection()
    connection.feed(b'{"execute":"x","id":' + number + b"}")
    command = connection.next_command()
    assert isinstance(command, Command)
    assert (command.id, type(command.id)) == (expected, type(expected))


@pytest.mark.parametrize("number", [b"1e999", b"-1e999", b"9" * 4000])
def test_number_that_json_could_not_echo(number: bytes) -> None:
    connection = open_connection()
    connection.feed(b'{"execute":"x","id":' + number + b"}")
    assert errors(answer(connection)) == (("GenericError", "JSON parse error, number out of range"),)


TOO_LARGE = ("GenericError", "JSON token size limit exceeded")


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b'{"execute":"' + b"x" * (MAX_VALUE_SIZE + 10) + b'"}', TOO_LARGE),
        (b'["' + b'","'.join([b"x" * 65536] * 17) + b'"]', TOO_LARGE),
        (b"[" + b"1" * 5000 + b"]", TOO_LARGE),
        (b"a" * 5000 + b" ", TOO_LARGE),
        (b"[" + b"1," * MAX_TOKENS + b"1]", ("GenericError", "JSON token count limit exceeded")),
    ],
    ids=["string", "value", "number", "keyword", "tokens"],
)
@pytest.mark.parametrize("size", [1000, 65536, 1 << 24])
def test_limits(data: bytes, expected: tuple[str, str], size: int) -> None:
    connection = open_connection()
    answers = []
    for start in range(0, len(data), size):
        connection.feed(data[start : start + size])
        answers += answer(connection)
    assert errors(answers)[0] == expected
    connection.feed(b'\xff{"execute":"query-version"}')
    assert answer(connection)[-1] == {"return": {}}


def test_largest_command() -> None:
    connection = open_connection()
    name = "x" * (MAX_VALUE_SIZE - len('{"execute":""}'))
    connection.feed(b'{"execute":"' + name.encode() + b'"}')
    assert connection.next_command() == Command(name, {})


def test_a_long_string_in_many_pieces_is_scanned_once() -> None:
    # 200 000 feeds of one byte take a second or so; scanned anew each time they would take minutes.
    connection = open_connection()
    connection.feed(b'{"execute":"')
    for _ in range(200_000):
        connection.feed(b"x")
        assert connection.next_command() is None
    connection.feed(b'"}')
    assert connection.next_command() == Command("x" * 200_000, {})


def test_a_stray_token_is_shown_in_part() -> None:
    connection = open_connection()
    connection.feed(b'"' + b"x" * 100_000 + b"\n")
    ((_, desc),) = errors(answer(connection))
    assert desc == "JSON parse error, stray '\"" + "x" * 127 + "...'"


def test_nothing_is_read_ahead() -> None:
    connection = open_connection()
    connection.feed(b"]" * 1000)
    assert isinstance(connection.next_command(), Answered)
    assert len(said(connection)) == 1


def test_events_wait_for_the_negotiation() -> None:
    line = encode_event("STOP", None, Timestamp(1, 2))
    connection = open_connection(negotiated=False)
    connection.send_event(line)
    assert said(connection) == []
    connection.feed(b'{"execute":"qmp_capabilities"}')
    assert answer(connection) == [{"return": {}}]
    connection.send_event(line)
    assert said(connection) == [{"event": "STOP", "timestamp": {"seconds": 1, "microseconds": 2}}]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), b"bytes", {1, 2}, {"a": object()}])
def test_what_json_can_not_say_is_not_queued(value: object) -> None:
    connection = open_connection()
    with pytest.raises((TypeError, ValueError)):
        connection.reply(1, value)
    assert connection.data_to_send() == b""


json_like = st.lists(
    st.sampled_from(
        [
            *(bytes([c]) for c in b"{}[]:,\"'\\ \n\xff\xfe\xc3@%-01.e"),
            b"true",
            b"nul",
            b"\\ud83d",
            b'"execute"',
            b'"id"',
            b"1e9",
        ]
    ),
    max_size=60,
).map(b"".join)


@given(data=st.binary(max_size=300) | json_like, cuts=st.lists(st.integers(1, 20), min_size=1, max_size=10))
def test_any_bytes_in_any_cut(data: bytes, cuts: list[int]) -> None:
    whole = open_connection()
    whole.feed(data)
    expected = answer(whole)
    cut, answers, at, turn = open_connection(), [], 0, 0
    while at < len(data):
        size = cuts[turn % len(cuts)]
        cut.feed(data[at : at + size])
        answers += answer(cut)
        at, turn = at + size, turn + 1
    assert answers == expected
    cut.feed(b'\xff{"execute":"query-version","id":"alive"}')
    assert answer(cut)[-1] == {"return": {}, "id": "alive"}


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cn", "Co"])),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("abc\"'\\é\n", max_size=4), inner, max_size=4),
    max_leaves=20,
)


@given(value=values, ascii_only=st.booleans())
def test_every_json_value_is_read_as_json_reads_it(value: Any, ascii_only: bool) -> None:
    connection = open_connection()
    connection.feed(json.dumps({"execute": "x", "id": value}, ensure_ascii=ascii_only).encode())
    assert connection.next_command() == Command("x", {}, value)


def test_memory_is_bounded() -> None:
    connection = open_connection()
    for chunk in [b'"' + b"x" * 65535, b"\xff[", b'"' + b"y" * 65535, b" " * 65536, b"1," * 32768, b'{"a":[' * 10000] * 40:
        connection.feed(chunk)
        answer(connection)
        stream = connection._stream
        assert sys.getsizeof(stream._buffer) < 4 * MAX_VALUE_SIZE
        assert len(stream._tokens) <= MAX_TOKENS
        assert sum(map(len, stream._tokens)) <= MAX_VALUE_SIZE
