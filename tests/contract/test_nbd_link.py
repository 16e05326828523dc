"""NbdDevice over a link that breaks: what is held, what fails, and how it is mended."""

from __future__ import annotations

import asyncio
import errno
import gc
from pathlib import Path

import pytest

from nbdmirror.devices import nbd_link
from nbdmirror.devices.nbd import NbdDevice
from nbdmirror.devices.nbd_connection import NbdConnection
from nbdmirror.devices.nbd_link import LinkOptions
from nbdmirror.devices.uri import NbdEndpoint
from nbdmirror.errors import DeviceError
from tests.support import peers
from tests.support.failing import BOUND, failed
from tests.support.links import back, lost, mended, opened, read
from tests.support.relay import Relay
from tests.support.tools import make_disk

pytest.importorskip("nbd", reason="libnbd's Python binding is not installed")

MIB = 1024**2
HOLDING = LinkOptions(reconnect_delay=BOUND)


# --- a server that is killed and comes back ---


async def test_requests_are_held_until_the_server_is_back(tmp_path: Path) -> None:
    image = make_disk(tmp_path / "disk", MIB, {0: b"x" * 4096})
    with peers.qemu_nbd(image) as first:
        async with opened(first.endpoint, link=HOLDING) as device:
            assert (device.link.generation, device.link.state) == (1, "connected")
            first.kill()
            await lost(device)
            assert device.link.state.startswith("reconnecting")
            work = (read(device, 0, 4096), device.pwrite(b"y" * 4096, 4096), device.zero(8192, 4096), device.trim(12288, 4096))
            work = (*work, device.flush(), device.extents(0, 4096), device.cache(0, 4096))
            held = [asyncio.ensure_future(each) for each in work]
            assert not (await asyncio.wait(held, timeout=0.05))[0]
            with peers.qemu_nbd(image, after=first):
                assert (await asyncio.wait_for(asyncio.gather(*held), BOUND))[0] == b"x" * 4096
                assert (device.link.generation, device.connection_count) == (2, 4)
                assert await read(device, 4096, 4096) == b"y" * 4096


async def test_what_was_in_flight_fails_once_and_what_comes_later_is_held() -> None:
    with peers.nbdkit("memory", "64M") as first:
        async with opened(first.endpoint, link=HOLDING) as device:
            first.freeze()
            flying = [asyncio.ensure_future(device.pwrite(bytes(MIB), index * MIB)) for index in range(20)]
            flying += [asyncio.ensure_future(device.pread(bytearray(4096), 0)) for _ in range(20)]
            await asyncio.sleep(0)
            first.kill()
            results = await asyncio.wait_for(asyncio.gather(*flying, return_exceptions=True), BOUND)
            assert {error.errno for error in results if isinstance(error, DeviceError)} == {errno.ENOTCONN}
            assert len(results) == 40
            held = [asyncio.ensure_future(device.pwrite(b"x" * 4096, index * 4096)) for index in range(20)]
            await asyncio.sleep(0)
            with back(first, "memory", "64M"):
                await asyncio.wait_for(asyncio.gather(*held), BOUND)
                assert await read(device, 0, 20 * 4096) == b"x" * 20 * 4096


async def test_without_a_delay_requests_fail_at_once_and_succeed_when_the_server_is_back() -> None:
    with peers.nbdkit("memory", "1M") as first:
        async with opened(first.endpoint) as device:
            first.kill()
            await lost(device)
            for work in (device.pread(bytearray(1), 0), device.pwrite(b"x", 0), device.flush(), device.extents(0, 1)):
                error = await failed(work)
                assert error.errno == errno.ENOTCONN
                assert "the connection is lost" in str(error)
            with back(first, "memory", "1M"):
                await asyncio.wait_for(device.link.reconnected(), BOUND)
                assert await read(device, 0, 1) == b"\0"
                await device.link.reconnected()


async def test_requests_are_held_no_longer_than_the_delay() -> None:
    with peers.nbdkit("memory", "1M") as first:
        async with opened(first.endpoint, link=LinkOptions(reconnect_delay=0.2)) as device:
            first.kill()
            await lost(device)
            assert (await failed(device.pread(bytearray(1), 0))).errno == errno.ENOTCONN
            async with asyncio.timeout(BOUND):
                while device.link.state == "reconnecting":
                    await asyncio.sleep(0.001)
            assert device.link.state.startswith("reconnecting: cannot connect to nbd+unix:")
            assert "the connection is lost (Connection refused)" in str(await failed(device.pread(bytearray(1), 0)))
            with back(first, "memory", "1M"):
                await asyncio.wait_for(device.link.reconnected(), BOUND)
                assert await read(device, 0, 1) == b"\0"


async def test_a_server_that_refuses_is_asked_again_until_it_does_not() -> None:
    with peers.nbdkit("memory", "1M") as peer, Relay(peer.endpoint) as relay:
        async with opened(relay.endpoint, link=HOLDING) as device:
            relay.refuse()
            relay.cut()
            await lost(device)
            held = asyncio.ensure_future(read(device, 0, 1))
            async with asyncio.timeout(BOUND):
                while device.link.state == "reconnecting":
                    await asyncio.sleep(0.001)
            assert not held.done()
            relay.accept()
            assert await held == b"\0"


