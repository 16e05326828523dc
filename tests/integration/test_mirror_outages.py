"""Every failure at every moment: the target dies, hangs, is cut off or full, the source can't be read, the guest leaves.

    before ready    the job's fifth write to the target hangs, or fails
    after ready     the guest writes, and the copy of that hangs, or fails
    completing      the same, and the job was told to complete

The guest's writes succeed all the time. In the end both disks are the same, also what is left of the target after a crash, and
no more was copied again than was in flight, dirty or not flushed.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any, Final, Literal

import pytest

from nbdmirror.cli.client import run_client
from nbdmirror.devices.uri import parse_endpoint
from nbdmirror.units import KiB, MiB
from tests.support import plugins
from tests.support.daemon import serving, until
from tests.support.links import opened
from tests.support.mirroring import job_info
from tests.support.netns import NetworkPair
from tests.support.tools import make_disk, pattern, same_content

if TYPE_CHECKING:
    from collections.abc import Iterator
    from concurrent.futures import Future
    from pathlib import Path

    from tests.support.daemon import Daemon

pytest.importorskip("nbd", reason="libnbd's Python binding is not installed")

SIZE: Final = 8 * MiB
DATA: Final = 4 * MiB
REQUEST: Final = 256 * KiB
CHUNK: Final = 64 * KiB

When = Literal["before ready", "after ready", "completing"]
WHEN: Final = ["before ready", "after ready", "completing"]
MODES: Final = ["background", "write-blocking"]
every_moment = pytest.mark.parametrize("when", WHEN)
every_mode = pytest.mark.parametrize("mode", MODES)


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

    def serve(self, disk: Path | str = "", **options: Any) -> None:
        self.daemon = self.stack.enter_context(serving(disk or self.disk, qmp=True, **options))

    # --- the job -----------------------------------------------------------------------------------------------------

    def ask(self, command: str, **arguments: Any) -> None:
        arguments = {name.replace("_", "-"): value for name, value in arguments.items()}
        run_client(str(self.daemon.control), lambda client: client.execute(command, arguments))

    def start(self, uri: str, **arguments: Any) -> None:
        common = {"job_id": "mirror0", "device": "source", "mode": "existing", "sync": "full", "copy_mode": self.mode}
        self.ask("drive-mirror", target=uri, x_request_size=REQUEST, x_request_timeout=1, **common, **arguments)

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


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def scene(stack: ExitStack, tmp_path: Path, mode: str) -> Scene:
    return Scene(stack, tmp_path, mode)


@every_moment
@every_mode
def test_target_dies(scene: Scene, when: str) -> None:
    target = scene.target()
    scene.serve()
    writing = scene.reach(when, target.uri, target, "write hang")
    target.peer.kill()
    scene.guest_writes(3 * MiB)
    paused = scene.paused("reconnecting")
    scene.guest_writes(6 * MiB)
    if writing is not None:
        writing.result(10)
        assert paused["len"] - paused["offset"] <= 3 * CHUNK, "what was flushed is not copied again"
    again = scene.target(after=target)
    scene.ends(when, paused)
    again.peer.kill()
    assert scene.same()


@every_moment
@every_mode
def test_target_hangs(scene: Scene, when: str) -> None:
    target = scene.target()
    scene.serve()
    writing = scene.reach(when, target.uri, target, "write hang times=1")
    target.peer.freeze()
    scene.guest_writes(3 * MiB)
    paused = scene.paused("reconnecting")
    target.peer.thaw()
    target.ask("clear")
    scene.ends(when, paused)
    if writing is not None:
        writing.result(10)
    target.peer.kill()
    assert scene.same()


@every_moment
@every_mode
def test_network_is_cut(scene: Scene, stack: ExitStack, when: str, tmp_path: Path) -> None:
    network = stack.enter_context(NetworkPair())
    control = tmp_path / "control"
    arguments = [f"file={scene.image}", "volatile=50%", f"control={control}"]
    endpoint = stack.enter_context(network.nbdkit("python", str(plugins.PLUGINS / "fault.py"), *arguments))
    target = plugins.Control(control)
    scene.serve(prefix=network.command("client"))
    writing = scene.reach(when, endpoint.uri, target, "write hang times=1")
    network.set_link("down")
    scene.guest_writes(3 * MiB)
    paused = scene.paused("reconnecting")
    target.ask("clear")
    network.set_link("up")
    scene.ends(when, paused)
    if writing is not None:
        writing.result(10)
    with suppress(ValueError):  # there is nobody left to answer
        plugins.ask(control, "crash")
    assert scene.same()


@every_moment
@every_mode
def test_target_is_full(scene: Scene, when: str) -> None:
    target = scene.target()
    scene.serve()
    writing = scene.reach(when, target.uri, target, "write error=ENOSPC", on_target_error="enospc")
    if writing is not None:
        writing.result(10)
    paused = scene.paused("copy" if when == "before ready" else "follow", "nospace")
    scene.guest_writes(3 * MiB)
    target.ask("clear")
    scene.ask("job-resume", id="mirror0")
    scene.ends(when, paused)
    target.peer.kill()
    assert scene.same()


@pytest.mark.parametrize(
    ("when", "mode"),
    [*((when, "background") for when in WHEN), ("before ready", "write-blocking")],  # an active write reads nothing
)
def test_source_cannot_be_read(scene: Scene, stack: ExitStack, when: str) -> None:
    source = stack.enter_context(plugins.fault(f"file={scene.disk}"))
    target = scene.target()
    scene.serve(source.uri)
    writing = scene.reach(when, target.uri, source, "read error=EIO", on_source_error="stop")
    if writing is not None:
        writing.result(10)
    paused = scene.paused("copy" if when == "before ready" else "follow", "failed")
    scene.guest_writes(3 * MiB)
    source.ask("clear")
    scene.ask("job-resume", id="mirror0")
    scene.ends(when, paused)
    target.peer.kill()
    assert scene.same()


@every_moment
@every_mode
def test_guest_leaves_and_comes_back(scene: Scene, when: str) -> None:
    target = scene.target()
    scene.serve()
    writing = scene.reach(when, target.uri, target, "write hang times=1")
    scene.guest_leaves(3 * MiB)
    scene.guest_writes(5 * MiB)
    target.ask("clear")
    scene.ends(when, None)
    if writing is not None:
        writing.result(10)
    target.peer.kill()
    assert scene.same()
