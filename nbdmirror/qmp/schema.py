"""Types that check what came as JSON: Python annotations in, values or QEMU's error texts out.

    str bool float int          as they are; int is an int64, and a float takes an int
    UInt8 ... UInt64            an int with a range, as every `Annotated[int, IntRange(...)]`
    Literal["a", "b"], StrEnum  one of these strings
    list[T], tuple[T, ...]      an array of T
    dict[str, Any]              any object; `Any` and `object` are any value
    a dataclass                 an object with these members; those with a default are optional
    A | B of dataclasses        a union: the member that is a Literal of one value, another in each of them, tells which
    str | A, str | A | B        an alternate: the JSON type tells which; name it with `Annotated[..., Named("...")]`
    T | None                    T, where the member is optional: JSON's null is a value of its own and is refused

Rules:
1. A member's name is the Python name with dashes for underscores; one trailing underscore (`id_`, `type_`) is dropped.
2. Members are checked in the order they are declared, then the unexpected ones: so one bad input has one error.
3. Errors name the member with its path (`actions[0].data.name`); where QEMU names it without (enums, integer ranges), so
   do we, and it calls the elements of an array 'null'.
4. Checking has no effects and nothing is coerced: 1 is not true, "1" is not 1, 1.0 is not 1.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from nbdmirror.qmp.messages import QmpError


@dataclass(frozen=True, slots=True)
class IntRange:
    """Bounds of an integer, and what it is said to expect outside them.

    `integer` is what it is said to expect of another JSON type, where that differs from "integer".
    """

    low: int
    high: int
    expects: str
    integer: str = "integer"


@dataclass(frozen=True, slots=True)
class Named:
    """The schema's name of an alternate, which QEMU puts into its errors."""

    name: str


