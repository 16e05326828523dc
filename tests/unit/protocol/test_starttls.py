"""STARTTLS in the haggling: what each mode answers, and that nothing said in clear text counts afterwards."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import pytest

from nbdmirror.errors import ProtocolError
from nbdmirror.protocol import constants as c
from nbdmirror.protocol.connection import ServerConnection
from nbdmirror.protocol.constants import Option, OptionReply, TlsMode
from nbdmirror.protocol.messages import StartTls
from tests.support import wire_client as wire
from tests.support.linked_pair import ALL_FLAGS, LinkedPair, export
from tests.support.wire_client import client_flags, go, info, meta_context, option

if TYPE_CHECKING:
    from tests.support.wire_client import Answered

STARTTLS = option(Option.STARTTLS)
STRUCTURED = option(Option.STRUCTURED_REPLY)
HAS_TLS = [TlsMode.ON, TlsMode.REQUIRE]


def pair(tls: TlsMode, flags: int = wire.CLIENT_FLAGS) -> LinkedPair:
    linked = LinkedPair([export(), export("disk", 12345)], tls)
    linked.client.greeting()
    linked.say(client_flags(flags))
    return linked


def replies(linked: LinkedPair, data: bytes) -> list[Answered]:
    linked.say(data)
    return linked.client.option_replies()


def only(linked: LinkedPair, data: bytes) -> int:
    (reply,) = replies(linked, data)
    assert reply.option == int.from_bytes(data[8:12], "big")
    return reply.reply


def encrypted(tls: TlsMode) -> LinkedPair:
    linked = pair(tls)
    assert only(linked, STARTTLS) == OptionReply.ACK
    return linked


def feed(connection: ServerConnection, data: bytes) -> None:
    buffer = connection.get_buffer()
    buffer[: len(data)] = data
    connection.buffer_updated(len(data))


# --- off -------------------------------------------------------------------------------------------------------------


def test_off_refuses_and_never_asks_for_it() -> None:
    linked = pair(TlsMode.OFF)
    (reply,) = replies(linked, STARTTLS)
    assert (reply.reply, reply.data) == (OptionReply.ERR_POLICY, b"TLS not configured")
    assert only(linked, option(4711)) == OptionReply.ERR_UNSUP
    assert replies(linked, go("disk"))[-1].reply == OptionReply.ACK


# --- require ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [0, *(each for each in Option if each not in (1, 2, 5)), 4711, 2**32 - 1])
@pytest.mark.parametrize("data", [b"", b"some data", bytes(70_000), bytes(300_000)])
def test_required_tls_comes_before_every_option(number: int, data: bytes) -> None:
    linked = pair(TlsMode.REQUIRE)
    assert only(linked, option(number, data)) == OptionReply.ERR_TLS_REQD
    assert only(linked, STARTTLS) == OptionReply.ACK
    assert [event for (event,) in linked.heard] == ["StartTls()"]


@pytest.mark.parametrize("name", ["disk", "nothing"])
def test_required_tls_does_not_tell_what_there_is(name: str) -> None:
    linked = pair(TlsMode.REQUIRE)
    asked = [go(name), info(name), option(Option.LIST), meta_context(Option.LIST_META_CONTEXT, name)]
    texts = {reply.data for data in asked for reply in replies(linked, data)}
    assert len(texts) == 1
    assert linked.heard == []


def test_required_tls_does_not_note_structured_replies() -> None:
    linked = pair(TlsMode.REQUIRE)
    linked.say(STRUCTURED)
    linked.say(STARTTLS)
    linked.say(go("disk"))
    assert not linked.server.structured


@pytest.mark.parametrize("name", [b"disk", b"nothing", b"", b"x" * 300_000])
def test_export_name_before_required_tls_ends_the_connection(name: bytes) -> None:
    linked = pair(TlsMode.REQUIRE)
    sent = bytes(linked.sent)
    with pytest.raises(ProtocolError, match="without TLS"):
        linked.say(option(Option.EXPORT_NAME, name))
    assert linked.sent == sent
    assert linked.server.data_to_send() == []
    assert linked.heard == []


@pytest.mark.parametrize("tls", TlsMode)
@pytest.mark.parametrize("data", [b"", b"for no reason"])
def test_abort_before_tls_is_acknowledged(tls: TlsMode, data: bytes) -> None:
    linked = pair(tls)
    assert only(linked, option(Option.ABORT, data)) == OptionReply.ACK
    assert linked.ended


# --- clients without C_FIXED_NEWSTYLE ----------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [0, c.FLAG_NO_ZEROES])
def test_clients_too_old_for_tls_get_no_export_where_it_is_required(flags: int) -> None:
    with pytest.raises(ProtocolError, match="too old for TLS"):
        pair(TlsMode.REQUIRE, flags)


@pytest.mark.parametrize("flags", [0, c.FLAG_NO_ZEROES])
def test_clients_too_old_for_tls_are_served_without_where_it_is_optional(flags: int) -> None:
    linked = pair(TlsMode.ON, flags)
    assert only(linked, STARTTLS) == OptionReply.ERR_POLICY
    linked.say(option(Option.EXPORT_NAME, b"disk"))
    assert linked.server.is_open


# --- on --------------------------------------------------------------------------------------------------------------


def test_optional_tls_serves_without() -> None:
    linked = pair(TlsMode.ON)
    assert next(each.reply for each in replies(linked, option(4711) + go("disk"))) == OptionReply.ERR_UNSUP
    assert linked.server.is_open


def test_optional_tls_serves_export_name_without() -> None:
    linked = pair(TlsMode.ON)
    linked.say(option(Option.EXPORT_NAME, b"disk"))
    assert linked.server.is_open


# --- STARTTLS itself -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tls", HAS_TLS)
def test_nothing_is_parsed_until_tls_has_started(tls: TlsMode) -> None:
    connection = ServerConnection(tls)
    connection.data_to_send()
    feed(connection, client_flags() + STARTTLS)
    assert connection.next_event() == StartTls()
    (ack,) = connection.data_to_send()
    assert ack == struct.pack(">QIII", c.OPTION_REPLY_MAGIC, Option.STARTTLS, OptionReply.ACK, 0)
    feed(connection, go("x"))
    assert connection.next_event() is None
    connection.tls_started()
    assert repr(connection.next_event()).startswith("ExportQuery(name='x'")


@pytest.mark.parametrize("tls", TlsMode)
@pytest.mark.parametrize("data", [b"x", bytes(5000), bytes(300_000)])
def test_starttls_with_data_is_refused_and_skipped(tls: TlsMode, data: bytes) -> None:
    linked = pair(tls)
    error = OptionReply.ERR_INVALID if len(data) < 300_000 else OptionReply.ERR_TOO_BIG
    assert only(linked, option(Option.STARTTLS, data)) == error
    assert linked.heard == []
    assert only(linked, STARTTLS) == (OptionReply.ERR_POLICY if tls is TlsMode.OFF else OptionReply.ACK)


@pytest.mark.parametrize("tls", HAS_TLS)
@pytest.mark.parametrize("data", [b"", b"x"])
def test_second_starttls_is_refused_and_haggling_goes_on(tls: TlsMode, data: bytes) -> None:
    linked = encrypted(tls)
    assert only(linked, option(Option.STARTTLS, data)) == OptionReply.ERR_INVALID
    assert replies(linked, go("disk"))[-1].reply == OptionReply.ACK
    assert linked.info.name == "disk"


@pytest.mark.parametrize("tls", HAS_TLS)
def test_tls_is_never_asked_for_once_it_is_there(tls: TlsMode) -> None:
    linked = encrypted(tls)
    asked = [option(number) for number in (0, 3, 4, 8, 4711)] + [info("nothing"), meta_context(10, "disk")]
    found = {reply.reply for data in asked for reply in replies(linked, data)}
    assert OptionReply.ERR_TLS_REQD not in found
    linked.say(option(Option.EXPORT_NAME, b"disk"))
    assert linked.client.export_name_reply() == (12345, ALL_FLAGS)


@pytest.mark.parametrize(
    "injected", [go("disk"), STRUCTURED, option(Option.ABORT), b"\0", b"\x16\x03\x01", option(Option.EXPORT_NAME, b"disk")]
)
@pytest.mark.parametrize("tls", HAS_TLS)
def test_clear_text_behind_starttls_ends_the_connection(tls: TlsMode, injected: bytes) -> None:
    linked = pair(tls)
    sent = bytes(linked.sent)
    with pytest.raises(ProtocolError, match=f"{len(injected)} bytes in clear text behind STARTTLS"):
        linked.say(STARTTLS + injected)
    assert linked.heard == []
    assert linked.sent == sent
    assert linked.server.data_to_send() == []


# --- what survives ---------------------------------------------------------------------------------------------------


def test_structured_replies_do_not_survive() -> None:
    linked = pair(TlsMode.ON)
    linked.say(STRUCTURED)
    linked.say(STARTTLS)
    linked.client.option_replies()
    assert wire.export_info(replies(linked, go("disk"))) == (12345, ALL_FLAGS & ~c.TFLAG_SEND_DF)
    assert not linked.server.structured


def test_extended_headers_do_not_survive() -> None:
    linked = pair(TlsMode.ON)
    linked.say(option(Option.EXTENDED_HEADERS))
    linked.say(STARTTLS)
    linked.client.option_replies()
    linked.say(option(Option.EXPORT_NAME, b"disk"))  # with extended headers it would be hung up on
    assert linked.client.export_name_reply() == (12345, ALL_FLAGS & ~c.TFLAG_SEND_DF)


def test_meta_contexts_need_structured_replies_again() -> None:
    linked = pair(TlsMode.ON)
    linked.say(STRUCTURED)
    linked.say(STARTTLS)
    linked.client.option_replies()
    assert only(linked, meta_context(Option.SET_META_CONTEXT, "disk", [c.BASE_ALLOCATION])) == OptionReply.ERR_INVALID


def test_meta_contexts_do_not_survive() -> None:
    linked = pair(TlsMode.ON)
    linked.say(STRUCTURED + meta_context(Option.SET_META_CONTEXT, "disk", [c.BASE_ALLOCATION]))
    linked.say(STARTTLS)
    linked.say(STRUCTURED + go("disk"))
    assert linked.server.structured
    assert linked.contexts == {}


@pytest.mark.parametrize(("flags", "zeroes"), [(3, False), (1, True)])
def test_client_flags_survive(flags: int, zeroes: bool) -> None:
    linked = pair(TlsMode.REQUIRE, flags)
    linked.say(STARTTLS)
    linked.client.option_replies()
    linked.say(option(Option.EXPORT_NAME, b"disk"))
    assert linked.client.export_name_reply(zeroes=zeroes) == (12345, ALL_FLAGS & ~c.TFLAG_SEND_DF)
    assert linked.client.unread == b""
