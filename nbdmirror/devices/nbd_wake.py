"""Wake: what is left of a connection that was given up while its server might still be at work on the commands.

NBD has no way to call a command back. A server that hangs may have writes of ours in its socket or in its hands, and carry them
out when it wakes up: after newer ones, if those come over another connection meanwhile. That would undo them.

Rules:
1. A connection that is given up stays open, closed only for sending, until the server closes it: by then the server has
   carried out what it had received. Answers are read and thrown away.
2. Whoever connects anew waits for that, for a bounded time, before the first command. A server that answers new
   connections but does not finish with old ones for that long can't be told from one that lost them.
"""

from __future__ import annotations

import asyncio
import os
import socket
from contextlib import suppress
from typing import Final

# As much as is read at a time of answers that nobody wants.
_PIECE: Final = 256 * 1024


class Wake:
    """The socket `fd`, which the caller may close: it is duplicated. Raises OSError where that fails."""

    def __init__(self, fd: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._sock = socket.socket(fileno=os.dup(fd))
        self._ended: asyncio.Future[None] = self._loop.create_future()
        with suppress(OSError):  # the other end may be gone by now, which is read below
            self._sock.shutdown(socket.SHUT_WR)
        self._loop.add_reader(self._sock.fileno(), self._read)

    def _read(self) -> None:
        try:
            if self._sock.recv(_PIECE):
                return
        except BlockingIOError:
            return
        except OSError:
            pass
        self.close()

    async def ended(self, timeout: float) -> None:
        """Wait until the server has closed it, but at most `timeout` seconds; closed it is in any case."""
        await asyncio.wait({self._ended}, timeout=timeout)
        self.close()

    def close(self) -> None:
        """Wait no longer. Idempotent."""
        if not self._ended.done():
            self._ended.set_result(None)
            self._loop.remove_reader(self._sock.fileno())
            self._sock.close()
