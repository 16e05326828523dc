"""A relay between NBD clients and a server that stands for the network: it delays, narrows, hangs and breaks connections.

with Relay(peer.endpoint) as relay:
    device = await NbdDevice.open(relay.endpoint)
    relay.set_link(delay=0.025, rate=GIGABIT)   50 ms there and back, 1 Gbit/s in each direction
    relay.up.hang()                             what clients send stays where it is; relay.hang() does both directions
    relay.resume()
    relay.cut()                                 every connection breaks, as by RST; cut(0) the first; cut_cleanly() as by FIN
    relay.refuse()                              nobody answers any more; relay.accept()

Rules:
1. It runs in a thread with an event loop of its own, so that the loop of the test does not slow it down.
2. The rate is the link's: all connections share it. Delay and rate count from the moment that a piece is read, so pieces
   overlap on their way as they do on a long line, and nothing is lost or reordered by changing either.
3. A direction that hangs is not read either: its senders find their buffers full after a while, as they would.
4. Every method may be called from any thread, and what it says has happened when it returns.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import tempfile
import threading
from collections import deque
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

if TYPE_CHECKING:
    from collections.abc import Callable

    from nbdmirror.devices.uri import NbdEndpoint

GIGABIT: Final = 125_000_000  # bytes per second
_BOUND: Final = 10.0
_PIECE: Final = 256 * 1024
# On its way at most: 1 Gbit/s for 100 ms, and some.
_ON_THE_WAY: Final = 16 * 1024 * 1024
_RESET: Final = struct.pack("ii", 1, 0)


class Direction:
    """One direction of the link. `passed` counts the bytes that have been handed on."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.delay = 0.0
        self.rate: float | None = None
        self.passed = 0
        self._loop = loop
        self._moving = asyncio.Event()
        self._moving.set()
        self._free_at = 0.0

    def hang(self) -> None:
        """Hand nothing on."""
        _in_loop(self._loop, self._moving.clear)

    def resume(self) -> None:
        """Go on."""
        _in_loop(self._loop, self._moving.set)

    def arrival(self, length: int) -> float:
        """When the last of `length` bytes that are sent now comes out at the other end."""
        now = self._loop.time()
        if self.rate is not None:
            self._free_at = max(self._free_at, now) + length / self.rate
            now = self._free_at
        return now + self.delay

    async def pump(self, source: socket.socket, sink: socket.socket) -> None:
        """Carry everything from one socket to the other, up to the end of it."""
        pieces: deque[tuple[float, bytes]] = deque()
        changed = asyncio.Condition()
        on_the_way = 0
        broken: OSError | None = None

        def has_room() -> bool:
            return on_the_way < _ON_THE_WAY

        async def read() -> None:
            nonlocal on_the_way, broken
            piece = b"."
            while piece:
                await self._moving.wait()
                try:
                    piece = await self._loop.sock_recv(source, _PIECE)
                except OSError as error:
                    piece, broken = b"", error
                await self._moving.wait()  # it may have been told to hang while it waited for something to read
                async with changed:
                    pieces.append((self.arrival(len(piece)), piece))
                    on_the_way += len(piece)
                    changed.notify_all()
                    await changed.wait_for(has_room)

        reading = self._loop.create_task(read())
        try:
            while True:
                async with changed:
                    await changed.wait_for(lambda: pieces)
                when, piece = pieces.popleft()
                if (left := when - self._loop.time()) > 0:
                    await asyncio.sleep(left)
                await self._moving.wait()
                if not piece:
                    if broken is not None:
                        raise broken
                    sink.shutdown(socket.SHUT_WR)
                    return
                await self._loop.sock_sendall(sink, piece)
                self.passed += len(piece)
                async with changed:
                    on_the_way -= len(piece)
                    changed.notify_all()
        finally:
            reading.cancel()


