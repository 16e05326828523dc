"""The configuration file of `serve`, in TOML: several disks, and what its options say of the daemon as a whole.

    [server]     socket, or port and bind, or vsock; insecure, allow_ip, max_clients, qmp, pid_file, log_level
    [[export]]   source, name, description, read_only, node_name; one table for each disk
    [tls]        mode, certificates, verify_peer, psk, allow_dn
    [metrics]    listen

Rules:
1. What is wrong is a UsageError with the file, the line and the key, also where it shows only when the daemon is set up. A key
   that nobody knows is wrong.
2. An option of the command line, or its variable, wins over its key; one that says where to listen wins over all such keys, and
   one of a disk over those of the only [[export]].
3. `tomllib` knows no lines. A key stands on the line where the first statement begins with which the file, cut off behind
   it, has that key: so nothing here reads TOML a second time, by other rules.
"""

from __future__ import annotations

import itertools
import re
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, TypeAlias, get_args

import msgspec
from msgspec import Meta, field

from nbdmirror.errors import StateError, UsageError
from nbdmirror.inventory import Inventory
from nbdmirror.protocol.constants import MAX_STRING
from nbdmirror.server.access import parse_network
from nbdmirror.serving import DEFAULT_NODE_NAME, LISTENING, DiskOptions, parse_vsock

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

# Keys and indices, from the root of the document.
Place: TypeAlias = "tuple[str | int, ...]"
LogLevel = Literal["error", "warning", "info", "debug"]

_WHERE: Final = re.compile(r"(?P<what>.*?)(?: - at `\$(?P<where>[^`]*)`)?")
_STEP: Final = re.compile(r"\.(\w+)|\[(\d+)\]")
_OPTION: Final = re.compile(r"(?<![\w-])(--[a-z-]+|-[kpb])\b")
_SHORT: Final = {"-k": "socket", "-p": "port", "-b": "bind"}
_TYPES: Final = {
    "int": "a whole number",
    "float": "a number",
    "str": "a string",
    "bool": "true or false",
    "array": "a list",
    "object": "a table",
}


class _Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A table of the file. Attributes are called as the options of `serve`, `name` is what the key is called."""


class _Server(_Table, frozen=True):
    socket: str | None = None
    port: Annotated[int, Meta(ge=0, le=65535)] | None = None
    bind: str | None = None
    vsock: str | None = None
    insecure: bool | None = None
    allow_ip: tuple[str, ...] | None = None
    shared: Annotated[int, Meta(ge=0)] | None = field(default=None, name="max_clients")
    qmp: tuple[str, ...] | None = None
    pid_file: str | None = None
    log_level: LogLevel | None = None


class _Export(_Table, frozen=True):
    source: str
    name: str = ""
    description: str = ""
    read_only: bool = False
    node_name: str | None = None


class _Tls(_Table, frozen=True):
    tls: Literal["off", "on", "require"] | None = field(default=None, name="mode")
    tls_certificates: str | None = field(default=None, name="certificates")
    tls_verify_peer: bool | None = field(default=None, name="verify_peer")
    tls_psk: str | None = field(default=None, name="psk")
    allow_dn: tuple[str, ...] | None = None


class _Metrics(_Table, frozen=True):
    metrics: str = field(name="listen")


class _Document(_Table, frozen=True):
    server: _Server = _Server()
    export: tuple[_Export, ...] = ()
    tls: _Tls = _Tls()
    metrics: _Metrics | None = None


_TABLES: Final[dict[str, type[_Table]]] = {"server": _Server, "export": _Export, "tls": _Tls, "metrics": _Metrics}
# Where each option of `serve` stands in the file.
_PLACES: Final[dict[str, Place]] = {
    attribute: (table, key)
    for table, kind in _TABLES.items()
    if kind is not _Export
    for attribute, key in zip(kind.__struct_fields__, kind.__struct_encode_fields__, strict=True)
}


@dataclass(frozen=True, slots=True)
class Config:
    """A file that was read and checked."""

    path: str
    text: str
    document: _Document

    def settings(self, given: Iterable[str] = ()) -> dict[str, Any]:
        """What the file says, by the names of serve's options, without those that were `given` otherwise (rule 2)."""
        hidden = set(given)
        if hidden & LISTENING:
            hidden |= LISTENING
        tables = [self.document.server, self.document.tls, self.document.metrics]
        found = {key: value for table in tables if table for key, value in msgspec.structs.asdict(table).items()}
        return {key: value for key, value in found.items() if value is not None and key not in hidden}

    def disks(self, given: Mapping[str, Any]) -> tuple[DiskOptions, ...]:
        """The disks, with what was `given` for the only one; raises UsageError where there are several."""
        exports = self.document.export
        if given and len(exports) > 1:
            raise UsageError(f"'{self.path}' has {len(exports)} exports: DISK, -x, -D, -r and --node-name are for the only one")
        disks = (DiskOptions(each.source, _node_name(each), each.name, each.description, each.read_only) for each in exports)
        return tuple(replace(disk, **given) for disk in disks)

    def blame(self, error: UsageError, given: Iterable[str] = ()) -> UsageError:
        """The same error, with the key that it is about: the first whose option it names, else whose value (rule 1)."""
        said = self.settings(given)
        named = (_SHORT.get(option) or option[2:].replace("-", "_") for option in _OPTION.findall(str(error)))
        quoted = (name for name, value in said.items() if isinstance(value, str) and f"'{value}" in str(error))
        for name in itertools.chain(named, quoted):
            if name in said:
                return _error(self.path, self.text, _PLACES[name], str(error))
        return error


