"""NbdDevice over servers that lack something, refuse something or ask for something."""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path

import pytest

from nbdmirror.devices.nbd import NbdDevice
from nbdmirror.extents import DATA, HOLE, ZERO
from nbdmirror.protocol.constants import FAST_ZERO, FUA, NO_HOLE
from tests.support import peers
from tests.support.failing import failed

pytest.importorskip("nbd", reason="libnbd's Python binding is not installed")

KIB, MIB, GIB = 1024, 1024**2, 1024**3


async def test_a_read_only_server_and_a_device_opened_read_only() -> None:
    for extra, read_only in ((["-r"], False), ([], True)):
        with peers.nbdkit("memory", "1M", extra=extra) as peer:
            device = await NbdDevice.open(peer.endpoint, read_only=read_only)
            assert device.capabilities.read_only
            for work in (device.pwrite(b"x", 0), device.zero(0, 1), device.trim(0, 1)):
                assert (await failed(work)).errno == errno.EPERM
            await device.pread(bytearray(10), 0)
            await device.flush()
            await device.aclose()


POLICY = ["blocksize-minimum=4096", "blocksize-preferred=65536", "blocksize-maximum=128k", "blocksize-error-policy=error"]


async def test_block_sizes_are_obeyed() -> None:
    with peers.nbdkit("memory", "8M", *POLICY, filters=["blocksize-policy"]) as peer:
        device = await NbdDevice.open(peer.endpoint)
        limits = device.limits
        assert (limits.minimum, limits.preferred, limits.maximum) == (4096, 65536, 128 * KIB)
        assert limits.maximum_zero % 4096 == 0
        data = bytes(range(256)) * 4096 + b"x" * 4096
        await device.pwrite(data, 4096)
        buffer = bytearray(len(data))
        await device.pread(buffer, 4096)
        assert buffer == data
        await device.aclose()


async def test_a_size_that_is_no_multiple_of_the_block_size_is_refused() -> None:
    with peers.nbdkit("memory", "1000000", *POLICY, filters=["blocksize-policy"]) as peer:
        open_before = len(list(Path("/proc/self/fd").iterdir()))
        assert "not a multiple" in str(await failed(NbdDevice.open(peer.endpoint)))
        assert len(list(Path("/proc/self/fd").iterdir())) == open_before


async def test_block_sizes_not_advertised() -> None:
    for size, minimum in ((MIB, 512), (MIB + 1, 1)):
        # Newer nbdkits advertise block sizes for their own plugins; this one says nothing of them.
        with peers.nbdkit("eval", f"get_size=echo {size}", "pread=head -c $3 /dev/zero") as peer:
            device = await NbdDevice.open(peer.endpoint)
            assert (device.limits.minimum, device.limits.maximum) == (minimum, 32 * MIB)
            await device.aclose()


async def test_requests_beyond_the_largest_payload_and_a_zero_beyond_32_bits() -> None:
    with peers.nbdkit("memory", "6G") as peer:
        device = await NbdDevice.open(peer.endpoint, connections=2)
        data = b"abcdefg!" * (5 * MIB)
        await device.pwrite(data, 4 * GIB - MIB, FUA)
        buffer = bytearray(len(data))
        await device.pread(buffer, 4 * GIB - MIB)
        assert buffer == data
        await device.zero(0, device.size)
        assert [(e.offset, e.flags) for e in await device.extents(0, device.size)] == [(0, HOLE | ZERO)]
        await device.pread(buffer, 4 * GIB - MIB)
        assert not any(buffer)
        await device.trim(0, device.size)
        await device.aclose()


@pytest.mark.parametrize("mode", [[], ["zeromode=notrim"]])
async def test_a_server_without_write_zeroes_gets_zeroes_as_data(mode: list[str]) -> None:
    with peers.nbdkit("memory", "20M", *mode, filters=["nozero"]) as peer:
        device = await NbdDevice.open(peer.endpoint)
        assert device.capabilities.zero == bool(mode)
        data = b"x" * device.size
        await device.pwrite(data, 0)
        await device.zero(1000 * 512, 10 * MIB + 512, FUA | NO_HOLE)
        buffer = bytearray(device.size)
        await device.pread(buffer, 0)
        start, end = 1000 * 512, 1001 * 512 + 10 * MIB
        assert buffer == data[:start] + bytes(end - start) + data[end:]
        await device.aclose()


async def test_fast_zero_is_refused_where_it_is_not_offered() -> None:
    with peers.nbdkit("memory", "1M", filters=["nozero"]) as peer:
        device = await NbdDevice.open(peer.endpoint)
        assert (await failed(device.zero(0, 4096, FAST_ZERO))).errno == errno.ENOTSUP
        await device.aclose()


def eval_disk(**scripts: str) -> list[str]:
    """nbdkit's eval plugin: a disk of 8 GiB of zeroes which takes every write; scripts override or add callbacks."""
    defaults = {
        "get_size": "echo 8G",
        "pread": "dd if=/dev/zero count=$3 iflag=count_bytes status=none",
        "pwrite": "cat > /dev/null",
        "can_write": "exit 0",
        "thread_model": "echo serialize_all_requests",
    }
    return [f"{key}={script}" for key, script in (defaults | scripts).items()]


