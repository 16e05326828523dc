"""The haggling, answer by answer, over a linked pair."""

from __future__ import annotations

import struct

import pytest

from nbdmirror.errors import ProtocolError
from nbdmirror.protocol import constants as c
from nbdmirror.protocol.connection import ServerConnection
from nbdmirror.protocol.constants import Info, Option, OptionReply
from nbdmirror.protocol.handshake import matches
from nbdmirror.protocol.messages import ExportQuery
from tests.support import wire_client as wire
from tests.support.linked_pair import ALL_FLAGS, LinkedPair, export
from tests.support.wire_client import Answered, client_flags, go, go_data, info, meta_context, option, string

BITMAP = "qemu:dirty-bitmap:b0"
CONTEXTS = (c.BASE_ALLOCATION, BITMAP, "qemu:dirty-bitmap:b1")
STRUCTURED = option(Option.STRUCTURED_REPLY)


def pair(*exports: object, flags: int = wire.CLIENT_FLAGS) -> LinkedPair:
    """A pair that has greeted."""
    linked = LinkedPair(exports or [export(), export("disk", 12345, contexts=CONTEXTS)])  # type: ignore[arg-type]
    assert linked.client.greeting() == c.FLAG_FIXED_NEWSTYLE | c.FLAG_NO_ZEROES
    linked.say(client_flags(flags))
    return linked


def replies(linked: LinkedPair, data: bytes) -> list[Answered]:
    linked.say(data)
    answered = linked.client.option_replies()
    assert linked.client.unread == b""
    return answered


def only(linked: LinkedPair, data: bytes) -> int:
    """The one reply, by its kind; option and text are checked on the way."""
    (reply,) = replies(linked, data)
    assert reply.option == int.from_bytes(data[8:12], "big")
    assert not reply.is_error or reply.data
    return reply.reply


def still_haggling(linked: LinkedPair) -> None:
    """The next option is read from the right place."""
    assert only(linked, option(4711)) == OptionReply.ERR_UNSUP


# --- greeting --------------------------------------------------------------------------------------------------------


def test_greeting_is_eighteen_known_bytes() -> None:
    assert b"".join(ServerConnection().data_to_send()) == b"NBDMAGIC" + b"IHAVEOPT" + b"\x00\x03"


def test_nothing_is_sent_twice() -> None:
    connection = ServerConnection()
    assert connection.data_to_send()
    assert connection.data_to_send() == []


@pytest.mark.parametrize("flags", [0, 1, 2, 3])
def test_offered_client_flags_are_taken(flags: int) -> None:
    assert only(pair(flags=flags), option(Option.STRUCTURED_REPLY)) == OptionReply.ACK


@pytest.mark.parametrize("flags", [4, 1 << 31, 7, 1 << 16])
def test_other_client_flags_end_the_connection(flags: int) -> None:
    with pytest.raises(ProtocolError, match="unknown flags"):
        pair(flags=flags)


def test_bad_option_magic_ends_the_connection() -> None:
    with pytest.raises(ProtocolError, match="where an option should begin"):
        pair().say(option(Option.LIST, magic=c.IHAVEOPT + 1))


@pytest.mark.parametrize("exports", [1, 3])
def test_flood_of_options_ends_the_connection(exports: int) -> None:
    server = ServerConnection(exports=exports)
    raw = wire.client_flags() + STRUCTURED * (32 + 32 * exports)
    server.get_buffer()[: len(raw)] = raw
    server.buffer_updated(len(raw))
    assert server.next_event() is None
    server.get_buffer()[: len(STRUCTURED)] = STRUCTURED
    server.buffer_updated(len(STRUCTURED))
    with pytest.raises(ProtocolError, match=f"more than {32 + 32 * exports} options"):
        server.next_event()


# --- options without an export ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [0, Option.PEEK_EXPORT, 12, 2**32 - 1])
@pytest.mark.parametrize("data", [b"", b"some data", bytes(70_000), bytes(300_000)])
def test_unknown_option_is_refused_and_its_data_skipped(number: int, data: bytes) -> None:
    linked = pair()
    assert only(linked, option(number, data)) == OptionReply.ERR_UNSUP
    still_haggling(linked)


@pytest.mark.parametrize("number", [Option.LIST, Option.STARTTLS, Option.STRUCTURED_REPLY, Option.EXTENDED_HEADERS])
def test_data_where_none_belongs_is_refused(number: int) -> None:
    linked = pair()
    assert only(linked, option(number, b"x")) == OptionReply.ERR_INVALID
    still_haggling(linked)


