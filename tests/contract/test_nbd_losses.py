"""What a lost connection may have cost, and that no flush hides it."""

from __future__ import annotations

import asyncio
import errno
from typing import TYPE_CHECKING, Any

import pytest

from nbdmirror.devices import nbd_link
from nbdmirror.devices.nbd_link import LinkOptions
from nbdmirror.protocol.constants import FUA
from tests.support import peers
from tests.support.failing import BOUND, failed
from tests.support.links import back, fewer, lost, mended, opened, read
from tests.support.relay import Relay

if TYPE_CHECKING:
    from pathlib import Path

pytest.importorskip("nbd", reason="libnbd's Python binding is not installed")

HOLDING = LinkOptions(reconnect_delay=BOUND)


# --- losses ---


async def test_a_flush_fails_after_a_loss_until_the_owner_has_acknowledged_it() -> None:
    with peers.nbdkit("memory", "1M") as first:
        async with opened(first.endpoint, link=HOLDING) as device:
            seen: list[str] = []
            device.link.on_lost = lambda: seen.append(device.link.state)
            await device.pwrite(b"x" * 4096, 0)
            first.kill()
            await lost(device)
            assert seen == ["reconnecting"]
            assert (await failed(device.flush())).errno == errno.ESTALE
            with back(first, "memory", "1M"):
                await device.pwrite(b"y" * 4096, 4096)
                for _ in range(2):
                    assert (await failed(device.flush())).errno == errno.ESTALE
                device.link.acknowledge_loss()
                await device.flush()
                assert (device.link.losses, len(seen)) == (1, 1)


async def test_a_write_without_fua_support_does_not_flush_over_a_loss() -> None:
    filters = ["fua"]  # which by default takes FUA away
    with peers.nbdkit("memory", "1M", filters=filters) as first:
        async with opened(first.endpoint, link=HOLDING) as device:
            assert not device.capabilities.fua
            await device.pwrite(b"x" * 4096, 0)
            first.kill()
            await lost(device)
            with back(first, "memory", "1M", filters=filters):
                assert (await failed(device.pwrite(b"y" * 4096, 4096, FUA))).errno == errno.ESTALE
                assert (await failed(device.flush())).errno == errno.ESTALE


async def test_nothing_is_lost_that_was_flushed_or_written_with_fua() -> None:
    with peers.nbdkit("memory", "1M") as peer, Relay(peer.endpoint) as relay:
        async with opened(relay.endpoint, link=HOLDING) as device:
            await device.pwrite(b"x" * 4096, 0)
            await device.zero(4096, 4096)
            await device.flush()
            await device.pwrite(b"x" * 4096, 0, FUA)
            await device.zero(4096, 4096, FUA)
            relay.cut()
            await lost(device)
            await device.flush()
            assert (device.link.losses, device.link.generation) == (0, 2)


async def test_a_flush_does_not_cover_what_was_in_flight_when_it_was_sent() -> None:
    with peers.nbdkit("memory", "1M", "delay-write=200ms", filters=["delay"]) as peer, Relay(peer.endpoint) as relay:
        async with opened(relay.endpoint, link=HOLDING) as device:
            writing = asyncio.ensure_future(device.pwrite(b"x" * 4096, 0))
            await asyncio.sleep(0)
            await device.flush()
            assert not writing.done()
            await writing
            relay.cut()
            await lost(device)
            assert device.link.losses == 1


async def test_a_server_without_flush_loses_what_was_written_since_the_last_one() -> None:
    scripts = ["get_size=echo 1M", "pread=head -c $3 /dev/zero", "pwrite=cat > /dev/null", "can_write=exit 0"]
    with peers.nbdkit("eval", *scripts) as peer, Relay(peer.endpoint) as relay:
        async with opened(relay.endpoint, link=HOLDING) as device:
            assert not device.capabilities.flush
            await device.pwrite(b"x" * 512, 0)
            await device.flush()
            relay.cut()
            await lost(device)
            await device.flush()
            await device.pwrite(b"x" * 512, 0)
            relay.cut()
            await lost(device)
            assert (await failed(device.flush())).errno == errno.ESTALE


# --- several connections ---


@pytest.mark.parametrize("cut", [Relay.cut, Relay.cut_cleanly])
async def test_one_lost_connection_is_mended_and_nothing_is_lost_while_another_lives(cut: Any) -> None:
    with peers.nbdkit("memory", "1M") as peer, Relay(peer.endpoint) as relay:
        async with opened(relay.endpoint, connections=4) as device:
            await device.pwrite(b"x" * 4096, 0)
            cut(relay, 0)
            await fewer(device, 4)
            assert device.link.state == "connected (3 of 4)"
            assert await read(device, 0, 4096) == b"x" * 4096
            await mended(device, 4)
            assert (device.link.generation, device.link.losses, relay.count) == (2, 0, 4)
            await device.flush()


async def test_a_later_connection_is_another_session_whose_flush_covers_nothing_of_the_first(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with peers.nbdkit("memory", "1M", f"logfile={log}", filters=["log"]) as peer, Relay(peer.endpoint) as relay:
        async with opened(relay.endpoint, connections=3) as device:
            relay.cut(0)
            await fewer(device, 3)
            await mended(device, 3)
            await device.flush()
            flushed = {line.split("connection=")[1].split()[0] for line in log.read_text().splitlines() if " Flush id" in line}
            assert len(flushed) == 2
            await asyncio.gather(*(device.pwrite(b"x", index) for index in range(3)))  # one on each connection
            relay.cut(0)  # the last two of the first session
            relay.cut(0)
            async with asyncio.timeout(BOUND):
                while device.link.losses == 0:
                    await asyncio.sleep(0.001)
            assert device.connection_count >= 1
            assert (await failed(device.flush())).errno == errno.ESTALE


async def test_the_loss_of_the_last_connection_ends_the_long_pause_before_another_one_is_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with peers.nbdkit("memory", "1M") as peer, Relay(peer.endpoint) as relay:
        async with opened(relay.endpoint, connections=2, link=HOLDING) as device:
            monkeypatch.setattr(nbd_link, "_FIRST_PAUSE", 3600.0)
            relay.cut(0)
            await fewer(device, 2)
            monkeypatch.setattr(nbd_link, "_FIRST_PAUSE", 0.01)
            relay.cut()
            await lost(device)
            assert await read(device, 0, 1) == b"\0"
            await mended(device, 2)
