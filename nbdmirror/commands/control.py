"""The daemon itself: quit, query-status."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nbdmirror.qmp.registry import Registry


class ControlCommands:
    """Handlers about the daemon. `stop` begins an orderly end."""

    def __init__(self, stop: Callable[[], None]) -> None:
        self._stop = stop

    def register(self, registry: Registry) -> None:
        """Name the handlers."""
        registry.command("quit")(self.quit)
        registry.command("query-status")(self.query_status)

    def quit(self) -> None:
        """Answer, then end: jobs are cancelled, accepted requests finished."""
        self._stop()

    def query_status(self) -> dict[str, Any]:
        """There is no machine that could be stopped: always running."""
        return {"status": "running", "running": True, "singlestep": False}