def test_refused_structured_reply_is_not_enabled() -> None:
    linked = pair()
    linked.say(option(Option.STRUCTURED_REPLY, b"x") + go("disk"))
    assert not linked.server.structured


def test_starttls_without_tls_is_against_the_policy() -> None:
    assert only(pair(), option(Option.STARTTLS)) == OptionReply.ERR_POLICY


@pytest.mark.parametrize("data", [b"", b"for no reason", bytes(1_000_000)])
def test_abort_is_acknowledged_and_ends_it(data: bytes) -> None:
    linked = pair()
    assert only(linked, option(Option.ABORT, data)) == OptionReply.ACK
    assert linked.ended
    assert linked.heard == [("Disconnected()",)]


def test_structured_reply_may_be_asked_for_again() -> None:
    assert [each.reply for each in replies(pair(), STRUCTURED * 2)] == [OptionReply.ACK] * 2


@pytest.mark.parametrize("number", [*Option, 4711])
def test_option_longer_than_any_limit_ends_the_connection(number: int) -> None:
    with pytest.raises(ProtocolError, match="announced an option"):
        pair().say(option(number, length=c.MAX_OPTION_LENGTH + 1))


@pytest.mark.parametrize("number", [Option.INFO, Option.GO, Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT])
def test_option_too_long_to_look_at_is_skipped(number: int) -> None:
    linked = pair()
    linked.say(STRUCTURED)
    linked.client.option_replies()
    assert only(linked, option(number, bytes(1_000_000))) == OptionReply.ERR_TOO_BIG
    still_haggling(linked)


def test_longest_data_that_is_looked_at() -> None:
    """One byte more than the window holds is skipped, what fits is parsed, and refused for what it says."""
    linked = pair()
    most = 256 * 1024 - 16
    assert only(linked, option(Option.GO, bytes(most))) == OptionReply.ERR_INVALID
    assert only(linked, option(Option.GO, bytes(most + 1))) == OptionReply.ERR_TOO_BIG
    still_haggling(linked)


# --- LIST ------------------------------------------------------------------------------------------------------------


def test_list_names_every_export_and_its_description() -> None:
    linked = pair(export("a"), export("dïsk", description="the big one"))
    first, second, ack = replies(linked, option(Option.LIST))
    assert (first.reply, first.data) == (OptionReply.SERVER, string("a"))
    assert (second.reply, second.data) == (OptionReply.SERVER, string("dïsk") + b"the big one")
    assert (ack.reply, ack.data) == (OptionReply.ACK, b"")


def test_list_can_be_refused() -> None:
    connection = ServerConnection()
    connection.data_to_send()
    feed(connection, client_flags() + option(Option.LIST))
    assert connection.next_event() is not None
    connection.refuse(OptionReply.ERR_POLICY, "no")
    assert b"".join(connection.data_to_send()) == struct.pack(
        ">QIII2s", c.OPTION_REPLY_MAGIC, Option.LIST, OptionReply.ERR_POLICY, 2, b"no"
    )


@pytest.mark.parametrize("asked", [b"", go("disk")])
def test_refusing_what_was_not_asked_is_a_mistake_of_the_owner(asked: bytes) -> None:
    connection = ServerConnection()
    feed(connection, client_flags() + asked)
    if connection.next_event() is not None:
        connection.refuse(OptionReply.ERR_UNKNOWN, "no")
    connection.data_to_send()
    with pytest.raises(AssertionError, match="was not asked"):
        connection.refuse(OptionReply.ERR_UNKNOWN, "no")
    assert connection.data_to_send() == []


def feed(connection: ServerConnection, data: bytes) -> None:
    """All at once, as far as the window takes it."""
    buffer = connection.get_buffer()
    buffer[: len(data)] = data
    connection.buffer_updated(len(data))


# --- INFO and GO -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [Option.INFO, Option.GO])
def test_go_and_info_say_size_flags_and_block_sizes_unasked(number: Option) -> None:
    linked = pair(export("disk", 12345, minimum_block=512, preferred_block=8192, maximum_payload=1 << 20))
    one, two, ack = replies(linked, go("disk", number=number))
    assert one.data == struct.pack(">HQH", Info.EXPORT, 12345, ALL_FLAGS & ~c.TFLAG_SEND_DF)
    assert two.data == struct.pack(">HIII", Info.BLOCK_SIZE, 512, 8192, 1 << 20)
    assert (one.reply, two.reply, ack.reply) == (OptionReply.INFO, OptionReply.INFO, OptionReply.ACK)
    assert {one.option, two.option, ack.option} == {number}
    assert linked.server.is_open == (number == Option.GO)