UInt8 = Annotated[int, IntRange(0, 2**8 - 1, "uint8_t", "uint64")]
UInt16 = Annotated[int, IntRange(0, 2**16 - 1, "uint16_t", "uint64")]
UInt32 = Annotated[int, IntRange(0, 2**32 - 1, "uint32_t", "uint64")]
UInt64 = Annotated[int, IntRange(0, 2**64 - 1, "uint64", "uint64")]
NonNegative = Annotated[int, IntRange(0, 2**63 - 1, "a non-negative value")]
Positive = Annotated[int, IntRange(1, 2**63 - 1, "a positive value")]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a value stands in the arguments: its whole path, and its own name."""

    path: str = ""
    name: str = ""

    def member(self, name: str) -> Place:
        """A member of the object here."""
        return Place(f"{self.path}.{name}" if self.path else name, name)

    def element(self, index: int) -> Place:
        """An element of the array here, which has no name of its own."""
        return Place(f"{self.path}[{index}]", "null")

    def wrong_type(self, expected: str) -> NoReturn:
        """Refuse a value for its JSON type."""
        raise QmpError.generic(f"Invalid parameter type for '{self.path}', expected: {expected}")

    def wrong_value(self, value: str) -> NoReturn:
        """Refuse a string that is none of the allowed ones."""
        raise QmpError.generic(f"Parameter '{self.name}' does not accept value '{value}'")


Check = Callable[[Any, Place], Any]
"""Gives the Python value of a JSON value; raises QmpError."""


@dataclass(frozen=True, slots=True)
class Member:
    """One member of an object: its QMP name, its Python name, its type and whether it may be left out."""

    name: str
    attribute: str
    annotation: Any
    optional: bool

    @classmethod
    def of(cls, attribute: str, annotation: object, *, optional: bool) -> Member:
        """With the QMP name that rule 1 gives."""
        return cls(attribute.removesuffix("_").replace("_", "-"), attribute, annotation, optional)


def check_members(members: tuple[Member, ...], value: Mapping[str, Any], place: Place) -> dict[str, Any]:
    """The members of an object by their Python names; raises QmpError."""
    found = {}
    for member in members:
        where = place.member(member.name)
        if member.name in value:
            found[member.attribute] = checker(member.annotation)(value[member.name], where)
        elif not member.optional:
            raise QmpError.generic(f"Parameter '{where.path}' is missing")
    if len(found) < len(value):
        known = {member.name for member in members}
        unexpected = next(name for name in value if name not in known)
        raise QmpError.generic(f"Parameter '{place.member(unexpected).path}' is unexpected")
    return found


@functools.cache
def members_of(struct: type) -> tuple[Member, ...]:
    """The members of a dataclass. Looked up late: its annotations may name types that are defined after it."""
    hints = get_type_hints(struct, include_extras=True)
    missing = dataclasses.MISSING
    return tuple(
        Member.of(f.name, hints[f.name], optional=f.default is not missing or f.default_factory is not missing)
        for f in dataclasses.fields(struct)
    )


@functools.cache
def checker(annotation: Any) -> Check:  # noqa: ANN401  an annotation is any object
    """The check of a type; raises TypeError for an annotation that is not in the list above."""
    simple = _SIMPLE.get(annotation)
    if simple is not None:
        return simple
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _annotated(arguments[0], arguments[1:])
    if origin in (Union, types.UnionType):
        return _union(tuple(a for a in arguments if a is not types.NoneType), "")
    if origin is Literal:
        return functools.partial(_choice, {value: value for value in arguments})
    if origin is list or (origin is tuple and arguments[1:] == (...,)):
        return functools.partial(_array, origin, arguments[0])
    if origin is dict:
        return _object
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        return functools.partial(_struct, annotation)
    if isinstance(annotation, type) and issubclass(annotation, enum.StrEnum):
        return functools.partial(_choice, {item.value: item for item in annotation})
    raise TypeError(f"{annotation!r} is not a type that QMP arguments can have")


def _annotated(annotation: object, extras: tuple[object, ...]) -> Check:
    for extra in extras:
        if isinstance(extra, IntRange):
            return functools.partial(_integer, extra)
        if isinstance(extra, Named):
            return _union(tuple(a for a in get_args(annotation) if a is not types.NoneType), extra.name)
    return checker(annotation)


def _union(choices: tuple[Any, ...], name: str) -> Check:
    if len(choices) == 1:
        return checker(choices[0])
    structs = tuple(c for c in choices if isinstance(c, type) and dataclasses.is_dataclass(c))
    scalars = {_JSON_TYPES[choice]: checker(choice) for choice in choices if choice in _JSON_TYPES}
    if len(structs) + len(scalars) < len(choices):
        raise TypeError(f"only structs and one type of JSON each can stand in a union: {choices!r}")
    struct = _tagged(structs) if len(structs) > 1 else checker(structs[0]) if structs else None
    if not scalars and struct is not None:
        return struct
    by_type: dict[type, Check] = {**scalars, **({dict: struct} if struct is not None else {})}
    return functools.partial(_alternate, by_type, name or " or ".join(t.__name__ for t in by_type))


def _tagged(structs: tuple[type, ...]) -> Check:
    """A union of structs, told apart by the one member that is a Literal of one value, another in each of them."""

    @functools.cache
    def variants() -> tuple[str, dict[str, Check]]:
        # Late, as in members_of: a variant may hold the union itself.
        name, by_tag = variants_of(structs)
        return name, {tag: checker(struct) for tag, struct in by_tag.items()}

    def check(value: object, place: Place) -> object:
        members = _object(value, place)
        name, by_tag = variants()
        where = place.member(name)
        if name not in members:
            raise QmpError.generic(f"Parameter '{where.path}' is missing")
        tag = _string(members[name], where)
        return by_tag[tag](value, place) if tag in by_tag else where.wrong_value(tag)

    return check


def variants_of(structs: tuple[type, ...]) -> tuple[str, dict[str, type]]:
    """The member that tells structs of a union apart, and each struct by its value there; raises TypeError."""
    tags = [{m.name: get_args(m.annotation)[0] for m in members_of(s) if _is_tag(m)} for s in structs]
    common = set.intersection(*(set(tag) for tag in tags))
    telling = [name for name in common if len({tag[name] for tag in tags}) == len(structs)]
    if len(telling) != 1:
        raise TypeError(f"nothing tells these apart: {[struct.__name__ for struct in structs]}")
    return telling[0], {tag[telling[0]]: struct for tag, struct in zip(tags, structs, strict=True)}


def _is_tag(member: Member) -> bool:
    return get_origin(member.annotation) is Literal and len(get_args(member.annotation)) == 1


def _alternate(by_type: dict[type, Check], name: str, value: object, place: Place) -> object:
    check = by_type.get(type(value))
    if check is None:
        # QEMU names an alternate by its own name, not its path, as it does an enum.
        Place(place.name).wrong_type(name)
    return check(value, place)


def _struct(struct: Callable[..., object], value: object, place: Place) -> object:
    assert isinstance(struct, type)
    return struct(**check_members(members_of(struct), _object(value, place), place))


def _array(kind: Callable[[list[Any]], Any], annotation: object, value: object, place: Place) -> object:
    if not isinstance(value, list):
        place.wrong_type("array")
    check = checker(annotation)
    return kind([check(element, place.element(index)) for index, element in enumerate(value)])


def _choice(choices: dict[str, object], value: object, place: Place) -> object:
    text = _string(value, place)
    return choices[text] if text in choices else place.wrong_value(text)


def _integer(bounds: IntRange, value: object, place: Place) -> int:
    # JSON's true is Python's 1; a number beyond the wire's integers has become a double already.
    if type(value) is not int or not -(2**63) <= value < 2**64:
        return _wrong_integer(place, bounds)
    if not bounds.low <= value <= bounds.high:
        raise QmpError.generic(f"Parameter '{place.name}' expects {bounds.expects}")
    return value


def _wrong_integer(place: Place, bounds: IntRange) -> NoReturn:
    if bounds.integer == "integer":
        place.wrong_type("integer")
    raise QmpError.generic(f"Parameter '{place.path}' expects {bounds.integer}")


def _int64(value: object, place: Place) -> int:
    if type(value) is not int or not -(2**63) <= value < 2**63:
        place.wrong_type("integer")
    return value


def _float(value: object, place: Place) -> float:
    if type(value) not in (int, float):
        place.wrong_type("number")
    assert isinstance(value, (int, float))
    return float(value)


def _bool(value: object, place: Place) -> bool:
    return value if isinstance(value, bool) else place.wrong_type("boolean")


def _string(value: object, place: Place) -> str:
    if not isinstance(value, str):
        place.wrong_type("string")
    if "\0" in value:
        # JSON can say it, no path or name of the operating system can: refused here instead of by each of its users.
        place.wrong_value(value)
    return value


def _object(value: object, place: Place) -> dict[str, Any]:
    return value if isinstance(value, dict) else place.wrong_type("object")


def _list(value: object, place: Place) -> list[Any]:
    return value if isinstance(value, list) else place.wrong_type("array")


def _any(value: object, _place: Place) -> object:
    return value


_SIMPLE: Final[dict[Any, Check]] = {
    str: _string,
    bool: _bool,
    int: _int64,
    float: _float,
    dict: _object,
    list: _list,
    Any: _any,
    object: _any,
}
_JSON_TYPES: Final[dict[Any, type]] = {str: str, bool: bool, int: int, float: float}
