r"""A byte stream cut into JSON values, as QEMU's monitor reads them.

Rules:
1. Newlines mean nothing; strings may be single-quoted; anything else is strict JSON in strict UTF-8.
2. A broken value raises QmpError with QEMU's text and the stream goes on: what is left of a broken token is skipped up to
   the next of `[]{}:,`, control character or 0xFF, and reading starts afresh there.
3. Limits are per value and hold before memory is spent. No input raises anything but QmpError.
4. No byte is looked at more than a few times, however the stream is cut: tokens in progress remember how far they got.

How a broken stream reads, `|` being where a value ends:

    {"execute": "stop"}{"execute": "cont"}      {...} | {...} |
    {"execute": @}                              stray '@' | } is not a value |
    {"execute": "st<FF>{"execute": "cont"}      stray '"st<FF>' | {...} |
    {"a": [1}                                   expected separator in list |
"""

from __future__ import annotations

import re
from typing import Any, Final, Literal, NoReturn

from nbdmirror.qmp.messages import QmpError

# QEMU allows 64 MiB and two million tokens, which Python objects would make gigabytes of. The longest honest command is
# a transaction of some hundred actions: 64 KiB and some thousand tokens. These bounds keep a client below 30 MB or so.
MAX_VALUE_SIZE: Final = 1024 * 1024
MAX_TOKENS: Final = 64 * 1024
# As QEMU's. Nothing here recurses, so that the bound is not Python's stack.
MAX_NESTING: Final = 1024
_TOO_LARGE: Final = "JSON token size limit exceeded"
# No number or keyword is longer. It bounds what is looked at again when such a token arrives byte by byte.
_MAX_WORD: Final = 4096
# Enough of a broken token to recognise it by, in the answer to it.
_MAX_STRAY: Final = 128

_BLANK: Final = re.compile(rb"[ \t\r\n]*")
_STRING_BODY: Final = re.compile(rb'(?:[^"\\\x00-\x1f\xfe\xff]+|\\[\x20-\xfd])*+')
_SINGLE_QUOTED_BODY: Final = re.compile(rb"(?:[^'\\\x00-\x1f\xfe\xff]+|\\[\x20-\xfd])*+")
_NUMBER: Final = re.compile(rb"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_NUMBER_BEGUN: Final = re.compile(
    rb"-?(?:(?:0|[1-9][0-9]*)(?:\.(?:[0-9]+(?:[eE][+-]?[0-9]*)?)?|[eE][+-]?[0-9]*)?)?",
)
_WORD: Final = re.compile(rb"[a-z]+")
_RESUME: Final = re.compile(rb"[\x00-\x08\x0a-\x1f\xfe\xff\[\]{}:,]")
_ESCAPE: Final = re.compile(
    r"\\(?:u(?P<high>[dD][89abAB][0-9a-fA-F]{2})\\u(?P<low>[dD][c-fC-F][0-9a-fA-F]{2})|u(?P<code>.{0,4})|(?P<char>.))",
    re.DOTALL,
)
_ESCAPED: Final = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "/": "/", "\\": "\\", '"': '"', "'": "'"}
_PLANES: Final = range(0, 0x110000, 0x10000)
_NOT_A_CHARACTER: Final = re.compile(
    "[\ud800-\udfff\ufdd0-\ufdef" + "".join(chr(plane | 0xFFFE) + chr(plane | 0xFFFF) for plane in _PLANES) + "]",
)
_KEYWORDS: Final = {b"true": True, b"false": False, b"null": None}


class _Incomplete(Exception):  # noqa: N818  not an error: the token needs more bytes
    """The buffer ends inside a token."""


