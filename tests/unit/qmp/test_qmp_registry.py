"""Registry and schema: the signature is the schema, and nothing runs before everything is checked."""

from __future__ import annotations

import enum
import functools
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from nbdmirror.qmp.messages import ErrorClass, QmpError
from nbdmirror.qmp.registry import Registry
from nbdmirror.qmp.schema import NonNegative, Positive, UInt8, UInt64
from tests.unit.qmp.qmp_cases import ARGUMENTS, VERSION, make_registry


class Policy(enum.StrEnum):
    REPORT = "report"
    NO_SPACE = "enospc"


@dataclass(frozen=True, slots=True)
class Left:
    kind: Literal["left"]


@dataclass(frozen=True, slots=True)
class Right:
    sort: Literal["right"]


@pytest.mark.parametrize(("name", "arguments", "desc"), ARGUMENTS, ids=lambda value: str(value)[:60])
def test_refused(name: str, arguments: dict[str, Any], desc: str) -> None:
    with pytest.raises(QmpError) as caught:
        make_registry().bind(name, arguments)
    assert (caught.value.error_class, caught.value.desc) == (ErrorClass.GENERIC_ERROR, desc)


@pytest.mark.parametrize(
    ("name", "arguments", "result"),
    [
        (
            "block-dirty-bitmap-add",
            {"node": "n", "name": "b", "granularity": 4096},
            {"node": "n", "name": "b", "granularity": 4096, "persistent": False},
        ),
        ("blockdev-mirror", {"device": "a", "target": "b", "sync": "top"}, ["a", "b", "top", 0]),
        (
            "nbd-server-start",
            {"addr": {"type": "unix", "data": {"path": "/x"}}},
            "UnixAddress(type_='unix', data=Unix(path='/x'))",
        ),
        (
            "blockdev-add",
            {"driver": "raw", "node-name": "r", "file": {"driver": "raw", "file": "f"}, "read-only": True},
            (
                "RawNode(node_name='r', read_only=True, driver='raw', "
                "file=RawNode(node_name=None, read_only=False, driver='raw', file='f', offset=0), offset=0)"
            ),
        ),
        ("transaction", {"actions": []}, "()"),
        (
            "transaction",
            {"actions": [{"type": "abort", "data": {}}]},
            "(AbortAction(type_='abort', data=Nothing()),)",
        ),
        (
            "block-dirty-bitmap-merge",
            {"node": "n", "target": "t", "bitmaps": ["a", {"node": "m", "name": "b"}]},
            "('n', 't', ['a', BitmapName(node='m', name='b')])",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_accepted(name: str, arguments: dict[str, Any], result: object) -> None:
    assert await make_registry().dispatch(name, arguments) == result


def test_no_such_command() -> None:
    with pytest.raises(QmpError, match=r"^The command nosuch has not been found$") as caught:
        make_registry().bind("nosuch", {})
    assert caught.value.error_class is ErrorClass.COMMAND_NOT_FOUND


async def test_built_in_commands() -> None:
    registry = Registry(VERSION)
    registry.command("aaa")(lambda: None)
    assert await registry.dispatch("query-version", {}) == VERSION.as_json()
    names = await registry.dispatch("query-commands", {})
    assert names == [{"name": n} for n in ("aaa", "qmp_capabilities", "query-commands", "query-version")]


def test_commands_describe_themselves() -> None:
    signature = make_registry().commands["block-dirty-bitmap-add"]
    assert [(m.name, m.optional) for m in signature.members] == [
        ("node", False),
        ("name", False),
        ("granularity", True),
        ("persistent", True),
    ]


def checked(annotation: Any, value: object) -> object:
    """What a handler with one parameter of this type gets."""

    def handler(some_value: object) -> object:
        return some_value

    handler.__annotations__["some_value"] = annotation
    registry = Registry(VERSION)
    registry.command("x")(handler)
    return registry.bind("x", {"some-value": value})()


@pytest.mark.parametrize(
    ("annotation", "value", "result"),
    [
        (str, "a", "a"),
        (int, -5, -5),
        (float, 1, 1.0),
        (float, 1.5, 1.5),
        (bool, True, True),
        (UInt64, 2**64 - 1, 2**64 - 1),
        (NonNegative, 0, 0),
        (Policy, "enospc", Policy.NO_SPACE),
        (dict[str, Any], {"x": [1]}, {"x": [1]}),
        (dict, {}, {}),
        (list[int], [1, 2], [1, 2]),
        (tuple[bool, ...], [True], (True,)),
        (list, [1, "x"], [1, "x"]),
        (Any, None, None),
        (str | int, 5, 5),
        (str | int, "5", "5"),
        (list[str] | None, ["x"], ["x"]),
    ],
    ids=str,
)
def test_types(annotation: Any, value: object, result: object) -> None:
    got = checked(annotation, value)
    assert (got, type(got)) == (result, type(result))


@pytest.mark.parametrize(
    ("annotation", "value", "desc"),
    [
        (str, "a\0b", "Parameter 'some-value' does not accept value 'a\0b'"),
        (str, 1, "Invalid parameter type for 'some-value', expected: string"),
        (float, True, "Invalid parameter type for 'some-value', expected: number"),
        (int, True, "Invalid parameter type for 'some-value', expected: integer"),
        (UInt8, 256, "Parameter 'some-value' expects uint8_t"),
        (UInt64, -1, "Parameter 'some-value' expects uint64"),
        (NonNegative, -1, "Parameter 'some-value' expects a non-negative value"),
        (NonNegative, "x", "Invalid parameter type for 'some-value', expected: integer"),
        (Positive, 0, "Parameter 'some-value' expects a positive value"),
        (Policy, "REPORT", "Parameter 'some-value' does not accept value 'REPORT'"),
        (dict, [], "Invalid parameter type for 'some-value', expected: object"),
        (list, {}, "Invalid parameter type for 'some-value', expected: array"),
        (list[int], [1, "x"], "Invalid parameter type for 'some-value[1]', expected: integer"),
        (list[Policy], ["x"], "Parameter 'null' does not accept value 'x'"),
        (str | int, True, "Invalid parameter type for 'some-value', expected: str or int"),
        (str | None, None, "Invalid parameter type for 'some-value', expected: string"),
    ],
    ids=str,
)
def test_types_refuse(annotation: Any, value: object, desc: str) -> None:
    with pytest.raises(QmpError) as caught:
        checked(annotation, value)
    assert caught.value.desc == desc


@pytest.mark.parametrize("annotation", [bytes, set[str], Left | bytes], ids=str)
def test_a_type_that_has_no_check_is_refused_when_registered(annotation: Any) -> None:
    with pytest.raises(TypeError):
        checked(annotation, None)


def test_a_union_that_nothing_tells_apart() -> None:
    with pytest.raises(TypeError, match="nothing tells these apart"):
        checked(Left | Right, {"kind": "left"})


def test_members_that_are_alike_in_all_of_a_union_tell_nothing_apart() -> None:
    @dataclass(frozen=True, slots=True)
    class One:
        kind: Literal["one"]
        mode: Literal["only"] = "only"

    @dataclass(frozen=True, slots=True)
    class Two:
        kind: Literal["two"]
        mode: Literal["only"] = "only"

    assert checked(One | Two, {"kind": "two"}) == Two("two")


def test_signatures_that_are_no_schema() -> None:
    registry = Registry(VERSION)

    def starred(**options: str) -> None: ...

    def both(whole: dict[str, str], /, more: str) -> None: ...

    for handler in (starred, both):
        with pytest.raises(TypeError):
            registry.command("x")(handler)
    with pytest.raises(ValueError, match="query-version"):
        registry.command("query-version")


def test_a_bound_method_is_a_handler() -> None:
    class Commands:
        def hello(self, name: str) -> str:
            return f"hello {name}"

    registry = Registry(VERSION)
    registry.command("hello")(Commands().hello)
    assert registry.bind("hello", {"name": "you"})() == "hello you"


def test_a_partial_is_a_handler() -> None:
    def hello(greeting: str, /, name: str) -> str:
        return f"{greeting} {name}"

    registry = Registry(VERSION)
    registry.command("hello")(functools.partial(hello, "hello"))
    assert registry.bind("hello", {"name": "you"})() == "hello you"


def test_nothing_runs_before_everything_is_checked() -> None:
    calls = []
    registry = Registry(VERSION)

    @registry.command("x")
    def handler(a: str, b: int) -> None:
        calls.append((a, b))

    for arguments in ({"a": "x"}, {"a": "x", "b": "y"}, {"a": "x", "b": 1, "c": 1}):
        with pytest.raises(QmpError):
            registry.bind("x", arguments)
    bound = registry.bind("x", {"a": "x", "b": 1})
    assert calls == []
    bound()
    assert calls == [("x", 1)]


def test_a_type_that_holds_itself_too_often() -> None:
    deep: Any = "file"
    for _ in range(1000):
        deep = {"driver": "raw", "file": deep}
    with pytest.raises(QmpError, match=r"^JSON nesting depth limit exceeded$"):
        make_registry().bind("blockdev-add", deep)
