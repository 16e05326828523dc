"""Requests out of bytes, replies into bytes, and the check that every request must pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from nbdmirror.errors import ProtocolError
from nbdmirror.extents import DATA, HOLE, ZERO, ExtentList
from nbdmirror.protocol import constants as c
from nbdmirror.protocol.constants import Option
from nbdmirror.protocol.messages import DONE, Answer, ExportInfo, ReadReply, Refusal, Request, StatusReply
from nbdmirror.protocol.receiver import IN_WINDOW
from nbdmirror.protocol.transmission import refusal_of
from tests.support import wire_client as wire
from tests.support.linked_pair import ALL_FLAGS, LinkedPair, export

if TYPE_CHECKING:
    from nbdmirror.protocol.connection import ServerConnection

SIZE = 1 << 20


def pair(*, structured: bool = False, contexts: tuple[str, ...] = (), **rest: Any) -> LinkedPair:
    """A pair whose export is open and whose haggling has been read."""
    linked = LinkedPair([export("", SIZE, contexts=("base:allocation", "qemu:dirty-bitmap:b"), **rest)])
    linked.client.greeting()
    linked.say(wire.client_flags())
    if structured:
        linked.say(wire.option(Option.STRUCTURED_REPLY))
    if contexts:
        linked.say(wire.meta_context(Option.SET_META_CONTEXT, "", contexts))
    linked.say(wire.go())
    linked.client.option_replies()
    linked.heard.clear()
    return linked


def ask(linked: LinkedPair, command: int, offset: int = 0, length: int = 0, **rest: Any) -> wire.Reply:
    linked.say(linked.client.request(command, offset, length, **rest))
    (reply,) = linked.client.replies()
    assert linked.client.unread == b""
    return reply


def answered(asked: Request, answer: Answer, *, structured: bool) -> tuple[wire.ClientCore, bytes]:
    """The bytes of one answer, in a client that has asked for it."""
    connection = opened(structured=structured)
    client = wire.ClientCore()
    client.structured = structured
    client.request(asked.command, asked.offset, asked.length, cookie=asked.cookie)
    connection.reply(asked, answer)
    raw = b"".join(connection.data_to_send())
    client.feed(raw)
    return client, raw


def opened(*, structured: bool = False, **rest: Any) -> ServerConnection:
    """A connection in its transmission phase, with nothing left to send."""
    linked = pair(structured=structured, **rest)
    return linked.server


# --- requests --------------------------------------------------------------------------------------------------------


def test_cookie_is_opaque() -> None:
    for cookie in (0, 1, 2**64 - 1, 0x4E42444D41474943):
        linked = pair()
        assert ask(linked, c.CMD_READ, 0, 512, cookie=cookie).cookie == cookie


@pytest.mark.parametrize("length", [1, 512, 4096, IN_WINDOW - 1, IN_WINDOW, IN_WINDOW + 1, 300_000, SIZE])
def test_write_then_read_of_any_length(length: int) -> None:
    linked = pair(structured=True)
    payload = bytes(range(1, 252)) * (length // 251 + 1)
    assert ask(linked, c.CMD_WRITE, 0, payload=payload[:length]).error == 0
    assert linked.heard == [(c.CMD_WRITE, 0, 1, 0, length, payload[:length])]
    assert ask(linked, c.CMD_READ, 0, length).data == payload[:length]


def test_write_of_nothing_is_refused_and_the_next_request_is_found() -> None:
    linked = pair()
    assert ask(linked, c.CMD_WRITE, 0, 0).error == c.EINVAL
    assert ask(linked, c.CMD_FLUSH).error == 0


def test_small_payload_lies_in_the_window_and_can_be_detached() -> None:
    connection = opened()
    buffer = connection.get_buffer()
    raw = wire.request(c.CMD_WRITE, payload=b"first")
    buffer[: len(raw)] = raw
    connection.buffer_updated(len(raw))
    asked = connection.next_request()
    assert asked is not None
    kept = asked.detached()
    raw = wire.request(c.CMD_WRITE, payload=b"other")
    connection.get_buffer()[: len(raw)] = raw
    connection.buffer_updated(len(raw))
    assert asked.payload is not None
    assert kept.payload is not None
    assert bytes(kept.payload) == b"first"
    assert bytes(asked.payload) == b"other"  # the window is used again: that's what detached() is for


def test_detached_without_payload_is_the_same() -> None:
    asked = Request(c.CMD_READ, 0, 1, 0, 512)
    assert asked.detached() is asked


def test_bad_request_magic_ends_the_connection() -> None:
    with pytest.raises(ProtocolError, match="where a request should begin"):
        pair().say(wire.request(c.CMD_READ, 0, 512, magic=c.REQUEST_MAGIC ^ 1))


@pytest.mark.parametrize("over", [1, 100_000, 3 * SIZE])
def test_write_over_the_limit_is_skipped_and_refused(over: int) -> None:
    linked = pair(maximum_payload=65536, structured=True)
    length = 65536 + over
    reply = ask(linked, c.CMD_WRITE, 0, payload=b"\xff" * length)
    assert reply.error in (c.EOVERFLOW, c.ENOSPC)
    assert linked.heard == [(c.CMD_WRITE, 0, 1, 0, length, None)]
    assert not any(linked.disk)
    assert ask(linked, c.CMD_READ, 0, 512).data == bytes(512)


def test_write_at_the_limit_is_taken() -> None:
    linked = pair(maximum_payload=4096)
    assert ask(linked, c.CMD_WRITE, 0, payload=b"x" * 4096).error == 0
    assert ask(linked, c.CMD_WRITE, 0, payload=b"x" * 4097).error == c.EOVERFLOW


def test_write_that_was_refused_is_answered_once_its_payload_has_come() -> None:
    linked = pair(maximum_payload=4096)
    raw = linked.client.request(c.CMD_WRITE, payload=b"x" * 10_000)
    linked.say(raw[:-1])
    assert linked.client.replies() == []
    linked.say(raw[-1:])
    assert [reply.error for reply in linked.client.replies()] == [c.EOVERFLOW]
    assert ask(linked, c.CMD_FLUSH).error == 0


def test_absurd_write_ends_the_connection() -> None:
    most = 128 * 1024 * 1024
    linked = pair()
    linked.say(wire.request(c.CMD_WRITE, 0, most))
    assert linked.heard == []
    assert not linked.ended
    with pytest.raises(ProtocolError, match="announced a write"):
        pair().say(wire.request(c.CMD_WRITE, 0, most + 1))


def test_big_payload_is_not_copied_again() -> None:
    """What `get_buffer` names while a big payload arrives is the memory that the request gets."""
    connection = opened()
    payload = b"\xa5" * (IN_WINDOW + 1)
    raw = wire.request(c.CMD_WRITE, payload=payload)
    connection.get_buffer()[:28] = raw[:28]
    connection.buffer_updated(28)
    assert connection.next_request() is None
    buffer = connection.get_buffer()
    assert len(buffer) == len(payload)
    buffer[:] = payload
    connection.buffer_updated(len(payload))
    asked = connection.next_request()
    assert asked is not None
    assert asked.payload is not None
    assert asked.payload.obj is buffer.obj


@pytest.mark.parametrize(("length", "in_window"), [(0, True), (1, True), (IN_WINDOW, True), (IN_WINDOW + 1, False)])
def test_where_a_payload_lies(length: int, in_window: bool) -> None:
    connection = opened()
    raw = wire.request(c.CMD_WRITE, payload=bytes(length))
    asked = None
    while asked is None:
        buffer = connection.get_buffer()
        count = min(len(buffer), len(raw))
        buffer[:count], raw = raw[:count], raw[count:]
        connection.buffer_updated(count)
        asked = connection.next_request()
    assert asked.payload is not None
    assert (len(asked.payload.obj) > length) == in_window  # type: ignore[arg-type]


def test_requests_print_themselves() -> None:
    assert repr(Request(c.CMD_WRITE, c.FUA, 7, 65536, 4096)) == "<Request WRITE 0x10000+4096 cookie=7 FUA>"
    assert repr(Request(77, 0, 0, 0, 0)) == "<Request command 77 0x0+0 cookie=0>"


# --- replies ---------------------------------------------------------------------------------------------------------

READ = Request(c.CMD_READ, 0, 9, 4096, 1000)
CONTENT = bytearray(range(250)) * 4


def test_read_without_structured_replies_is_one_header_and_the_data() -> None:
    client, raw = answered(READ, CONTENT, structured=False)
    assert raw[:16] == bytes.fromhex("67446698 00000000 0000000000000009")
    reply = client.reply()
    assert reply is not None
    assert (reply.data, reply.chunks) == (bytes(CONTENT), 0)


def test_runs_do_not_matter_without_structured_replies() -> None:
    client, _ = answered(READ, ReadReply(bytearray(1000), [(0, 1000, True)]), structured=False)
    assert client.replies() == [wire.Reply(9, data=bytes(1000))]


def test_structured_read_without_runs_is_one_chunk() -> None:
    client, raw = answered(READ, CONTENT, structured=True)
    assert raw[:28] == bytes.fromhex("668e33ef 0001 0001 0000000000000009 000003f0 0000000000001000")
    assert client.replies() == [wire.Reply(9, data=bytes(CONTENT), chunks=1)]


@pytest.mark.parametrize(
    "runs",
    [
        [(0, 1000, False)],
        [(0, 400, False), (400, 1000, True)],
        [(0, 400, True), (400, 600, False), (600, 1000, True)],
    ],
)
def test_zero_runs_do_not_travel(runs: list[tuple[int, int, bool]]) -> None:
    content = bytearray(CONTENT)
    for start, end, zero in runs:
        if zero:
            content[start:end] = bytes(end - start)
    holes = sum(end - start for start, end, zero in runs if zero)
    client, raw = answered(READ, ReadReply(content, runs), structured=True)
    assert client.replies() == [wire.Reply(9, data=bytes(content), chunks=len(runs), holes=holes)]
    assert len(raw) == sum(32 if zero else 28 + end - start for start, end, zero in runs)


@pytest.mark.parametrize("structured", [False, True])
@pytest.mark.parametrize("command", [c.CMD_WRITE, c.CMD_FLUSH, c.CMD_TRIM, c.CMD_CACHE, c.CMD_WRITE_ZEROES])
def test_done_is_a_simple_reply(command: int, structured: bool) -> None:
    asked = Request(command, 0, 2**64 - 1, 0, 512)
    _, raw = answered(asked, DONE, structured=structured)
    assert raw == bytes.fromhex("67446698 00000000 ffffffffffffffff")


def test_refusal_without_structured_replies_is_a_number() -> None:
    client, raw = answered(READ, Refusal(c.EIO, "the disk is gone"), structured=False)
    assert raw == bytes.fromhex("67446698 00000005 0000000000000009")
    assert client.replies() == [wire.Reply(9, c.EIO)]


def test_refusal_with_structured_replies_says_why() -> None:
    client, _ = answered(READ, Refusal(c.EIO, "the disk is gone"), structured=True)
    assert client.replies() == [wire.Reply(9, c.EIO, "the disk is gone", chunks=1)]


@pytest.mark.parametrize("message", ["", "x" * 4096, "x" * 5000, "x" + "é" * 4000, "disk \udcff"])
def test_any_text_becomes_a_protocol_string(message: str) -> None:
    client, _ = answered(READ, Refusal(c.EIO, message), structured=True)
    reply = client.reply()
    assert reply is not None
    assert len(reply.message) == min(len(message), 2048 if "é" in message else 4096)


def test_block_status_is_one_chunk_per_context() -> None:
    asked = Request(c.CMD_BLOCK_STATUS, 0, 3, 0, 8192)
    allocation = ExtentList(0, 8192)
    allocation.add(4096, DATA)
    allocation.add(4096, HOLE | ZERO)
    answer = StatusReply([(1, allocation), (2, ExtentList.all_data(0, 8192))])
    client, raw = answered(asked, answer, structured=True)
    assert client.replies() == [wire.Reply(3, extents={1: [(4096, 0), (4096, 3)], 2: [(8192, 0)]}, chunks=2)]
    assert len(raw) == 20 + 4 + 16 + 20 + 4 + 8


def test_replies_may_be_given_in_any_order() -> None:
    linked = pair(structured=True)
    first = Request(c.CMD_READ, 0, 1, 0, 4)
    second = Request(c.CMD_READ, 0, 2, 4, 4)
    linked.client.request(c.CMD_READ, 0, 4, cookie=1)
    linked.client.request(c.CMD_READ, 4, 4, cookie=2)
    linked.server.reply(second, bytearray(b"ef g"))
    linked.server.reply(first, bytearray(b"abcd"))
    for part in linked.server.data_to_send():
        linked.client.feed(part)
    assert [(reply.cookie, reply.data) for reply in linked.client.replies()] == [(2, b"ef g"), (1, b"abcd")]


def test_whole_session_with_meta_contexts() -> None:
    linked = pair(structured=True, contexts=("base:allocation", "qemu:dirty-bitmap:b"))
    assert ask(linked, c.CMD_BLOCK_STATUS, 0, 4096).extents == {1: [(4096, 0)], 2: [(4096, 0)]}


# --- the check -------------------------------------------------------------------------------------------------------

ALL_COMMANDS = range(8)
FLAGS_TAKEN = {
    c.CMD_READ: c.DF,
    c.CMD_WRITE_ZEROES: c.NO_HOLE | c.FAST_ZERO,
    c.CMD_BLOCK_STATUS: c.REQ_ONE,
}


def refused(
    command: int,
    offset: int = 0,
    length: int = 512,
    flags: int = 0,
    *,
    info: ExportInfo = export("", SIZE),  # noqa: B008
    structured: bool = True,
) -> int:
    payload = memoryview(b"") if command == c.CMD_WRITE else None  # only whether there is one matters
    refusal = refusal_of(Request(command, flags, 0, offset, length, payload), info, structured=structured)
    assert refusal is None or refusal.message
    return 0 if refusal is None else refusal.error


@pytest.mark.parametrize("command", ALL_COMMANDS)
@pytest.mark.parametrize("bit", range(16))
def test_flags_that_a_command_takes(command: int, bit: int) -> None:
    taken = FLAGS_TAKEN.get(command, 0) | c.FUA
    assert refused(command, flags=1 << bit) == (0 if taken & 1 << bit else c.EINVAL)


def test_df_needs_structured_replies() -> None:
    assert refused(c.CMD_READ, flags=c.DF, structured=True) == 0
    assert refused(c.CMD_READ, flags=c.DF, structured=False) == c.EINVAL


NOT_OFFERED = [
    (c.CMD_READ, c.DF, c.TFLAG_SEND_DF),
    (c.CMD_READ, c.FUA, c.TFLAG_SEND_FUA),
    (c.CMD_WRITE, c.FUA, c.TFLAG_SEND_FUA),
    (c.CMD_FLUSH, 0, c.TFLAG_SEND_FLUSH),
    (c.CMD_TRIM, 0, c.TFLAG_SEND_TRIM),
    (c.CMD_CACHE, 0, c.TFLAG_SEND_CACHE),
    (c.CMD_WRITE_ZEROES, 0, c.TFLAG_SEND_WRITE_ZEROES),
    (c.CMD_WRITE_ZEROES, c.FAST_ZERO, c.TFLAG_SEND_FAST_ZERO),
]


@pytest.mark.parametrize(("command", "flags", "bit"), NOT_OFFERED)
def test_what_is_not_offered_is_refused(command: int, flags: int, bit: int) -> None:
    assert refused(command, flags=flags, info=export("", SIZE)) == 0
    assert refused(command, flags=flags, info=export("", SIZE, ALL_FLAGS & ~bit)) == c.EINVAL


@pytest.mark.parametrize(("command", "flags"), [(c.CMD_TRIM, 0), (c.CMD_WRITE_ZEROES, c.FAST_ZERO), (c.CMD_WRITE, c.FUA)])
def test_a_read_only_export_says_that_it_is(command: int, flags: int) -> None:
    """It offers none of these, but the client should hear the reason."""
    assert refused(command, flags=flags, info=export("", SIZE, c.TFLAG_HAS_FLAGS | c.TFLAG_READ_ONLY)) == c.EPERM


@pytest.mark.parametrize("command", [8, 9, 100, 65535])
def test_unknown_commands(command: int) -> None:
    assert refused(command) == c.EINVAL
    assert refused(command, 2**64 - 1, 2**32 - 1, 0xFFFF) == c.EINVAL


@pytest.mark.parametrize("command", ALL_COMMANDS)
def test_read_only_exports_are_not_written(command: int) -> None:
    read_only = export("", SIZE, ALL_FLAGS | c.TFLAG_READ_ONLY)
    writes = command in (c.CMD_WRITE, c.CMD_TRIM, c.CMD_WRITE_ZEROES)
    assert refused(command, info=read_only) == (c.EPERM if writes else 0)
    assert refused(command, SIZE, info=read_only) == (c.EPERM if writes else 0 if command == c.CMD_FLUSH else c.EINVAL)


@pytest.mark.parametrize("command", [c.CMD_READ, c.CMD_WRITE, c.CMD_TRIM, c.CMD_CACHE, c.CMD_WRITE_ZEROES, 7])
@pytest.mark.parametrize(
    ("offset", "length"),
    [(SIZE, 1), (SIZE - 1, 2), (0, SIZE + 1), (2**64 - 1, 1), (2**64 - 512, 512), (SIZE, 2**32 - 1)],
)
def test_past_the_end(command: int, offset: int, length: int) -> None:
    grows = command in (c.CMD_WRITE, c.CMD_WRITE_ZEROES)
    assert refused(command, offset, length) == (c.ENOSPC if grows else c.EINVAL)


@pytest.mark.parametrize("command", [c.CMD_READ, c.CMD_WRITE, c.CMD_TRIM, c.CMD_CACHE, c.CMD_WRITE_ZEROES, 7])
def test_ranges_that_reach_the_end_and_requests_of_nothing(command: int) -> None:
    assert refused(command, 0, SIZE) == 0
    assert refused(command, SIZE - 1, 1) == 0
    assert refused(command, 0, 0) == c.EINVAL
    assert refused(command, SIZE, 0) == c.EINVAL


@pytest.mark.parametrize(("offset", "length"), [(0, 0), (SIZE, 0), (2**64 - 1, 2**32 - 1)])
def test_flush_has_no_range(offset: int, length: int) -> None:
    assert refused(c.CMD_FLUSH, offset, length) == 0


@pytest.mark.parametrize("command", ALL_COMMANDS)
def test_payload_limit_is_for_what_travels(command: int) -> None:
    limited = export("", SIZE, maximum_payload=4096)
    travels = command in (c.CMD_READ, c.CMD_WRITE)
    assert refused(command, 0, 4096, info=limited) == 0
    assert refused(command, 0, 8192, info=limited) == (c.EOVERFLOW if travels else 0)


@pytest.mark.parametrize(
    ("offset", "length", "fits"),
    [
        (0, 512, True),
        (512, 512, True),
        (1, 512, False),
        (0, 511, False),
        (256, 256, False),
        (1024, 176, True),  # the tail of the disk
        (0, 1200, True),
        (512, 688, True),
        (1100, 100, False),  # ends with the disk, but begins inside a block
        (1, 1199, False),
        (1024, 100, False),
    ],
)
def test_alignment(offset: int, length: int, fits: bool) -> None:
    unaligned_size = export("", 1200, minimum_block=512)
    assert refused(c.CMD_READ, offset, length, info=unaligned_size) == (0 if fits else c.EINVAL)
