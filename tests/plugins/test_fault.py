"""plugins/fault.py under nbdkit: each fault, to the client of this product."""

from __future__ import annotations

import asyncio
import errno
import json
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

import pytest

from nbdmirror.devices.nbd import NbdDevice
from nbdmirror.errors import DeviceError
from nbdmirror.extents import HOLE
from nbdmirror.protocol.constants import FAST_ZERO, FUA, NO_HOLE
from nbdmirror.units import KiB, MiB
from tests.support import plugins
from tests.support.daemon import until
from tests.support.failing import BOUND, failed
from tests.support.tools import content, make_disk, nbdsh, pattern

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

pytest.importorskip("nbd", reason="libnbd's Python binding is not installed")

SIZE = 4 * MiB


@asynccontextmanager
async def opened(target: plugins.Plugin, connections: int = 1) -> AsyncIterator[NbdDevice]:
    device = await NbdDevice.open(target.endpoint, connections=connections)
    try:
        yield device
    finally:
        await device.aclose()


async def read(device: NbdDevice, offset: int, length: int) -> bytes:
    buffer = bytearray(length)
    await device.pread(buffer, offset)
    return bytes(buffer)


# --- which requests --------------------------------------------------------------------------------------------------

REQUESTS: dict[str, Callable[[NbdDevice], Awaitable[object]]] = {
    "read": lambda device: device.pread(bytearray(KiB), 0),
    "write": lambda device: device.pwrite(bytes(KiB), 0),
    "zero": lambda device: device.zero(0, KiB),
    "trim": lambda device: device.trim(0, KiB),
    "flush": lambda device: device.flush(),
    "extents": lambda device: device.extents(0, KiB),
    "cache": lambda device: device.cache(0, KiB),
    "fua": lambda device: device.pwrite(bytes(KiB), 0, FUA),
    "fast-zero": lambda device: device.zero(0, KiB, FAST_ZERO),
}


async def test_an_error_of_each_kind_and_of_no_other() -> None:
    with plugins.fault(f"size={SIZE}") as target:
        async with opened(target) as device:
            for kind in REQUESTS:
                rule = target.ask(f"add {kind} error=ENOSPC")["rule"]
                errors = {}
                for name, request in REQUESTS.items():
                    try:
                        await request(device)
                    except DeviceError as error:
                        errors[name] = error.errno
                # Two are a write and a zero as well; and where block status fails, the device takes all for data.
                struck = {kind} - {"extents"} | {"write": {"fua"}, "zero": {"fast-zero"}}.get(kind, set())
                assert errors == dict.fromkeys(struck, errno.ENOSPC)
                assert target.hits() == (2 if kind in {"write", "zero"} else 1)
                target.ask(f"remove {rule}")
            for request in REQUESTS.values():
                await request(device)
        counted = target.ask("counts")["requests"]
        assert counted["flush"] == {"count": 10, "bytes": 0}
        assert counted["read"] == {"count": 10, "bytes": 10 * KiB}


@pytest.mark.parametrize("name", ["EPERM", "EIO", "ENOMEM", "EINVAL", "ENOSPC", "ESHUTDOWN"])
async def test_every_errno_that_nbd_has(name: str) -> None:
    with plugins.fault(f"size={SIZE}", f"fault=write error={name}") as target:
        async with opened(target) as device:
            assert (await failed(device.pwrite(b"x", 0))).errno == getattr(errno, name)


async def test_a_rule_has_a_range_a_beginning_and_an_end() -> None:
    with plugins.fault(f"size={SIZE}", "fault=write,read error=EIO from=64k to=128k at=3 times=2") as target:
        async with opened(target) as device:
            for offset in (64 * KiB - 512, 128 * KiB, 0, MiB):
                await device.pwrite(bytes(512), offset)
            told = []
            for offset in (64 * KiB - 511, 128 * KiB - 1, 64 * KiB, 100 * KiB, 64 * KiB):
                try:
                    await device.pwrite(bytes(512), offset)
                    told.append("done")
                except DeviceError:
                    told.append("failed")
            assert told == ["done", "done", "failed", "failed", "done"]
        assert target.ask("counts")["faults"] == [
            {"rule": 1, "fault": "write,read error=EIO from=64k to=128k at=3 times=2", "seen": 5, "hits": 2}
        ]


def which_fail(*args: str) -> list[int]:
    """The writes of a fixed series that fail."""
    with plugins.fault(f"size={SIZE}", "fault=write error=EIO p=30%", *args) as target:
        script = """
        import json
        told = []
        for number in range(100):
            try:
                h.pwrite(b"x" * 512, number * 512)
            except nbd.Error:
                told.append(number)
        print(json.dumps(told))
        """
        failures = json.loads(nbdsh(target.uri, script))
        assert target.hits() == len(failures)
        return list(failures)


