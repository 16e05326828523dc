"""What a server takes, as data: the answer to query-qmp-schema (QMP reference, "SchemaInfo"), made from handlers' signatures.

Rules:
1. Commands and events have their names; types have numbers, as QEMU's have, which clients only follow from entry to entry.
2. What a command returns is told as far as its annotation does: nothing, a list, or any value.
3. Every name that occurs in an entry is that of an entry.
"""

from __future__ import annotations

import dataclasses
import enum
import types
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, Union, get_args, get_origin

from nbdmirror.qmp.schema import IntRange, Member, members_of, variants_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from nbdmirror.qmp.registry import Signature

Entry = dict[str, Any]

_BUILTINS: Final[dict[Any, tuple[str, str]]] = {
    str: ("str", "string"),
    bool: ("bool", "boolean"),
    int: ("int", "int"),
    float: ("number", "number"),
    Any: ("any", "value"),
    object: ("any", "value"),
    dict: ("any", "value"),
    list: ("any", "value"),
}


def describe(commands: Mapping[str, Signature], events: Mapping[str, Mapping[str, Any]]) -> list[Entry]:
    """Entries for commands, for events, whose members are given with their types, and for all types they lead to."""
    found = _Types()
    for name, signature in commands.items():
        takes = found.name_of(signature.whole) if signature.whole is not None else found.object_of(signature.members)
        returns = found.returned(signature.returns)
        found.add({"name": name, "meta-type": "command", "arg-type": takes, "ret-type": returns, "allow-oob": False})
    for name, members in events.items():
        data = tuple(Member.of(key, hint, optional=types.NoneType in get_args(hint)) for key, hint in members.items())
        found.add({"name": name, "meta-type": "event", "arg-type": found.object_of(data)})
    return list(found.entries.values())


class _Types:
    """Types that have been named, and entries by name."""

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}
        self._names: dict[Any, str] = {}

    def add(self, entry: Entry) -> str:
        self.entries[entry["name"]] = entry
        return str(entry["name"])

    def returned(self, annotation: object) -> str:
        if annotation is types.NoneType:
            return self.object_of(())
        return self.name_of(list[Any] if get_origin(annotation) is list else Any)

    def name_of(self, annotation: Any) -> str:  # noqa: ANN401  an annotation is any object
        """The name of a type, which is described when it is met first."""
        origin, arguments = get_origin(annotation), get_args(annotation)
        if annotation in _BUILTINS or origin is dict:
            name, json_type = _BUILTINS[origin or annotation]
            return self.add({"name": name, "meta-type": "builtin", "json-type": json_type})
        if origin is Annotated:
            is_integer = any(isinstance(extra, IntRange) for extra in arguments[1:])
            return self.name_of(int if is_integer else arguments[0])
        if origin in (list, tuple):
            element = self.name_of(arguments[0])
            return self.add({"name": f"[{element}]", "meta-type": "array", "element-type": element})
        if origin in (Union, types.UnionType):
            choices = tuple(each for each in arguments if each is not types.NoneType)
            return self.name_of(choices[0]) if len(choices) == 1 else self._numbered(choices, self._union)
        if origin is Literal:
            return self._numbered(arguments, self._enum)
        if issubclass(annotation, enum.StrEnum):
            return self._numbered(tuple(item.value for item in annotation), self._enum)
        return self._numbered(members_of(annotation), self._object)

    def object_of(self, members: tuple[Member, ...]) -> str:
        return self._numbered(members, self._object)

    def _numbered(self, key: Any, describe_it: Callable[[Any], Entry]) -> str:  # noqa: ANN401
        """A number for each type, given before it is looked into: it may hold itself."""
        name = self._names.get((describe_it.__name__, key))
        if name is None:
            name = self._names[describe_it.__name__, key] = str(len(self._names))
            self.entries[name] = {"name": name, **describe_it(key)}
        return name

    def _enum(self, values: tuple[str, ...]) -> Entry:
        return {"meta-type": "enum", "members": [{"name": value} for value in values], "values": list(values)}

    def _object(self, members: tuple[Member, ...]) -> Entry:
        return {"meta-type": "object", "members": [self._member(member) for member in members]}

    def _member(self, member: Member) -> Entry:
        described: Entry = {"name": member.name, "type": self.name_of(member.annotation)}
        return {**described, "default": None} if member.optional else described

    def _union(self, choices: tuple[Any, ...]) -> Entry:
        if not all(dataclasses.is_dataclass(choice) for choice in choices):
            return {"meta-type": "alternate", "members": [{"type": self.name_of(choice)} for choice in choices]}
        tag, by_value = variants_of(choices)
        members = {value: [m for m in members_of(struct) if m.name != tag] for value, struct in by_value.items()}
        shared = [member for member in next(iter(members.values())) if all(member in each for each in members.values())]
        return {
            "meta-type": "object",
            "members": [{"name": tag, "type": self._numbered(tuple(by_value), self._enum)}, *map(self._member, shared)],
            "tag": tag,
            "variants": [
                {"case": value, "type": self.object_of(tuple(m for m in each if m not in shared))}
                for value, each in members.items()
            ],
        }