def test_name_and_description_are_said_when_asked_for() -> None:
    linked = pair(export("disk", description="the big one"))
    kinds = {each.data[:2]: each.data[2:] for each in replies(linked, info("disk", [Info.DESCRIPTION, Info.NAME]))}
    assert kinds[struct.pack(">H", Info.NAME)] == b"disk"
    assert kinds[struct.pack(">H", Info.DESCRIPTION)] == b"the big one"


def test_a_description_that_is_not_there_is_not_said() -> None:
    assert len(replies(pair(), info("disk", [Info.DESCRIPTION]))) == 3


def test_what_was_asked_of_one_option_is_not_told_to_the_next() -> None:
    linked = pair()
    assert len(replies(linked, info("disk", [Info.NAME]))) == 4
    assert len(replies(linked, info("disk"))) == 3


def test_unknown_and_repeated_information_requests_are_ignored() -> None:
    linked = pair()
    assert len(replies(linked, info("disk", [Info.NAME] * 3 + [99]))) == 4
    assert len(replies(linked, info("disk", [77] * 65535))) == 3


@pytest.mark.parametrize("before", [b"", STRUCTURED])
def test_go_says_what_info_said(before: bytes) -> None:
    linked = pair(export("disk", 12345, description="the big one", minimum_block=512))
    linked.say(before)
    linked.client.option_replies()
    asked = [Info.NAME, Info.DESCRIPTION, Info.BLOCK_SIZE]
    said, said_again = (replies(linked, go("disk", asked, number=number)) for number in (Option.INFO, Option.GO))
    assert [each.data for each in said] == [each.data for each in said_again]


def test_df_is_only_offered_with_structured_replies() -> None:
    linked = pair()
    linked.say(STRUCTURED)
    linked.client.option_replies()
    assert wire.export_info(replies(linked, go("disk"))) == (12345, ALL_FLAGS)
    assert linked.server.structured


@pytest.mark.parametrize("number", [Option.INFO, Option.GO])
def test_unknown_export_can_be_followed_by_another(number: Option) -> None:
    linked = pair()
    assert only(linked, go("nothing", number=number)) == OptionReply.ERR_UNKNOWN
    assert replies(linked, go("disk"))[-1].reply == OptionReply.ACK
    assert linked.info.name == "disk"


def test_empty_name_is_an_export_like_others() -> None:
    linked = pair()
    linked.say(go())
    assert linked.info == export()


def test_longest_name() -> None:
    name = "é" * 2048
    linked = pair(export(name))
    assert only(linked, go(name + "x")) == OptionReply.ERR_TOO_BIG
    assert replies(linked, go(name))[-1].reply == OptionReply.ACK


MALFORMED_GO = {
    "no data": b"",
    "half a length": b"\0\0",
    "a name that is not there": struct.pack(">I", 4),
    "a name longer than the option": struct.pack(">I", 2**32 - 1) + b"disk\0\0",
    "no number of requests": string("disk"),
    "half a number of requests": string("disk") + b"\0",
    "fewer requests than announced": string("disk") + struct.pack(">HH", 2, 0),
    "more requests than announced": string("disk") + struct.pack(">HHH", 1, 0, 0),
    "a trailing byte": go_data("disk") + b"\0",
    "a name with NUL": go_data("di\0sk"),
    "a name that is not UTF-8": go_data(b"di\xffsk"),
}


@pytest.mark.parametrize("number", [Option.INFO, Option.GO])
@pytest.mark.parametrize("data", MALFORMED_GO.values(), ids=MALFORMED_GO)
def test_malformed_go_is_refused_and_skipped(number: Option, data: bytes) -> None:
    linked = pair()
    (reply,) = replies(linked, option(number, data))
    assert reply.reply == OptionReply.ERR_INVALID
    assert b"-" not in reply.data.replace(b"UTF-8", b"")  # no negative number of bytes
    assert linked.heard == []
    still_haggling(linked)


def test_refusal_is_cut_between_characters() -> None:
    connection = ServerConnection()
    feed(connection, client_flags() + go("x"))
    connection.next_event()
    connection.refuse(OptionReply.ERR_UNKNOWN, "x" + "é" * 4000 + "\udcff")
    client = wire.ClientCore()
    for part in connection.data_to_send():
        client.feed(part)
    client.greeting()
    reply = client.option_reply()
    assert reply is not None
    assert reply.data == b"x" + "é".encode() * 2047


def test_nothing_is_parsed_while_a_question_is_open() -> None:
    connection = ServerConnection()
    feed(connection, client_flags() + go("x") + option(Option.ABORT))
    assert connection.next_event() == ExportQuery("x", Option.GO)
    assert connection.next_event() is None
    connection.refuse(OptionReply.ERR_UNKNOWN, "no")
    assert connection.next_event() is not None


