"""A live mirror into targets that misbehave: what the target says is believed no further than it goes, and no fault is lost."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from nbdmirror.units import MiB
from tests.support import plugins
from tests.support.daemon import run_cli, serving, until
from tests.support.mirroring import ask, job_info, make_disk, new_seed, refused, stop, tell, writing_guest
from tests.support.tools import pattern, same_content

if TYPE_CHECKING:
    from pathlib import Path

pytest.importorskip("nbd", reason="libnbd's Python binding is not installed")

SIZE = 16 * MiB


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_disk(tmp_path / "source", SIZE, (0, pattern(2 * MiB)), (8 * MiB, pattern(MiB)))


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("write error=ENOSPC at=4 times=1", "No space left on device"),
        ("write error=EIO p=20%", "Input/output error"),
        ("write error=ENOMEM from=8M", "Cannot allocate memory"),
        ("write torn at=3", "Input/output error"),
        ("zero error=EIO", "Input/output error"),
        ("flush error=EIO", "Input/output error"),
        ("write disconnect=before at=3", "Transport endpoint is not connected"),
        ("write disconnect=unanswered at=3", "Transport endpoint is not connected"),
        ("flush disconnect=unanswered", "Transport endpoint is not connected"),
        ("write crash at=5", "Transport endpoint is not connected"),
    ],
)
def test_a_fault_ends_the_job_and_the_guest_goes_on(rule: str, message: str, source: Path, tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "target", SIZE, (4 * MiB, pattern(MiB)))  # so that there is something to zero
    with plugins.fault(f"file={disk}", f"fault={rule}", f"seed={new_seed()}") as target, serving(source, qmp=True) as daemon:
        # It leaves alone what is to be zeroed.
        with writing_guest(daemon, source, 2 * MiB, 1, "--offset=10M") as writer:
            tell(daemon, "mirror", target.uri, "--background", "--reconnect", "0")
            refused(ask(daemon, "wait", "mirror0", "--ready", "--timeout", "30"), 3, "job 'mirror0' failed", message)
            assert writer.poll() is None
            stop(writer)
        assert job_info(daemon)["error"] == message


def test_ready_waits_for_the_flush(source: Path) -> None:
    with plugins.fault(f"size={SIZE}", "fault=flush hang") as target, serving(source, qmp=True) as daemon:
        tell(daemon, "mirror", target.uri, "--background")
        until(lambda: target.ask("counts")["hanging"] == 1, "the job flushes")
        assert job_info(daemon)["status"] == "running"
        target.ask("clear")
        assert tell(daemon, "wait", "mirror0", "--ready") == ""


def test_completion_waits_for_the_flush(source: Path) -> None:
    with plugins.fault(f"size={SIZE}") as target, serving(source, qmp=True) as daemon:
        tell(daemon, "mirror", target.uri)
        target.ask("add flush hang")
        tell(daemon, "complete", "mirror0", "--background")
        until(lambda: target.ask("counts")["hanging"] == 1, "the job flushes")
        assert job_info(daemon)["status"] != "concluded"
        target.ask("clear")
        assert tell(daemon, "wait", "mirror0") == ""


@pytest.mark.parametrize(
    "parameters",
    [
        ["fault=write,zero delay=0.02 p=30%"],
        ["fault=extents short=512"],
        ["fault=extents error=EIO"],
        ["fault=zero error=EOPNOTSUPP", "fault=fast-zero error=EOPNOTSUPP"],
        ["fault=fast-zero error=EOPNOTSUPP"],
        ["without=fua,trim,fast-zero,multi-conn,cache,extents"],
        ["block-size=4k:64k:64k"],
    ],
)
def test_a_slow_or_poor_target_gets_it_all(parameters: list[str], source: Path, tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "target", SIZE, (4 * MiB, pattern(MiB)))
    with (
        plugins.fault(f"file={disk}", *parameters, "volatile=30%", f"seed={new_seed()}") as target,
        serving(source, qmp=True) as daemon,
    ):
        with writing_guest(daemon, source, SIZE, 1) as writer:
            tell(daemon, "mirror", target.uri)
            stop(writer)
        tell(daemon, "complete", "mirror0")
        target.peer.kill()
    assert same_content(source, disk)


def test_a_lost_write_is_seen_by_a_comparison(source: Path) -> None:
    with plugins.fault(f"size={SIZE}", "fault=write lie from=8M to=8200k times=1") as target:
        assert run_cli("copy", source, target.uri).returncode == 0
        result = run_cli("compare", source, target.uri)
    assert result.returncode == 1
    assert f"first at offset {8 * MiB}" in result.stdout
