"""Every failure at every moment: the target dies, hangs, is cut off or full, the source can't be read, the guest leaves.

    before ready    the job's fifth write to the target hangs, or fails
    after ready     the guest writes, and the copy of that hangs, or fails
    completing      the same, and the job was told to complete

The guest's writes succeed all the time. In the end both disks are the same, also what is left of the target after a crash, and
no more was copied again than was in flight, dirty or not flushed.
"""

from __future__ import annotations

from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

import pytest

from nbdmirror.units import MiB
from tests.support import plugins
from tests.support.netns import NetworkPair
from tests.support.outages import CHUNK, MODES, WHEN, Scene

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytest.importorskip("nbd", reason="libnbd's Python binding is not installed")

every_moment = pytest.mark.parametrize("when", WHEN)
every_mode = pytest.mark.parametrize("mode", MODES)


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
