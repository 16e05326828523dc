"""Extended headers: how they are agreed on, requests with 64-bit lengths and replies in extended chunks only."""

from __future__ import annotations

from typing import Any

import pytest

from nbdmirror.errors import ProtocolError
from nbdmirror.extents import DATA, HOLE, ZERO, ExtentList
from nbdmirror.protocol import constants as c
from nbdmirror.protocol.constants import Option, OptionReply
from nbdmirror.protocol.messages import DONE, Answer, ReadReply, Refusal, Request, StatusReply
from nbdmirror.protocol.receiver import IN_WINDOW
from tests.support import wire_client as wire
from tests.support.linked_pair import LinkedPair, export
from tests.support.wire_client import extended_request, option

SIZE = 1 << 20
EXTENDED = option(Option.EXTENDED_HEADERS)
STRUCTURED = option(Option.STRUCTURED_REPLY)


def haggling(*exports: Any) -> LinkedPair:
    linked = LinkedPair(exports or [export("", SIZE)])
    linked.client.greeting()
    linked.say(wire.client_flags())
    return linked


def pair(*, contexts: tuple[str, ...] = (), **rest: Any) -> LinkedPair:
    """A pair that agreed on extended headers and whose haggling has been read."""
    linked = haggling(export("", SIZE, **rest))
    linked.say(EXTENDED)
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


def kinds(linked: LinkedPair, data: bytes) -> list[int]:
    linked.say(data)
    return [each.reply for each in linked.client.option_replies()]


# --- the option ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [b"", STRUCTURED, EXTENDED])
def test_agreed_on_with_or_without_structured_replies_before(before: bytes) -> None:
    linked = haggling()
    linked.say(before)
    linked.client.option_replies()
    assert kinds(linked, EXTENDED) == [OptionReply.ACK]
    linked.say(wire.go())
    assert (linked.client.structured, linked.client.extended) == (True, True)


def test_data_is_refused_and_nothing_enabled() -> None:
    linked = haggling()
    assert kinds(linked, option(Option.EXTENDED_HEADERS, b"x")) == [OptionReply.ERR_INVALID]
    linked.say(wire.go())
    assert (linked.client.structured, linked.client.extended) == (False, False)


def test_structured_replies_alone_leave_the_headers_as_they_were() -> None:
    linked = haggling()
    linked.say(STRUCTURED + wire.go())
    assert (linked.client.structured, linked.client.extended) == (True, False)


def test_there_is_no_way_back_to_structured_replies() -> None:
    linked = haggling()
    assert kinds(linked, EXTENDED + STRUCTURED) == [OptionReply.ACK, OptionReply.ERR_EXT_HEADER_REQD]
    linked.say(wire.go())
    assert linked.client.extended


def test_export_name_ends_the_connection() -> None:
    linked = haggling()
    linked.say(EXTENDED)
    sent = bytes(linked.sent)
    with pytest.raises(ProtocolError, match="EXPORT_NAME"):
        linked.say(option(Option.EXPORT_NAME, b""))
    assert linked.sent == sent
    assert linked.heard == []


def test_meta_contexts_and_df_need_no_structured_replies_then() -> None:
    linked = haggling()
    assert kinds(linked, EXTENDED + wire.meta_context(Option.SET_META_CONTEXT, "", [c.BASE_ALLOCATION])) == [
        OptionReply.ACK,
        OptionReply.META_CONTEXT,
        OptionReply.ACK,
    ]
    linked.say(wire.go())
    assert wire.export_info(linked.client.option_replies())[1] & c.TFLAG_SEND_DF
    assert linked.contexts == {1: c.BASE_ALLOCATION}