def test_chance_comes_from_the_seed() -> None:
    first = which_fail("seed=1")
    assert 10 < len(first) < 60
    assert which_fail("seed=1") == first
    assert which_fail("seed=2") != first


async def test_the_first_rule_that_does_not_wait_decides() -> None:
    rules = ["fault=write delay=0.001", "fault=write error=EIO at=2 times=1", "fault=write error=ENOSPC at=2"]
    with plugins.fault(f"size={SIZE}", *rules) as target:
        async with opened(target) as device:
            await device.pwrite(b"x", 0)
            assert (await failed(device.pwrite(b"x", 0))).errno == errno.EIO
            assert (await failed(device.pwrite(b"x", 0))).errno == errno.ENOSPC
        assert [rule["seen"] for rule in target.ask("counts")["faults"]] == [3, 3, 2]


# --- which faults ----------------------------------------------------------------------------------------------------


async def test_a_late_answer() -> None:
    with plugins.fault(f"size={SIZE}", "fault=write delay=0.3") as target:
        async with opened(target) as device:
            late = asyncio.ensure_future(device.pwrite(b"late", 0))
            await asyncio.sleep(0)
            while not target.hits():
                await asyncio.sleep(0)
            assert await read(device, 0, 4) == bytes(4), "others overtake it"
            await late
            assert await read(device, 0, 4) == b"late"


