"""Where received bytes lie: in place, in bounded memory, never lost."""

from __future__ import annotations

import pytest

from nbdmirror.protocol.receiver import IN_WINDOW, WINDOW_AFTER_BIG, WINDOW_MAX, WINDOW_START, Receiver


def arrive(receiver: Receiver, data: bytes) -> None:
    """As many calls as the buffers need."""
    at = 0
    while at < len(data):
        buffer = receiver.get_buffer()
        assert len(buffer) > 0
        count = min(len(buffer), len(data) - at)
        buffer[:count] = data[at : at + count]
        receiver.buffer_updated(count)
        at += count


def pattern(length: int) -> bytes:
    return (bytes(range(251)) * (length // 251 + 1))[:length]


def taken(receiver: Receiver, length: int) -> bytes:
    data = bytes(receiver.view(length))
    receiver.consume(length)
    return data


def test_idle_connection_costs_little() -> None:
    assert len(Receiver().get_buffer()) == len(Receiver().window) == WINDOW_START


def test_what_is_needed_is_waited_for() -> None:
    receiver = Receiver()
    arrive(receiver, b"abc")
    assert not receiver.need(4)
    arrive(receiver, b"d")
    assert receiver.need(4)
    assert receiver.available == 4
    assert taken(receiver, 4) == b"abcd"
    assert receiver.available == 0


def test_view_behind_others() -> None:
    receiver = Receiver()
    arrive(receiver, b"headbody")
    assert bytes(receiver.view(4, skip=4)) == b"body"


def test_window_grows_while_the_peer_fills_it_up_to_its_bound() -> None:
    receiver = Receiver()
    sizes = []
    for _ in range(6):
        buffer = receiver.get_buffer()
        sizes.append(len(buffer))
        receiver.buffer_updated(len(buffer))
        receiver.consume(receiver.available)
    assert sizes == [WINDOW_START, 4 * WINDOW_START, 16 * WINDOW_START, WINDOW_MAX, WINDOW_MAX, WINDOW_MAX]


def test_window_stays_small_for_small_talk() -> None:
    receiver = Receiver()
    for _ in range(1000):
        arrive(receiver, bytes(28))
        receiver.consume(28)
    assert len(receiver.window) == WINDOW_START


@pytest.mark.parametrize("length", [WINDOW_START + 1, 3 * WINDOW_START, IN_WINDOW + 28, WINDOW_MAX])
@pytest.mark.parametrize("before", [0, 1, 4000])
def test_window_becomes_large_enough_for_what_is_needed(length: int, before: int) -> None:
    receiver = Receiver()
    data = pattern(before + length)
    arrive(receiver, data[: before + 1])
    receiver.consume(before)
    assert not receiver.need(length)
    arrive(receiver, data[before + 1 :])
    assert receiver.need(length)
    assert taken(receiver, length) == data[before:]
    assert len(receiver.window) <= WINDOW_MAX


def test_never_more_than_the_bound() -> None:
    receiver = Receiver()
    assert not receiver.need(10 * WINDOW_MAX)
    receiver.get_buffer()
    assert len(receiver.window) == WINDOW_MAX


def test_bytes_at_the_end_of_the_window_move_to_its_beginning() -> None:
    receiver = Receiver()
    arrive(receiver, pattern(WINDOW_START - 10))
    receiver.consume(WINDOW_START - 20)
    buffer = receiver.get_buffer()
    assert len(buffer) == WINDOW_START - 10
    assert taken(receiver, 10) == pattern(WINDOW_START - 10)[-10:]


def test_view_lives_until_the_next_buffer_even_when_the_window_is_replaced() -> None:
    receiver = Receiver()
    arrive(receiver, pattern(WINDOW_START))
    view = receiver.view(100)
    receiver.consume(WINDOW_START)
    receiver.get_buffer()
    assert len(receiver.window) > WINDOW_START
    assert bytes(view) == pattern(100)


@pytest.mark.parametrize("held", [0, 5, 100, 4000])
@pytest.mark.parametrize("length", [100, IN_WINDOW + 1, 1 << 20])
def test_payload_of_its_own(length: int, held: int) -> None:
    receiver = Receiver()
    data = pattern(length) + b"next"
    arrive(receiver, data[:held])
    receiver.begin_payload(length)
    if held < length:
        assert receiver.finish_payload() is None
        arrive(receiver, data[held:length])
    payload = receiver.finish_payload()
    assert payload is not None
    assert payload == data[:length]
    assert receiver.finish_payload() is None
    arrive(receiver, data[max(length, held) :])
    assert receiver.available == 4
    assert taken(receiver, 4) == b"next"


def test_payload_is_received_to_its_own_end_only() -> None:
    receiver = Receiver()
    receiver.begin_payload(100_000)
    assert len(receiver.get_buffer()) == 100_000
    receiver.buffer_updated(99_999)
    assert len(receiver.get_buffer()) == 1
    assert receiver.finish_payload() is None


def big_payload(receiver: Receiver) -> None:
    receiver.begin_payload(100_000)
    while receiver.finish_payload() is None:
        receiver.buffer_updated(len(receiver.get_buffer()))


def test_after_a_big_payload_little_is_read_ahead() -> None:
    receiver = Receiver()
    receiver.need(WINDOW_MAX)
    assert len(receiver.get_buffer()) == WINDOW_MAX
    for _ in range(3):
        big_payload(receiver)
        assert len(receiver.get_buffer()) == WINDOW_AFTER_BIG
        arrive(receiver, bytes(1000))  # a header, and the begin of the next payload


def test_when_no_other_big_payload_follows_all_of_the_window_is_used_again() -> None:
    receiver = Receiver()
    receiver.need(WINDOW_MAX)
    receiver.get_buffer()
    big_payload(receiver)
    for expected in (WINDOW_AFTER_BIG, WINDOW_AFTER_BIG, WINDOW_MAX, WINDOW_MAX):
        assert len(receiver.get_buffer()) == expected
        arrive(receiver, bytes(28))
        receiver.consume(28)


@pytest.mark.parametrize("held", [0, 3, 10, 15])
def test_skip(held: int) -> None:
    receiver = Receiver()
    data = b"0123456789after"
    arrive(receiver, data[:held])
    receiver.skip(10)
    assert receiver.is_skipping == (held < 10)
    arrive(receiver, data[held:])
    assert not receiver.is_skipping
    assert taken(receiver, receiver.available) == b"after"


def test_skipping_takes_no_memory() -> None:
    receiver = Receiver()
    receiver.skip(10_000_000)
    arrive(receiver, bytes(9_999_999))
    assert receiver.is_skipping
    assert receiver.available == 0
    assert len(receiver.window) <= WINDOW_MAX
    arrive(receiver, b"xy")
    assert taken(receiver, 1) == b"y"
