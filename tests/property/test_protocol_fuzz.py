"""Any bytes give events or ProtocolError: nothing else is raised, and memory stays bounded by what was promised."""

from __future__ import annotations

from typing import Final

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nbdmirror.errors import ProtocolError
from nbdmirror.protocol import constants as c
from nbdmirror.protocol.constants import Option
from nbdmirror.protocol.receiver import WINDOW_MAX
from tests.support import wire_client as wire
from tests.support.linked_pair import LinkedPair, export
from tests.support.wire_client import client_flags, extended_request, go, info, meta_context, option, request

LIMIT: Final = 100_000

OPENED: Final = client_flags() + option(Option.STRUCTURED_REPLY) + meta_context(10, "", [c.BASE_ALLOCATION]) + go()
EXTENDED: Final = client_flags() + option(Option.EXTENDED_HEADERS) + meta_context(10, "", [c.BASE_ALLOCATION]) + go()
SESSIONS: Final = (
    client_flags() + info("", [1, 2, 3]) + option(Option.LIST) + option(Option.EXPORT_NAME),
    client_flags() + option(Option.STRUCTURED_REPLY) + meta_context(9, "", ["base:"]) + option(Option.ABORT),
    OPENED + request(c.CMD_READ, 0, 4096) + request(c.CMD_WRITE, 5, payload=b"hello") + request(c.CMD_FLUSH),
    OPENED + request(c.CMD_WRITE, 0, payload=b"x" * 70_000) + request(c.CMD_BLOCK_STATUS, 0, 4096) + request(c.CMD_DISC),
    OPENED + request(c.CMD_WRITE, 0, payload=b"x" * (LIMIT + 1)) + request(c.CMD_TRIM, 0, 4096) + request(c.CMD_DISC),
    EXTENDED + extended_request(c.CMD_WRITE, 5, payload=b"hello") + extended_request(c.CMD_READ, 0, 4096),
    EXTENDED + extended_request(c.CMD_BLOCK_STATUS, 0, 1 << 40) + extended_request(c.CMD_TRIM, 0, payload=b"x" * 70_000),
)


def survives(data: bytes, piece: int | None = None) -> LinkedPair:
    """Feed it; check what the server holds after every piece, and that its answers can be parsed."""
    linked = LinkedPair([export("", maximum_payload=LIMIT), export("disk", maximum_payload=LIMIT)])
    receiver = linked.server._receiver
    linked.client.greeting()
    try:
        for at in range(0, len(data), step := piece or max(len(data), 1)):
            linked.say(data[at : at + step])
            assert len(receiver.window) <= WINDOW_MAX
            assert receiver.available <= len(receiver.window)
            assert receiver._payload is None or len(receiver._payload) <= LIMIT
    except ProtocolError:
        linked.ended = True
    return linked


any_bytes: Final = st.binary(max_size=400)
u16: Final = st.one_of(st.integers(0, 12), st.integers(0, 2**16 - 1))
u32: Final = st.one_of(st.integers(0, 70_000), st.integers(0, 2**32 - 1))
u64: Final = st.one_of(st.integers(0, 1 << 22), st.integers(0, 2**64 - 1))


@given(any_bytes)
def test_any_bytes_from_the_start(data: bytes) -> None:
    survives(data)


@given(any_bytes)
def test_any_bytes_as_options(data: bytes) -> None:
    survives(client_flags() + data)


@given(st.lists(st.tuples(st.one_of(st.integers(0, 12), u32), st.binary(max_size=60)), max_size=12))
def test_any_options(options: list[tuple[int, bytes]]) -> None:
    linked = survives(client_flags() + b"".join(option(number, data) for number, data in options))
    for reply in linked.client.option_replies() if not linked.server.is_open else ():
        assert reply.option in {number for number, _ in options}


@given(st.integers(6, 10), st.binary(max_size=20), u32, st.binary(max_size=20))
def test_options_whose_lengths_lie(number: int, name: bytes, lie: int, rest: bytes) -> None:
    data = lie.to_bytes(4, "big") + name + rest
    linked = survives(client_flags() + option(Option.STRUCTURED_REPLY) + option(number, data) + option(4711))
    if not linked.server.is_open and not linked.ended:
        assert linked.client.option_replies()[-1].option == 4711


@given(any_bytes)
def test_any_bytes_as_requests(data: bytes) -> None:
    survives(OPENED + data)
    survives(EXTENDED + data)