async def test_torn_write(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk", SIZE, {0: b"o" * SIZE})
    with plugins.fault(f"file={disk}", "fault=write torn=1000 times=1", "fault=zero,trim torn=0", "fault=write torn") as target:
        async with opened(target) as device:
            assert (await failed(device.pwrite(b"n" * 4096, 512))).errno == errno.EIO
            for work in (device.zero(0, 512), device.trim(0, 512)):
                assert (await failed(work)).errno == errno.EIO
            assert content(disk, 0, 8192) == b"o" * 512 + b"n" * 1000 + b"o" * (8192 - 1512)
            await failed(device.pwrite(b"s" * MiB, MiB))
        begun = content(disk, MiB, MiB).count(b"s")
        assert 0 < begun < MiB
        assert content(disk, MiB, MiB) == b"s" * begun + b"o" * (MiB - begun)


async def test_short_and_lost_writes_are_answered_like_good_ones(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk", SIZE, {0: b"o" * SIZE})
    rules = ["fault=write short=512 to=1M", "fault=write lie from=1M", "fault=zero lie", "fault=trim short=1k"]
    with plugins.fault(f"file={disk}", *rules) as target:
        async with opened(target) as device:
            await device.pwrite(b"n" * 4096, 0)
            await device.pwrite(b"n" * 4096, MiB)
            await device.zero(MiB, 4096)
            await device.trim(2 * MiB, 4096)
            assert await read(device, 0, 4096) == b"n" * 512 + b"o" * 3584
            assert await read(device, MiB, 4096) == b"o" * 4096
            assert await read(device, 2 * MiB, 4096) == bytes(KiB) + b"o" * 3072


async def test_what_hangs_waits_for_its_release() -> None:
    with plugins.fault(f"size={SIZE}", "fault=write,flush hang") as target:
        async with opened(target) as device:
            for command in ("release", "clear"):
                hanging = [asyncio.ensure_future(device.pwrite(b"x", 0)), asyncio.ensure_future(device.flush())]
                while target.ask("counts")["hanging"] < 2:
                    await asyncio.sleep(0)
                assert await read(device, 0, 1) is not None, "others are served"
                assert not any(task.done() for task in hanging)
                assert target.ask(command) == {"released": 2}
                await asyncio.wait_for(asyncio.gather(*hanging), BOUND)
            await device.pwrite(b"x", 0)


@pytest.mark.parametrize(
    ("when", "done", "answered"), [("before", False, False), ("unanswered", True, False), ("answered", True, True)]
)
async def test_disconnect(when: str, done: bool, answered: bool, tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk", SIZE)
    with plugins.fault(f"file={disk}", f"fault=write disconnect={when} times=1") as target:
        async with opened(target, connections=2) as device, opened(target) as other:
            await other.flush()
            if answered:
                await device.pwrite(b"data", 0)
            else:
                assert (await failed(device.pwrite(b"data", 0))).errno == errno.ENOTCONN
            for cut_off in (device, other):  # one connection after the other
                while cut_off.connection_count:
                    with suppress(DeviceError):
                        await cut_off.flush()
        assert content(disk, 0, 4) == (b"data" if done else bytes(4))
        async with opened(target) as device:  # the server goes on
            await device.pwrite(b"more", 0)


async def test_crash_by_rule(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk", SIZE)
    with plugins.fault(f"file={disk}", "fault=write crash at=2") as target:
        async with opened(target) as device:
            await device.pwrite(b"one", 0)
            assert (await failed(device.pwrite(b"two", 3))).errno == errno.ENOTCONN
        assert target.peer.wait()
    assert content(disk, 0, 6) == b"one\0\0\0"


async def test_connecting_fails_or_hangs() -> None:
    with plugins.fault(f"size={SIZE}") as target:
        for kind in ("connect", "open"):
            target.ask(f"add {kind} error=EIO times=1")
            await failed(NbdDevice.open(target.endpoint, connections=1))
            target.ask(f"add {kind} hang times=1")
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.5):
                    await NbdDevice.open(target.endpoint, connections=1)
            target.ask("clear")
            async with opened(target) as device:
                await device.flush()


# --- what the disk is like -------------------------------------------------------------------------------------------


async def test_size_changes_for_those_who_connect_later(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk", SIZE)
    with plugins.fault(f"file={disk}", "volatile=1") as target:
        async with opened(target) as before:
            await before.pwrite(b"x" * 8192, 2 * MiB - 4096)
            assert target.ask("resize 2M") == {"size": 2 * MiB}
            assert disk.stat().st_size == 2 * MiB
            async with opened(target) as after:
                assert (before.size, after.size) == (SIZE, 2 * MiB)
            assert (await failed(before.pwrite(b"x", 2 * MiB))).errno == errno.ENOSPC
            assert (await failed(before.pread(bytearray(2), 2 * MiB - 1))).errno == errno.EIO
            assert await read(before, 2 * MiB - 4096, 4096) == b"x" * 4096
        target.ask("resize 6M")
        async with opened(target) as after:
            assert await read(after, 2 * MiB - 4096, 8192) == b"x" * 4096 + bytes(4096)
        assert plugins.ask(target.control, "resize much") == {
            "error": "'much' is no size: give one like 512, 64k or 1G",
        }


async def test_block_sizes_are_advertised_and_enforced() -> None:
    with plugins.fault(f"size={SIZE}", "block-size=4k:64k:128k") as target:
        async with opened(target) as device:
            assert (device.limits.minimum, device.limits.preferred, device.limits.maximum) == (4096, 65536, 131072)
            data = pattern(MiB)
            await device.pwrite(data, 4096)
            assert await read(device, 4096, MiB) == data
            await device.zero(0, 2 * MiB)
        assert (
            nbdsh(
                target.uri,
                """
            h.set_strict_mode(0)
            for offset, length in ((512, 4096), (0, 512), (0, 256 * 1024)):
                for request in (lambda: h.pwrite(bytes(length), offset), lambda: h.pread(length, offset)):
                    try:
                        request()
                    except nbd.Error as error:
                        print(error.errno)
            """,
            ).split()
            == ["EINVAL"] * 6
        )


async def test_what_it_can_be_without() -> None:
    with plugins.fault(f"size={SIZE}", "without=flush,fua,trim,fast-zero,multi-conn,cache,extents") as target:
        async with opened(target, connections=4) as device:
            can = device.capabilities
            assert (can.flush, can.fua, can.trim, can.fast_zero, can.multi_conn, can.cache) == (False,) * 6
            assert device.connection_count == 1
            assert [extent.flags for extent in (await device.extents(0, SIZE))] == [0]
    with plugins.fault(f"size={SIZE}", filters=["nozero"]) as target:
        async with opened(target) as device:
            assert not device.capabilities.zero


async def test_fast_zero_refused() -> None:
    with plugins.fault(f"size={SIZE}", "fault=fast-zero error=EOPNOTSUPP") as target:
        async with opened(target) as device:
            assert (await failed(device.zero(0, SIZE, FAST_ZERO))).errno == errno.ENOTSUP
            await device.zero(0, SIZE)
            target.ask("clear")
            await device.zero(0, SIZE, FAST_ZERO)
            assert (await failed(device.zero(0, SIZE, FAST_ZERO | NO_HOLE))).errno == errno.ENOTSUP


async def test_a_zero_that_the_disk_cannot_do_is_written() -> None:
    with plugins.fault(f"size={SIZE}", "fault=zero error=EOPNOTSUPP") as target:
        async with opened(target) as device:
            await device.pwrite(b"x" * MiB, 0)
            await device.zero(0, 4096)
            assert await read(device, 0, 8192) == bytes(4096) + b"x" * 4096
        assert target.ask("counts")["requests"]["write"]["bytes"] == MiB + 4096


async def test_extents_answer_as_little_as_a_byte() -> None:
    with plugins.fault(f"size={SIZE}", "fault=extents short=1") as target:
        async with opened(target) as device:
            told = list(await device.extents(0, SIZE))
            assert told[0].flags & HOLE
            assert target.ask("counts")["requests"]["extents"]["count"] >= 1
        until(lambda: target.ask("counts")["in-flight"] == 0, "all is answered")
