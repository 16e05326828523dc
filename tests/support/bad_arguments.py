"""Every way in which arguments can be wrong, made from what a server says of itself (query-qmp-schema).

For each command: each required member left out, each member of every wrong JSON type, of a value that no enum has or no
integer, a string with a NUL, and a member that nobody knows; in all objects that arguments can hold, all variants of unions.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

Case = tuple[Any, str]
"""A wrong value, and a pattern of the error that names it."""

_VALUES: Final[tuple[Any, ...]] = (None, True, 7, 1.5, "text", ["list"], {"an": "object"})
_NUMBERS: Final = (2**64, -(2**63) - 1, 10**30)
_TAKES: Final = {"string": str, "boolean": bool, "int": int, "number": (int, float), "array": list, "object": dict}
_WORDS: Final = {"int": "integer"}
_RANGE: Final = r"(u?int\d+(_t)?|a (non-negative|positive) value)"


class Schema:
    """The entries of a schema, by name."""

    def __init__(self, entries: list[dict[str, Any]]) -> None:
        self._entries = {entry["name"]: entry for entry in entries}
        self.commands = [entry["name"] for entry in entries if entry["meta-type"] == "command"]

    def least(self, command: str) -> dict[str, Any]:
        """The least arguments that are well formed: what is required, and names of nothing."""
        least: dict[str, Any] = self._base(self._entries[command]["arg-type"])
        return least

    def bad_arguments(self, command: str) -> Iterator[Case]:
        """Objects that are no arguments of a command."""
        for value, pattern in self._bad(self._entries[command]["arg-type"], "", ""):
            if isinstance(value, dict):
                yield value, pattern

    def _base(self, type_name: str) -> Any:
        entry = self._entries[type_name]
        match entry["meta-type"]:
            case "builtin":
                return {"string": "zz", "boolean": False, "int": 1, "number": 1.0, "value": None}[entry["json-type"]]
            case "enum":
                return entry["values"][0]
            case "array":
                return []
            case "alternate":
                return self._base(entry["members"][0]["type"])
        return next(self._objects(entry))[0]

    def _objects(self, entry: dict[str, Any]) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
        """An object of each variant, with the members that it can have."""
        variants = entry.get("variants", [None])
        for variant in variants:
            members = list(entry["members"])
            made: dict[str, Any] = {}
            if variant is not None:
                members += self._entries[variant["type"]]["members"]
                made[entry["tag"]] = variant["case"]
            for member in members:
                if "default" not in member and member["name"] not in made:
                    made[member["name"]] = self._base(member["type"])
            yield made, members

    def _bad(self, type_name: str, path: str, name: str) -> Iterator[Case]:
        """Values that are none of a type, at a place that errors call by its path or by its name alone."""
        entry = self._entries[type_name]
        match entry["meta-type"]:
            case "builtin":
                yield from self._bad_builtin(entry["json-type"], path, name)
            case "enum":
                yield from _wrong_types("string", path, name)
                yield "bogus", f"Parameter '{name}' does not accept value 'bogus'"
            case "array":
                yield from _wrong_types("array", path, name)
                for bad, pattern in self._bad(entry["element-type"], f"{path}[0]", "null"):
                    yield [bad], pattern
            case "alternate":
                yield from self._bad_alternate(entry, path, name)
            case "object":
                yield from _wrong_types("object", path, name)
                for made, members in self._objects(entry):
                    yield from self._bad_object(made, members, path)

    def _bad_builtin(self, json_type: str, path: str, name: str) -> Iterator[Case]:
        if json_type == "value":
            return
        yield from _wrong_types(json_type, path, name)
        if json_type == "string":
            yield "a\0b", f"Parameter '{name}' does not accept value 'a\0b'"
        if json_type == "int":
            for number in _NUMBERS:
                yield number, _wrong_integer(path, name)

    def _bad_alternate(self, entry: dict[str, Any], path: str, name: str) -> Iterator[Case]:
        choices = [self._entries[member["type"]] for member in entry["members"]]
        taken = tuple(_TAKES[choice.get("json-type", choice["meta-type"])] for choice in choices)
        for value in _VALUES:
            if not isinstance(value, taken):
                yield value, rf"Invalid parameter type for '{name}', expected: \w+"
        for choice in choices:
            if choice["meta-type"] == "object":
                for value, pattern in self._bad(choice["name"], path, name):
                    if isinstance(value, dict):
                        yield value, pattern

    def _bad_object(self, made: dict[str, Any], members: list[dict[str, Any]], path: str) -> Iterator[Case]:
        for member in members:
            name = member["name"]
            where = f"{path}.{name}" if path else name
            if "default" not in member:
                yield {key: value for key, value in made.items() if key != name}, f"Parameter '{re.escape(where)}' is missing"
            for bad, pattern in self._bad(member["type"], where, name):
                yield {**made, name: bad}, pattern
        unknown = f"{path}.zork" if path else "zork"
        yield {**made, "zork": 1}, f"Parameter '{re.escape(unknown)}' is unexpected"


def _wrong_types(json_type: str, path: str, name: str) -> Iterator[Case]:
    for value in _VALUES:
        # A bool is an int in Python, and not in JSON.
        if isinstance(value, _TAKES[json_type]) and (json_type == "boolean" or value is not True):
            continue
        if json_type == "int":
            yield value, _wrong_integer(path, name)
        else:
            word = _WORDS.get(json_type, json_type)
            yield value, f"Invalid parameter type for '{re.escape(path)}', expected: {word}"


def _wrong_integer(path: str, name: str) -> str:
    where = re.escape(path)
    return rf"Invalid parameter type for '{where}', expected: integer|Parameter '({where}|{re.escape(name)})' expects {_RANGE}"
