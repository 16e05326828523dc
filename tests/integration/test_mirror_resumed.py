"""Mirrors that outlive their daemon: killed at every moment, it goes on where it was, and copies again what was not flushed."""

from __future__ import annotations

import json
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

import pytest

from nbdmirror.errors import NbdMirrorError
from tests.support import plugins
from tests.support.daemon import serving, until
from tests.support.mirroring import ask, job_info, refused, tell
from tests.support.outages import CHUNK, DATA, MODES, SIZE, WHEN, Scene
from tests.support.tools import content, make_disk, pattern

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytest.importorskip("nbd", reason="libnbd's Python binding is not installed")


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def state(tmp_path: Path) -> list[str]:
    return ["--state-dir", str(tmp_path / "state")]


def saved(tmp_path: Path) -> dict[str, object]:
    return dict(json.loads((tmp_path / "state" / "jobs.json").read_text())["jobs"])


@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("mode", MODES)
def test_daemon_is_killed(stack: ExitStack, tmp_path: Path, mode: str, when: str, state: list[str]) -> None:
    scene = Scene(stack, tmp_path, mode)
    target = scene.target()
    scene.serve("", *state)
    writing = scene.reach(when, target.uri, target, "write hang times=1")
    scene.daemon.kill()
    if writing is not None:
        with suppress(NbdMirrorError):  # nobody has promised anything
            writing.result(10)
    target.ask("clear")
    scene.serve("", *state)
    scene.guest_writes(3 * CHUNK)
    until(lambda: "mirror0" in scene.jobs(), "the job is resumed")
    until(scene.is_ready, "the job is ready again")
    if when != "before ready":
        assert scene.info()["x-bytes-sent"] <= 3 * CHUNK, "what was flushed is not copied again"
    scene.ends("after ready", None)
    until(lambda: saved(tmp_path) == {}, "the job is not saved any more")
    until(lambda: not list((tmp_path / "state" / "bitmaps").glob("*.nbm")), "nor is its bitmap")
    target.peer.kill()
    assert scene.same()


def test_job_waits_to_be_resumed(stack: ExitStack, tmp_path: Path, state: list[str]) -> None:
    scene = Scene(stack, tmp_path, "background")
    target = scene.target()
    scene.serve("", *state)
    scene.start(target.uri)
    until(scene.is_ready, "the job is ready")
    assert scene.daemon.terminate() == 0
    scene.serve("", *state, "--resume", "manual")
    until(lambda: "mirror0" in scene.jobs() and scene.info()["status"] == "paused", "the job waits")
    scene.guest_writes(0)
    assert scene.info()["x-bytes-sent"] == 0
    tell(scene.daemon, "resume", "mirror0")
    until(scene.is_ready, "the job is ready again")
    scene.ends("after ready", None)
    target.peer.kill()
    assert scene.same()


def test_what_was_copied_is_verified(stack: ExitStack, tmp_path: Path, state: list[str]) -> None:
    """The target has forgotten something while nobody looked."""
    scene = Scene(stack, tmp_path, "background")
    target = scene.target()
    scene.serve("", *state)
    scene.start(target.uri)
    until(scene.is_ready, "the job is ready")
    assert scene.daemon.terminate() == 0
    with scene.image.open("r+b") as image:
        image.seek(5 * CHUNK + 100)
        image.write(b"rot")
    scene.serve("", *state, "--resume", "verify")
    until(lambda: "mirror0" in scene.jobs(), "the job is resumed")
    until(scene.is_ready, "the job is ready again")
    assert scene.info()["x-bytes-sent"] == CHUNK
    scene.ends("after ready", None)
    target.peer.kill()
    assert scene.same()


def test_target_of_another_size_is_another_target(tmp_path: Path, state: list[str]) -> None:
    disk, image = make_disk(tmp_path / "source", SIZE, {0: pattern(DATA)}), make_disk(tmp_path / "target", SIZE)
    with serving(disk, *state, qmp=True) as daemon:
        tell(daemon, "mirror", str(image))
        daemon.kill()
    other = make_disk(tmp_path / "other", SIZE + CHUNK, {0: pattern(CHUNK, 9)})
    other.rename(image)
    with serving(disk, *state, qmp=True) as daemon:
        daemon.wait_for_log("job 'mirror0' is not resumed")
        assert "it is another one" in daemon.stderr
        refused(ask(daemon, "resume", "mirror0"), 1, "not found")
    assert content(image, 0, CHUNK) == pattern(CHUNK, 9)
    assert "mirror0" in saved(tmp_path)


def test_target_that_comes_later(stack: ExitStack, tmp_path: Path, state: list[str]) -> None:
    scene = Scene(stack, tmp_path, "background")
    target = scene.target()
    scene.serve("", *state)
    scene.start(target.uri)
    until(scene.is_ready, "the job is ready")
    scene.daemon.kill()
    target.peer.kill()
    scene.serve("", *state)
    scene.guest_writes(CHUNK)
    refused(ask(scene.daemon, "mirror", str(scene.image), "--job-id", "mirror0"), 1, "Job ID 'mirror0' already in use")
    again = stack.enter_context(plugins.fault(f"file={scene.image}", "volatile=50%", after=target))
    until(lambda: "mirror0" in scene.jobs(), "the job is resumed")
    until(scene.is_ready, "the job is ready again")
    assert job_info(scene.daemon)["x-bytes-sent"] <= 2 * CHUNK
    scene.ends("after ready", None)
    again.peer.kill()
    assert scene.same()


def test_cancelled_job_is_over(stack: ExitStack, tmp_path: Path, state: list[str]) -> None:
    scene = Scene(stack, tmp_path, "background")
    target = scene.target()
    scene.serve("", *state)
    scene.start(target.uri)
    until(scene.is_ready, "the job is ready")
    assert "mirror0" in saved(tmp_path)
    tell(scene.daemon, "cancel", "--force", "mirror0")
    until(lambda: saved(tmp_path) == {}, "the job is not saved any more")


def test_file_that_makes_no_sense(tmp_path: Path, state: list[str]) -> None:
    disk = make_disk(tmp_path / "source", SIZE)
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "jobs.json").write_text("{")
    with pytest.raises(pytest.fail.Exception, match=r"jobs\.json' can't be read"), serving(disk, *state):
        pass
