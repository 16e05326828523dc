"""`nbdmirror demo`: the main job from start to end on a disk of its own, and proof that it was done.

A disk with a file system is served, a writer keeps changing it, it is mirrored to a server on an empty file and reaches READY
meanwhile; then the writer stops, the job completes, and the two files are compared.

Rules:
1. Every server is a real process, and the job is asked for over the control socket, as a user's would be.
2. Exit status 0 only if every claim of the report held. Whatever fails is one line, and status 1.
3. When it ends, by itself or by a signal, its children have ended and its directory is gone (unless it is to be kept).
"""

from __future__ import annotations

import asyncio
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, Self

import click
import uvloop

from nbdmirror.cli.bar import Bar
from nbdmirror.cli.client import ControlClient
from nbdmirror.cli.demo_children import Child, find_program, nbdmirror_command, need_program
from nbdmirror.cli.demo_disk import MIN_SIZE, DemoDisk, make_disk, make_sparse
from nbdmirror.cli.demo_report import Mirrored, Outcome, prove
from nbdmirror.cli.demo_writer import RATE, FioWriter, OwnWriter, Writer, fio_speaks_nbd
from nbdmirror.cli.follow import Outcome as JobOutcome
from nbdmirror.cli.follow import Report, follow, look
from nbdmirror.cli.mirror import check
from nbdmirror.cli.options import SIZE, json_option, print_json
from nbdmirror.devices.uri import NbdEndpoint
from nbdmirror.errors import NbdMirrorError
from nbdmirror.sockets import MAX_SOCKET_PATH
from nbdmirror.units import MiB, format_size, round_up

if TYPE_CHECKING:
    from types import TracebackType

    from nbdmirror.cli.progress import Meter

Say = Callable[[str], None]

_JOB: Final = "mirror0"
_POLL_SECONDS: Final = 0.01
# A writer's first write, and the next one after READY, come within milliseconds.
_WRITE_SECONDS: Final = 10.0


@dataclass(frozen=True, slots=True)
class _Options:
    size: int
    writer: Literal["auto", "fio", "own"]
    target: Literal["auto", "nbdkit", "nbdmirror"]
    seconds: float
    keep: bool


@click.command("demo", short_help="A whole mirror on a disk of its own, with proof.")
@click.option("--size", type=SIZE, default="1G", show_default=True, help="The disk's size; about a third of it is data.")
@click.option(
    "--writer", type=click.Choice(["auto", "fio", "own"]), default="auto", show_default=True, help="What changes the disk."
)
@click.option(
    "--target",
    type=click.Choice(["auto", "nbdkit", "nbdmirror"]),
    default="auto",
    show_default=True,
    help="What serves the copy.",
)
@click.option("--seconds", type=click.FloatRange(0), default=2, show_default=True, help="How long to stay READY under writes.")
@click.option("--keep", is_flag=True, help="Keep the directory with both disks.")
@json_option
def demo(
    *,
    size: int,
    writer: Literal["auto", "fio", "own"],
    target: Literal["auto", "nbdkit", "nbdmirror"],
    seconds: float,
    keep: bool,
    as_json: bool,
) -> int:
    """Mirror a disk while it is being written to, and prove that the copy is the same.

    Needs no disk and no set-up: everything happens in a temporary directory (TMPDIR says where), which is removed at the end.
    """
    if size < MIN_SIZE:
        raise click.UsageError(f"--size must be at least {format_size(MIN_SIZE)}, to hold a file system and something in it")
    options = _Options(round_up(size, MiB), writer, target, seconds, keep)
    return uvloop.run(_until_signalled(options, as_json=as_json))


async def _until_signalled(options: _Options, *, as_json: bool) -> int:
    """The demo; a signal ends it in good order, with the status that a shell gives it."""
    task = asyncio.create_task(_demo(options, as_json=as_json))
    received: list[int] = []

    def on_signal(number: int) -> None:
        if not received:  # a second one must not break the cleaning up
            received.append(number)
            task.cancel()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, on_signal, number)
    try:
        return await task
    except asyncio.CancelledError:
        if not received:
            raise
        return 128 + received[0]