# --- EXPORT_NAME -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("flags", "zeroes"), [(3, False), (1, True), (0, True), (2, False)])
def test_export_name_answers_with_size_and_flags_alone(flags: int, zeroes: bool) -> None:
    linked = pair(flags=flags)
    linked.say(option(Option.EXPORT_NAME, b"disk"))
    assert linked.client.export_name_reply(zeroes=zeroes) == (12345, ALL_FLAGS & ~c.TFLAG_SEND_DF)
    assert linked.client.unread == b""
    assert linked.server.is_open


@pytest.mark.parametrize("name", [b"nothing", b"di\0sk", b"\xff", b"x" * 4097, b"x" * 300_000])
def test_export_name_that_fails_ends_the_connection(name: bytes) -> None:
    linked = pair()
    sent = bytes(linked.sent)
    with pytest.raises(ProtocolError):
        linked.say(option(Option.EXPORT_NAME, name))
    assert linked.sent == sent
    assert linked.server.data_to_send() == []


def test_export_name_takes_the_longest_name() -> None:
    linked = pair(export("x" * 4096))
    linked.say(option(Option.EXPORT_NAME, b"x" * 4096))
    assert linked.server.is_open


def test_export_name_after_structured_replies() -> None:
    linked = pair()
    linked.say(STRUCTURED + meta_context(Option.SET_META_CONTEXT, "disk", [BITMAP]))
    linked.client.option_replies()
    linked.say(option(Option.EXPORT_NAME, b"disk"))
    assert linked.client.export_name_reply() == (12345, ALL_FLAGS)
    assert linked.contexts == {1: BITMAP}


# --- meta contexts ---------------------------------------------------------------------------------------------------


def structured_pair() -> LinkedPair:
    linked = pair()
    assert only(linked, STRUCTURED) == OptionReply.ACK
    return linked


def contexts(answered: list[Answered]) -> dict[str, int]:
    """Names and ids; the ACK must be there."""
    assert answered[-1].reply == OptionReply.ACK
    assert all(each.reply == OptionReply.META_CONTEXT for each in answered[:-1])
    return {each.data[4:].decode(): int.from_bytes(each.data[:4], "big") for each in answered[:-1]}


@pytest.mark.parametrize("number", [Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT])
def test_meta_contexts_need_structured_replies(number: Option) -> None:
    linked = pair()
    assert only(linked, meta_context(number, "disk", [BITMAP])) == OptionReply.ERR_INVALID
    still_haggling(linked)


@pytest.mark.parametrize(
    ("queries", "expected"),
    [
        ([], CONTEXTS),
        (["base:"], CONTEXTS[:1]),
        (["qemu:"], CONTEXTS[1:]),
        (["qemu:dirty-bitmap:"], CONTEXTS[1:]),
        ([BITMAP, "base:", BITMAP], CONTEXTS[:2]),
        (["x-unknown:", "base:unknown", "qemu", "nocolon", "base:alloc"], ()),
    ],
)
def test_list_meta_context(queries: list[str], expected: tuple[str, ...]) -> None:
    linked = structured_pair()
    found = contexts(replies(linked, meta_context(Option.LIST_META_CONTEXT, "disk", queries)))
    assert tuple(found) == expected
    assert set(found.values()) <= {0}
    linked.say(go("disk"))
    assert linked.contexts == {}


@pytest.mark.parametrize(
    ("queries", "expected"),
    [
        ([], ()),
        (["base:", "qemu:", "x-unknown:leaf", "base:unknown"], ()),
        ([c.BASE_ALLOCATION], CONTEXTS[:1]),
        ([BITMAP, c.BASE_ALLOCATION, BITMAP], CONTEXTS[:2]),
    ],
)
def test_set_meta_context(queries: list[str], expected: tuple[str, ...]) -> None:
    linked = structured_pair()
    found = contexts(replies(linked, meta_context(Option.SET_META_CONTEXT, "disk", queries)))
    assert tuple(found) == expected
    assert len(set(found.values())) == len(found)
    linked.say(go("disk"))
    assert linked.contexts == {number: name for name, number in found.items()}


def test_selection_holds_for_its_export_only() -> None:
    linked = structured_pair()
    linked.say(meta_context(Option.SET_META_CONTEXT, "disk", [c.BASE_ALLOCATION]) + go(""))
    assert linked.server.is_open
    assert linked.contexts == {}


