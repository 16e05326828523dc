"""A state directory that fails, and a host that does: what could not be recorded fails, or the bitmap says so; never silence.

A power cut is played by what it may leave at worst: of the bits none that were set since the daemon started, of the state and
the regions what was made durable, and another boot id.
"""

from __future__ import annotations

import errno
import os
import random
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import nbd
import pytest

from nbdmirror.bitmap.image import STATE_OFFSET, Head, State, Sync
from nbdmirror.units import MiB
from tests.support.crashing import BLOCK, SIZE, Load, Record, marked
from tests.support.daemon import doomed, run_cli, serving
from tests.support.peers import require
from tests.support.tools import content, make_disk

if TYPE_CHECKING:
    from pathlib import Path

REGION: Final = 4 * MiB


@pytest.fixture(autouse=True)
def _tools() -> None:
    require("nbdinfo")


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return make_disk(tmp_path / "disk", SIZE)


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


def arguments(state: Path, mode: Sync) -> list[str | Path]:
    return ["--state-dir", state, "-B", "b:4k", "--bitmap-sync", mode.value]


def connected(socket: Path) -> nbd.NBD:
    handle = nbd.NBD()
    handle.connect_unix(str(socket))
    return handle


def failure(call: object, *args: object) -> int:
    """The errno that a request is answered with."""
    with pytest.raises(nbd.Error) as caught:
        call(*args)  # type: ignore[operator]
    return caught.value.errnum or 0


# --- a state directory that fails ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("error", "answer"), [("ENOSPC", errno.ENOSPC), ("EIO", errno.EIO)])
def test_intent_write_that_could_not_be_recorded_fails(disk: Path, state: Path, error: str, answer: int) -> None:
    with serving(disk, *arguments(state, Sync.INTENT), program=doomed(f"{error}:regions:3")) as daemon:
        client = connected(daemon.unix)
        client.pwrite(b"x" * BLOCK, 0)  # the second piece of regions; the first was when the file was taken into use
        assert failure(client.pwrite, b"y" * BLOCK, REGION) == answer
        assert failure(client.zero, BLOCK, 2 * REGION) == answer
        client.pwrite(b"z" * BLOCK, BLOCK)  # its region is on record
        assert content(disk, REGION, BLOCK) == bytes(BLOCK)
        daemon.wait_for_log("cannot record in bitmap 'b' in ")
        assert daemon.stderr.count("cannot record") == 1
        daemon.kill()
    with serving(disk, *arguments(state, Sync.INTENT)) as daemon:
        assert marked(daemon.uri, "b") >= {0, 1}


def test_barrier_flush_that_could_not_be_recorded_fails(disk: Path, state: Path) -> None:
    with serving(disk, *arguments(state, Sync.BARRIER), program=doomed("EIO:bits:2")) as daemon:
        client = connected(daemon.unix)
        client.pwrite(b"x" * BLOCK, 0)
        assert failure(client.flush) == errno.EIO
        assert failure(client.pwrite, b"x" * BLOCK, BLOCK, nbd.CMD_FLAG_FUA) == errno.EIO
        assert content(disk, BLOCK, BLOCK) == bytes(BLOCK)
        client.pwrite(b"x" * BLOCK, 2 * BLOCK)
        assert daemon.terminate() == 1
        assert daemon.stderr.splitlines()[-1].startswith("nbdmirror: cannot record in bitmap 'b' in ")
    line = run_cli("serve", disk, "-k", state / "s", *arguments(state, Sync.BARRIER)).stderr
    assert "bitmap 'b' is inconsistent" in line


def test_lazy_bitmap_that_could_not_be_stored_is_inconsistent_and_says_so(disk: Path, state: Path) -> None:
    with serving(disk, *arguments(state, Sync.LAZY), program=doomed("EIO:bits:2")) as daemon:
        client = connected(daemon.unix)
        client.pwrite(b"x" * BLOCK, 0)
        client.flush()
        assert daemon.terminate() == 1
        assert daemon.stderr.splitlines()[-1].startswith("nbdmirror: cannot record in bitmap 'b' in ")
    result = run_cli("serve", disk, "-k", state / "s", *arguments(state, Sync.LAZY))
    assert result.returncode == 1
    assert "bitmap 'b' is inconsistent" in result.stderr
    with serving(disk, *arguments(state, Sync.LAZY), "--on-inconsistent", "all-dirty") as daemon:
        assert len(marked(daemon.uri, "b")) == SIZE // BLOCK


@pytest.mark.parametrize(
    "point",
    ["ENOSPC:allocate:1", "ENOSPC:draft:2", "EIO:complete:1", "EIO:rename:1", "EIO:complete:2", "EIO:bits:1", "EIO:state:1"],
)
def test_bitmap_that_can_not_be_made_leaves_nothing(disk: Path, state: Path, point: str) -> None:
    result = run_cli("serve", disk, "-k", state.with_name("s"), *arguments(state, Sync.INTENT), program=doomed(point))
    assert (result.returncode, result.stdout) == (1, "")
    line = result.stderr.splitlines()[-1]
    assert "bitmap 'b'" in line
    assert os.strerror(getattr(errno, point.partition(":")[0])) in line
    assert list((state / "bitmaps").iterdir()) == []


# --- a host that fails -----------------------------------------------------------------------------------------------


def cut_power(path: Path, before: bytes) -> None:
    """Leave of the file what a power cut may leave at worst, `before` being the file when nothing was written yet."""
    head = Head.decode(before)
    with path.open("r+b") as file:
        now = file.read()
        state = State.decode(now[STATE_OFFSET : STATE_OFFSET + 512])
        file.seek(STATE_OFFSET)
        file.write(replace(state, boot_id=b"another boot id!").encode())
        file.seek(head.bits_offset)
        file.write(before[head.bits_offset :])


@pytest.mark.parametrize("mode", list(Sync))
def test_power_cut_under_load(disk: Path, state: Path, mode: Sync) -> None:
    record, chance = Record(), random.Random(1)
    span = 3 * REGION
    with serving(disk, *arguments(state, mode)) as daemon:
        (path,) = (state / "bitmaps").iterdir()
        before = path.read_bytes()
        stop = time.monotonic() + 0.3
        Load(record, chance, span).run(daemon.unix, until=lambda: time.monotonic() > stop)
        daemon.kill()
    cut_power(path, before)
    if mode is not Sync.INTENT:
        result = run_cli("serve", disk, "-k", state / "s", *arguments(state, mode))
        assert (result.returncode, result.stdout) == (1, "")
        assert "changes may be missing since the host crashed" in result.stderr.splitlines()[-1]
        return
    with serving(disk, *arguments(state, mode)) as daemon:
        found = marked(daemon.uri, "b")
        assert record.acked
        assert record.check_disk(disk) <= found
        assert found <= set(range(span // BLOCK))
        assert "regions that were being written count as dirty" in daemon.stderr


def test_barrier_bitmap_is_taken_for_what_was_flushed(disk: Path, state: Path) -> None:
    with serving(disk, *arguments(state, Sync.BARRIER)) as daemon:
        client = connected(daemon.unix)
        client.pwrite(b"x" * BLOCK, 0)
        client.flush()
        client.pwrite(b"x" * BLOCK, BLOCK)
        daemon.kill()
    (path,) = (state / "bitmaps").iterdir()
    cut_power(path, path.read_bytes())
    with serving(disk, *arguments(state, Sync.BARRIER), "--on-inconsistent", "flushed") as daemon:
        assert 0 in marked(daemon.uri, "b")
        assert "taken as it is, with all that clients had flushed" in daemon.stderr