async def _demo(options: _Options, *, as_json: bool) -> int:
    say = _mute if as_json else click.echo
    async with AsyncExitStack() as stack:
        directory = _directory(stack, options)
        outcome = await _mirror_and_prove(directory, options, say)
        if as_json:
            print_json({**outcome.facts, "directory": str(directory) if options.keep else None})
        for line in outcome.lines:
            mark = {True: "ok", False: "FAILED", None: ""}[line.held]
            say(f"  {line.label:<18} {mark:<6} {line.text}")
        if options.keep:
            say(f"kept: {directory}")
    if outcome.failures:
        raise NbdMirrorError(f"the demo failed: {'; '.join(outcome.failures)}")
    say("All of it held")
    return 0


async def _mirror_and_prove(directory: Path, options: _Options, say: Say) -> Outcome:
    say(f"Making a disk of {format_size(options.size)} with an ext4 file system in {directory}")
    disk = await make_disk(directory / "source.img", options.size)
    say(f"  {disk.files} files, {format_size(disk.content)}; the rest is a hole")
    copy = directory / "target.img"
    make_sparse(copy, disk.size)
    mirrored = await _Show(directory, disk, copy, options, say).run()
    say("Proof:")
    return await prove(disk.path, copy, disk.size, mirrored)


def _directory(stack: AsyncExitStack, options: _Options) -> Path:
    directory = Path(tempfile.mkdtemp(prefix="nbdmirror-demo-"))
    if not options.keep:
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
    if len(os.fsencode(directory / "target.sock")) > MAX_SOCKET_PATH:
        raise NbdMirrorError(f"no socket can have a path as long as one in {directory}; set TMPDIR to a shorter directory")
    return directory


