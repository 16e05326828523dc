"""The daemon itself: quit, query-status, query-qmp-schema."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Literal

from nbdmirror.jobs.status import JobStatus
from nbdmirror.qmp.introspection import describe
from nbdmirror.qmp.registry import Registry

_PROGRESS: Final[dict[str, Any]] = {"type": str, "device": str, "len": int, "offset": int, "speed": int}

# Every event that there is, with its data.
EVENTS: Final[dict[str, dict[str, Any]]] = {
    "BLOCK_EXPORT_DELETED": {"id": str},
    "BLOCK_JOB_CANCELLED": _PROGRESS,
    "BLOCK_JOB_COMPLETED": {**_PROGRESS, "error": str | None},
    "BLOCK_JOB_ERROR": {"device": str, "operation": Literal["read", "write"], "action": Literal["ignore", "report", "stop"]},
    "BLOCK_JOB_PENDING": {"type": str, "id": str},
    "BLOCK_JOB_READY": _PROGRESS,
    "JOB_STATUS_CHANGE": {"id": str, "status": JobStatus},
    "SHUTDOWN": {"guest": bool, "reason": Literal["host-qmp-quit", "host-signal"]},
}


class ControlCommands:
    """Handlers about the daemon. `stop` begins an orderly end."""

    def __init__(self, registry: Registry, stop: Callable[[], None]) -> None:
        self._registry = registry
        self._stop = stop

    def register(self, registry: Registry) -> None:
        """Name the handlers."""
        registry.command("quit")(self.quit)
        registry.command("query-status")(self.query_status)
        registry.command("query-qmp-schema")(self.query_qmp_schema)

    def quit(self) -> None:
        """Answer, then end: jobs are cancelled, accepted requests finished."""
        self._stop()

    def query_status(self) -> dict[str, Any]:
        """There is no machine that could be stopped: always running."""
        return {"status": "running", "running": True, "singlestep": False}

    def query_qmp_schema(self) -> list[dict[str, Any]]:
        """Every command and event, with the types of what they take."""
        return describe(self._registry.commands, EVENTS)
