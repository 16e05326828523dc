"""Kill -9, again and again: no write that was answered is ever without its bit.

The daemon dies at random times under load, and at named points, before or after a certain call. Afterwards the disk has what
was answered, and the next daemon's bitmap marks all of it and nothing that was never sent.
NBDMIRROR_KILLS=200 kills that often in a row, in each mode, and at every point.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import threading
import time
from typing import TYPE_CHECKING, Final, Self

import pytest

from nbdmirror.bitmap.image import Sync
from tests.support.crashing import SIZE, Load, Record, marked
from tests.support.daemon import doomed, environment, serving
from tests.support.peers import require
from tests.support.tools import make_disk

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

KILLS: Final = int(os.environ.get("NBDMIRROR_KILLS", "0"))
# Kills after which a new bitmap begins, so that what is marked stays little, and a mark that is missing is seen.
_ROUND: Final = 10


@pytest.fixture(autouse=True)
def _tools() -> None:
    require("nbdinfo")


def check(record: Record, disk: Path, uri: str, name: str) -> None:
    changed, found = record.check_disk(disk), marked(uri, name)
    assert not changed - found, f"changed and not marked: {sorted(changed - found)}"
    assert not record.acked - found, f"answered and not marked: {sorted(record.acked - found)}"
    assert not found - record.sent, f"marked and never sent: {sorted(found - record.sent)}"


@pytest.mark.timeout(60 + 10 * KILLS)
@pytest.mark.parametrize("mode", list(Sync))
def test_killed_at_random_times_under_load(mode: Sync, tmp_path: Path) -> None:
    disk, state = make_disk(tmp_path / "disk", SIZE), tmp_path / "state"
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    chance, record = random.Random(seed), Record()
    names = [f"b{number // _ROUND}" for number in range((KILLS or 3) + 1)]
    args = ["--state-dir", state, "--bitmap-sync", mode.value]
    for number, name in enumerate(names):
        old = names[max(number - 1, 0)]
        with serving(disk, *args, *(arg for each in {old, name} for arg in ("-B", f"{each}:4k"))) as daemon:
            check(record, disk, daemon.uri, old)
            if name != old:
                record.forget_marks()
            killer = threading.Timer(chance.choice([0.005, 0.05, 0.3]) * chance.random(), daemon.process.kill)
            killer.start()
            Load(record, chance).run(daemon.unix, until=lambda: False)
            killer.join()
            daemon.process.wait(10)
    assert record.serial, "nothing was written"
    with serving(disk, *args, "-B", f"{names[-1]}:4k") as daemon:
        check(record, disk, daemon.uri, names[-1])
        assert daemon.terminate() == 0


# --- named points ----------------------------------------------------------------------------------------------------

# Where a daemon dies, as `tests.support.doomed` has it. One that never comes so far is stopped in order.
POINTS: Final = [
    f"{when}:{call}:{number}"
    for call, numbers in {
        "allocate": (1,),
        "complete": (1, 2, 3),
        "rename": (1,),
        "draft": (1, 2),
        "state": (1, 2, 3),
        "regions": (1, 2, 3, 5, 8),
        "bits": (1, 2, 3, 4),
        "write": (1, 2, 10, 100),
        "flush": (1, 2, 3),
    }.items()
    for number in numbers
    for when in ("before", "after")
]
SOME: Final = {
    Sync.LAZY: ["before:draft:2", "after:write:10", "before:bits:2", "before:state:2"],
    Sync.BARRIER: ["after:bits:2", "before:flush:1", "after:state:2"],
    Sync.INTENT: ["before:regions:2", "after:regions:2", "before:write:3", "before:regions:4"],
}
CASES: Final = [(mode, point) for mode in Sync for point in (POINTS if KILLS else SOME[mode])]


class Doomed:
    """A daemon that dies at a point."""

    def __init__(self, point: str, disk: Path, *args: str | Path) -> None:
        self.socket = disk.with_name("s")
        self.process = subprocess.Popen(
            [*doomed(point), "serve", str(disk), "-k", str(self.socket), *map(str, args)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment(None),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def wait_ready(self) -> bool:
        """Whether it lived to listen."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().startswith(b"READY")

    def end(self) -> int:
        """Stop it in order, unless it is dead; its status."""
        self.process.terminate()
        _, stderr = self.process.communicate(timeout=20)
        assert b"Traceback" not in stderr, stderr.decode()
        return self.process.returncode


@pytest.mark.parametrize(("mode", "point"), CASES)
def test_killed_at_a_named_point(mode: Sync, point: str, sock_dir: Path) -> None:
    disk, state = make_disk(sock_dir / "disk", SIZE), sock_dir / "state"
    record, chance = Record(), random.Random(point)
    args: Sequence[str | Path] = ["--state-dir", state, "-B", "b:4k", "--bitmap-sync", mode.value]
    with Doomed(point, disk, *args) as daemon:
        if daemon.wait_ready():
            stop = time.monotonic() + 0.2
            Load(record, chance).run(daemon.socket, until=lambda: time.monotonic() > stop)
        status = daemon.end()
    assert status in (0, -signal.SIGKILL)
    assert KILLS or status != 0, "it was to be killed, and was not"
    with serving(disk, *args) as daemon:
        check(record, disk, daemon.uri, "b")
        stop = time.monotonic() + 0.05
        Load(record, chance).run(daemon.unix, until=lambda: time.monotonic() > stop)
        check(record, disk, daemon.uri, "b")
        assert daemon.terminate() == 0
    assert record.acked
