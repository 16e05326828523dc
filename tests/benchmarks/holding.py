"""What a server holds in memory: with clients that do nothing, and with large requests in flight.

Rules:
1. Each figure is a fresh server's, and its own account: VmRSS, and VmHWM for the most there was.
2. Every READ is sent, and a while passes, before any answer is taken: all that a server can be made to hold by clients that
   are slow, not what it happens to hold for fast ones. The payloads of WRITEs come as fast as the server takes them, over
   all connections at a time.
3. In the end every request is answered, without an error.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Final

from nbdmirror.protocol import constants as c
from nbdmirror.units import MiB
from tests.benchmarks.machine import RUN_SECONDS, BenchmarkError

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.benchmarks.machine import Server

REQUESTS: Final = 32
LENGTH: Final = 32 * MiB
IDLE_CLIENTS: Final = 100
# For the server to do all that it can do without its clients.
_SETTLING: Final = 1.0


class Client:
    """As plain as can be: EXPORT_NAME, simple replies, blocking."""

    def __init__(self, path: str) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(RUN_SECONDS)
        self.sock.connect(path)
        self._scratch = bytearray(MiB)
        self._take(18)
        self.sock.sendall(struct.pack(">I", c.FLAG_FIXED_NEWSTYLE | c.FLAG_NO_ZEROES))
        self.sock.sendall(struct.pack(">8sII", b"IHAVEOPT", c.Option.EXPORT_NAME, 0))
        self._take(10)

    def _take(self, length: int) -> bytes:
        view = memoryview(self._scratch)
        last = 0
        while length:
            last = self.sock.recv_into(view[: min(length, len(view))])
            if not last:
                raise BenchmarkError("the server hung up")
            length -= last
        return bytes(view[:last])

    def request(self, command: int, number: int) -> None:
        """The header of a READ or WRITE of LENGTH bytes."""
        self.sock.sendall(struct.pack(">IHHQQI", c.REQUEST_MAGIC, 0, command, number, 0, LENGTH))

    def reply(self, content: int) -> None:
        """The next reply, with so many bytes behind it."""
        error = int.from_bytes(self._take(16)[4:8], "big")
        if error:
            raise BenchmarkError(f"the server answered with error {error}")
        self._take(content)


def idle(server: Server) -> float:
    """Bytes resident with IDLE_CLIENTS that have opened the export and ask nothing."""
    clients = [Client(server.socket) for _ in range(IDLE_CLIENTS)]
    found = _memory(server, "VmRSS")
    for client in clients:
        client.sock.close()
    return found


def reading(server: Server, connections: int) -> float:
    """The most bytes resident with REQUESTS reads of LENGTH in flight over so many connections."""
    clients = [Client(server.socket) for _ in range(connections)]
    for number in range(REQUESTS):
        clients[number % connections].request(c.CMD_READ, number)
    time.sleep(_SETTLING)

    def take(client: Client) -> None:
        for _ in range(REQUESTS // connections):
            client.reply(LENGTH)

    return _finished(server, clients, take)


def writing(server: Server, connections: int) -> float:
    """The most bytes resident with REQUESTS writes of LENGTH in flight over so many connections."""
    clients = [Client(server.socket) for _ in range(connections)]
    payload = bytes(LENGTH)

    def send(client: Client) -> None:
        for number in range(REQUESTS // connections):
            client.request(c.CMD_WRITE, number)
            client.sock.sendall(payload)
        for _ in range(REQUESTS // connections):
            client.reply(0)

    return _finished(server, clients, send)


def _finished(server: Server, clients: list[Client], work: Callable[[Client], None]) -> float:
    with ThreadPoolExecutor(len(clients)) as executor:
        for done in [executor.submit(work, client) for client in clients]:
            done.result()
    found = _memory(server, "VmHWM")
    for client in clients:
        with contextlib.suppress(OSError):
            client.sock.close()
    return found


def _memory(server: Server, what: str) -> float:
    status = Path(f"/proc/{server.pid}/status").read_text()
    return int(status.partition(f"{what}:")[2].split()[0]) * 1024.0