# --- requests --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 512, IN_WINDOW - 1, IN_WINDOW, IN_WINDOW + 1, 300_000, SIZE])
def test_write_then_read_of_any_length(length: int) -> None:
    linked = pair()
    payload = (bytes(range(1, 252)) * (length // 251 + 1))[:length]
    assert ask(linked, c.CMD_WRITE, 0, payload=payload).error == 0
    assert linked.heard == [(c.CMD_WRITE, 0, 1, 0, length, payload)]  # the flag has done its work
    assert ask(linked, c.CMD_READ, 0, length).data == payload


def test_other_flags_of_a_write_stay() -> None:
    linked = pair()
    assert ask(linked, c.CMD_WRITE, 0, payload=b"x", flags=c.PAYLOAD_LEN | c.FUA).error == 0
    assert linked.heard[0][1] == c.FUA


def test_write_without_the_flag_has_its_payload_all_the_same() -> None:
    """QEMU's client writes so."""
    linked = pair()
    data = b"what QEMU writes"
    linked.say(linked.client.request(c.CMD_WRITE, 512, len(data), flags=0, cookie=1) + data)
    (reply,) = linked.client.replies()
    assert (reply.cookie, reply.error) == (1, 0)
    assert ask(linked, c.CMD_FLUSH).error == 0


def test_write_of_nothing_is_refused() -> None:
    linked = pair()
    assert ask(linked, c.CMD_WRITE, 0, 0, payload=b"").error == c.EINVAL
    assert ask(linked, c.CMD_FLUSH).error == 0


@pytest.mark.parametrize("command", [0, 3, 4, 5, 6, 7, 8, 65535])
@pytest.mark.parametrize("length", [1, 28, 5000, SIZE])
def test_payload_of_another_command_is_consumed_and_refused(command: int, length: int) -> None:
    linked = pair(contexts=(c.BASE_ALLOCATION,))
    raw = linked.client.request(command, 0, payload=b"\x21" * length)
    linked.say(raw[:-1])
    assert linked.client.replies() == []  # not before its payload has come
    linked.say(raw[-1:])
    assert [reply.error for reply in linked.client.replies()] == [c.EINVAL]
    assert ask(linked, c.CMD_READ, 0, 512).data == bytes(512)


@pytest.mark.parametrize("command", [c.CMD_WRITE, c.CMD_READ, c.CMD_BLOCK_STATUS, 77])
def test_payload_over_the_limit_ends_the_connection(command: int) -> None:
    linked = pair(maximum_payload=4096)
    assert ask(linked, command, payload=b"x" * 4096).error == (0 if command == c.CMD_WRITE else c.EINVAL)
    for length in (4097, 2**64 - 1):
        linked = pair(maximum_payload=4096)
        with pytest.raises(ProtocolError, match="announced a payload"):
            linked.say(extended_request(command, 0, length, flags=c.PAYLOAD_LEN))


@pytest.mark.parametrize("raw", [extended_request(c.CMD_DISC), extended_request(c.CMD_DISC, 0, 2**64 - 1, flags=0xFFFF)])
def test_disc_is_heard_whatever_it_says(raw: bytes) -> None:
    linked = pair()
    linked.say(raw)
    assert linked.ended
    assert linked.heard[0][0] == c.CMD_DISC


def test_the_other_magic_ends_the_connection() -> None:
    with pytest.raises(ProtocolError, match="where a request should begin"):
        pair().say(wire.request(c.CMD_READ, 0, 512) + bytes(4))
    classic = haggling()
    classic.say(wire.go())
    with pytest.raises(ProtocolError, match="where a request should begin"):
        classic.say(extended_request(c.CMD_READ, 0, 512))


def test_payload_flag_is_unknown_to_compact_requests() -> None:
    linked = haggling()
    linked.say(STRUCTURED + wire.go())
    linked.client.option_replies()
    assert ask(linked, c.CMD_WRITE, payload=b"x", flags=c.PAYLOAD_LEN).error == c.EINVAL
    assert ask(linked, c.CMD_READ, 0, 512, flags=c.PAYLOAD_LEN).error == c.EINVAL
    assert ask(linked, c.CMD_FLUSH).error == 0


@pytest.mark.parametrize("command", [c.CMD_READ, c.CMD_TRIM, c.CMD_CACHE, c.CMD_WRITE_ZEROES, c.CMD_BLOCK_STATUS])
@pytest.mark.parametrize(("offset", "length"), [(0, 2**32), (1, 2**64 - 1), (2**64 - 1, 2**64 - 1), (SIZE - 1, 2**33)])
def test_lengths_of_64_bits_do_not_wrap(command: int, offset: int, length: int) -> None:
    linked = pair(contexts=(c.BASE_ALLOCATION,))
    assert ask(linked, command, offset, length).error == (c.ENOSPC if command == c.CMD_WRITE_ZEROES else c.EINVAL)
    assert linked.heard[0][4] == length


# --- replies ---------------------------------------------------------------------------------------------------------

READ = Request(c.CMD_READ, 0, 9, 4096, 1000)
CONTENT = bytearray(range(250)) * 4


def answered(asked: Request, answer: Answer) -> tuple[wire.ClientCore, bytes]:
    """The bytes of one answer, in a client that has asked for it."""
    linked = pair()
    linked.client.request(asked.command, asked.offset, asked.length, cookie=asked.cookie)
    linked.server.reply(asked, answer)
    raw = b"".join(linked.server.data_to_send())
    linked.client.feed(raw)
    return linked.client, raw


def test_read_is_one_chunk_with_both_offsets() -> None:
    client, raw = answered(READ, CONTENT)
    head = "6e8a278c 0001 0001 0000000000000009 0000000000001000 00000000000003f0 0000000000001000"
    assert raw == bytes.fromhex(head) + CONTENT
    assert client.replies() == [wire.Reply(9, data=bytes(CONTENT), chunks=1)]


def test_runs_are_chunks_at_the_offset_of_the_request() -> None:
    content = CONTENT[:400] + bytes(200) + CONTENT[600:]
    client, raw = answered(READ, ReadReply(content, [(0, 400, False), (400, 600, True), (600, 1000, False)]))
    assert client.replies() == [wire.Reply(9, data=bytes(content), chunks=3, holes=200)]
    assert raw[440:484] == bytes.fromhex(
        "6e8a278c 0000 0002 0000000000000009 0000000000001000 000000000000000c 0000000000001190 000000c8"
    )


@pytest.mark.parametrize("command", [c.CMD_WRITE, c.CMD_FLUSH, c.CMD_TRIM, c.CMD_CACHE, c.CMD_WRITE_ZEROES])
def test_done_is_an_empty_chunk(command: int) -> None:
    client, raw = answered(Request(command, 0, 2**64 - 1, 2**63, 512), DONE)
    assert raw == bytes.fromhex("6e8a278c 0001 0000 ffffffffffffffff 8000000000000000 0000000000000000")
    assert client.replies() == [wire.Reply(2**64 - 1, chunks=1)]


def test_errors_say_why() -> None:
    client, raw = answered(READ, Refusal(c.EIO, "gone"))
    head = "6e8a278c 0001 8001 0000000000000009 0000000000001000 000000000000000a"
    assert raw == bytes.fromhex(head) + bytes.fromhex("00000005 0004") + b"gone"
    assert client.replies() == [wire.Reply(9, c.EIO, "gone", chunks=1)]


def test_extents_have_64_bits() -> None:
    asked = Request(c.CMD_BLOCK_STATUS, 0, 3, 0, 1 << 43)
    extents = ExtentList(0, 1 << 43)
    extents.add(4096, DATA)
    extents.add((1 << 43) - 4096, HOLE | ZERO)
    wide = ExtentList(0, 1 << 43)
    wide.add(1 << 43, 1 << 40)
    client, raw = answered(asked, StatusReply([(1, extents), (2, wide)]))
    assert client.replies() == [
        wire.Reply(3, extents={1: [(4096, 0), ((1 << 43) - 4096, 3)], 2: [(1 << 43, 1 << 40)]}, chunks=2)
    ]
    assert len(raw) == 32 + 8 + 32 + 32 + 8 + 16
    assert raw[:40] == bytes.fromhex("6e8a278c 0000 0006 0000000000000003 0000000000000000 0000000000000028 00000001 00000002")