class JsonStream:
    """Cuts a byte stream into JSON values. Errors are QMP's, with QEMU's texts, and the stream goes on after each."""

    __slots__ = ("_at", "_buffer", "_curly", "_scanned", "_size", "_skipping", "_square", "_tokens")

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._at = 0  # where the current token begins
        self._scanned = 0  # how much of a string in progress needs no second look
        self._skipping = False
        self._restart()

    def _restart(self) -> None:
        self._tokens: list[bytes] = []
        self._curly = self._square = self._size = 0

    def feed(self, data: bytes) -> None:
        """Take more bytes."""
        del self._buffer[: self._at]
        self._at = 0
        self._buffer += data

    def next_value(self) -> tuple[Any] | None:
        """The next value in a tuple of one, None when more bytes are needed; raises QmpError for a broken one."""
        try:
            while not self._collect(self._next_token()):
                pass
            tokens = self._tokens
            self._restart()
            return (_parse(tokens),)
        except _Incomplete:
            return None
        except QmpError:
            self._restart()
            raise

    def _collect(self, token: bytes) -> bool:
        """Add to the value in progress; True when it ends here, well or badly."""
        self._curly += (token == b"{") - (token == b"}")
        self._square += (token == b"[") - (token == b"]")
        self._size += len(token)
        if self._size > MAX_VALUE_SIZE:
            raise QmpError.generic(_TOO_LARGE)
        if len(self._tokens) >= MAX_TOKENS:
            raise QmpError.generic("JSON token count limit exceeded")
        if self._curly + self._square > MAX_NESTING:
            raise QmpError.generic("JSON nesting depth limit exceeded")
        self._tokens.append(token)
        return min(self._curly, self._square) < 0 or self._curly == self._square == 0

    def _next_token(self) -> bytes:
        self._skip()
        start = self._at
        match chr(self._buffer[start]):
            case "{" | "}" | "[" | "]" | ":" | ",":
                end = start + 1
            case '"':
                end = self._string_end(_STRING_BODY)
            case "'":
                end = self._string_end(_SINGLE_QUOTED_BODY)
            case char if char in "-0123456789":
                end = self._number_end()
            case char if "a" <= char <= "z":
                end = self._word_end(_WORD)
            case _:
                self._stray(start + 1)
        return self._take(end)

    def _skip(self) -> None:
        """Over what is left of a broken token, then over blanks, up to a byte that begins a token."""
        if self._skipping:
            found = _RESUME.search(self._buffer, self._at)
            self._at = found.start() if found else len(self._buffer)
            self._skipping = found is None
        blank = _BLANK.match(self._buffer, self._at)
        assert blank is not None
        self._at = blank.end()
        if self._at == len(self._buffer):
            raise _Incomplete

    def _take(self, end: int) -> bytes:
        token = bytes(self._buffer[self._at : end])
        self._at = end
        self._scanned = 0
        return token

    def _stray(self, end: int) -> NoReturn:
        self._skipping = True
        text = self._take(end)
        shown = text if len(text) <= _MAX_STRAY else text[:_MAX_STRAY] + b"..."
        raise _parse_error(f"stray '{shown.decode('utf-8', 'replace')}'")

    def _give_up(self, end: int) -> NoReturn:
        """The token in progress is too large; what is still to come of it is skipped."""
        self._skipping = True
        self._take(end)
        raise QmpError.generic(_TOO_LARGE)

    def _string_end(self, body: re.Pattern[bytes]) -> int:
        buffer, start = self._buffer, self._at
        end = _end(body, buffer, start + max(1, self._scanned))
        self._scanned = end - start
        if self._size + self._scanned >= MAX_VALUE_SIZE:
            self._give_up(end)
        escape = buffer[end : end + 1] == b"\\"
        if end + escape >= len(buffer):
            raise _Incomplete
        if buffer[end] != buffer[start]:
            self._stray(end + 1 + escape)
        return end + 1

    def _word_end(self, word: re.Pattern[bytes]) -> int:
        """The end of a token that only the byte after it ends."""
        end = _end(word, self._buffer, self._at)
        if end - self._at > _MAX_WORD:
            self._give_up(end)
        if end == len(self._buffer):
            raise _Incomplete
        return end

    def _number_end(self) -> int:
        end = self._word_end(_NUMBER_BEGUN)
        text = bytes(self._buffer[self._at : end])
        leading_zero = text in (b"0", b"-0") and chr(self._buffer[end]) in "0123456789"
        if leading_zero or not _NUMBER.fullmatch(text):
            self._stray(end + 1)
        return end


def _end(pattern: re.Pattern[bytes], buffer: bytearray, start: int) -> int:
    found = pattern.match(buffer, start)
    return found.end() if found else start


def _parse_error(what: str) -> QmpError:
    return QmpError.generic(f"JSON parse error, {what}")


