"""The endpoint that Prometheus asks: as much of an HTTP server as GET /metrics takes, on the daemon's own loop.

Rules:
1. It is for this host unless an address says otherwise: there is neither TLS nor a password.
2. A client costs bounded memory and time: one request each, of at most _REQUEST_MAX bytes, within _SECONDS; _CLIENTS at a time.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from contextlib import suppress
from http import HTTPStatus
from typing import TYPE_CHECKING, Final

from prometheus_client.exposition import choose_encoder

from nbdmirror.errors import UsageError
from nbdmirror.sockets import BACKLOG, KEEP_FILE, for_loop, listen_tcp, listen_unix

if TYPE_CHECKING:
    from collections.abc import Sequence

    from prometheus_client import CollectorRegistry

    from nbdmirror.sockets import ServerSocket

_log: Final = logging.getLogger(__name__)

_LOOPBACK: Final = "127.0.0.1"
_REQUEST_MAX: Final = 16 * 1024
_SECONDS: Final = 10.0
_CLIENTS: Final = 16
_MAX_PORT: Final = 65535


def listen(where: str) -> ServerSocket:
    """Listen at [ADDR:]PORT, or at the path of a Unix socket, which has a slash. Raises UsageError and ListenError."""
    if "/" in where:
        return listen_unix(where)
    address, _, port = where.rpartition(":")
    if not (port.isdecimal() and port.isascii() and int(port) <= _MAX_PORT):
        raise UsageError(f"--metrics '{where}' is neither [ADDR:]PORT nor the path of a socket, with a slash in it")
    return listen_tcp(address.removeprefix("[").removesuffix("]") or _LOOPBACK, int(port))


class MetricsEndpoint:
    """Answers with what `registry` collects. The sockets are closed with it."""

    def __init__(self, registry: CollectorRegistry, sockets: Sequence[ServerSocket]) -> None:
        self._registry = registry
        self._sockets = sockets
        self._servers: list[asyncio.Server] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Begin to answer."""
        for each in self._sockets:
            sock = for_loop(each.sock)
            if sock.family == socket.AF_UNIX:
                server = await asyncio.start_unix_server(
                    self._accept, sock=sock, backlog=BACKLOG, limit=_REQUEST_MAX, **KEEP_FILE
                )
            else:
                server = await asyncio.start_server(self._accept, sock=sock, backlog=BACKLOG, limit=_REQUEST_MAX)
            self._servers.append(server)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._tasks) >= _CLIENTS:
            writer.close()
            return
        task = asyncio.get_running_loop().create_task(self._answer(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(_SECONDS):
                head = await reader.readuntil(b"\r\n\r\n")
                writer.write(self._response(head.decode("latin-1")))
                await writer.drain()
        except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
            _log.debug("a client of the metrics was dropped: %s", error)
        except Exception:
            _log.exception("the metrics could not be told because of a fault in nbdmirror")
        finally:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()

    def _response(self, head: str) -> bytes:
        request, *fields = head.split("\r\n")
        method, _, rest = request.partition(" ")
        path = rest.partition(" ")[0].partition("?")[0]
        if method not in ("GET", "HEAD"):
            return _message(HTTPStatus.METHOD_NOT_ALLOWED, "only GET\n", ("Allow: GET, HEAD",))
        if path != "/metrics":
            return _message(HTTPStatus.NOT_FOUND, "the metrics are at /metrics\n")
        accepted = [value.strip() for name, _, value in (field.partition(":") for field in fields) if name.lower() == "accept"]
        encode, content_type = choose_encoder(",".join(accepted))
        text = encode(self._registry).decode()
        return _message(HTTPStatus.OK, text, content_type=content_type, with_body=method == "GET")

    async def aclose(self) -> None:
        """Stop answering."""
        for each in self._sockets:
            each.remove_file()
        for server in self._servers:
            server.close()
        for each in self._sockets:
            each.close()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(set(self._tasks))


def _message(
    status: HTTPStatus,
    text: str,
    fields: Sequence[str] = (),
    *,
    content_type: str = "text/plain; charset=utf-8",
    with_body: bool = True,
) -> bytes:
    body = text.encode()
    lines = (
        f"HTTP/1.1 {status.value} {status.phrase}",
        f"Content-Type: {content_type}",
        f"Content-Length: {len(body)}",
        "Connection: close",
        *fields,
        "\r\n",
    )
    return "\r\n".join(lines).encode("latin-1") + (body if with_body else b"")
