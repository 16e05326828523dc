"""libnbd's ground, asynchronous calls and the errors it can make: with its own checks off, what is wrong reaches our server."""

from __future__ import annotations

import signal
import sys
from textwrap import dedent
from typing import TYPE_CHECKING, Final

import pytest

from nbdmirror.units import MiB
from tests.support.daemon import Daemon, serving
from tests.support.peers import nbdkit, require
from tests.support.tools import completed, content, make_disk, nbdsh, pattern, run

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SIZE: Final = 123_456_789
OLD: Final = pattern(4 * MiB)

# What the scripts share: the error of a call, by name, and the request after it, which has to work.
TOOLS: Final = """
import errno

def error_of(call, *rest):
    try:
        call(*rest)
    except nbd.Error as error:
        return errno.errorcode.get(error.errnum, error.errnum)
    return None

def drain(h):
    while h.aio_in_flight():
        h.poll(-1)

def goes_on(h):
    assert h.aio_is_ready() and not h.aio_in_flight()
    assert bytes(h.pread(16, 0)).hex() == START
"""


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    disk = make_disk(tmp_path_factory.mktemp("libnbd") / "disk", SIZE, {0: OLD, SIZE - MiB: OLD[:MiB]})
    with serving(disk) as daemon:
        yield daemon
        assert "dropped" not in daemon.stderr, "no error was worth a connection"
        assert daemon.terminate() == 0
    assert disk.stat().st_size == SIZE


def shell(uri: str, script: str, *options: str) -> str:
    return nbdsh(uri, f"START = '{OLD[:16].hex()}'\n{TOOLS}\n{dedent(script)}\ngoes_on(h)\n", *options)


# --- requests that are wrong -----------------------------------------------------------------------------------------


def test_requests_of_no_bytes(daemon: Daemon) -> None:
    shell(
        daemon.uri,
        """
        h.set_strict_mode(0)
        calls = [(h.pread, 0, 0), (h.pwrite, b"", 0), (h.zero, 0, 0), (h.trim, 0, 0), (h.cache, 0, 0)]
        calls += [(h.pread_structured, 0, 0, lambda *_: 0), (h.block_status, 0, 0, lambda *_: 0)]
        for call in calls:
            assert error_of(*call) == "EINVAL", call
            goes_on(h)
        """,
        "--base-allocation",
    )


def test_requests_past_the_end(daemon: Daemon) -> None:
    shell(
        daemon.uri,
        f"""
        h.set_strict_mode(0)
        for offset, length in (({SIZE}, 1), ({SIZE} - 1, 2), (2**63 - 1, 512), ({SIZE} - 4096, 8192)):
            assert error_of(h.pread, length, offset) == "EINVAL"
            assert error_of(h.trim, length, offset) == "EINVAL"
            assert error_of(h.cache, length, offset) == "EINVAL"
            assert error_of(h.block_status, length, offset, lambda *_: 0) == "EINVAL"
            assert error_of(h.pwrite, bytes(length), offset) == "ENOSPC"
            assert error_of(h.zero, length, offset) == "ENOSPC"
            goes_on(h)
        """,
        "--base-allocation",
    )


def test_flags_that_nobody_knows(daemon: Daemon) -> None:
    shell(
        daemon.uri,
        """
        h.set_strict_mode(0)
        for flag in (nbd.CMD_FLAG_MASK + 1, 0x8000):
            for call in ((h.pread, 512, 0), (h.pwrite, b"x" * 512, 0), (h.zero, 512, 0), (h.trim, 512, 0), (h.cache, 512, 0)):
                assert error_of(*call, flag) == "EINVAL", call
            assert error_of(h.flush, flag) == "EINVAL"
            goes_on(h)
        for call, flag in ((h.trim, nbd.CMD_FLAG_NO_HOLE), (h.cache, nbd.CMD_FLAG_DF), (h.flush, nbd.CMD_FLAG_REQ_ONE)):
            assert error_of(call, *(() if call == h.flush else (512, 0)), flag) == "EINVAL"
        """,
    )


def test_what_was_not_negotiated(daemon: Daemon, tmp_path: Path) -> None:
    """Block status without a context; a large read where there are no chunks to refuse it in."""
    shell(daemon.uri, 'h.set_strict_mode(0)\nassert error_of(h.block_status, 512, 0, lambda *_: 0) in ("EINVAL", "ENOTSUP")')
    with serving(make_disk(tmp_path / "disk", MiB, {0: OLD[:4096]}), "-r") as reader:
        shell(
            reader.uri,
            """
            h.set_strict_mode(0)
            for call in ((h.pwrite, b"x", 0), (h.zero, 512, 0), (h.trim, 512, 0), (h.zero, 512, 0, nbd.CMD_FLAG_FAST_ZERO)):
                assert error_of(*call) == "EPERM"
                goes_on(h)
            """,
        )


