from __future__ import annotations

import pytest

from nbdmirror.cli.bitmap_options import parse_request
from nbdmirror.errors import UsageError
from nbdmirror.state import BitmapRequest
from nbdmirror.units import GiB


@pytest.mark.parametrize(
    ("text", "name", "granularity"),
    [
        ("b0", "b0", None),
        ("b0:64k", "b0", 65536),
        ("b0:512", "b0", 512),
        ("b0:2G", "b0", 2 * GiB),
        ("a:b:4k", "a:b", 4096),
        ("x" * 1023, "x" * 1023, None),
    ],
)
def test_name_and_granularity(text: str, name: str, granularity: int | None) -> None:
    assert parse_request(text) == BitmapRequest(name, granularity)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "1 to 1023 bytes"),
        (":64k", "1 to 1023 bytes"),
        ("ä" * 512, "1 to 1023 bytes"),
        ("\udcff", "UTF-8"),
        ("b:", "not a size"),
        ("a:b", "'b' is not a size"),
        ("b:256", "power of two"),
        ("b:1000", "power of two"),
        ("b:4G", "power of two"),
    ],
)
def test_what_is_no_request(text: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        parse_request(text)