# --- it must be the same export ---


@pytest.mark.parametrize(
    ("came_back", "change"),
    [
        (["memory", "2M"], "its size changed from 1048576 to 2097152 bytes"),
        (["memory", "1M", "-r"], "it is read-only now"),
        (["memory", "1M", "--filter=nozero"], "it no longer offers zero"),
        (["memory", "1M", "--filter=blocksize-policy", "blocksize-minimum=512"], "its block sizes changed from"),
        (["memory", "1M", "--filter=multi-conn", "multi-conn-mode=disable"], "it no longer takes several connections"),
    ],
)
async def test_another_export_in_its_place_ends_the_link(came_back: list[str], change: str) -> None:
    with peers.nbdkit("memory", "1M") as first:
        async with opened(first.endpoint, connections=2, link=HOLDING) as device:
            first.kill()
            await lost(device)
            held = asyncio.ensure_future(device.pread(bytearray(1), 0))
            extra = [word for word in came_back if word.startswith("-")]
            with back(first, *(word for word in came_back if not word.startswith("-")), extra=extra):
                error = await failed(held)
                assert error.errno == errno.ESTALE
                assert change in str(error)
                assert device.link.state.startswith("failed: ")
                assert change in device.link.state
                assert str(await failed(device.link.reconnected())) == str(error)
                assert device.link._mending is not None
                await asyncio.wait_for(device.link._mending, BOUND)  # nothing is tried any more
                assert str(await failed(device.pwrite(b"x", 0))) == str(error)


# --- ending while it is lost ---


async def test_held_requests_can_be_cancelled_and_leave_nothing_behind() -> None:
    with peers.nbdkit("memory", "1M") as first:
        async with opened(first.endpoint, link=HOLDING) as device:
            first.kill()
            await lost(device)
            held = [
                asyncio.ensure_future(work) for work in (device.pread(bytearray(1), 0), device.pwrite(b"x", 0), device.flush())
            ]
            kept = asyncio.ensure_future(read(device, 0, 1))
            await asyncio.sleep(0)
            for task in held:
                task.cancel()
            results = await asyncio.gather(*held, return_exceptions=True)
            assert all(isinstance(result, asyncio.CancelledError) for result in results)
            with back(first, "memory", "1M"):
                assert await kept == b"\0"


@pytest.mark.parametrize("refused", [True, False])
async def test_closing_while_reconnecting_is_quick_and_fails_what_is_held(refused: bool) -> None:
    with peers.nbdkit("memory", "1M") as peer, Relay(peer.endpoint) as relay:
        device = await NbdDevice.open(relay.endpoint, link=HOLDING)
        if refused:
            relay.refuse()
        else:
            relay.hang()  # it takes the connection and says nothing
        relay.cut()
        await lost(device)
        held = [asyncio.ensure_future(device.pread(bytearray(1), 0)), asyncio.ensure_future(device.link.reconnected())]
        await asyncio.wait(held, timeout=0.2)  # an attempt is under way, or over
        await asyncio.wait_for(device.aclose(), 1)
        for task in held:
            assert "the connection is closed" in str(await failed(task))
        assert device.link.state == "closed"
        relay.resume()


# --- opening ---


async def test_opening_is_tried_once_or_for_as_long_as_was_said(tmp_path: Path) -> None:
    loop = asyncio.get_running_loop()
    endpoint = NbdEndpoint.unix(str(tmp_path / "none"))
    started = loop.time()
    assert (await failed(NbdDevice.open(endpoint))).errno == errno.ENOENT
    assert loop.time() - started < 0.3
    started = loop.time()
    error = await failed(NbdDevice.open(endpoint, link=LinkOptions(open_timeout=0.5)))
    assert (error.errno, loop.time() - started >= 0.5) == (errno.ENOENT, True)


async def test_opening_waits_for_a_server_that_comes_later() -> None:
    with peers.nbdkit("memory", "1M") as first:
        first.kill()
        opening = asyncio.ensure_future(NbdDevice.open(first.endpoint, link=LinkOptions(open_timeout=BOUND)))
        await asyncio.wait({opening}, timeout=0.05)
        with back(first, "memory", "1M"):
            device = await opening
            assert device.size == MIB
            await device.aclose()


# --- in the long run ---


async def test_two_hundred_reconnections_leave_no_descriptors_and_no_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nbd_link, "_FIRST_PAUSE", 0.0)

    def left() -> tuple[int, int]:
        gc.collect()
        alive = sum(isinstance(thing, NbdConnection) for thing in gc.get_objects())
        return len(list(Path("/proc/self/fd").iterdir())), alive

    with peers.nbdkit("memory", "1M") as peer, Relay(peer.endpoint) as relay:
        async with opened(relay.endpoint, connections=2, link=HOLDING) as device:
            await device.pread(bytearray(4096), 0)
            before = left()
            for generation in range(2, 202):
                relay.cut()
                await lost(device)
                await device.pread(bytearray(4096), 0)
                await device.pwrite(b"x" * 4096, 0)
                assert device.link.generation >= generation
            await mended(device, 2)
            async with asyncio.timeout(BOUND):
                while relay.count > 2:
                    await asyncio.sleep(0.001)
            assert left() == before
            assert device.link.losses == 199  # what was written last is not lost
