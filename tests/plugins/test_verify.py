"""plugins/verify.py under nbdkit: what it knows of a disk, and what it counts."""

from __future__ import annotations

import errno
import json
import random
import sys
from pathlib import Path

import pytest

from nbdmirror.devices.nbd import NbdDevice
from nbdmirror.protocol.constants import FUA, NO_HOLE
from nbdmirror.units import GiB, KiB, MiB, TiB
from tests.support import plugins
from tests.support.daemon import run_cli, serving
from tests.support.failing import failed
from tests.support.mirroring import refused, stop, tell, writing_guest
from tests.support.tools import DATA, PIECES, SIZE, completed, make_disk, pattern, run

pytest.importorskip("nbd", reason="libnbd's Python binding is not installed")

DATA_BYTES = sum(length for _, length in DATA)


def digest_of(path: Path, chunk: str = "64k") -> str:
    """By the plugin itself, as a command."""
    return run(sys.executable, plugins.PLUGINS / "verify.py", path, chunk).strip()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_disk(tmp_path / "source", SIZE, PIECES)


# --- what copies send ------------------------------------------------------------------------------------------------


def test_what_nbdcopy_sends(source: Path) -> None:
    with plugins.verify(f"size={SIZE}") as target:
        run("nbdcopy", "--flush", source, target.uri)
        report = target.ask("report")
    sent = report["requests"]
    assert sent["write"]["bytes"] == DATA_BYTES
    assert sent["zero"]["bytes"] == report["may-trim-bytes"] == SIZE - DATA_BYTES
    assert sent["flush"]["count"] >= 1
    assert report["digest"] == digest_of(source)
    assert (report["unknown-chunks"], report["zero-bytes-written"], report["in-flight"]) == (0, 0, 0)
    assert report["max-in-flight"] >= 1


def test_zeroes_that_travel_as_data_are_counted(source: Path) -> None:
    with plugins.verify(f"size={SIZE}") as target:
        run("nbdcopy", "--no-extents", "--sparse=0", source, target.uri)
        report = target.ask("report")
    assert report["requests"]["write"]["bytes"] == SIZE
    assert report["zero-bytes-written"] == SIZE - DATA_BYTES
    assert report["digest"] == digest_of(source)


def test_copy_sends_no_zeroes_as_data(source: Path) -> None:
    with source.open("r+b") as out:  # allocated, and zero all the same
        out.seek(8 * MiB)
        out.write(bytes(MiB))
    with plugins.verify(f"size={SIZE}") as target:
        result = run_cli("copy", source, target.uri)
        assert (result.returncode, result.stderr) == (0, "")
        report = target.ask("report")
    assert report["digest"] == digest_of(source)
    assert report["requests"]["write"]["bytes"] == DATA_BYTES
    assert (report["zero-bytes-written"], report["unknown-chunks"]) == (0, 0)
    assert report["requests"]["flush"]["count"] >= 1
    zeroed = report["requests"].get("zero", {"bytes": 0})["bytes"]
    assert zeroed == report["may-trim-bytes"] <= SIZE - DATA_BYTES


def test_mirror_under_a_guest_sends_no_zeroes_as_data(source: Path) -> None:
    with plugins.verify(f"size={SIZE}") as target, serving(source, qmp=True) as daemon:
        with writing_guest(daemon, source, SIZE, 1) as writer:
            tell(daemon, "mirror", target.uri)
            stop(writer)
        tell(daemon, "complete", "mirror0")
        report = target.ask("report")
        assert report["digest"] == digest_of(source)
        assert (report["zero-bytes-written"], report["unknown-chunks"]) == (0, 0)
        assert report["requests"]["flush"]["count"] >= 1
        assert "trim" not in report["requests"]