def test_later_selection_replaces_an_earlier_one() -> None:
    linked = structured_pair()
    linked.say(meta_context(Option.SET_META_CONTEXT, "disk", [c.BASE_ALLOCATION]))
    linked.say(meta_context(Option.SET_META_CONTEXT, "disk", [BITMAP]) + go("disk"))
    assert linked.contexts == {1: BITMAP}


@pytest.mark.parametrize(
    "failing",
    [
        option(Option.SET_META_CONTEXT, b"\0"),
        meta_context(Option.SET_META_CONTEXT, "nothing", [BITMAP]),
        meta_context(Option.SET_META_CONTEXT, "disk", [BITMAP], count=2),
        option(Option.SET_META_CONTEXT, bytes(300_000)),
    ],
    ids=["malformed", "unknown export", "short", "too long to look at"],
)
def test_selection_that_fails_replaces_too(failing: bytes) -> None:
    linked = structured_pair()
    linked.say(meta_context(Option.SET_META_CONTEXT, "disk", [BITMAP]))
    linked.client.option_replies()
    assert replies(linked, failing)[0].is_error
    linked.say(go("disk"))
    assert linked.contexts == {}


def test_listing_leaves_the_selection_alone() -> None:
    linked = structured_pair()
    linked.say(meta_context(Option.SET_META_CONTEXT, "disk", [BITMAP]))
    linked.say(meta_context(Option.LIST_META_CONTEXT, "disk", ["base:"]) + go("disk"))
    assert linked.contexts == {1: BITMAP}


@pytest.mark.parametrize("number", [Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT])
@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"", OptionReply.ERR_INVALID),
        (string("disk"), OptionReply.ERR_INVALID),
        (string("disk") + b"\0\0\0", OptionReply.ERR_INVALID),
        (string("disk") + struct.pack(">I", 1), OptionReply.ERR_INVALID),
        (string("disk") + struct.pack(">II", 1, 100) + b"base:", OptionReply.ERR_INVALID),
        (string("disk") + struct.pack(">I", 0) + b"\0", OptionReply.ERR_INVALID),
        (string("disk") + struct.pack(">I", 1) + string(b"\xff"), OptionReply.ERR_INVALID),
        (string("disk") + struct.pack(">I", 1) + string("x" * 4097), OptionReply.ERR_TOO_BIG),
        (string("disk") + struct.pack(">I", 2**32 - 1), OptionReply.ERR_TOO_BIG),
        (string("disk") + struct.pack(">I", 1025) + string("a:b") * 1025, OptionReply.ERR_TOO_BIG),
    ],
)
def test_malformed_meta_context_is_refused_and_skipped(number: Option, data: bytes, error: OptionReply) -> None:
    linked = structured_pair()
    assert only(linked, option(number, data)) == error
    still_haggling(linked)


def test_most_queries() -> None:
    linked = structured_pair()
    queries = ["a:b"] * 1023 + [BITMAP]
    assert contexts(replies(linked, meta_context(Option.SET_META_CONTEXT, "disk", queries))) == {BITMAP: 1}


def test_matches_never_takes_part_of_a_name() -> None:
    assert not matches(BITMAP, ["qemu:dirty-bitmap"], selecting=False)
    assert not matches(BITMAP, ["qemu:dirty-bitmap:b"], selecting=False)
    assert matches(BITMAP, [BITMAP], selecting=False)


# --- into the transmission phase -------------------------------------------------------------------------------------


def test_go_and_requests_may_share_a_segment() -> None:
    linked = pair()
    linked.say(go("disk") + wire.request(c.CMD_READ, 0, 512, cookie=7) + wire.request(c.CMD_DISC))
    assert linked.heard[-2:] == [(c.CMD_READ, 0, 7, 0, 512, None), (c.CMD_DISC, 0, 0, 0, 0, None)]
    assert linked.ended


# --- shutting down ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [each for each in Option if each not in (Option.EXPORT_NAME, Option.ABORT)])
@pytest.mark.parametrize("data", [b"", b"some data", bytes(300_000)])
def test_options_are_refused_while_the_server_shuts_down(number: Option, data: bytes) -> None:
    linked = pair()
    linked.server.shut_down()
    assert only(linked, option(number, data)) == OptionReply.ERR_SHUTDOWN
    assert linked.heard == []
    assert not linked.server.structured
    assert only(linked, option(Option.ABORT)) == OptionReply.ACK
    assert linked.ended


def test_export_name_ends_the_connection_while_the_server_shuts_down() -> None:
    linked = pair()
    linked.server.shut_down()
    with pytest.raises(ProtocolError, match="shutting down"):
        linked.say(option(Option.EXPORT_NAME, b"disk"))
