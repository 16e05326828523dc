"""The file of pre-shared keys: every line counts or is refused."""

from __future__ import annotations

import pytest

from nbdmirror.errors import UsageError
from nbdmirror.server.tls import parse_psk


def test_keys_by_user() -> None:
    text = "alice:00ff\n\n bob@example:ABCDEF0123456789 \n"
    assert parse_psk("keys.psk", text) == {"alice": b"\0\xff", "bob@example": bytes.fromhex("abcdef0123456789")}


@pytest.mark.parametrize("line", ["alice", "alice:", ":00", "alice:0", "alice:0g", "alice:00:11", "alice: 00", "alice:0x00"])
def test_malformed_lines_are_refused_with_their_number(line: str) -> None:
    with pytest.raises(UsageError, match=r"'keys\.psk', line 3: write USER:KEY"):
        parse_psk("keys.psk", f"bob:00\n\n{line}\n")


def test_refusals_do_not_show_keys() -> None:
    with pytest.raises(UsageError) as refusal:
        parse_psk("keys.psk", "alice:secret")
    assert "secret" not in str(refusal.value)


def test_one_user_has_one_key() -> None:
    with pytest.raises(UsageError, match="line 2: user 'bob' has a key already"):
        parse_psk("keys.psk", "bob:00\nbob:11\n")


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_a_file_without_keys_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"'keys\.psk' has no keys"):
        parse_psk("keys.psk", text)
