from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdmirror.errors import UsageError
from nbdmirror.units import GiB, KiB, MiB, TiB, format_size, parse_size, round_down, round_up


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("65536", 65536),
        ("512b", 512),
        ("512B", 512),
        ("64k", 64 * KiB),
        ("64K", 64 * KiB),
        ("64kb", 64 * KiB),
        ("64KiB", 64 * KiB),
        ("1.5G", 3 * GiB // 2),
        ("0.5k", 512),
        ("1.000m", MiB),
        ("2 MiB", 2 * MiB),
        (" 4t\n", 4 * TiB),
        ("1p", 1024 * TiB),
        ("8E", 8 * 1024 * 1024 * TiB),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    ["", " ", "k", "-1", "+1", "1.k", ".5k", "1,5k", "1 2", "1kk", "1x", "0x10", "1e9", "5ib", "5bb", "5bib", "٣", "9" * 5000],
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError, match="is not a size"):
        parse_size(text)


@pytest.mark.parametrize("text", ["0.5", "1.0001k", "0.1m"])
def test_fractions_of_a_byte(text: str) -> None:
    with pytest.raises(UsageError, match="not a whole number of bytes"):
        parse_size(text)


@given(st.text(max_size=30))
def test_any_text_is_a_size_or_wrong_usage(text: str) -> None:
    with contextlib.suppress(UsageError):
        assert parse_size(text) >= 0


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (-2048, "-2 KiB"),
        (5 * MiB, "5 MiB"),
        (1.25 * GiB, "1.2 GiB"),
        (1023 * TiB, "1023 TiB"),
        (2048 * TiB, "2.0 PiB"),
        (12.4, "12 bytes"),
    ],
)
def test_sizes_for_people(size: float, text: str) -> None:
    assert format_size(size) == text


@given(st.integers(0, 2**64), st.integers(1, 2**32))
def test_rounding(value: int, unit: int) -> None:
    low, high = round_down(value, unit), round_up(value, unit)
    assert low % unit == high % unit == 0
    assert low <= value <= high
    assert high - low == (unit if value % unit else 0)
