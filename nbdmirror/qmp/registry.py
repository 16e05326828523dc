"""Commands by name. A handler is a function, and its signature is the command's schema.

    registry = Registry(version)

    @registry.command("block-dirty-bitmap-add")
    def bitmap_add(node: str, name: str, *, granularity: UInt32 | None = None, persistent: bool = False) -> None: ...

    @registry.command("blockdev-add")
    async def blockdev_add(options: FileOptions | NbdOptions, /) -> None: ...

Rules:
1. A parameter is a member of `arguments` (`schema` has the types and names); one with a default is optional. A single
   positional-only parameter is the whole of `arguments` instead, which makes unions of driver options possible.
2. Arguments are checked completely before the handler is called; the handler checks what depends on the state of things.
3. A handler returns what JSON can say, None meaning the empty object, and raises NbdMirrorError; it may be `async`.
4. A handler with a parameter that `schema` has no check for is refused when it is registered. Structs are looked into at
   their first use only, so that they may name types that are defined after them.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, Final, Literal, TypeVar, get_type_hints

from nbdmirror.qmp.messages import ErrorClass, QmpError, Version
from nbdmirror.qmp.schema import Member, Place, check_members, checker

AnyHandler = TypeVar("AnyHandler", bound=Callable[..., Any])


class Signature:
    """A handler and what it takes. `members` is empty for one that takes the whole object, whose type is `whole`.

    `returns` is the type of its result, `Any` where it does not say.
    """

    __slots__ = ("handler", "members", "returns", "whole")

    def __init__(self, handler: Callable[..., Any]) -> None:
        self.handler: Final = handler
        self.whole: Any = None
        parameters = inspect.signature(handler).parameters.values()
        hints = get_type_hints(_function(handler), include_extras=True)
        self.returns: Any = hints.get("return", Any)
        members = []
        for parameter in parameters:
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                raise TypeError(f"*{parameter.name} of {handler!r} says nothing of what it takes")
            checker(hints[parameter.name])
            if parameter.kind is parameter.POSITIONAL_ONLY:
                self.whole = hints[parameter.name]
            optional = parameter.default is not parameter.empty
            members.append(Member.of(parameter.name, hints[parameter.name], optional=optional))
        if self.whole is not None and len(members) > 1:
            raise TypeError(f"{handler!r} takes the whole of the arguments and more")
        self.members: Final = () if self.whole is not None else tuple(members)

    def bind(self, arguments: dict[str, Any]) -> Callable[[], Any]:
        """The call that these arguments ask for, all of them checked; raises QmpError."""
        try:
            if self.whole is not None:
                return functools.partial(self.handler, checker(self.whole)(arguments, Place()))
            return functools.partial(self.handler, **check_members(self.members, arguments, Place()))
        except RecursionError:
            # Only a type that holds itself gets here, such as a node inline in a node inline in a node.
            raise QmpError.generic("JSON nesting depth limit exceeded") from None


def _function(handler: Callable[..., Any]) -> Callable[..., Any]:
    """Where the annotations are: what a partial, a bound method or a decorator stands for."""
    while isinstance(handler, functools.partial):
        handler = handler.func
    function: Callable[..., Any] = inspect.unwrap(getattr(handler, "__func__", handler))
    return function


class Registry:
    """The commands of a server, `qmp_capabilities`, `query-version` and `query-commands` among them from the start."""

    __slots__ = ("_commands", "version")

    def __init__(self, version: Version) -> None:
        self.version: Final = version
        self._commands: dict[str, Signature] = {}
        self.command("qmp_capabilities")(qmp_capabilities)
        self.command("query-version")(self._query_version)
        self.command("query-commands")(self._query_commands)

    @property
    def commands(self) -> dict[str, Signature]:
        """Every command with its signature, sorted by name."""
        return dict(sorted(self._commands.items()))

    def command(self, name: str) -> Callable[[AnyHandler], AnyHandler]:
        """Make a function, bound method or partial the handler of a command; a name can be given once."""
        if name in self._commands:
            raise ValueError(f"the command {name} has a handler already")

        def register(handler: AnyHandler) -> AnyHandler:
            self._commands[name] = Signature(handler)
            return handler

        return register

    def bind(self, name: str, arguments: dict[str, Any]) -> Callable[[], Any]:
        """The call that a command asks for, checked; raises QmpError, CommandNotFound where nobody handles it."""
        signature = self._commands.get(name)
        if signature is None:
            raise QmpError(ErrorClass.COMMAND_NOT_FOUND, f"The command {name} has not been found")
        return signature.bind(arguments)

    async def dispatch(self, name: str, arguments: dict[str, Any]) -> object:
        """Check, call, await: the command's result. Raises what the handler raises, and QmpError before it is called."""
        result = self.bind(name, arguments)()
        return await result if inspect.isawaitable(result) else result

    def _query_version(self) -> dict[str, Any]:
        return self.version.as_json()

    def _query_commands(self) -> list[dict[str, str]]:
        return [{"name": name} for name in self.commands]


def qmp_capabilities(*, enable: list[Literal["oob"]] | None = None) -> None:
    """Choose among the capabilities of the greeting (QMP reference, "qmp_capabilities"): none are offered."""
    for capability in enable or ():
        raise QmpError.generic(f"Capability {capability} not available")
