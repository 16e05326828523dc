"""Buffers that are used again: by nobody else in the meantime, and in bounded number."""

from __future__ import annotations

from nbdmirror.server.buffers import BYTES_KEPT, LENGTHS_KEPT, BufferPool, ReadBuffers
from nbdmirror.units import KiB, MiB


def kept(pool: BufferPool) -> int:
    return sum(len(buffer) for spare in pool.spare.values() for buffer in spare)


def test_a_buffer_comes_again_once_it_is_given_back() -> None:
    pool = BufferPool()
    one, two = pool.take(4096), pool.take(4096)
    assert one is not two
    pool.give([one])
    assert pool.take(4096) is one
    assert pool.take(4096) is not one


def test_each_length_has_its_own() -> None:
    pool = BufferPool()
    pool.give([bytearray(512), bytearray(4096), bytearray(512)])
    assert [len(pool.take(length)) for length in (512, 512, 512, 4096, 1)] == [512, 512, 512, 4096, 1]


def test_what_is_kept_is_bounded() -> None:
    pool = BufferPool()
    for power in range(9, 21):
        pool.give([bytearray(1 << power) for _ in range(5 * MiB >> power)])
    assert kept(pool) == LENGTHS_KEPT * BYTES_KEPT
    pool.give([bytearray(BYTES_KEPT + 1)])
    assert kept(pool) == (LENGTHS_KEPT - 1) * BYTES_KEPT


def test_what_a_client_has_not_taken_yet_is_lent_to_nobody() -> None:
    pool = BufferPool()
    slow, other = ReadBuffers(pool), ReadBuffers(pool)
    lent = [slow.take(64 * KiB) for _ in range(3)]
    slow.handed_over()
    assert all(other.take(64 * KiB) is not buffer for buffer in lent for _ in range(4))
    slow.all_sent()
    assert {id(other.take(64 * KiB)) for _ in range(3)} == {id(buffer) for buffer in lent}


def test_what_goes_on_being_read_from_is_never_used_again() -> None:
    pool = BufferPool()
    client = ReadBuffers(pool)
    lent = client.take(4096)
    client.let_go()
    client.handed_over()
    client.all_sent()
    assert client.take(4096) is not lent