@pytest.mark.parametrize("name", ["EINVAL", "EOVERFLOW"])
async def test_a_zero_that_is_too_long_is_halved_and_the_length_remembered(tmp_path: Path, name: str) -> None:
    log = tmp_path / "log"
    script = f"echo $3 >> {log}; if [ $3 -gt 1073741824 ]; then echo {name} >&2; exit 1; fi"
    with peers.nbdkit("eval", *eval_disk(zero=script, can_zero="exit 0")) as peer:
        device = await NbdDevice.open(peer.endpoint)
        await device.zero(0, device.size)
        lengths = [int(line) for line in log.read_text().split()]
        done = [length for length in lengths if length <= GIB]
        assert sum(done) == device.size
        assert len(lengths) - len(done) <= 2
        log.write_text("")
        await device.zero(0, device.size)
        assert all(int(line) <= GIB for line in log.read_text().split())
        await device.aclose()


async def test_a_zero_that_is_refused_at_every_length_fails() -> None:
    with peers.nbdkit("eval", *eval_disk(zero="echo EINVAL >&2; exit 1", can_zero="exit 0")) as peer:
        device = await NbdDevice.open(peer.endpoint)
        assert (await failed(device.zero(0, device.size))).errno == errno.EINVAL
        await device.aclose()


async def test_trim_flush_cache_and_extents_without_the_servers_help() -> None:
    with peers.nbdkit("eval", *eval_disk()) as peer:
        device = await NbdDevice.open(peer.endpoint)
        capabilities = device.capabilities
        assert (capabilities.trim, capabilities.flush, capabilities.fua) == (False, False, False)
        await device.trim(0, device.size, FUA)
        await device.pwrite(b"x", 0, FUA)
        await device.flush()
        await device.cache(0, 4096)
        await device.aclose()


async def test_no_extents_and_failing_extents_are_all_data() -> None:
    for filters, args in ((["noextents"], []), (["error"], ["error-extents=EIO", "error-extents-rate=100%"])):
        with peers.nbdkit("memory", "1M", *args, filters=filters) as peer:
            device = await NbdDevice.open(peer.endpoint)
            extents = [(e.offset, e.length, e.flags) for e in await device.extents(4096, 8192)]
            assert extents == [(4096, 8192, DATA)]
            await device.aclose()


async def test_the_servers_errno_comes_through_and_the_connection_lives_on() -> None:
    with peers.nbdkit("memory", "1M", "error-pwrite=ENOSPC", "error-pwrite-rate=100%", filters=["error"]) as peer:
        device = await NbdDevice.open(peer.endpoint)
        error = await failed(device.pwrite(bytes(4096), 8192))
        assert error.errno == errno.ENOSPC
        assert str(error) == f"{peer.endpoint}: write of 4096 bytes at 8192: No space left on device"
        await device.pread(bytearray(4096), 8192)
        await device.aclose()


async def test_one_failed_piece_fails_the_request_after_all_pieces_are_done() -> None:
    args = ["blocksize-maximum=64k", "blocksize-minimum=1", "error-pread=EIO", "error-pread-rate=50%"]
    with peers.nbdkit("memory", "64M", *args, filters=["blocksize-policy", "error"]) as peer:
        device = await NbdDevice.open(peer.endpoint, connections=2)
        assert (await failed(device.pread(bytearray(32 * MIB), 0))).errno == errno.EIO
        assert all(connection.in_flight == 0 for connection in device.link.connections)
        await device.aclose()


async def test_one_flush_goes_to_one_connection_behind_the_writes(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with peers.nbdkit("memory", "8M", f"logfile={log}", filters=["log"]) as peer:
        device = await NbdDevice.open(peer.endpoint, connections=4)
        await asyncio.gather(*(device.pwrite(bytes(4096), index * 4096) for index in range(16)))
        await device.flush()
        await device.aclose()
    lines = [line for line in log.read_text().splitlines() if " Write " in line or " Flush " in line]
    assert ["Flush" in line for line in lines if "..." in line or "return" not in line].count(True) == 1
    assert "Flush" in [line for line in lines if "return" not in line][-1]
    assert len({line.split("connection=")[1].split()[0] for line in lines}) == 4


async def test_fua_without_fua_is_a_write_and_then_a_flush(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with peers.nbdkit("memory", "8M", f"logfile={log}", filters=["log", "fua"]) as peer:
        device = await NbdDevice.open(peer.endpoint)
        assert not device.capabilities.fua
        await device.pwrite(bytes(4096), 0, FUA)
        await device.zero(0, 4096, FUA)
        await device.aclose()
    words = [word for line in log.read_text().splitlines() for word in ("Write", "Zero", "Flush") if f" {word} " in line]
    assert words == ["Write", "Flush", "Zero", "Flush"]
