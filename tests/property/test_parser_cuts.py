"""Bytes may arrive in any pieces: what they mean does not depend on where they were cut, nor on what follows.

Each script is a whole session from the client's flags to DISC. It is fed whole, byte by byte (the large ones in pieces of
many sizes), in pieces that hypothesis chooses, and with bytes behind its end.
"""

from __future__ import annotations

import functools
import struct
from typing import Any, Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdmirror.protocol import constants as c
from nbdmirror.protocol.constants import Option
from tests.support.linked_pair import LinkedPair, export
from tests.support.wire_client import (
    client_flags,
    extended_request,
    go,
    go_data,
    info,
    meta_context,
    option,
    request,
    string,
)

CONTEXTS: Final = (c.BASE_ALLOCATION, "qemu:dirty-bitmap:b0")
STRUCTURED: Final = option(Option.STRUCTURED_REPLY)
EXTENDED: Final = option(Option.EXTENDED_HEADERS)
DISC: Final = request(c.CMD_DISC)
READS: Final = b"".join(request(c.CMD_READ, at * 4096, 4096, cookie=at) for at in range(5))


def write(length: int, *, cookie: int = 1, offset: int = 0) -> bytes:
    return request(c.CMD_WRITE, offset, payload=(bytes(range(251)) * (length // 251 + 1))[:length], cookie=cookie)


def every_option() -> bytes:
    names = [Option.LIST, Option.STARTTLS, Option.PEEK_EXPORT, 4711]
    asked = meta_context(Option.LIST_META_CONTEXT, "disk"), meta_context(Option.SET_META_CONTEXT, "disk", CONTEXTS)
    haggling = b"".join(option(name) for name in names) + b"".join(asked) + STRUCTURED + b"".join(asked)
    return haggling + info("disk", [0, 1, 2, 3, 99]) + info("nothing") + info() + go("nothing") + go("disk", [3])


def every_malformed_option() -> bytes:
    data = [b"", b"\0", struct.pack(">I", 2**32 - 1), string("disk"), go_data("disk") + b"\0", string(b"\xff") + b"\0\0"]
    numbers = (0, 2, 3, 5, 6, 7, 8, 9, 10, 11)  # all but EXPORT_NAME; ABORT ends it, so it stands elsewhere
    malformed = [
        option(number, each)
        for number in numbers
        for each in data
        if number != Option.ABORT and (each or number != Option.EXTENDED_HEADERS)  # there, no data is right
    ]
    return STRUCTURED + b"".join(malformed) + option(Option.LIST, b"x" * 5000)


def every_extended_request() -> bytes:
    commands = [*range(2), *range(3, 9), 65535]
    others = [command for command in commands if command != c.CMD_WRITE]
    plain = [extended_request(command, 4096, 512, cookie=command) for command in others]
    plain.append(extended_request(c.CMD_WRITE, 4096, payload=b"\x23" * 512, flags=0))
    payloads = [
        extended_request(command, 0, payload=b"\x21" * (70 * command % 997 + 1), cookie=command) for command in commands
    ]
    lengths = [extended_request(command, 0, length, flags=0) for command in others for length in (0, 1 << 32, 2**64 - 1)]
    return b"".join(plain + payloads + lengths)


def extended_write(length: int) -> bytes:
    return extended_request(c.CMD_WRITE, 0, payload=(bytes(range(251)) * (length // 251 + 1))[:length])


def every_request() -> bytes:
    many = [
        request(command, offset, length, cookie=number, flags=flags)
        for number, (command, offset, length, flags) in enumerate(
            [
                (c.CMD_READ, 0, 8192, 0),
                (c.CMD_READ, 0, 8192, c.DF),
                (c.CMD_READ, 1 << 40, 1, 0),
                (c.CMD_READ, 0, 0, 0),
                (c.CMD_READ, 2**64 - 1, 2**32 - 1, 0xFFFF),
                (c.CMD_FLUSH, 0, 0, c.FUA),
                (c.CMD_TRIM, 4096, 4096, 0),
                (c.CMD_CACHE, 0, 100, 0),
                (c.CMD_WRITE_ZEROES, 0, 4096, c.NO_HOLE | c.FAST_ZERO),
                (c.CMD_BLOCK_STATUS, 0, 65536, c.REQ_ONE),
                (8, 0, 0, 0),
                (65535, 1, 2, 3),
            ]
        )
    ]
    return b"".join(many) + write(0, cookie=98) + write(1, cookie=99) + write(4096) + READS


EXTENDED_OPEN: Final = (
    client_flags() + EXTENDED + meta_context(Option.SET_META_CONTEXT, "disk", CONTEXTS) + STRUCTURED + go("disk")
)
EXTENDED_DISC: Final = extended_request(c.CMD_DISC)
EXTENDED_READS: Final = b"".join(extended_request(c.CMD_READ, at * 4096, 4096, cookie=at) for at in range(5))
OPEN: Final = client_flags() + STRUCTURED + meta_context(Option.SET_META_CONTEXT, "disk", CONTEXTS) + go("disk")

SMALL: Final = {
    "every option": client_flags() + every_option() + READS + DISC,
    "every malformed option": client_flags() + every_malformed_option() + go("disk") + READS + DISC,
    "abort": client_flags() + STRUCTURED + option(Option.ABORT, b"data"),
    "export name": client_flags() + option(Option.EXPORT_NAME, b"disk") + READS + DISC,
    "export name with zeroes": client_flags(1) + option(Option.EXPORT_NAME, b"disk") + READS + DISC,
    "every extended request": EXTENDED_OPEN + every_extended_request() + EXTENDED_READS + EXTENDED_DISC,
    "every request": OPEN + every_request() + DISC,
    "every request, simple replies": client_flags() + go("disk") + every_request() + DISC,
    "many small writes": OPEN + b"".join(write(at % 300, cookie=at) for at in range(200)) + DISC,
    "oversize write": client_flags() + go("little") + write(5000) + READS + write(4097) + write(4096) + DISC,
}

LARGE: Final = {
    "options that are skipped": client_flags()
    + option(4711, bytes(300_000))
    + info("disk")
    + option(7, bytes(262_129))
    + go()
    + DISC,
    "longest option": client_flags() + info("disk", [1] * 65535) + go("disk", [2] * 65535) + READS + DISC,
    "extended headers": EXTENDED_OPEN
    + extended_write(65536)
    + EXTENDED_READS
    + extended_write(65537)
    + extended_request(c.CMD_BLOCK_STATUS, 0, payload=bytes(300_000))
    + EXTENDED_READS
    + extended_write(1 << 20)
    + EXTENDED_READS
    + EXTENDED_DISC,
    "64 KiB": OPEN + write(65536) + READS + write(65535) + READS + DISC,
    "64 KiB + 1": OPEN + write(65537) + READS + write(4096) + write(65537) + DISC,
    "1 MiB": OPEN + write(1 << 20) + READS + write(1) + write(1 << 20, offset=4096) + READS + DISC,
    "oversize": client_flags() + go("little") + write(1 << 20) + READS + write(65537) + write(100) + write(200_000) + DISC,
}


def session(script: bytes, *pieces: int) -> tuple[list[tuple[Any, ...]], bytes, bool]:
    """What the server heard and what it answered. The last piece size is used for all the rest."""
    linked = LinkedPair(
        [export("disk", contexts=CONTEXTS, description="a disk"), export(""), export("little", 65536, maximum_payload=4096)]
    )
    at = 0
    for piece in pieces[:-1]:
        linked.say(script[at : at + piece])
        at += piece
    linked.say(script[at:], pieces[-1] if pieces else None)
    return linked.heard, bytes(linked.sent), linked.ended


@functools.cache
def whole(script: bytes) -> tuple[list[tuple[Any, ...]], bytes, bool]:
    return session(script)


@pytest.mark.parametrize("script", SMALL.values(), ids=SMALL)
def test_byte_by_byte(script: bytes) -> None:
    heard, sent, ended = whole(script)
    assert ended
    assert session(script, 1) == (heard, sent, ended)


@pytest.mark.parametrize("script", SMALL.values(), ids=SMALL)
def test_cut_once_anywhere(script: bytes) -> None:
    """The first kilobyte at every byte, the rest wherever it falls."""
    for at in [*range(1, min(len(script), 500)), *range(500, len(script), 97)]:
        assert session(script, at, len(script)) == whole(script)


@pytest.mark.parametrize("script", [*SMALL.values(), *LARGE.values()], ids=[*SMALL, *LARGE])
@pytest.mark.parametrize("behind", [b"\0", DISC, b"\xff" * 5000])
def test_what_follows_the_end_changes_nothing(script: bytes, behind: bytes) -> None:
    assert whole(script)[2]
    assert session(script + behind) == whole(script)


@pytest.mark.parametrize("script", LARGE.values(), ids=LARGE)
@pytest.mark.parametrize("piece", [97, 1448, 4095, 4096, 4097, 65536, 65563, 262_144])
def test_large_in_pieces(script: bytes, piece: int) -> None:
    assert session(script, piece) == whole(script)


def test_write_just_over_the_window_byte_by_byte() -> None:
    script = LARGE["64 KiB + 1"]
    assert session(script, 1) == whole(script)


@settings(max_examples=60, deadline=None)
@given(
    script=st.sampled_from([*SMALL.values(), *LARGE.values()]),
    pieces=st.lists(
        st.one_of(st.integers(1, 40), st.sampled_from([4095, 4096, 4097, 65535, 65536, 65564, 65565])), min_size=1, max_size=40
    ),
    rest=st.integers(500, 300_000),
)
def test_chosen_cuts(script: bytes, pieces: list[int], rest: int) -> None:
    assert session(script, *pieces, rest) == whole(script)


def test_scripts_say_what_they_mean_to() -> None:
    """Scripts that end early would test nothing."""
    heard = whole(SMALL["every request"])[0]
    assert [each[0] for each in heard[-6:]] == [c.CMD_READ] * 5 + [c.CMD_DISC]
    assert {each[0] for each in heard if isinstance(each[0], int)} == {*range(8), 8, 65535}
    assert next(each[5] for each in heard if each[0] == c.CMD_WRITE and each[5] is not None) == b""
    extended = whole(SMALL["every extended request"])[0]
    assert [each[0] for each in extended[-6:]] == [c.CMD_READ] * 5 + [c.CMD_DISC]
    assert {each[0] for each in extended if isinstance(each[0], int)} == {*range(9), 65535}
    assert [each[4] for each in whole(LARGE["extended headers"])[0] if each[0] == c.CMD_WRITE] == [65536, 65537, 1 << 20]
    oversize = whole(LARGE["oversize"])[0]
    assert [(each[4], each[5] is None) for each in oversize if each[0] == c.CMD_WRITE] == [
        (1 << 20, True),
        (65537, True),
        (100, False),
        (200_000, True),
    ]
    skipped = whole(LARGE["options that are skipped"])
    assert len(skipped[0]) == 4
