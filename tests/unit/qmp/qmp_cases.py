"""What a QMP server answers to what it can't take, as observed on qemu-storage-daemon 7.2.

The unit tests hold our connection and registry to this table, the integration test a live qemu-storage-daemon.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from nbdmirror.qmp.messages import Version
from nbdmirror.qmp.registry import Registry
from nbdmirror.qmp.schema import Named, UInt32

VERSION = Version(10, 1, 0, "nbdmirror 0")

NOT_FOUND, GENERIC = "CommandNotFound", "GenericError"


def parse(*texts: str) -> tuple[tuple[str, str], ...]:
    return tuple((GENERIC, f"JSON parse error, {text}") for text in texts)


def generic(*texts: str) -> tuple[tuple[str, str], ...]:
    return tuple((GENERIC, text) for text in texts)


def nosuch(name: str = "nosuch") -> tuple[tuple[str, str], ...]:
    return ((NOT_FOUND, f"The command {name} has not been found"),)


VALUE = "expecting value"
NOT_AN_OBJECT = "QMP input must be a JSON object"

# Before the negotiation: input and the errors, in order, that answer it.
UNNEGOTIATED: dict[bytes, tuple[tuple[str, str], ...]] = {
    b'{"execute":"query-version"}': ((NOT_FOUND, "Expecting capabilities negotiation with 'qmp_capabilities'"),),
    b'{"execute":"nosuch"}': ((NOT_FOUND, "Expecting capabilities negotiation with 'qmp_capabilities'"),),
    b'{"execute":"qmp_capabilities","arguments":{"enable":["foo"]}}': generic("Parameter 'null' does not accept value 'foo'"),
    b'{"execute":"qmp_capabilities","arguments":{"enable":"x"}}': generic(
        "Invalid parameter type for 'enable', expected: array"
    ),
    b'{"execute":"qmp_capabilities","arguments":{"enable":[1]}}': generic(
        "Invalid parameter type for 'enable[0]', expected: string"
    ),
    b'{"execute":"qmp_capabilities","arguments":{"x":1}}': generic("Parameter 'x' is unexpected"),
    b'{"exec-oob":"qmp_capabilities"}': generic("QMP input member 'exec-oob' is unexpected"),
    b"[]": generic(NOT_AN_OBJECT),
    b"nonsense ": parse("invalid keyword 'nonsense'"),
}

# After it.
NEGOTIATED: dict[bytes, tuple[tuple[str, str], ...]] = {
    # The form of a command.
    b'{"execute":"qmp_capabilities"}': ((NOT_FOUND, "Capabilities negotiation is already complete, command ignored"),),
    b'{"execute":"nosuch"}': nosuch(),
    b'{"execute":"nosuch"}{"execute":"nosuch"}': nosuch() * 2,
    b"{'execute':'it\\'s'}": nosuch("it's"),
    b"{'execute':'\"'}": nosuch('"'),
    b'{"exec-oob":"query-version"}': generic("QMP input member 'exec-oob' is unexpected"),
    b'{"execute":"query-version","exec-oob":"x"}': generic("QMP input member 'exec-oob' is unexpected"),
    b"[]": generic(NOT_AN_OBJECT),
    b"1 ": generic(NOT_AN_OBJECT),
    b"-5 ": generic(NOT_AN_OBJECT),
    b'"x"': generic(NOT_AN_OBJECT),
    b"true ": generic(NOT_AN_OBJECT),
    b"null ": generic(NOT_AN_OBJECT),
    b'true{"execute":"nosuch"}': generic(NOT_AN_OBJECT) + nosuch(),
    b"{}": generic("QMP input lacks member 'execute'"),
    b'{"execute":1}': generic("QMP input member 'execute' must be a string"),
    b'{"execute":"query-version","arguments":[]}': generic("QMP input member 'arguments' must be an object"),
    b'{"execute":"query-version","arguments":null}': generic("QMP input member 'arguments' must be an object"),
    b'{"execute":"query-version","foo":1}': generic("QMP input member 'foo' is unexpected"),
    b'{"execute":"query-version","arguments":{"x":1}}': generic("Parameter 'x' is unexpected"),
    b'{"execute":1,"foo":2}': generic("QMP input member 'execute' must be a string"),
    # Grammar.
    b'{"execute":"query-version","execute":"nosuch"}': parse("duplicate key"),
    b"{]": parse(VALUE),
    b'{"a"}': parse("missing : in object pair"),
    b'{"a" 1}': parse("missing : in object pair"),
    b'{"a":}': parse(VALUE),
    b'{"a":1 "b":2}': parse("expected separator in dict"),
    b'{"a":1]': parse("expected separator in dict"),
    b'{"a":1,}': parse(VALUE),
    b'{"a":1,2}': parse("key is not a string in object"),
    b"{1:2}": parse("key is not a string in object"),
    b"{[1]:2}": parse("key is not a string in object"),
    b"{,}": parse(VALUE),
    b"[1,]": parse(VALUE),
    b"[1 2]": parse("expected separator in list"),
    b"[1}": parse("expected separator in list"),
    b"[,]": parse(VALUE),
    b"[}": parse(VALUE),
    b"{[}]": parse(VALUE),
    b"}": parse(VALUE),
    b"]": parse(VALUE),
    b":": parse(VALUE),
    b",": parse(VALUE),
    b'[1,2]]{"execute":"nosuch"}': generic(NOT_AN_OBJECT) + parse(VALUE) + nosuch(),
    b'[{]}]{"execute":"nosuch"}': parse(VALUE, VALUE) + nosuch(),
    # Tokens, and where reading goes on after a bad one.
    b"@": parse("stray '@'"),
    b"%d ": parse("stray '%'"),
    b'{"execute": @}': parse("stray '@'", VALUE),
    b'&&&\n{"execute":"nosuch"}': parse("stray '&'") + nosuch(),
    b'{"execute":"nosuch"}\x0c{"execute":"nosuch"}': nosuch() + parse("stray '\f'") + nosuch(),
    b'\\"abc"{"execute":"nosuch"}': parse("stray '\\'") + nosuch(),
    b'{"a":\x01}{"execute":"nosuch"}': parse("stray '\x01'", VALUE) + nosuch(),
    b'{"a":"\x01"}{"execute":"nosuch"}': parse("stray '\"\x01'", VALUE) + nosuch(),
    b'{"execute":"a\nb"}': parse("stray '\"a\n'", VALUE),
    b'{"execute":"a\tb"}': parse("stray '\"a\t'", VALUE),
    b'{"execute":"a\x7fb"}': nosuch("a\x7fb"),
    b'"abc\n{"execute":"nosuch"}': parse("stray '\"abc\n'") + nosuch(),
    b'\xff{"execute":"nosuch"}': parse("stray '\ufffd'") + nosuch(),
    b'\xef\xbb\xbf{"execute":"nosuch"}': parse("stray '\ufffd'") + nosuch(),
    b'{"execute":\xff{"execute":"nosuch"}': parse("stray '\ufffd'") + nosuch(),
    b'{"execute":"query-\xff{"execute":"nosuch"}': parse("stray '\"query-\ufffd'") + nosuch(),
    b'{"execute":"\xfe"}': parse("stray '\"\ufffd'", VALUE),
    # Keywords and numbers.
    b'abc{"execute":"nosuch"}': parse("invalid keyword 'abc'") + nosuch(),
    b'{"a":abc}{"execute":"nosuch"}': parse("invalid keyword 'abc'") + nosuch(),
    b'{"a":tru"x"}': parse("invalid keyword 'tru'"),
    b"1abc ": generic(NOT_AN_OBJECT) + parse("invalid keyword 'abc'"),
    b'{"x": 01 }': parse("stray '01'", VALUE),
    b'{"x": 1.}': parse("stray '1.}'"),
    b'{"x": 1e}': parse("stray '1e}'"),
    b'{"x": -}': parse("stray '-}'"),
    b'{"x": .5}': parse("stray '.'", VALUE),
    b'{"x": +1}': parse("stray '+'", VALUE),
    b'{"x": NaN}': parse("stray 'N'", VALUE),
    b'{"a":1.5e+3,"b":-0.5E-2,"c":0}': generic("QMP input member 'a' is unexpected"),
    # Strings.
    b'{"execute":"\\x"}': parse("invalid escape sequence in string"),
    b'{"execute":"\\u12"}': parse('\\u12" is not a valid Unicode character'),
    b'{"execute":"\\ud800"}': parse("\\ud800 is not a valid Unicode character"),
    b'{"execute":"\\udc00"}': parse("\\udc00 is not a valid Unicode character"),
    b'{"execute":"\\ud83d\\u0041"}': parse("\\ud83d is not a valid Unicode character"),
    b'{"execute":"\\uFFFF"}': parse("\\uFFFF is not a valid Unicode character"),
    b'{"execute":"\\u00e9\\uD83D\\uDE00\\n\\t\\r\\b\\f\\/"}': nosuch("\u00e9\U0001f600\n\t\r\b\f/"),
    b'{"execute":"\\u0000"}': nosuch("\x00"),
    b'{"execute":"\xc3\xa9"}': nosuch("\u00e9"),
    b'{"execute":"\xc3"}': parse("invalid UTF-8 sequence in string"),
    b'{"execute":"\xed\xa0\x80"}': parse("invalid UTF-8 sequence in string"),
    b'{"execute":"\xf4\x90\x80\x80"}': parse("invalid UTF-8 sequence in string"),
    b'{"execute":"\xef\xbf\xbf"}': parse("invalid UTF-8 sequence in string"),
    # Nesting.
    b"[" * 1024 + b"]" * 1024: generic(NOT_AN_OBJECT),
    b"[" * 1025 + b'{"execute":"nosuch"}': generic("JSON nesting depth limit exceeded") + nosuch(),
    b'{"execute":' + b"[" * 1023 + b"]" * 1023 + b"}": generic("QMP input member 'execute' must be a string"),
    b'{"a":' * 1025 + b"\n": generic("JSON nesting depth limit exceeded", NOT_AN_OBJECT) + parse(VALUE),
}

# The arguments of commands that QEMU has too.
ARGUMENTS: list[tuple[str, dict[str, Any], str]] = [
    ("block-dirty-bitmap-add", {}, "Parameter 'node' is missing"),
    ("block-dirty-bitmap-add", {"node": "x"}, "Parameter 'name' is missing"),
    ("block-dirty-bitmap-add", {"node": "x", "zzz": 1}, "Parameter 'name' is missing"),
    ("block-dirty-bitmap-add", {"name": 1, "node": 1}, "Invalid parameter type for 'node', expected: string"),
    ("block-dirty-bitmap-add", {"node": None, "name": "b"}, "Invalid parameter type for 'node', expected: string"),
    ("block-dirty-bitmap-add", {"node": "x", "name": "b", "zzz": 1}, "Parameter 'zzz' is unexpected"),
    *(
        ("block-dirty-bitmap-add", {"node": "x", "name": "b", "granularity": value}, f"Parameter 'granularity' {text}")
        for value, text in [
            ("x", "expects uint64"),
            (1.5, "expects uint64"),
            (1.0, "expects uint64"),
            (True, "expects uint64"),
            (None, "expects uint64"),
            (1 << 65, "expects uint64"),
            (-1, "expects uint32_t"),
            (1 << 32, "expects uint32_t"),
        ]
    ),
    *(
        (
            "block-dirty-bitmap-add",
            {"node": "x", "name": "b", "persistent": value},
            "Invalid parameter type for 'persistent', expected: boolean",
        )
        for value in (1, "on", None)
    ),
    ("blockdev-mirror", {"sync": "full"}, "Parameter 'device' is missing"),
    ("blockdev-mirror", {"device": "a", "target": "b"}, "Parameter 'sync' is missing"),
    ("blockdev-mirror", {"device": "a", "target": "b", "sync": "?"}, "Parameter 'sync' does not accept value '?'"),
    (
        "blockdev-mirror",
        {"device": "a", "target": "b", "sync": 1},
        "Invalid parameter type for 'sync', expected: string",
    ),
    *(
        (
            "blockdev-mirror",
            {"device": "a", "target": "b", "sync": "full", "speed": value},
            "Invalid parameter type for 'speed', expected: integer",
        )
        for value in ("x", 1 << 63, 1.5, -(1 << 64))
    ),
    ("nbd-server-start", {}, "Parameter 'addr' is missing"),
    ("nbd-server-start", {"addr": 1}, "Invalid parameter type for 'addr', expected: object"),
    ("nbd-server-start", {"addr": {}}, "Parameter 'addr.type' is missing"),
    ("nbd-server-start", {"addr": {"type": 1}}, "Invalid parameter type for 'addr.type', expected: string"),
    ("nbd-server-start", {"addr": {"type": "bogus"}}, "Parameter 'type' does not accept value 'bogus'"),
    ("nbd-server-start", {"addr": {"type": "unix"}}, "Parameter 'addr.data' is missing"),
    ("nbd-server-start", {"addr": {"type": "unix", "data": {}}}, "Parameter 'addr.data.path' is missing"),
    ("nbd-server-start", {"addr": {"type": "inet", "data": {"host": "h"}}}, "Parameter 'addr.data.port' is missing"),
    (
        "nbd-server-start",
        {"addr": {"type": "unix", "data": {"path": "x", "y": 1}}},
        "Parameter 'addr.data.y' is unexpected",
    ),
    (
        "nbd-server-start",
        {"addr": {"type": "unix", "data": {"path": "x"}, "z": 1}},
        "Parameter 'addr.z' is unexpected",
    ),
    ("blockdev-add", {}, "Parameter 'driver' is missing"),
    ("blockdev-add", {"driver": "bogus"}, "Parameter 'driver' does not accept value 'bogus'"),
    ("blockdev-add", {"driver": "file"}, "Parameter 'filename' is missing"),
    ("blockdev-add", {"driver": "file", "filename": "x", "bogus": 1}, "Parameter 'bogus' is unexpected"),
    ("blockdev-add", {"driver": "raw", "file": {"driver": "file"}}, "Parameter 'file.filename' is missing"),
    (
        "blockdev-add",
        {"driver": "raw", "file": {"driver": "file", "filename": "f", "q": 1}},
        "Parameter 'file.q' is unexpected",
    ),
    ("blockdev-add", {"driver": "raw", "file": 1}, "Invalid parameter type for 'file', expected: BlockdevRef"),
    ("blockdev-add", {"driver": "raw", "file": None}, "Invalid parameter type for 'file', expected: BlockdevRef"),
    ("transaction", {"actions": 1}, "Invalid parameter type for 'actions', expected: array"),
    ("transaction", {"actions": [1]}, "Invalid parameter type for 'actions[0]', expected: object"),
    ("transaction", {"actions": [{}]}, "Parameter 'actions[0].type' is missing"),
    ("transaction", {"actions": [{"type": "bogus"}]}, "Parameter 'type' does not accept value 'bogus'"),
    ("transaction", {"actions": [{"type": "block-dirty-bitmap-add"}]}, "Parameter 'actions[0].data' is missing"),
    (
        "transaction",
        {"actions": [{"type": "abort", "data": {}}, {"type": "block-dirty-bitmap-add", "data": {"node": "x"}}]},
        "Parameter 'actions[1].data.name' is missing",
    ),
    (
        "block-dirty-bitmap-merge",
        {"node": "x", "target": "b", "bitmaps": [1]},
        "Invalid parameter type for 'null', expected: BlockDirtyBitmapOrStr",
    ),
    (
        "block-dirty-bitmap-merge",
        {"node": "x", "target": "b", "bitmaps": ["x", {"node": "x", "name": "n", "z": 1}]},
        "Parameter 'bitmaps[1].z' is unexpected",
    ),
]


@dataclass(frozen=True, slots=True)
class BitmapAdd:
    node: str
    name: str
    granularity: UInt32 | None = None
    persistent: bool = False


@dataclass(frozen=True, slots=True)
class BitmapName:
    node: str
    name: str


@dataclass(frozen=True, slots=True)
class Nothing:
    pass


@dataclass(frozen=True, slots=True)
class AddAction:
    type_: Literal["block-dirty-bitmap-add"]
    data: BitmapAdd


@dataclass(frozen=True, slots=True)
class AbortAction:
    type_: Literal["abort"]
    data: Nothing


@dataclass(frozen=True, slots=True)
class Unix:
    path: str


@dataclass(frozen=True, slots=True)
class Inet:
    host: str
    port: str


@dataclass(frozen=True, slots=True)
class UnixAddress:
    type_: Literal["unix"]
    data: Unix


@dataclass(frozen=True, slots=True)
class InetAddress:
    type_: Literal["inet"]
    data: Inet


@dataclass(frozen=True, slots=True, kw_only=True)
class AnyNode:
    node_name: str | None = None
    read_only: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class FileNode(AnyNode):
    driver: Literal["file"]
    filename: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RawNode(AnyNode):
    driver: Literal["raw"]
    file: BlockdevRef
    offset: int = 0


BlockdevRef = Annotated[str | FileNode | RawNode, Named("BlockdevRef")]
BitmapRef = Annotated[str | BitmapName, Named("BlockDirtyBitmapOrStr")]


def make_registry() -> Registry:
    """A registry whose commands give back what they were called with."""
    registry = Registry(VERSION)

    @registry.command("block-dirty-bitmap-add")
    def bitmap_add(node: str, name: str, *, granularity: UInt32 | None = None, persistent: bool = False) -> dict[str, Any]:
        return {"node": node, "name": name, "granularity": granularity, "persistent": persistent}

    @registry.command("blockdev-mirror")
    async def mirror(device: str, target: str, sync: Literal["full", "top", "none"], speed: int = 0) -> list[Any]:
        return [device, target, sync, speed]

    @registry.command("nbd-server-start")
    def server_start(addr: UnixAddress | InetAddress) -> str:
        return repr(addr)

    @registry.command("blockdev-add")
    def blockdev_add(options: FileNode | RawNode, /) -> str:
        return repr(options)

    @registry.command("transaction")
    def transaction(actions: tuple[AddAction | AbortAction, ...]) -> str:
        return repr(actions)

    @registry.command("block-dirty-bitmap-merge")
    def merge(node: str, target: str, bitmaps: list[BitmapRef]) -> str:
        return repr((node, target, bitmaps))

    return registry
