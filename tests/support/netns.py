"""Two network namespaces with a cable between them that can be pulled: what no relay on one host can show.

with NetworkPair() as pair, pair.nbdkit("memory", "1M") as endpoint, pair.inside():
    ... connect to endpoint ...
    pair.set_link("down")

Rules:
1. Both ends are namespaces of their own, and the names are this process's: nothing of the host's network is touched.
2. It takes root and iproute2; a test without them is skipped and says so.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import subprocess
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, Self

import pytest

from nbdmirror.devices.uri import NbdEndpoint
from tests.support.peers import require

if TYPE_CHECKING:
    from collections.abc import Iterator

_CLONE_NEWNET: Final = 0x40000000
_BOUND: Final = 10.0
_CLIENT, _SERVER = "10.97.0.1", "10.97.0.2"


class NetworkPair:
    """A client's and a server's namespace."""

    def __init__(self) -> None:
        require("ip", "ss", "nbdkit")
        self._names = [f"nbdm-{os.getpid()}-{end}" for end in ("client", "server")]

    def __enter__(self) -> Self:
        client, server = self._names
        if os.geteuid() != 0 or subprocess.run(["ip", "netns", "add", client], capture_output=True, check=False).returncode:
            pytest.skip("network namespaces take root")
        _ip("netns", "add", server)
        try:
            _ip("-n", client, "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", server)
            for name, address in ((client, _CLIENT), (server, _SERVER)):
                _ip("-n", name, "addr", "add", f"{address}/24", "dev", "cable")
                _ip("-n", name, "link", "set", "cable", "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in self._names:
            _ip("netns", "del", name)

    def set_link(self, state: Literal["up", "down"]) -> None:
        """Pull the cable on the server's side, or plug it in again."""
        _ip("-n", self._names[1], "link", "set", "cable", state)

    @contextmanager
    def nbdkit(self, plugin: str, *args: str) -> Iterator[NbdEndpoint]:
        """nbdkit in the server's namespace."""
        with tempfile.TemporaryDirectory(prefix="nbd-") as directory:
            pid_file = Path(directory) / "pid"
            where = ["-f", "-i", _SERVER, "-p", "10809", "-P", str(pid_file)]
            process = subprocess.Popen([*self.command("server"), "nbdkit", *where, plugin, *args])
            try:
                deadline = time.monotonic() + _BOUND
                while not pid_file.exists():  # written once it listens
                    if process.poll() is not None or time.monotonic() > deadline:
                        pytest.fail("nbdkit does not start")
                    time.sleep(0.01)
                yield NbdEndpoint.tcp(_SERVER)
            finally:
                process.kill()
                process.wait()

    def command(self, end: Literal["client", "server"]) -> list[str]:
        """What runs a program at that end."""
        return ["ip", "netns", "exec", self._names[end == "server"]]

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Sockets that this thread opens are the client's. Threads that it starts inherit that."""
        libc = ctypes.CDLL(None, use_errno=True)
        with Path("/proc/thread-self/ns/net").open("rb") as home, Path(f"/run/netns/{self._names[0]}").open("rb") as away:
            _enter(libc, away.fileno())
            try:
                yield
            finally:
                _enter(libc, home.fileno())

    def sockets(self, end: Literal["client", "server"]) -> str:
        """The TCP connections that the system at that end knows of, also those that no process has any more."""
        name = self._names[end == "server"]
        return subprocess.run(["ip", "netns", "exec", name, "ss", "-Htn"], capture_output=True, check=True, text=True).stdout

    async def no_sockets(self, end: Literal["client", "server"]) -> None:
        """Wait until nothing can come out of any connection any more."""
        deadline = time.monotonic() + _BOUND
        while left := self.sockets(end):
            if time.monotonic() > deadline:
                pytest.fail(f"connections are left:\n{left}")
            await asyncio.sleep(0.01)


def _enter(libc: ctypes.CDLL, namespace: int) -> None:
    assert threading.current_thread() is threading.main_thread()
    if libc.setns(namespace, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


def _ip(*args: str) -> None:
    subprocess.run(["ip", *args], check=True, capture_output=True)