class Relay:
    """Relays to `target`; `endpoint` is where to connect instead."""

    def __init__(self, target: NbdEndpoint) -> None:
        self._target = target
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="relay", daemon=True)
        self._directory = tempfile.TemporaryDirectory(prefix="nbd-")
        self._listening: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._connections: dict[asyncio.Task[None], tuple[socket.socket, socket.socket]] = {}
        self.up, self.down = Direction(self._loop), Direction(self._loop)
        if target.transport == "unix":
            self.endpoint = replace(target, socket=f"{self._directory.name}/relay")
        else:
            self._listening = socket.create_server((target.host, 0))
            self.endpoint = replace(target, port=self._listening.getsockname()[1])

    def __enter__(self) -> Self:
        self._thread.start()
        self.accept()
        return self

    def __exit__(self, *_: object) -> None:
        self.refuse()
        self.cut()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_BOUND)
        self._loop.close()
        self._directory.cleanup()

    # --- the link --------------------------------------------------------------------------------------------------

    def set_link(self, *, delay: float = 0.0, rate: float | None = None) -> None:
        """Seconds in each direction, and bytes per second in each."""
        for direction in (self.up, self.down):
            direction.delay, direction.rate = delay, rate

    def hang(self) -> None:
        """Hand nothing on in either direction."""
        self.up.hang()
        self.down.hang()

    def resume(self) -> None:
        """Go on in both directions."""
        self.up.resume()
        self.down.resume()

    # --- connections -----------------------------------------------------------------------------------------------

    @property
    def count(self) -> int:
        """The connections there are."""
        return len(self._connections)

    def cut(self, index: int | None = None) -> None:
        """Break all connections, or that one in the order of their coming; what is on its way is gone."""
        self._end(index, self._reset)

    def cut_cleanly(self, index: int | None = None) -> None:
        """The same, but both ends see an orderly end of what was handed on."""
        self._end(index, self._close)

    def _end(self, index: int | None, end: Callable[[socket.socket], None]) -> None:
        async def work() -> None:
            tasks = list(self._connections) if index is None else [list(self._connections)[index]]
            for task in tasks:
                for sock in self._connections[task]:
                    end(sock)
                task.cancel()
            if tasks:
                await asyncio.wait(tasks)

        _in_loop(self._loop, work)

    def _reset(self, sock: socket.socket) -> None:
        with suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)

    def _close(self, sock: socket.socket) -> None:
        with suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)

    def refuse(self) -> None:
        """Take no more connections: they are refused. Those that there are go on."""
        _in_loop(self._loop, self._refuse)

    async def _refuse(self) -> None:
        if self._accepting is not None:
            self._accepting.cancel()
            await asyncio.wait({self._accepting})
            self._accepting = None
        if self._listening is not None:
            self._listening.close()
            self._listening = None
        if self.endpoint.transport == "unix":
            Path(self.endpoint.socket).unlink(missing_ok=True)

    def accept(self) -> None:
        """Take connections."""
        _in_loop(self._loop, self._accept)

    async def _accept(self) -> None:
        if self._accepting is not None:
            return
        if self._listening is None and self.endpoint.transport == "unix":
            self._listening = socket.socket(socket.AF_UNIX)
            self._listening.bind(self.endpoint.socket)
            self._listening.listen()
        elif self._listening is None:
            self._listening = socket.create_server((self.endpoint.host, self.endpoint.port))
        self._listening.setblocking(False)
        self._accepting = self._loop.create_task(self._accept_from(self._listening))

    async def _accept_from(self, listening: socket.socket) -> None:
        while True:
            client, _ = await self._loop.sock_accept(listening)
            server = socket.socket(client.family)
            server.setblocking(False)
            if client.family != socket.AF_UNIX:
                for sock in (client, server):
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            task = self._loop.create_task(self._carry(client, server))
            self._connections[task] = (client, server)
            task.add_done_callback(self._connections.pop)

    async def _carry(self, client: socket.socket, server: socket.socket) -> None:
        with client, server, suppress(OSError):
            try:
                await self._loop.sock_connect(server, self._target.socket or (self._target.host, self._target.port))
                async with asyncio.TaskGroup() as pumps:
                    pumps.create_task(self.up.pump(client, server))
                    pumps.create_task(self.down.pump(server, client))
            except* OSError:  # one of the two has ended its connection in its own way: so does the other
                self._reset(client)
                self._reset(server)


def _in_loop(loop: asyncio.AbstractEventLoop, work: Callable[[], Any]) -> None:
    """Run it in the relay's thread, and wait until it is done."""

    async def run() -> None:
        result = work()
        if asyncio.iscoroutine(result):
            await result

    asyncio.run_coroutine_threadsafe(run(), loop).result(_BOUND)
