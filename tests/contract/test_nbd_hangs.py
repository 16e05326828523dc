"""NbdDevice over servers and links that fall silent: time limits, and old commands that must not come after new ones."""

from __future__ import annotations

import asyncio
import errno
import signal
import time
from typing import TYPE_CHECKING

import pytest

from nbdmirror.devices import nbd_captive
from nbdmirror.devices.nbd import NbdDevice
from nbdmirror.devices.nbd_connection import NbdConnection
from nbdmirror.devices.nbd_link import LinkOptions
from nbdmirror.errors import DeviceError
from nbdmirror.protocol.constants import FUA
from tests.support import peers
from tests.support.failing import BOUND, failed
from tests.support.links import lost
from tests.support.netns import NetworkPair
from tests.support.relay import Relay
from tests.support.tools import content, make_disk

if TYPE_CHECKING:
    from pathlib import Path

pytest.importorskip("nbd", reason="libnbd's Python binding is not installed")

MIB = 1024**2
LIMIT = 0.5  # a loaded machine's stalls are shorter
IMPATIENT = LinkOptions(request_timeout=LIMIT)
HOLDING = LinkOptions(request_timeout=LIMIT, reconnect_delay=BOUND)


# --- a time limit ---


async def test_a_frozen_server_is_given_up_and_found_again_when_it_thaws() -> None:
    with peers.nbdkit("memory", "64M") as peer:
        device = await NbdDevice.open(peer.endpoint, link=HOLDING)
        peer.freeze()
        flying = [device.pwrite(bytes(MIB), index * MIB) for index in range(20)]
        flying += [device.pread(bytearray(4096), 0) for _ in range(20)]
        results = await asyncio.wait_for(asyncio.gather(*flying, return_exceptions=True), BOUND)
        assert {error.errno for error in results if isinstance(error, DeviceError)} == {errno.ETIMEDOUT}
        assert len(results) == 40
        assert (device.connection_count, device.link.losses) == (0, 1)
        held = asyncio.ensure_future(device.pwrite(b"x" * 4096, 0))
        assert not (await asyncio.wait({held}, timeout=LIMIT))[0]
        peer.thaw()
        await asyncio.wait_for(held, BOUND)
        await device.aclose()


async def test_an_idle_connection_has_all_the_time_in_the_world() -> None:
    with peers.nbdkit("memory", "1M") as peer:
        device = await NbdDevice.open(peer.endpoint, connections=1, link=IMPATIENT)
        await device.pread(bytearray(1), 0)
        await asyncio.wait({asyncio.get_running_loop().create_future()}, timeout=3 * LIMIT)
        await device.pread(bytearray(1), 0)
        assert device.link.generation == 1
        await device.aclose()


async def test_a_slow_link_on_which_something_moves_is_no_hung_one() -> None:
    with peers.nbdkit("memory", "16M") as peer, Relay(peer.endpoint) as relay:
        device = await NbdDevice.open(relay.endpoint, connections=1, link=IMPATIENT)
        relay.set_link(rate=4 * MIB)
        started = asyncio.get_running_loop().time()
        await device.pread(bytearray(8 * MIB), 0)
        assert asyncio.get_running_loop().time() - started > 2 * LIMIT
        await device.aclose()


@pytest.mark.parametrize("stopped", ["up", "down"])
async def test_a_link_that_hangs_in_either_direction(stopped: str) -> None:
    with peers.nbdkit("memory", "16M") as peer, Relay(peer.endpoint) as relay:
        device = await NbdDevice.open(relay.endpoint, connections=2, link=HOLDING)
        getattr(relay, stopped).hang()
        work = [device.pread(bytearray(4096), 0), device.pwrite(bytes(8 * MIB), 0), device.extents(0, MIB)]
        for error in await asyncio.gather(*map(failed, work)):
            assert error.errno == errno.ETIMEDOUT
        relay.resume()
        await asyncio.wait_for(device.pread(bytearray(4096), 0), BOUND)
        await device.aclose()


def slow_disk(**scripts: str) -> list[str]:
    """nbdkit's eval plugin, with callbacks that take three times the limit."""
    defaults = {"get_size": "echo 1M", "can_write": "exit 0", "thread_model": "echo parallel"}
    defaults |= {"pread": "head -c $3 /dev/zero", "pwrite": "cat > /dev/null"}
    return [f"{key}={script}" for key, script in (defaults | scripts).items()]


async def test_what_waits_for_a_disk_may_take_longer_and_a_write_may_not() -> None:
    slow = f"sleep {3 * LIMIT}"
    scripts = slow_disk(
        can_flush="exit 0", can_fua="echo native", can_zero="exit 0", flush=slow, zero=slow, pwrite=f"{slow}; cat > /dev/null"
    )
    with peers.nbdkit("eval", *scripts) as peer:
        device = await NbdDevice.open(peer.endpoint, connections=1, link=IMPATIENT)
        await device.flush()
        await device.zero(0, MIB)
        await device.pwrite(b"x", 0, FUA)
        assert device.link.generation == 1
        assert (await failed(device.pwrite(b"x", 0))).errno == errno.ETIMEDOUT
        await device.aclose()


