"""A mirror in trouble, step by step: a source with a guest, a target that fails as told, and the job between them."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final

from nbdmirror.cli.client import run_client
from nbdmirror.devices.uri import parse_endpoint
from nbdmirror.units import KiB, MiB
from tests.support import plugins
from tests.support.daemon import serving, until
from tests.support.links import opened
from tests.support.mirroring import job_info
from tests.support.tools import make_disk, pattern, same_content

if TYPE_CHECKING:
    from concurrent.futures import Future
    from contextlib import ExitStack
    from pathlib import Path

    from tests.support.daemon import Daemon

SIZE: Final = 8 * MiB
DATA: Final = 4 * MiB
REQUEST: Final = 256 * KiB
CHUNK: Final = 64 * KiB

WHEN: Final = ["before ready", "after ready", "completing"]
MODES: Final = ["background", "write-blocking"]


class Scene:
    """A source with a guest, a target that fails as told, and a mirror between them."""

    def __init__(self, stack: ExitStack, tmp_path: Path, mode: str) -> None:
        self.stack = stack
        self.mode = mode
        self.disk = make_disk(tmp_path / "source", SIZE, {0: pattern(DATA)})
        self.image = make_disk(tmp_path / "target", SIZE, {2 * MiB: pattern(MiB, 2), 7 * MiB: pattern(MiB, 3)})
        self.daemon: Daemon
        self._guests = stack.enter_context(ThreadPoolExecutor(1))
        self.written = 0

    def target(self, after: plugins.Plugin | None = None) -> plugins.Plugin:
        """A server of the image that has a volatile cache."""
        return self.stack.enter_context(plugins.fault(f"file={self.image}", "volatile=50%", after=after))

    def serve(self, disk: Path | str = "", *args: str, **options: Any) -> None:
        self.daemon = self.stack.enter_context(serving(disk or self.disk, *args, qmp=True, **options))

    # --- the job -----------------------------------------------------------------------------------------------------

    def ask(self, command: str, **arguments: Any) -> None:
        arguments = {name.replace("_", "-"): value for name, value in arguments.items()}
        run_client(str(self.daemon.control), lambda client: client.execute(command, arguments))

    def start(self, uri: str, **arguments: Any) -> None:
        common = {"job_id": "mirror0", "device": "source", "mode": "existing", "sync": "full", "copy_mode": self.mode}
        self.ask("drive-mirror", target=uri, x_request_size=REQUEST, x_request_timeout=1, **common, **arguments)

    def jobs(self) -> list[str]:
        """The jobs there are."""
        found = run_client(str(self.daemon.control), lambda client: client.execute("query-jobs"))
        return [job["id"] for job in found]

    def info(self) -> dict[str, Any]:
        return job_info(self.daemon)

    def is_ready(self) -> bool:
        info = self.info()
        assert "error" not in info, info
        return info["status"] == "ready" and (self.mode == "background" or info["actively-synced"])

    def reach(self, when: str, uri: str, trouble: plugins.Control, rule: str, **arguments: Any) -> Future[None] | None:
        """Get to that moment, and into trouble; the guest's write is under way then, but for the first of them."""
        if when == "before ready":
            trouble.ask(f"add {rule} at=5")
            self.start(uri, **arguments)
            writing = None
        else:
            self.start(uri, **arguments)
            until(self.is_ready, "the job is ready")
            trouble.ask(f"add {rule}")
            writing = self._guests.submit(self.guest_writes, MiB)
        until(lambda: trouble.hits() > 0, "the fault strikes")
        if when == "completing":
            self.ask("job-complete", id="mirror0")
        return writing

    def paused(self, phase: str, io_status: str = "ok") -> dict[str, Any]:
        """What the job says once it waits for the end of the trouble."""
        until(lambda: self.info()["status"] in ("paused", "standby"), "the job pauses")
        info = self.info()
        assert (info["x-phase"], info["io-status"]) == (phase, io_status)
        return info

    def ends(self, when: str, paused: dict[str, Any] | None) -> None:
        """All is well again: the job goes on, to its end, and both disks are the same."""
        if when != "completing":
            until(self.is_ready, "the job is ready again")
        info = self.info()
        if when != "completing":
            self.ask("job-complete", id="mirror0")
        until(lambda: self.info()["status"] == "null", "the job has ended")
        assert "error" not in self.info()
        if paused is not None:
            left = paused["len"] - paused["offset"]
            assert info["x-bytes-sent"] - paused["x-bytes-sent"] <= left + self.written

    def same(self) -> bool:
        """The target has crashed; nobody may make good what it has lost."""
        self.daemon.kill()
        return same_content(self.disk, self.image)

    # --- the guest ---------------------------------------------------------------------------------------------------

    def guest_writes(self, offset: int) -> None:
        """A client comes, writes a chunk and leaves; nothing fails."""
        self.written += 1
        data = pattern(CHUNK, 10 + self.written)

        async def write() -> None:
            async with opened(parse_endpoint(self.daemon.uri), connections=1) as device:
                await device.pwrite(data, offset)

        asyncio.run(write())
        self.written += CHUNK

    def guest_leaves(self, offset: int) -> None:
        """A client that breaks its connection before its write can have been answered."""
        data = pattern(CHUNK, 99)

        async def leave() -> None:
            async with opened(parse_endpoint(self.daemon.uri), connections=1) as device:
                writing = asyncio.ensure_future(device.pwrite(data, offset))
                await asyncio.sleep(0)
                await device.link.connections[0].aclose(0)
                await asyncio.wait({writing})
                writing.exception()

        asyncio.run(leave())
        self.written += CHUNK