class _Show:
    """The servers, the writer and the job, from READY to the end."""

    def __init__(self, directory: Path, disk: DemoDisk, copy: Path, options: _Options, say: Say) -> None:
        self._directory = directory
        self._disk = disk
        self._copy = copy
        self._options = options
        self._say = say
        self._qmp = str(directory / "qmp.sock")
        self._source = NbdEndpoint.unix(str(directory / "source.sock"))
        self._target = NbdEndpoint.unix(str(directory / "target.sock"))

    async def run(self) -> Mirrored:
        """All of it; when it returns both servers have ended."""
        async with AsyncExitStack() as stack:
            target = await self._start_target()
            stack.push_async_callback(target.stop)
            source = await self._start_source()
            stack.push_async_callback(source.stop)
            self._show_commands()
            before = self._disk.path.stat().st_mtime_ns
            writer = await self._start_writer()
            stack.push_async_callback(writer.aclose)
            await self._written_after(before, writer)
            self._say(f"Mirroring to {target.name} while a guest ({writer.name}) writes {format_size(RATE)}/s")
            mirrored = await self._mirror(writer, target.name)
            # In this order: the source's server has the target's export open, since its own moved there.
            for server in (source, target):
                if await server.stop():
                    raise server.failure()
            return mirrored

    def _show_commands(self) -> None:
        commands = (
            ("serve", str(self._disk.path), "-k", self._source.socket, "--qmp", self._qmp),
            ("mirror", "--qmp", self._qmp, self._target.uri),
            ("complete", "--qmp", self._qmp, _JOB),
        )
        self._say("What you would type, once a server for the target runs:")
        for command in commands:
            self._say(f"  {shlex.join(('nbdmirror', *command))}")

    # --- the parts -------------------------------------------------------------------------------------------------

    async def _start_source(self) -> Child:
        command = nbdmirror_command("serve", str(self._disk.path), "-k", self._source.socket, "--qmp", self._qmp)
        return await self._started("nbdmirror serve", command, "source.log")

    async def _start_target(self) -> Child:
        choice = self._options.target
        socket = self._target.socket
        if choice == "nbdmirror" or (choice == "auto" and find_program("nbdkit") is None):
            command = nbdmirror_command("serve", str(self._copy), "-k", socket)
            return await self._started("a second nbdmirror serve", command, "target.log")
        program = need_program("nbdkit", "nbdkit")
        command = [program, "--foreground", "--unix", socket, "file", f"file={self._copy}"]
        child = await Child.start("nbdkit", command, self._directory / "target.log")
        try:
            await child.accepts(socket)
        except BaseException:
            await child.stop()
            raise
        return child

    async def _started(self, name: str, command: list[str], log: str) -> Child:
        child = await Child.start(name, command, self._directory / log)
        try:
            line = await child.line()
            if not line.startswith("READY "):
                raise NbdMirrorError(f"{name} said '{line}' instead of READY")
        except BaseException:
            await child.stop()
            raise
        return child

    async def _start_writer(self) -> Writer:
        choice, disk = self._options.writer, self._disk
        if choice == "own" or (choice == "auto" and not await fio_speaks_nbd()):
            return await OwnWriter.start(self._source.uri, disk.area_offset, disk.area_length)
        if not await fio_speaks_nbd():
            raise NbdMirrorError("there is no fio with the nbd engine; please install fio, or use --writer own")
        return await FioWriter.start(self._source.uri, disk.area_offset, disk.area_length, self._directory)

    async def _written_after(self, moment: int, writer: Writer) -> None:
        """Wait until the disk has changed since `moment`, in nanoseconds as the file's time of change has them."""
        deadline = time.monotonic() + _WRITE_SECONDS
        while self._disk.path.stat().st_mtime_ns <= moment:
            writer.check()
            if time.monotonic() > deadline:
                raise NbdMirrorError(f"the writer ({writer.name}) writes nothing")
            await asyncio.sleep(_POLL_SECONDS)

    # --- the job ---------------------------------------------------------------------------------------------------

    async def _mirror(self, writer: Writer, target_name: str) -> Mirrored:
        async with ControlClient(self._qmp) as client:
            ready, ready_seconds = await self._reach_ready(client, writer)
            await self._stay_ready(client, writer)
            written = await writer.stop()
            started = time.monotonic()
            await client.execute("job-complete", {"id": _JOB})
            done = await follow(client, _JOB, frozenset())
            check(_JOB, done)
            seconds = time.monotonic() - started
        self._say(f"The writer was stopped, and the job completed in {seconds:.2f} s: the export is on the target now")
        info = done.info
        zeroes = info["x-bytes-zeroed"] + info["x-bytes-skipped"]
        sent = ready.info["x-bytes-sent"]
        return Mirrored(ready_seconds, sent, seconds, info["x-bytes-sent"], zeroes, written, writer.name, target_name)

    async def _reach_ready(self, client: ControlClient, writer: Writer) -> tuple[Report, float]:
        started = time.monotonic()
        arguments = {"job-id": _JOB, "device": "source", "target": self._target.uri, "sync": "full", "mode": "existing"}
        await client.execute("drive-mirror", arguments)
        with _meter(self._say) as shown:
            ready = await follow(client, _JOB, frozenset({JobOutcome.READY}), shown)
        check(_JOB, ready)
        seconds = time.monotonic() - started
        writer.check()
        self._say(f"READY after {seconds:.2f} s, with the writer still writing")
        return ready, seconds

    async def _stay_ready(self, client: ControlClient, writer: Writer) -> None:
        """Let the guest write, to a disk that is in step; it must change, and the job must stay READY."""
        moment = self._disk.path.stat().st_mtime_ns
        await asyncio.sleep(self._options.seconds)
        await self._written_after(moment, writer)
        report = await look(client, _JOB)
        check(_JOB, report)
        if report.outcome is not JobOutcome.READY:
            raise NbdMirrorError(f"job '{_JOB}' is {report.info['status']} while it should be ready")


# --- progress -----------------------------------------------------------------------------------------------------------


class _Quarters:
    """Progress as plain lines: a few of them."""

    def __init__(self, say: Say) -> None:
        self._say = say
        self._next = 25

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

    def show(self, done: int, total: int, note: str = "") -> None:
        """See Meter."""
        if total and done * 100 >= self._next * total:
            percent = done * 100 // total
            self._say(f"  mirroring: {percent} % of {format_size(total)}, {note}")
            self._next = percent - percent % 25 + 25


def _meter(say: Say) -> Meter:
    return Bar("mirroring") if sys.stderr.isatty() else _Quarters(say)


def _mute(_line: Any) -> None:  # noqa: ANN401
    """Say nothing."""


COMMANDS: Final = (demo,)