@settings(max_examples=150)
@given(st.lists(st.tuples(u16, u16, u64, u64, u32), min_size=1, max_size=10), st.binary(max_size=100))
def test_any_requests(fields: list[tuple[int, int, int, int, int]], behind: bytes) -> None:
    """Whatever they ask for: a reply that a client can parse to each, unless the connection ended."""
    linked = LinkedPair([export("", maximum_payload=LIMIT)])
    linked.client.greeting()
    linked.say(OPENED)
    linked.client.option_replies()
    assert linked.client.structured
    for number, (command, flags, _, offset, length) in enumerate(fields):
        if command == c.CMD_READ:
            length = min(length, 4096)
        payload = b"p" * length if command == c.CMD_WRITE and length <= LIMIT else b""
        raw = linked.client.request(command, offset, length, flags=flags, payload=payload, cookie=number)
        try:
            linked.say(raw)
        except ProtocolError:
            return
        if linked.ended or (command == c.CMD_WRITE and length > LIMIT):
            return
        (reply,) = linked.client.replies()
        assert reply.cookie == number
    survives(OPENED + behind)


@settings(max_examples=150)
@given(st.lists(st.tuples(u16, u16, u64, u64), min_size=1, max_size=10), st.binary(max_size=100))
def test_any_extended_requests(fields: list[tuple[int, int, int, int]], behind: bytes) -> None:
    """A reply to each that a client can parse, and the next request is found behind its payload."""
    linked = LinkedPair([export("", maximum_payload=LIMIT)])
    linked.client.greeting()
    linked.say(EXTENDED)
    linked.client.option_replies()
    assert linked.client.extended
    for number, (command, flags, offset, length) in enumerate(fields):
        has_payload = bool(flags & c.PAYLOAD_LEN) or command == c.CMD_WRITE
        payload = b"p" * length if has_payload and length <= LIMIT else b""
        raw = linked.client.request(command, offset, length, flags=flags, payload=payload, cookie=number)
        try:
            linked.say(raw)
        except ProtocolError:
            assert has_payload
            assert length > LIMIT
            return
        if linked.ended:
            return
        (reply,) = linked.client.replies()
        assert reply.cookie == number
    survives(EXTENDED + behind)


@settings(max_examples=200)
@given(
    st.sampled_from(SESSIONS),
    st.lists(st.tuples(st.integers(0, 299), st.integers(0, 255)), min_size=1, max_size=4),
    st.sampled_from([None, 7, 4096]),
)
def test_mutated_sessions(session: bytes, changes: list[tuple[int, int]], piece: int | None) -> None:
    data = bytearray(session)
    for at, value in changes:
        data[at % len(data)] = value
    survives(bytes(data), piece)


@given(st.sampled_from(SESSIONS), st.integers(0, 299), st.integers(1, 60), st.binary(max_size=8))
def test_sessions_with_bytes_taken_out_and_put_in(session: bytes, at: int, length: int, put: bytes) -> None:
    survives(session[:at] + put + session[at + length :])


@given(st.sampled_from(SESSIONS), st.sampled_from(SESSIONS), st.integers(0, 299), st.integers(0, 299))
@example(SESSIONS[2], SESSIONS[3], 299, 0)
def test_spliced_sessions(one: bytes, two: bytes, at: int, after: int) -> None:
    survives(one[:at] + two[after:])


@pytest.mark.parametrize("length", [0, 1, LIMIT, LIMIT + 1, 1 << 27, (1 << 27) + 1, 2**32 - 1])
def test_claims_are_not_allocated(length: int) -> None:
    """A header is 28 bytes, whatever it announces: a buffer is made for no more than the limit."""
    linked = survives(OPENED + wire.request(c.CMD_WRITE, 0, length))
    receiver = linked.server._receiver
    assert len(receiver.window) < WINDOW_MAX
    assert (receiver._payload is not None) == (length == LIMIT)
    linked = survives(EXTENDED + wire.extended_request(c.CMD_WRITE, 0, length, flags=c.PAYLOAD_LEN))
    receiver = linked.server._receiver
    assert len(receiver.window) < WINDOW_MAX
    assert (receiver._payload is not None) == (length == LIMIT)
    assert linked.ended == (length > LIMIT)


def test_most_that_a_haggling_client_can_make_the_server_hold() -> None:
    """Bytes that no event comes of yet are bounded by the window, whatever the option announces."""
    for length in (1, 262_128, 262_129, c.MAX_OPTION_LENGTH):
        linked = survives(client_flags() + option(Option.GO, bytes(min(length, 300_000) - 1), length=length))
        assert len(linked.server._receiver.window) <= WINDOW_MAX
