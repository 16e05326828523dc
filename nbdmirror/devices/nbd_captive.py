"""CaptiveServer: an NBD server that is started for one device, by systemd's socket activation, and ends with it.

Rules:
1. libnbd could start it, but waits without bound, holding up the whole program, for one that does not end. Here it is asked to
   end, and killed when it does not.
2. Its socket is in a directory that only we can enter, and is gone once it is connected to.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from nbdmirror.devices.uri import NbdEndpoint
from nbdmirror.errors import UsageError
from nbdmirror.sockets import listen_unix

if TYPE_CHECKING:
    from asyncio.subprocess import Process
    from collections.abc import Sequence

# Seconds for the server to write out what it holds and end; and for the system to end it after that.
_STOP_SECONDS: Final = 5.0
_KILL_SECONDS: Final = 2.0
# The listening socket arrives as stdin and has to be descriptor 3; LISTEN_PID has to be the server's own (sd_listen_fds(3)).
_ACTIVATE: Final = 'LISTEN_FDS=1 LISTEN_PID=$$; export LISTEN_FDS LISTEN_PID; unset LISTEN_FDNAMES; exec "$@" 3<&0 </dev/null'


class CaptiveServer:
    """A running server. Construct it with `start`."""

    def __init__(self, process: Process, endpoint: NbdEndpoint) -> None:
        self.endpoint = endpoint
        self._process = process

    @classmethod
    async def start(cls, argv: Sequence[str]) -> CaptiveServer:
        """Start `argv`; it can be connected to at once. Raises UsageError if there is no such command."""
        if not argv or shutil.which(argv[0]) is None:
            raise UsageError(f"{command_name(argv)}: no such command to start an NBD server with")
        directory = tempfile.mkdtemp(prefix="nbdmirror-")
        try:
            endpoint = NbdEndpoint.unix(f"{directory}/socket")
            with listen_unix(endpoint.socket).sock as listening:  # the file stays: it is what we connect to
                process = await asyncio.create_subprocess_exec(
                    "/bin/sh", "-c", _ACTIVATE, "sh", *argv, stdin=listening.fileno()
                )
        except BaseException:
            shutil.rmtree(directory, ignore_errors=True)
            raise
        return cls(process, endpoint)

    def hide(self) -> None:
        """Nobody else needs to connect to it."""
        shutil.rmtree(Path(self.endpoint.socket).parent, ignore_errors=True)

    async def aclose(self) -> None:
        """End it, by force if need be, for a bounded time. Idempotent."""
        self.hide()
        try:
            with suppress(ProcessLookupError):
                self._process.terminate()
            await self._ended(_STOP_SECONDS)
        finally:  # also where the wait was cancelled
            if self._process.returncode is None:
                with suppress(ProcessLookupError):
                    self._process.kill()
                await self._ended(_KILL_SECONDS)

    async def _ended(self, timeout: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await self._process.wait()


def command_name(argv: Sequence[str]) -> str:
    """What a device over a captive server is called, as a shell user would write it."""
    return f"[ {' '.join(argv)} ]"