def test_more_than_64_mib(daemon: Daemon) -> None:
    shell(
        daemon.uri,
        f"""
        h.set_strict_mode(0)
        assert h.get_block_size(nbd.SIZE_MAXIMUM) == {64 * MiB}
        assert len(h.pread({64 * MiB}, 0)) == {64 * MiB}
        for length in ({64 * MiB} + 1, {64 * MiB} + 4096):
            assert error_of(h.pwrite, bytes(length), 0) in ("EINVAL", "EOVERFLOW", "ERANGE")
            assert error_of(h.pread, length, 0) in ("EINVAL", "EOVERFLOW", "ERANGE")
            goes_on(h)
        """,
    )


def test_requests_off_the_blocks_of_the_disk_below(tmp_path: Path) -> None:
    """Below is a server that insists on its block size: ours says so, and refuses what that one would."""
    disk = make_disk(tmp_path / "disk", MiB, {0: OLD[:MiB]})
    options = [str(disk), "blocksize-minimum=4096", "blocksize-error-policy=error"]
    with nbdkit("file", *options, filters=["blocksize-policy"]) as peer, serving(peer.endpoint.uri) as daemon:
        nbdsh(
            daemon.uri,
            f"""{TOOLS}
h.set_strict_mode(0)
assert h.get_block_size(nbd.SIZE_MINIMUM) == 4096
for offset, length in ((1, 4096), (0, 512), (4095, 2), (4096, 4097)):
    for call in ((h.pread, length), (h.pwrite, bytes(length)), (h.zero, length), (h.trim, length), (h.cache, length)):
        assert error_of(*call, offset) == "EINVAL", call
h.pwrite(bytes(4096), 4096)
assert h.pread(4096, 4096) == bytes(4096)
""",
        )
    assert content(disk, 0, 12288) == OLD[:4096] + bytes(4096) + OLD[8192:12288]


# --- calls that are wrong --------------------------------------------------------------------------------------------


def test_calls_out_of_turn(daemon: Daemon) -> None:
    socket = str(daemon.unix)
    shell(
        daemon.uri,
        f"""
        assert error_of(h.connect_unix, {socket!r}) == "EINVAL"
        goes_on(h)
        assert error_of(h.aio_command_completed, 0) == "EINVAL"
        assert error_of(h.aio_command_completed, 4711) == "EINVAL" or not h.aio_command_completed(4711)
        assert error_of(h.opt_go) == "EINVAL" and error_of(h.opt_abort) == "EINVAL"
        error_of(h.aio_notify_write)
        goes_on(h)
        other = nbd.NBD()
        assert error_of(other.pread, 512, 0) == "ENOTCONN"
        assert error_of(other.connect_unix, {socket!r} + "-not-there") == "ENOENT"
        """,
    )


def test_disconnecting_more_than_once(daemon: Daemon) -> None:
    """DISC behind requests in flight, twice, and from another handle meanwhile."""
    shell(
        daemon.uri,
        f"""
        import threading
        for _ in range(20):
            other = nbd.NBD()
            other.connect_unix({str(daemon.unix)!r})
            buffers = [nbd.Buffer(65536) for _ in range(16)]
            for number, buffer in enumerate(buffers):
                other.aio_pread(buffer, number * 65536)
            other.aio_disconnect()
            error_of(other.aio_disconnect)
            while not (other.aio_is_closed() or other.aio_is_dead()):
                other.poll(-1)
            assert [error_of(other.shutdown), error_of(other.shutdown)] != []
            assert error_of(other.pread, 1, 0) is not None
            goes_on(h)
        """,
    )


def test_the_server_dies_with_requests_in_flight(tmp_path: Path) -> None:
    """Its client hears of it: nothing hangs."""
    with nbdkit("memory", "64M", "delay-read=60", filters=["delay"]) as peer, serving(peer.endpoint.uri) as daemon:
        script = f"""
            import os, errno
            h.set_strict_mode(0)
            results = []
            for number in range(8):
                h.aio_pread(nbd.Buffer(512), number * 512, lambda error: results.append(error.value) or 1)
            os.kill({daemon.pid}, {int(signal.SIGKILL)})
            try:
                while h.aio_in_flight():
                    h.poll(-1)
            except nbd.Error:
                pass
            assert h.aio_is_dead() or h.aio_is_closed()
            assert results == [errno.ENOTCONN] * 8, results
            """
        nbdsh(daemon.uri, script)
        daemon.wait()


