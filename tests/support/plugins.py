"""Our nbdkit plugins as peers, with their control sockets.

    with plugins.fault(f"file={disk}", "volatile=50%") as target:
        target.ask("add write at=3 error=ENOSPC")
        ...
        assert target.ask("counts")["unflushed-sectors"] == 0
        target.peer.kill()

Rules:
1. Rules of `connect` are to be added once it runs: to see that it does somebody has to connect.
2. What hangs is let go in the end, for nbdkit waits for it.
"""

from __future__ import annotations

import functools
import json
import socket
import subprocess
import tempfile
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

import nbdmirror
from tests.support import peers
from tests.support.daemon import until

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from contextlib import AbstractContextManager

    from nbdmirror.devices.uri import NbdEndpoint

PLUGINS: Final = Path(nbdmirror.__file__).parents[1] / "plugins"
_CONTROL_SECONDS: Final = 10.0


@dataclass(frozen=True, slots=True)
class Control:
    """The control socket of a plugin."""

    control: Path

    def ask(self, command: str) -> Any:
        """The answer of a command that has to succeed."""
        answer = ask(self.control, command)
        assert "error" not in answer, answer
        return answer

    def hits(self) -> int:
        """How many requests a rule of fault.py has struck."""
        return sum(rule["hits"] for rule in self.ask("counts")["faults"])


@dataclass(frozen=True, slots=True)
class Plugin(Control):
    """A plugin that nbdkit runs."""

    peer: peers.Peer

    @property
    def endpoint(self) -> NbdEndpoint:
        return self.peer.endpoint

    @property
    def uri(self) -> str:
        return self.endpoint.uri


def ask(control: Path, command: str) -> Any:
    """The answer of a command, error or not."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(_CONTROL_SECONDS)
        client.connect(str(control))
        client.sendall(f"{command}\n".encode())
        with client.makefile() as lines:
            return json.loads(lines.readline())


def require() -> None:
    """Skip the test unless nbdkit runs Python plugins."""
    peers.require("nbdkit")
    if not _has_python():
        pytest.skip("nbdkit-plugin-python is not installed")


@functools.cache
def _has_python() -> bool:
    return subprocess.run(["nbdkit", "python", "--version"], capture_output=True, check=False).returncode == 0


@contextmanager
def _plugin(script: str, *args: str, filters: Sequence[str], after: Plugin | None = None) -> Iterator[Plugin]:
    require()
    with tempfile.TemporaryDirectory(prefix="nbd-") as name:
        control = Path(name) / "control"
        arguments = [str(PLUGINS / script), f"control={control}", *args]
        with peers.nbdkit("python", *arguments, filters=filters, after=after.peer if after else None) as peer:
            plugin = Plugin(control, peer)
            try:
                yield plugin
            finally:
                with suppress(OSError, ValueError):  # it may have been killed
                    ask(control, "clear")


@contextmanager
def fault(*args: str, filters: Sequence[str] = (), after: Plugin | None = None) -> Iterator[Plugin]:
    """plugins/fault.py with its parameters; it listens where `after` did before."""
    with _plugin("fault.py", *args, filters=filters, after=after) as plugin:
        # The look whether it runs was a connection, too.
        until(lambda: "connect" in plugin.ask("counts")["requests"], "the first connection is counted")
        yield plugin


def verify(*args: str, filters: Sequence[str] = ()) -> AbstractContextManager[Plugin]:
    """plugins/verify.py with its parameters."""
    return _plugin("verify.py", *args, filters=filters)