def read(path: str) -> Config:
    """Read and check a file; raises UsageError."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot read the configuration '{path}': {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"cannot read the configuration '{path}': it is not UTF-8") from None
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"'{path}' is not TOML: {error}") from None
    try:
        document = msgspec.convert(content, _Document)
    except msgspec.ValidationError as error:
        raise _error(path, text, *_explained(str(error))) from None
    for place, problem in _problems(document):
        raise _error(path, text, place, problem)
    return Config(path, text, document)


# --- what is wrong ---------------------------------------------------------------------------------------------------


def _problems(document: _Document) -> Iterator[tuple[Place, str]]:
    """What is wrong though every value is of its type."""
    server = document.server
    listening = [key for key in ("socket", "port", "vsock") if getattr(server, key) is not None]
    if len(listening) > 1:
        yield ("server", listening[1]), f"excludes {listening[0]}: a Unix socket, TCP or a vsock"
    if server.bind is not None and listening and listening != ["port"]:
        yield ("server", "bind"), f"goes with TCP, and {listening[0]} is set"
    for place, check, values in (
        (("server", "allow_ip"), parse_network, server.allow_ip or ()),
        (("server", "vsock"), parse_vsock, [server.vsock] if server.vsock is not None else []),
    ):
        for value in values:
            if problem := _refusal_of(check, value):
                yield place, problem
    yield from _export_problems(document.export)


def _export_problems(exports: Sequence[_Export]) -> Iterator[tuple[Place, str]]:
    names: set[str] = set()
    nodes: set[str] = set()
    for index, each in enumerate(exports):
        if len(exports) > 1 and not each.name:
            yield ("export", index), "needs a name: there are several"
        if each.name in names:
            yield ("export", index, "name"), f"'{each.name}' is another export's already"
        if max(len(each.name.encode()), len(each.description.encode())) > MAX_STRING:
            yield ("export", index), f"name and description are at most {MAX_STRING} bytes each"
        node = _node_name(each)
        place: Place = ("export", index) if each.node_name is None else ("export", index, "node_name")
        if problem := _refusal_of(Inventory().check_node_name, node):
            yield place, problem if each.node_name is not None else f"needs a node_name of letters, digits and -._ ({problem})"
        if node in nodes:
            yield place, f"'{node}' is another export's node already; give it a node_name of its own"
        names.add(each.name)
        nodes.add(node)


def _refusal_of(check: Any, value: str) -> str | None:  # noqa: ANN401
    """What `check` has against a value."""
    try:
        check(value)
    except (UsageError, StateError) as error:
        return str(error)
    return None


def _node_name(export: _Export) -> str:
    """The name of an export, for it is known to clients, where no other was chosen."""
    return export.node_name or export.name or DEFAULT_NODE_NAME


def _explained(problem: str) -> tuple[Place, str]:
    """A finding of msgspec's: where, and in our words what."""
    match = _WHERE.fullmatch(problem)
    assert match is not None, "anything matches"
    place: Place = tuple(key or int(index) for key, index in _STEP.findall(match["where"] or ""))
    what = match["what"]
    quoted = re.findall(r"`([^`]*)`", what)
    table = _TABLES[str(place[0])] if place else _Document
    known = ", ".join(table.__struct_encode_fields__)
    if "unknown field" in what:
        return (*place, quoted[0]), f"nobody knows this key; there {'are' if place else 'are the tables'} {known}"
    if "missing required" in what:
        return (*place, quoted[0]), "is missing"
    if what.startswith("Invalid enum"):
        return place, f"{what.removeprefix('Invalid enum value ')} is none of {', '.join(_choices(table, str(place[-1])))}"
    if "got" in what:
        wanted, got = (" or ".join(_TYPES[name] for name in each.split(" | ") if name in _TYPES) for each in quoted)
        return place, f"has to be {wanted}, and is {got or quoted[1]}"
    return place, f"has to be{what.partition('`int`')[2]}"


def _choices(table: type[_Table], key: str) -> tuple[str, ...]:
    """The words that a key takes."""
    wanted = next(each.type for each in msgspec.structs.fields(table) if each.encode_name == key)
    return tuple(word for part in get_args(wanted) for word in get_args(part))


def _error(path: str, text: str, place: Place, problem: str) -> UsageError:
    keys = ".".join(str(key) for key in place if isinstance(key, str))
    return UsageError(f"'{path}', line {_line_of(text, place)}: {keys}: {problem}")


def _line_of(text: str, place: Place) -> int:
    """The line of a key, counted from 1; of the table that it is missing from where it is not there (rule 3)."""
    while place:
        begins = 1
        for number, cut in enumerate(itertools.accumulate(text.splitlines(keepends=True)), 1):
            try:
                content = tomllib.loads(cut)
            except tomllib.TOMLDecodeError:
                continue  # in the middle of a statement
            if _has(content, place):
                return begins
            begins = number + 1
        place = place[:-1]
    return 1


def _has(content: Any, place: Place) -> bool:  # noqa: ANN401
    for step in place:
        try:
            content = content[step]
        except (KeyError, IndexError, TypeError):
            return False
    return True
