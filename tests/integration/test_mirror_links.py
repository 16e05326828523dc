"""What the user can say about a target's connection: how long it is waited for, how it is opened, whether it is verified."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from nbdmirror.devices.uri import ClientTls
from nbdmirror.units import MiB
from tests.support import peers
from tests.support.certificates import Authority
from tests.support.daemon import run_cli, serving, until
from tests.support.mirroring import ask, job_info, refused, tell
from tests.support.tools import make_disk, pattern, run, same_content

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support.daemon import Daemon

pytest.importorskip("nbd", reason="libnbd's Python binding is not installed")

SIZE = 4 * MiB


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    with serving(make_disk(tmp_path / "source", SIZE, {0: pattern(2 * MiB)}), qmp=True) as daemon:
        yield daemon


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return make_disk(tmp_path / "target", SIZE)


def add_node(daemon: Daemon, peer: peers.Peer, **options: object) -> None:
    server = {"type": "unix", "path": peer.endpoint.socket}
    tell(daemon, "qmp", "blockdev-add", json.dumps({"driver": "nbd", "node-name": "t", "server": server, **options}))


def mirror_to_node(daemon: Daemon) -> None:
    arguments = {"job-id": "mirror0", "device": "source", "target": "t", "sync": "full"}
    tell(daemon, "qmp", "blockdev-mirror", json.dumps(arguments))
    tell(daemon, "wait", "mirror0", "--ready")


def guest_writes(daemon: Daemon) -> None:
    peers.require("qemu-io")
    run("qemu-io", "-f", "raw", "-c", "write -P 5 1M 64k", daemon.uri)


@pytest.mark.parametrize("delay", [0, 1])
def test_reconnect_delay_bounds_the_waiting(daemon: Daemon, image: Path, delay: int) -> None:
    with peers.nbdkit("file", str(image)) as peer:
        add_node(daemon, peer, **{"reconnect-delay": delay})
        mirror_to_node(daemon)
        peer.kill()
        if delay:
            until(lambda: job_info(daemon)["status"] == "standby", "the job waits")
        guest_writes(daemon)
        refused(ask(daemon, "wait", "mirror0"), 3, "job 'mirror0' failed", "Transport endpoint is not connected")


def test_node_without_a_delay_is_waited_for(daemon: Daemon, image: Path, tmp_path: Path) -> None:
    with peers.nbdkit("file", str(image)) as peer:
        add_node(daemon, peer)
        mirror_to_node(daemon)
        peer.kill()
        until(lambda: job_info(daemon)["status"] == "standby", "the job waits")
        guest_writes(daemon)
        with peers.nbdkit("file", str(image), after=peer):
            tell(daemon, "complete", "mirror0")
            assert same_content(tmp_path / "source", image)


def test_open_timeout_waits_for_a_server(daemon: Daemon, image: Path) -> None:
    with peers.nbdkit("file", str(image)) as first:
        first.kill()
        adding = threading.Thread(target=add_node, args=(daemon, first), kwargs={"open-timeout": 10})
        adding.start()
        with peers.nbdkit("file", str(image), after=first):
            adding.join(20)
            mirror_to_node(daemon)
            tell(daemon, "cancel", "mirror0")


def test_cancel_while_the_target_is_away(daemon: Daemon, image: Path) -> None:
    with peers.nbdkit("file", str(image)) as peer:
        tell(daemon, "mirror", peer.endpoint.uri)
        peer.kill()
        until(lambda: job_info(daemon)["status"] == "standby", "the job waits")
        started = time.monotonic()
        tell(daemon, "cancel", "--force", "mirror0")
        assert time.monotonic() - started < 5
        assert job_info(daemon)["x-cancelled"]


def test_another_export_in_the_targets_place(daemon: Daemon, image: Path) -> None:
    with peers.nbdkit("file", str(image)) as peer:
        tell(daemon, "mirror", peer.endpoint.uri)
        peer.kill()
        until(lambda: job_info(daemon)["status"] == "standby", "the job waits")
        guest_writes(daemon)
        with peers.nbdkit("memory", str(2 * SIZE), after=peer):
            refused(ask(daemon, "wait", "mirror0"), 3, "job 'mirror0' failed", str(2 * SIZE))


def test_target_that_cannot_be_verified(daemon: Daemon, tmp_path: Path) -> None:
    authority = Authority(tmp_path / "us")
    server, client = authority.server(tmp_path / "server"), authority.client(tmp_path / "client")
    with peers.nbdkit("memory", str(SIZE), extra=["--tls=require", f"--tls-certificates={server}"]) as peer:
        uri = replace(peer.endpoint, tls=ClientTls(str(client))).uri
        refused(ask(daemon, "mirror", uri), 1, "can't verify", "--tls-no-verify")
        tell(daemon, "mirror", uri, "--tls-no-verify", "--complete")
        assert run_cli("compare", tmp_path / "source", f"{uri}&tls-verify-peer=false").returncode == 0