def test_copy_to_a_target_with_a_reference(source: Path, tmp_path: Path) -> None:
    with plugins.verify(f"reference={source}") as target:
        result = run_cli("copy", source, target.uri)
        assert (result.returncode, result.stderr) == (0, "")
        assert run_cli("compare", source, target.uri).returncode == 0
    other = make_disk(tmp_path / "other", SIZE, {**PIECES, 5 * MiB: pattern(MiB // 2, 9)})
    with plugins.verify(f"reference={other}") as target:
        refused(run_cli("copy", source, target.uri), 1, "Input/output error")
        report = target.ask("report")
    assert report["mismatches"] >= 1
    assert 5 * MiB <= report["first-mismatch"] < 5 * MiB + MiB // 2


# --- what it knows ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", ["4096", "1000", "64k", "1M"])
async def test_any_writes_give_the_digest_of_a_file_with_the_same_content(chunk: str, tmp_path: Path) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    size = 2 * MiB + 777
    model = bytearray(size)
    with plugins.verify(f"size={size}", f"chunk={chunk}") as target:
        device = await NbdDevice.open(target.endpoint, connections=1)
        for _ in range(150):
            offset = chance.randrange(size)
            length = chance.randint(1, min(150 * KiB, size - offset))
            if chance.random() < 0.6:
                data = chance.randbytes(length)
                await device.pwrite(data, offset)
            else:
                data = bytes(length)
                await device.zero(offset, length)
            model[offset : offset + length] = data
            for extent in await device.extents(0, size):
                assert not extent.is_zero or not any(model[extent.offset : extent.end])
        # A part of a chunk of which no more than a checksum was left is unknown: the rest is to be written again.
        await device.pwrite(model, 0)
        report = target.ask("report")
        file = tmp_path / "same"
        file.write_bytes(model)
        assert report["digest"] == digest_of(file, chunk)
        assert len(report["digest"]) == 32
        await device.pwrite(bytes([model[-1] ^ 1]), size - 1)
        assert target.ask("report")["digest"] != report["digest"]
        await device.aclose()


async def test_parts_that_are_kept_and_zeroes_of_any_range_leave_nothing_unknown(tmp_path: Path) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    chunk, size = 4096, 60 * 4096
    model, file = bytearray(size), tmp_path / "same"
    with plugins.verify(f"size={size}", f"chunk={chunk}") as target:
        device = await NbdDevice.open(target.endpoint, connections=1)
        for step in range(1, 401):
            offset = chance.randrange(size)
            if chance.random() < 0.8:
                data = chance.randbytes(min(chance.randint(1, chunk - 1), chunk - offset % chunk, size - offset))
                await device.pwrite(data, offset)
            else:
                data = bytes(min(chance.randint(1, 5 * chunk), size - offset))
                await device.zero(offset, len(data))
            model[offset : offset + len(data)] = data
            if step % 40 == 0:
                file.write_bytes(model)
                report = target.ask("report")
                assert (report["digest"], report["unknown-chunks"]) == (digest_of(file, "4096"), 0)
        everything = bytearray(size)
        await device.pread(everything, 0)
        assert everything == model
        await device.aclose()


async def test_parts_around_zeroes_are_known_and_parts_over_a_checksum_are_not(tmp_path: Path) -> None:
    chunk = 64 * KiB
    with plugins.verify(f"size={MiB}") as target:
        device = await NbdDevice.open(target.endpoint, connections=1)
        await device.pwrite(b"part", 100)
        file = make_disk(tmp_path / "same", MiB, {100: b"part"})
        assert target.ask("report")["digest"] == digest_of(file)
        buffer = bytearray(300)
        await device.pread(buffer, 0)
        assert buffer == file.read_bytes()[:300]
        await device.pwrite(b"w" * chunk, 0)
        assert (await failed(device.pread(bytearray(1), 0))).errno == errno.EIO
        await device.pwrite(b"p" * 4096, 4096)
        report = target.ask("report")
        assert (report["digest"], report["unknown-chunks"]) == (None, 1)
        await device.pwrite(b"p" * 4096, 0)
        assert (await failed(device.pread(bytearray(9000), 0))).errno == errno.EIO
        await device.zero(8192, chunk - 8192)
        file = make_disk(tmp_path / "same", MiB, {0: b"p" * 8192})
        assert target.ask("report")["digest"] == digest_of(file)
        await device.aclose()


async def test_what_was_trimmed_is_unknown_until_it_is_written_or_zeroed() -> None:
    with plugins.verify(f"size={MiB}") as target:
        empty = target.ask("report")["digest"]
        device = await NbdDevice.open(target.endpoint, connections=1)
        await device.trim(0, 128 * KiB + 512)
        report = target.ask("report")
        assert (report["digest"], report["unknown-chunks"]) == (None, 3)
        assert not next(iter(await device.extents(0, MiB))).is_zero
        assert (await failed(device.pread(bytearray(512), 0))).errno == errno.EIO
        await device.zero(0, 64 * KiB)
        await device.pwrite(bytes(64 * KiB), 64 * KiB)
        assert target.ask("report")["unknown-chunks"] == 1
        await device.zero(128 * KiB, 512)
        assert target.ask("report")["digest"] == empty
        await device.aclose()


async def test_a_disk_of_a_tebibyte_takes_little_memory() -> None:
    with plugins.verify(f"size={TiB}") as target:
        device = await NbdDevice.open(target.endpoint, connections=1)
        for at in range(0, TiB, 64 * GiB):
            await device.zero(at, 64 * GiB)
            await device.pwrite(b"x" * MiB, at)
        report = target.ask("report")
        assert report["requests"]["zero"]["bytes"] == TiB
        assert report["digest"]
        await device.aclose()
        status = Path(f"/proc/{target.peer.pid}/status").read_text()
        assert int(status.partition("VmHWM:")[2].split()[0]) * KiB < 200 * MiB


# --- what it counts --------------------------------------------------------------------------------------------------


async def test_every_kind_of_request_is_counted_and_counting_starts_anew() -> None:
    with plugins.verify(f"size={MiB}") as target:
        device = await NbdDevice.open(target.endpoint, connections=1)
        await device.pwrite(bytes(8192), 512)
        await device.pwrite(b"x" * 512, 0, FUA)
        await device.zero(0, 4096)
        await device.zero(0, 1024, NO_HOLE)
        await device.trim(0, 2048)
        await device.cache(0, 100)
        await device.extents(0, MiB)
        await device.pread(bytearray(300), 512 * KiB)
        await device.flush()
        report = target.ask("report")
        assert report["requests"] == {
            "write": {"count": 2, "bytes": 8704},
            "fua": {"count": 1, "bytes": 512},
            "zero": {"count": 2, "bytes": 5120},
            "trim": {"count": 1, "bytes": 2048},
            "cache": {"count": 1, "bytes": 100},
            "extents": {"count": 1, "bytes": MiB},
            "read": {"count": 1, "bytes": 300},
            "flush": {"count": 1, "bytes": 0},
        }
        assert report["may-trim-bytes"] == 4096
        assert report["zero-bytes-written"] == 4096, "one aligned block"
        again = target.ask("reset")
        assert (again["requests"], again["zero-bytes-written"], again["may-trim-bytes"]) == ({}, 0, 0)
        assert again["unknown-chunks"] == 1, "what it knows of the content stays"
        await device.aclose()


async def test_the_report_is_written_at_the_start_at_a_flush_and_in_the_end(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    with plugins.verify(f"size={MiB}", f"report={path}") as target:
        assert json.loads(path.read_text())["requests"] == {}
        device = await NbdDevice.open(target.endpoint, connections=1)
        await device.pwrite(b"x", 0)
        await device.flush()
        assert json.loads(path.read_text())["requests"]["write"] == {"count": 1, "bytes": 1}
        await device.pwrite(b"x", 1)
        await device.aclose()
        report = target.ask("report")
    assert json.loads(path.read_text()) == report
    assert report["requests"]["write"]["count"] == 2


def test_the_digest_of_a_file_knows_size_and_chunks(tmp_path: Path) -> None:
    one, two = make_disk(tmp_path / "one", MiB), make_disk(tmp_path / "two", MiB + 1)
    digests = {digest_of(one), digest_of(two), digest_of(one, "4096")}
    assert len(digests) == 3
    written = tmp_path / "written"
    written.write_bytes(bytes(MiB))
    assert digest_of(written) == digest_of(one), "holes and zeroes are the same content"
    result = completed(sys.executable, plugins.PLUGINS / "verify.py", tmp_path / "none")
    assert result.returncode == 1
    assert "No such file" in result.stderr
    assert "Traceback" not in result.stderr
