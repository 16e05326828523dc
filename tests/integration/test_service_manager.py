"""What a service manager hears of a daemon, and the units that are for it."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import nbdmirror
from nbdmirror.units import MiB
from tests.support.daemon import serving
from tests.support.peers import nbdkit, require
from tests.support.tools import make_disk, pattern

if TYPE_CHECKING:
    from collections.abc import Iterator

UNITS = Path(nbdmirror.__file__).parents[1] / "systemd"
# What `systemd-analyze security` says of it, from 0 to 10; README has the figure.
EXPOSURE = 1.8


class Manager:
    """The other end of NOTIFY_SOCKET."""

    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.sock.bind(str(path))
        self.sock.settimeout(10)
        self.environment = {"NOTIFY_SOCKET": str(path)}

    def heard(self, text: str) -> str:
        """The next message that has this in it."""
        while True:
            message = self.sock.recv(4096).decode()
            if text in message:
                return message


@pytest.fixture
def manager(sock_dir: Path) -> Iterator[Manager]:
    found = Manager(sock_dir / "n")
    yield found
    found.sock.close()


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return make_disk(tmp_path / "disk", MiB, {0: pattern(4096)})


def test_from_start_to_end(disk: Path, manager: Manager) -> None:
    with serving(disk, env=manager.environment) as daemon:
        assert manager.heard("READY=1") == "READY=1\nSTATUS=exports: 1, clients: 0"
        assert daemon.terminate() == 0
        assert manager.heard("STOPPING=1") == "STOPPING=1\nSTATUS=shutting down\nEXTEND_TIMEOUT_USEC=15000000"


def test_the_watchdog_hears_from_the_loop_and_only_as_long_as_it_turns(disk: Path, manager: Manager) -> None:
    with serving(disk, env={**manager.environment, "WATCHDOG_USEC": "400000"}) as daemon:
        for _ in range(4):
            manager.heard("WATCHDOG=1")
        daemon.send_signal(signal.SIGSTOP)
        manager.sock.settimeout(1.0)
        with pytest.raises(TimeoutError):
            [manager.heard("WATCHDOG=1") for _ in range(5)]
        daemon.send_signal(signal.SIGCONT)
        manager.heard("WATCHDOG=1")


def test_a_watchdog_of_another_process_is_none_of_ours(disk: Path, manager: Manager) -> None:
    environment = {**manager.environment, "WATCHDOG_USEC": "2000", "WATCHDOG_PID": "1"}
    with serving(disk, env=environment):
        manager.heard("READY=1")
        manager.sock.settimeout(0.5)
        with pytest.raises(TimeoutError):
            manager.heard("WATCHDOG=1")


def test_a_reload_begins_and_ends(disk: Path, manager: Manager, tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(f"[[export]]\nsource = '{disk}'\n")
    with serving(f"--config={tmp_path}/c.toml", env=manager.environment) as daemon:
        manager.heard("READY=1")
        before = time.monotonic_ns() // 1000
        daemon.send_signal(signal.SIGHUP)
        message = manager.heard("RELOADING=1")
        (usec,) = re.findall(r"^MONOTONIC_USEC=(\d+)$", message, re.MULTILINE)
        assert before <= int(usec) <= time.monotonic_ns() // 1000
        manager.heard("READY=1")


def test_more_time_is_asked_for_while_a_disk_takes_its_time(disk: Path, manager: Manager) -> None:
    with nbdkit("file", str(disk), extra=["--exit-with-parent"]) as peer:
        environment = {**manager.environment, "WATCHDOG_USEC": "400000"}
        with serving(peer.endpoint.uri, env=environment) as daemon:
            peer.freeze()
            daemon.send_signal(signal.SIGTERM)
            manager.heard("STOPPING=1")
            for _ in range(3):
                manager.heard("EXTEND_TIMEOUT_USEC=600000")
            peer.thaw()
            assert daemon.wait() == 0


# --- the units -------------------------------------------------------------------------------------------------------


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """The units as an instance, with a command that is there."""
    for unit in UNITS.glob("nbdmirror*.*"):
        if unit.suffix in {".service", ".socket", ".target"}:
            text = unit.read_text().replace("ExecStart=nbdmirror ", f"ExecStart={sys.executable} -m nbdmirror ")
            (tmp_path / unit.name.replace("@", "@disk")).write_text(text)
    return tmp_path


def test_the_units_are_sound(units: Path) -> None:
    require("systemd-analyze")
    names = sorted(units.iterdir())
    assert len(names) == 3
    result = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *names], capture_output=True, text=True, check=False, timeout=60
    )
    assert (result.returncode, result.stderr) == (0, "")


def test_the_service_is_hardened(units: Path) -> None:
    require("systemd-analyze")
    argv = [
        "systemd-analyze",
        "security",
        "--offline=yes",
        f"--threshold={EXPOSURE * 10:.0f}",
        units / "nbdmirror@disk.service",
    ]
    result = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == 0, result.stdout
    readme = (UNITS.parent / "README.md").read_text()
    assert f"exposure {EXPOSURE} of 10" in readme