async def test_a_loop_that_was_late_itself_does_not_blame_the_server() -> None:
    with peers.nbdkit("memory", "1M", "delay-read=100ms", filters=["delay"]) as peer:
        connection = await NbdConnection.connect(peer.endpoint, request_timeout=LIMIT)
        reading = connection.pread(bytearray(4096), 0)
        # What a suspended machine looks like to its programs: the answer and the deadline are there at once.
        asyncio.get_running_loop().call_soon(time.sleep, 3 * LIMIT)
        await asyncio.wait_for(reading, BOUND)
        await connection.aclose()


async def test_a_connection_by_itself_fails_its_commands_with_a_timeout() -> None:
    with peers.nbdkit("memory", "1M") as peer:
        connection = await NbdConnection.connect(peer.endpoint, request_timeout=LIMIT)
        peer.freeze()
        error = await failed(connection.pread(bytearray(4096), 8192))
        assert str(error) == f"{peer.endpoint}: read of 4096 bytes at 8192: Connection timed out"
        assert not connection.is_alive


# --- old commands ---


async def test_a_write_that_was_given_up_does_not_undo_a_later_one(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk", MIB)
    # The first write takes its time; later ones don't, and would be done before it.
    write = f"mkdir {tmp_path}/first 2>/dev/null && sleep {5 * LIMIT}; dd of={disk} conv=notrunc status=none"
    with peers.nbdkit("eval", *slow_disk(pwrite=write)) as peer:
        device = await NbdDevice.open(peer.endpoint, link=HOLDING)
        assert (await failed(device.pwrite(b"old!", 0))).errno == errno.ETIMEDOUT
        assert content(disk, 0, 4) == bytes(4)
        await asyncio.wait_for(device.pwrite(b"new!", 0), BOUND)
        assert content(disk, 0, 4) == b"new!"
        await device.aclose()
        assert peer.terminate()  # and with it whatever it still worked on
        assert content(disk, 0, 4) == b"new!"


async def test_a_link_that_was_down_does_not_bring_old_writes_after_new_ones(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk", 64 * MIB)
    with NetworkPair() as pair, pair.nbdkit("file", str(disk)) as endpoint, pair.inside():
        device = await NbdDevice.open(endpoint, connections=2, link=HOLDING)
        await device.pwrite(b"a" * 4096, 0)
        pair.set_link("down")
        flying = [device.pwrite(b"old." * (MIB // 4), index * MIB) for index in range(8)]
        for error in await asyncio.gather(*map(failed, flying)):
            assert error.errno == errno.ETIMEDOUT
        held = [asyncio.ensure_future(device.pwrite(b"new!" * (MIB // 4), index * MIB)) for index in range(8)]
        await asyncio.wait(held, timeout=LIMIT)
        assert device.link.losses == 1
        pair.set_link("up")
        await asyncio.wait_for(asyncio.gather(*held), BOUND)
        device.link.acknowledge_loss()
        await device.flush()
        await device.aclose()
        await pair.no_sockets("server")
        assert content(disk, 0, 8 * MIB) == b"new!" * (2 * MIB)


async def test_a_connection_that_is_closed_while_the_link_is_down_leaves_nothing_to_be_delivered() -> None:
    with NetworkPair() as pair, pair.nbdkit("memory", "64M") as endpoint, pair.inside():
        device = await NbdDevice.open(endpoint, connections=2, link=IMPATIENT)
        pair.set_link("down")
        flying = [asyncio.ensure_future(device.pwrite(bytes(MIB), index * MIB)) for index in range(8)]
        await asyncio.sleep(0)
        assert pair.sockets("client")
        await device.aclose()
        assert not pair.sockets("client")
        await asyncio.gather(*map(failed, flying))


# --- closing ---


async def test_closing_a_hung_device_is_bounded() -> None:
    with peers.nbdkit("memory", "1M") as peer:
        device = await NbdDevice.open(peer.endpoint, connections=2, link=IMPATIENT)
        peer.freeze()
        reading = asyncio.ensure_future(device.pread(bytearray(4096), 0))
        await asyncio.sleep(0)
        await asyncio.wait_for(device.aclose(), BOUND)
        assert (await failed(reading)).errno == errno.ETIMEDOUT


async def test_a_captive_server_that_does_not_end_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    peers.require("nbdkit")
    monkeypatch.setattr(nbd_captive, "_STOP_SECONDS", LIMIT)
    device = await NbdDevice.open_command(["nbdkit", "memory", "1M"])
    await device.pread(bytearray(1), 0)
    server = device._server
    assert server is not None
    await device.link.aclose()
    server._process.send_signal(signal.SIGSTOP)  # a stopped process takes no notice of SIGTERM
    await asyncio.wait_for(device.aclose(), BOUND)
    assert server._process.returncode == -signal.SIGKILL
    await device.aclose()


async def test_a_captive_server_that_dies_is_not_started_again() -> None:
    peers.require("nbdkit")
    device = await NbdDevice.open_command(["nbdkit", "memory", "1M"])
    assert device._server is not None
    device._server._process.kill()
    await device._server._process.wait()
    await lost(device)
    for work in (device.pread(bytearray(1), 0), device.link.reconnected()):
        assert "the server that was started for it has ended" in str(await failed(work))
    await device.aclose()