class _Open:
    """An object or array that is being parsed, and the one it stands in."""

    __slots__ = ("key", "outer", "value", "wants")

    def __init__(self, token: bytes, outer: _Open | None) -> None:
        self.value: dict[str, Any] | list[Any] = {} if token == b"{" else []
        self.outer = outer
        self.key: str = ""
        self.wants: Literal["first", "key", "colon", "value", "separator"] = "first"

    def closed_by(self, token: bytes) -> bool:
        """Whether this token may and does end it here."""
        return self.wants in ("first", "separator") and token == (b"}" if isinstance(self.value, dict) else b"]")

    def punctuation(self, token: bytes) -> bool:
        """Take a separator or colon; False when a value is due instead. Raises QmpError where it is missing."""
        if self.wants == "colon":
            if token != b":":
                raise _parse_error("missing : in object pair")
            self.wants = "value"
            return True
        if self.wants == "separator":
            if token != b",":
                raise _parse_error(f"expected separator in {'dict' if isinstance(self.value, dict) else 'list'}")
            self.wants = "key" if isinstance(self.value, dict) else "value"
            return True
        return False

    def add(self, value: Any) -> None:  # noqa: ANN401  any JSON value
        """Take a complete value, as key, member or element."""
        if isinstance(self.value, list):
            self.value.append(value)
        elif self.wants in ("first", "key"):
            if not isinstance(value, str):
                raise _parse_error("key is not a string in object")
            self.key, self.wants = value, "colon"
            return
        elif self.key in self.value:
            raise _parse_error("duplicate key")
        else:
            self.value[self.key] = value
        self.wants = "separator"


def _parse(tokens: list[bytes]) -> Any:  # noqa: ANN401  any JSON value
    """The value of one token list; raises QmpError. A loop, so that deep nesting needs no deep stack."""
    inner: _Open | None = None
    for token in tokens:
        if inner is not None and inner.closed_by(token):
            value: Any = inner.value
            inner = inner.outer
        elif inner is not None and inner.punctuation(token):
            continue
        elif token in (b"{", b"["):
            inner = _Open(token, inner)
            continue
        else:
            value = _scalar(token)
        if inner is None:
            return value
        inner.add(value)
    raise _parse_error("premature EOI")


def _scalar(token: bytes) -> object:
    first = token[:1]
    if first in b"\"'":
        return _string(token)
    if first in b"-0123456789":
        return _number(token)
    if first.isalpha():
        if token not in _KEYWORDS:
            raise _parse_error(f"invalid keyword '{token[:_MAX_STRAY].decode('ascii')}'")
        return _KEYWORDS[token]
    raise _parse_error("expecting value")


def _number(token: bytes) -> int | float:
    # As QEMU: what neither int64 nor uint64 holds is a double. Longer digits never reach int(), which bounds them itself.
    if len(token) <= len("-9223372036854775808") and token.removeprefix(b"-").isdigit():
        value = int(token)
        if -(2**63) <= value < 2**64:
            return value
    number = float(token)
    if number in (float("inf"), float("-inf")):
        raise _parse_error("number out of range")
    return number


def _string(token: bytes) -> str:
    try:
        text = token.decode("utf-8")
    except UnicodeDecodeError:
        raise _parse_error("invalid UTF-8 sequence in string") from None
    if _NOT_A_CHARACTER.search(text):
        raise _parse_error("invalid UTF-8 sequence in string")
    if "\\" not in text:
        return text[1:-1]
    # The closing quote stays on during the search: QEMU shows it in the error of an escape that is too short.
    return _ESCAPE.sub(_unescape, text[1:])[:-1]


def _unescape(escape: re.Match[str]) -> str:
    if escape["high"] is not None:
        return chr(0x10000 + ((int(escape["high"], 16) & 0x3FF) << 10 | int(escape["low"], 16) & 0x3FF))
    if escape["char"] is not None:
        if escape["char"] not in _ESCAPED:
            raise _parse_error("invalid escape sequence in string")
        return _ESCAPED[escape["char"]]
    code = escape["code"]
    if re.fullmatch("[0-9a-fA-F]{4}", code) and not _NOT_A_CHARACTER.match(char := chr(int(code, 16))):
        return char
    raise _parse_error(f"\\u{code} is not a valid Unicode character")
