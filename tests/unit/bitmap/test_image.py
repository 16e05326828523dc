"""The file of a bitmap: what is written is read again, and nothing else is."""

from __future__ import annotations

import struct
import zlib
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdmirror.bitmap.image import (
    IDENTITY_MAX,
    PAGE,
    Head,
    ImageError,
    State,
    Sync,
    Worth,
    check_content,
    file_name,
    region_size_of,
)
from nbdmirror.units import GiB, KiB, MiB, TiB

NOW, BEFORE = b"n" * 16, b"b" * 16
HEAD = Head("b0", 10 * MiB + 1, 64 * KiB, "file, inode 12", bytes(range(16)), 4 * MiB)
STATE = State(7, in_use=True, recording=True, sync=Sync.BARRIER, boot_id=NOW)

heads = st.builds(
    Head,
    name=st.text(st.characters(codec="utf-8"), min_size=1, max_size=255),
    size=st.integers(0, 2**63 - 1),
    granularity=st.integers(9, 31).map(lambda bits: 1 << bits),
    identity=st.text(st.characters(codec="utf-8"), max_size=400),
    uuid=st.binary(min_size=16, max_size=16),
    region_size=st.integers(22, 40).map(lambda bits: 1 << bits),
)
states = st.builds(
    State,
    generation=st.integers(0, 2**64 - 1),
    in_use=st.booleans(),
    recording=st.booleans(),
    sync=st.sampled_from(Sync),
    boot_id=st.binary(min_size=16, max_size=16),
    unsure=st.booleans(),
    bits_crc=st.integers(0, 2**32 - 1),
)


@given(heads)
def test_head_is_read_as_it_was_written(head: Head) -> None:
    page = head.encode()
    assert len(page) == PAGE
    assert Head.decode(page) == head


@given(states)
def test_state_is_read_as_it_was_written(state: State) -> None:
    sector = state.encode()
    assert len(sector) == 512
    assert State.decode(sector + bytes(PAGE - 512)) == state


def test_longest_texts_fit() -> None:
    head = replace(HEAD, name="ä" * 511 + "x", identity="x" * IDENTITY_MAX)
    assert Head.decode(head.encode()) == head


@given(st.integers(0, PAGE - 1), st.integers(1, 255))
def test_any_byte_of_the_head_that_changes_is_noticed(at: int, change: int) -> None:
    page = bytearray(HEAD.encode())
    page[at] ^= change
    with pytest.raises(ImageError):
        Head.decode(bytes(page))


@given(st.integers(0, 511), st.integers(1, 255))
def test_any_byte_of_the_state_that_changes_is_noticed(at: int, change: int) -> None:
    sector = bytearray(STATE.encode())
    sector[at] ^= change
    with pytest.raises(ImageError, match="state"):
        State.decode(bytes(sector))


def sealed(page: bytes) -> bytes:
    return page[:-4] + struct.pack("<I", zlib.crc32(page[:-4]))


def test_what_is_refused_is_named() -> None:
    page = HEAD.encode()
    for found, reason in (
        (b"", "no bitmap of nbdmirror"),
        (page[: PAGE - 1], "no bitmap of nbdmirror"),
        (bytes(PAGE), "no bitmap of nbdmirror"),
        (page[:8] + struct.pack("<I", 2) + page[12:], "version 2, and this nbdmirror knows up to 1: use a newer one"),
        (page[:100] + b"x" + page[101:], "checksum of its head"),
        (sealed(page[:12] + struct.pack("<I", 1000) + page[16:]), "granularity makes no sense"),
        (sealed(page[:-200] + page[-200:]).replace(b"b0file", b"\xff\xfefile"), "checksum of its head"),
        (sealed(page.replace(b"b0file", b"\xff\xfefile")), "its name is no text"),
    ):
        with pytest.raises(ImageError, match=reason):
            Head.decode(found)
    state = STATE.encode()
    with pytest.raises(ImageError, match="state makes no sense"):
        State.decode(sealed(state[:16] + struct.pack("<I", 8) + state[20:]))


def test_layout() -> None:
    assert (HEAD.regions_length, HEAD.bits_offset, HEAD.bits_length, HEAD.file_length) == (4096, 12288, 21, 16384)
    big = Head("b", 16 * TiB, 64 * KiB, "", bytes(16), region_size_of(16 * TiB))
    assert (big.region_size, big.regions_length, big.bits_length) == (32 * MiB, 64 * KiB, 32 * MiB)
    coarse = Head("b", 16 * TiB, 2 * GiB, "", bytes(16), region_size_of(16 * TiB))
    assert coarse.bits_length == 1024
    empty = Head("b", 0, 512, "", bytes(16), region_size_of(0))
    assert (empty.regions_length, empty.bits_length, empty.file_length) == (0, 0, 8192)
    assert region_size_of(1) == region_size_of(2 * TiB) == 4 * MiB
    assert region_size_of(2 * TiB + 1) == 8 * MiB


@pytest.mark.parametrize(
    ("state", "worth"),
    [
        (replace(STATE, in_use=False, boot_id=BEFORE), Worth.EXACT),
        (STATE, Worth.EXACT),
        (replace(STATE, boot_id=BEFORE, sync=Sync.LAZY), Worth.NOTHING),
        (replace(STATE, boot_id=BEFORE, sync=Sync.BARRIER), Worth.FLUSHED),
        (replace(STATE, boot_id=BEFORE, sync=Sync.INTENT), Worth.REGIONS),
        (replace(STATE, unsure=True, sync=Sync.LAZY), Worth.NOTHING),
        (replace(STATE, unsure=True, sync=Sync.BARRIER), Worth.FLUSHED),
        (replace(STATE, unsure=True, sync=Sync.INTENT), Worth.REGIONS),
    ],
)
def test_worth_of_the_bits(state: State, worth: Worth) -> None:
    assert state.worth(NOW) is worth


def content(head: Head = HEAD, bits: bytes = b"") -> bytearray:
    made = bytearray(head.file_length)
    made[head.bits_offset : head.bits_offset + len(bits)] = bits
    return made


def test_content_is_checked_as_far_as_it_can_be() -> None:
    stored = bytes(20) + b"\1"
    clean = replace(STATE, in_use=False, bits_crc=zlib.crc32(stored))
    check_content(HEAD, clean, content(bits=stored))
    check_content(HEAD, STATE, content(bits=b"\1" * 21))
    with pytest.raises(ImageError, match="checksum of its bits"):
        check_content(HEAD, clean, content(bits=b"\1" * 21))
    for state in (clean, STATE):
        with pytest.raises(ImageError, match="behind the end of the disk"):
            check_content(HEAD, state, content(bits=bytes(20) + b"\2"))
    on_record = content(bits=stored)
    on_record[8192] = 1
    check_content(HEAD, STATE, on_record)
    with pytest.raises(ImageError, match="regions on record"):
        check_content(HEAD, clean, on_record)


def test_file_names_are_short_safe_and_different() -> None:
    names = ["b0", "a/b", "..", ".", "a\nb", "\0", "ä" * 511, "x" * 1023, "x" * 1022 + "y", "b0 "]
    files = [file_name(name, identity) for name in names for identity in ("one", "two")]
    assert len(set(files)) == len(files)
    for file in files:
        assert len(file.encode()) <= 255
        assert file.endswith(".nbm")
        assert not {"/", "\n", "\0"} & set(file)
    assert file_name("b0", "one").startswith("b0-")