# --- asynchronous calls ----------------------------------------------------------------------------------------------


def test_asynchronous_reads_and_writes(daemon: Daemon) -> None:
    """By cookie, by callback, into one shared buffer; each call with its own data."""
    shell(
        daemon.uri,
        f"""
        base = {8 * MiB}
        data = bytes(range(256)) * 256
        cookies = [h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(data[n:] + data[:n])), base + n * 65536) for n in range(40)]
        drain(h)
        assert all(h.aio_command_completed(cookie) for cookie in cookies)
        assert error_of(h.aio_command_completed, cookies[0]) or not h.aio_command_completed(cookies[0]), "told once"

        buffers, done = [nbd.Buffer(65536) for _ in range(40)], []
        for n, buffer in enumerate(buffers):
            h.aio_pread(buffer, base + n * 65536, lambda error, n=n: done.append((n, error.value)) or 1)
        drain(h)
        assert sorted(done) == [(n, 0) for n in range(40)]
        assert all(bytes(buffer.to_bytearray()) == data[n:] + data[:n] for n, buffer in enumerate(buffers))

        seen = []
        cookie = h.aio_pread_structured(nbd.Buffer(131072), base, lambda piece, *_: seen.append(len(piece)))
        h.aio_flush(), h.aio_cache(4096, 0), h.aio_zero(65536, base), h.aio_trim(65536, base + 65536)
        h.aio_block_status(65536, base, lambda *_: 0)
        drain(h)
        assert h.aio_command_completed(cookie) and sum(seen) == 131072
        zero = nbd.Buffer(65536)
        cookie = h.aio_pread(zero, base)
        drain(h)
        assert h.aio_command_completed(cookie) and zero.is_zero()
        """,
        "--base-allocation",
    )


def test_a_callback_may_change_the_error_and_the_session_goes_on(daemon: Daemon) -> None:
    shell(
        daemon.uri,
        f"""
        def chunk(piece, at, status, error):
            error.value = errno.EPROTO
            return -1
        assert error_of(h.pread_structured, 65536, 0, chunk) == "EPROTO"
        goes_on(h)
        assert error_of(h.pread_structured, 65536, {SIZE} - 512, lambda *_: 0) == "EINVAL"
        """,
    )


def test_haggling_step_by_step(daemon: Daemon) -> None:
    out = run(
        sys.executable,
        *("-P", "-m", "nbd"),
        "-c",
        dedent(f"""
        h.set_opt_mode(True)
        h.set_request_structured_replies(True)
        h.add_meta_context("base:allocation")
        h.connect_unix({str(daemon.unix)!r})
        names = []
        assert h.opt_list(lambda name, description: names.append(name)) == 1 and names == [""]
        contexts = []
        assert h.opt_list_meta_context(lambda name: contexts.append(name)) == len(contexts)
        assert "base:allocation" in contexts
        h.opt_info()
        assert h.get_size() == {SIZE}
        h.set_export_name("not there")
        for call in (h.opt_info, h.opt_go, h.opt_info):
            try:
                call()
            except nbd.Error:
                pass
            else:
                raise AssertionError("there is no such export")
            assert h.aio_is_negotiating()
        h.set_export_name("")
        h.opt_go()
        assert h.can_meta_context("base:allocation") and h.get_structured_replies_negotiated()
        h.shutdown()
        other = nbd.NBD()
        other.set_opt_mode(True)
        other.connect_unix({str(daemon.unix)!r})
        other.opt_abort()
        assert other.aio_is_closed()
        print("done")
        """),
    )
    assert out.strip() == "done"


# --- qemu-io ---------------------------------------------------------------------------------------------------------


def test_qemu_io_past_the_end_and_off_its_blocks(tmp_path: Path) -> None:
    require("qemu-io")
    disk = make_disk(tmp_path / "disk", MiB + 1, {0: OLD[:MiB]})
    with serving(disk) as daemon:
        words = [word for each in ("read -v 1048575 1", "write -P 7 1 3", "read -P 7 1 3", "flush") for word in ("-c", each)]
        run("qemu-io", "-f", "raw", *words, daemon.uri)
        assert content(disk, 0, 5) == OLD[:1] + b"\7" * 3 + OLD[4:5]
        for command in ("read 2M 512", "write 2M 512", "write -z 1M 64k"):
            result = completed("qemu-io", "-f", "raw", "-c", command, daemon.uri)
            assert result.returncode or "failed" in result.stdout + result.stderr
    assert disk.stat().st_size == MiB + 1
