"""Payloads that wait for room before their buffer is made."""

from __future__ import annotations

from typing import Final

import pytest

from nbdmirror.protocol import constants as c
from nbdmirror.protocol.connection import ServerConnection
from nbdmirror.protocol.messages import ExportQuery, Opened
from nbdmirror.protocol.receiver import IN_WINDOW
from tests.support.linked_pair import export
from tests.support.wire_client import client_flags, go, request

LARGE: Final = 2 * IN_WINDOW


def opened(taken: list[int]) -> ServerConnection:
    def take(length: int) -> bytearray:
        taken.append(length)
        return bytearray(b"\xff" * length)

    connection = ServerConnection(take_buffer=take, large_payload=LARGE)
    say(connection, client_flags() + go())
    assert isinstance(connection.next_event(), ExportQuery)
    connection.accept(export())
    assert isinstance(connection.next_event(), Opened)
    return connection


def say(connection: ServerConnection, data: bytes) -> int:
    """Until all is said, or there is no room for more."""
    at = 0
    while at < len(data) and (buffer := connection.get_buffer()):
        count = min(len(buffer), len(data) - at)
        buffer[:count] = data[at : at + count]
        connection.buffer_updated(count)
        at += count
        if connection.is_open:
            break
    return at


def test_a_payload_that_is_not_large_needs_no_permission() -> None:
    taken: list[int] = []
    connection = opened(taken)
    said = request(c.CMD_WRITE, 0, payload=b"x" * LARGE)
    while said:
        said = said[say(connection, said) :]
        asked = connection.next_request()
    assert asked is not None
    assert asked.payload == b"x" * LARGE
    assert taken == [LARGE]
    assert not connection.awaits_room


@pytest.mark.parametrize("times", [1, 3])
def test_a_large_one_has_no_buffer_before_it_is_admitted(times: int) -> None:
    taken: list[int] = []
    connection = opened(taken)
    payload = bytes(range(256)) * (LARGE // 256) + b"!"
    said = request(c.CMD_WRITE, 0, payload=payload)
    for number in range(1, times + 1):
        left = said[say(connection, said) :]
        for _ in range(2):
            assert connection.next_request() is None
            assert connection.awaits_room == len(payload)
            assert len(taken) == number - 1
        connection.admit_payload()
        assert not connection.awaits_room
        asked = connection.next_request()
        while asked is None:
            assert left
            left = left[say(connection, left) :]
            asked = connection.next_request()
        assert asked.payload == payload
        assert taken == [len(payload)] * number
