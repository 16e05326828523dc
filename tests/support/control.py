"""A QMP client for tests: one command after another, with the events of each.

    with Control(path) as qmp:
        qmp.ask("block-dirty-bitmap-add", node="source", name="b0")
        assert qmp.refused("block-dirty-bitmap-add", node="source", name="b0") == "Bitmap already exists: b0"

An argument's name has underscores for dashes. An event belongs to the command during which it came, or shortly after: before
the answer to a question that is asked next. `wait` looks at all of them, once.
"""

from __future__ import annotations

import json
import socket
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Self

if TYPE_CHECKING:
    from pathlib import Path

_SECONDS: Final = 20.0


@dataclass(slots=True)
class Answer:
    """What a command came to: `value`, or `error` as (class, desc)."""

    value: Any = None
    error: tuple[str, str] | None = None
    events: list[tuple[str, Any]] = field(default_factory=list)


class Control:
    """One connection, negotiated."""

    def __init__(self, path: Path | str) -> None:
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.settimeout(_SECONDS)
        self._sock.connect(str(path))
        self._lines = self._sock.makefile("rb")
        self._unseen: deque[tuple[str, Any]] = deque()
        self.greeting = json.loads(self._lines.readline())
        self._tell("qmp_capabilities", {})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.close()
        self._sock.close()

    def say(self, text: str) -> tuple[str, str] | None:
        """The error, if it is one, that answers a text that need not be well formed."""
        return self._answer(text).error

    def _tell(self, command: str, arguments: Any) -> Answer:
        return self._answer(json.dumps({"execute": command, "arguments": arguments}))

    def _answer(self, text: str) -> Answer:
        self._sock.sendall(text.encode())
        answer = Answer()
        while "event" in (message := self._read()):
            answer.events.append((message["event"], message.get("data")))
        self._unseen += answer.events
        if "error" in message:
            answer.error = message["error"]["class"], message["error"]["desc"]
        answer.value = message.get("return")
        return answer

    def _read(self) -> Any:
        line = self._lines.readline()
        if not line:
            raise EOFError("the server has hung up")
        return json.loads(line)

    def send(self, command: str) -> None:
        """A command whose answer is not waited for: the last one of a connection, but for `wait`."""
        self._sock.sendall(json.dumps({"execute": command}).encode())

    def tell(self, command: str, arguments: Any) -> Answer:
        """The answer to a command, and the events that came with it."""
        answer = self._tell(command, arguments)
        answer.events += self._tell("query-version", {}).events
        return answer

    def ask(self, command: str, **arguments: Any) -> Any:
        """The result of a command that has to succeed."""
        answer = self.tell(command, {name.replace("_", "-"): value for name, value in arguments.items()})
        assert answer.error is None, f"{command} {arguments}: {answer.error}"
        return answer.value

    def refused(self, command: str, **arguments: Any) -> str:
        """The error of a command that has to fail."""
        answer = self.tell(command, {name.replace("_", "-"): value for name, value in arguments.items()})
        assert answer.error is not None, f"{command} {arguments} was taken: {answer.value}"
        return answer.error[1]

    def wait(self, event: str) -> Any:
        """The data of the next event of that name; those before it are forgotten."""
        while True:
            if self._unseen:
                name, data = self._unseen.popleft()
            else:
                message = self._read()
                name, data = message.get("event"), message.get("data")
            if name == event:
                return data

    # --- bitmaps -----------------------------------------------------------------------------------------------------

    def bitmap(self, verb: str, name: str, node: str = "source", **arguments: Any) -> None:
        """A command about one bitmap that has to succeed."""
        self.ask(f"block-dirty-bitmap-{verb}", node=node, name=name, **arguments)

    def bitmaps(self, node: str = "source") -> dict[str, dict[str, Any]]:
        """The bitmaps of a node, by name."""
        nodes = self.ask("query-named-block-nodes")
        found = next(each for each in nodes if each["node-name"] == node)
        return {info["name"]: info for info in found.get("dirty-bitmaps", ())}

    def chunks(self, name: str, node: str = "source") -> int:
        """How many chunks are dirty."""
        info = self.bitmaps(node)[name]
        return int(info["count"]) // int(info["granularity"])

    def transact(self, *actions: tuple[str, dict[str, Any]]) -> None:
        """A transaction of bitmap actions, given as (verb, data), that has to succeed."""
        self.ask("transaction", actions=actions_of(*actions))


def actions_of(*actions: tuple[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Bitmap actions on the node 'source', and aborts, as `transaction` takes them."""
    return [
        {"type": "abort", "data": {}}
        if verb == "abort"
        else {"type": f"block-dirty-bitmap-{verb}", "data": {"node": "source", **data}}
        for verb, data in actions
    ]


def unix(path: Path | str) -> dict[str, Any]:
    """Where nbd-server-start is to listen."""
    return {"type": "unix", "data": {"path": str(path)}}
