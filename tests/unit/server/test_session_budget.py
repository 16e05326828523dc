"""A session's part of the budget, over a transport that the test fills and empties."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

import pytest

from nbdmirror.devices.memory import MemoryDevice
from nbdmirror.protocol import constants as c
from nbdmirror.server.budget import LARGE, Budget
from nbdmirror.server.export import Export
from nbdmirror.server.session import Session
from nbdmirror.server.shared import Shared
from tests.support.fakes import settled
from tests.support.wire_client import client_flags, go, request

if TYPE_CHECKING:
    from collections.abc import Iterable

LENGTH: Final = 2 * LARGE


class FakeTransport(asyncio.Transport):
    """Keeps everything until `drain`; pauses its protocol at once, as uvloop does at the end of a turn of the loop."""

    def __init__(self, protocol: Session) -> None:
        super().__init__()
        self.protocol = protocol
        self.held = 0
        self.high = 0

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self.high = high or 0

    def get_write_buffer_size(self) -> int:
        return self.held

    def is_closing(self) -> bool:
        return False

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass

    def writelines(self, list_of_data: Iterable[Any]) -> None:
        self.held += sum(map(len, list_of_data))
        if self.held > self.high:
            self.protocol.pause_writing()

    def drain(self) -> None:
        self.held = 0
        self.protocol.resume_writing()


def say(session: Session, data: bytes) -> None:
    while data:
        buffer = session.get_buffer(-1)
        count = min(len(buffer), len(data))
        buffer[:count] = data[:count]
        data = data[count:]
        session.buffer_updated(count)


@pytest.fixture
def budget() -> Budget:
    return Budget()


@pytest.fixture
def session(budget: Budget) -> Session:
    made = Session({"": Export("", MemoryDevice(LENGTH))}, lambda _: None, Shared(budget=budget))
    made.connection_made(FakeTransport(made))
    say(made, client_flags() + go())
    return made


def transport_of(session: Session) -> FakeTransport:
    assert isinstance(session._transport, FakeTransport)
    return session._transport


async def test_a_reply_is_paid_for_until_the_transport_has_sent_nearly_all_of_it(session: Session, budget: Budget) -> None:
    transport = transport_of(session)
    say(session, b"".join(request(c.CMD_READ, 0, LENGTH, cookie=number) for number in range(3)))
    await settled()
    assert session.write_paused
    assert transport.held > LENGTH
    # The others were made while the first was on its way: they are handed over only now, and are not free before they are sent.
    assert budget.spent == 3 * LENGTH
    transport.drain()
    assert transport.held > 2 * LENGTH
    assert budget.spent >= transport.held // LENGTH * LENGTH
    transport.drain()
    await settled()
    assert (transport.held, budget.spent) == (0, 0)


async def test_a_connection_that_is_lost_pays_everything_back(session: Session, budget: Budget) -> None:
    say(session, b"".join(request(c.CMD_READ, 0, LENGTH, cookie=number) for number in range(2)))
    await settled()
    assert budget.spent == 2 * LENGTH
    session.connection_lost(None)
    assert budget.spent == 0


async def test_what_has_moved_is_what_was_received_and_sent(session: Session) -> None:
    transport = transport_of(session)
    before = session.moved()
    assert before is not None
    say(session, request(c.CMD_READ, 0, LENGTH))
    assert session.moved() == before + 28, "the task has not begun"
    await settled()
    assert session.moved() == before + 28
    held = transport.held
    transport.drain()
    assert session.moved() == before + 28 + held
