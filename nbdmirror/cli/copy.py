"""`nbdmirror copy`: one shot, like nbdcopy. SOURCE and TARGET are paths, NBD URIs or `[ COMMAND ... ]`.

Rules:
1. Nothing is written before both ends are open and fit.
2. A missing TARGET is an error unless --create was given: a mistyped device name must not become a file.
3. The copy is the mirror job of an idle source: one engine, one set of rules.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click
import uvloop

from nbdmirror.cli.options import copy_options, json_option, print_json
from nbdmirror.cli.progress import Meter, meter
from nbdmirror.devices.open import open_device
from nbdmirror.devices.tracked import TrackedDevice
from nbdmirror.devices.uri import looks_like_uri
from nbdmirror.errors import DeviceError, NbdMirrorError, StateError
from nbdmirror.mirror.copier import CopyOptions
from nbdmirror.mirror.job import MirrorJob
from nbdmirror.mirror.options import MirrorOptions

if TYPE_CHECKING:
    from nbdmirror.devices.base import BlockDevice

Endpoint = str | list[str]
_POLL_SECONDS: Final = 0.2
_JOB_LOGS: Final = tuple(map(logging.getLogger, ("nbdmirror.jobs.job", "nbdmirror.mirror.job")))


class BracketCommand(click.Command):
    """A command whose arguments may be `[ COMMAND ARGS... ]`, which click would take for options of its own."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """See click."""
        plain: list[str] = []
        captives: list[list[str]] = []
        rest = iter(args)
        for word in rest:
            if word != "[":
                plain.append(word)
                continue
            command: list[str] = []
            for inner in rest:
                if inner == "]":
                    break
                command.append(inner)
            else:
                raise click.UsageError("'[' without ']'", ctx)
            if not command:
                raise click.UsageError("'[ ]' names no command", ctx)
            plain.append(f"[{len(captives)}")
            captives.append(command)
        ctx.meta["captives"] = captives
        return super().parse_args(ctx, plain)


def endpoint(ctx: click.Context, _param: click.Parameter, value: str) -> Endpoint:
    """The word that stands for a bracketed command becomes the command again."""
    captives: list[list[str]] = ctx.meta.get("captives", [])
    if value.startswith("[") and value[1:].isdecimal() and int(value[1:]) < len(captives):
        return captives[int(value[1:])]
    return value


@dataclass(frozen=True, slots=True)
class _Plan:
    source: Endpoint
    target: Endpoint
    connections: int
    create: bool
    speed: int
    options: MirrorOptions


@click.command("copy", cls=BracketCommand, short_help="Copy a disk, once.")
@click.argument("source", callback=endpoint)
@click.argument("target", callback=endpoint)
@click.option("--progress", "-P", is_flag=False, flag_value="", metavar="[=FD]", help="Show a bar, or write N/100 lines to FD.")
@copy_options
@click.option("--allocated", is_flag=True, help="Write zeroes so that the target is fully allocated.")
@click.option("--no-extents", is_flag=True, help="Do not ask the source for its holes.")
@click.option("--flush/--no-flush", default=True, help="Make the copy durable before ending (the default).")
@click.option("--create", is_flag=True, help="Create TARGET, a raw sparse file, where it is missing.")
@json_option
def copy(
    *,
    source: Endpoint,
    target: Endpoint,
    progress: str | None,
    connections: int,
    requests: int,
    request_size: int,
    target_is_zero: bool,
    speed: int,
    allocated: bool,
    no_extents: bool,
    flush: bool,
    create: bool,
    as_json: bool,
) -> None:
    """Copy SOURCE to TARGET: each a path, an NBD URI, or [ COMMAND ... ] for a server that is started for the copy."""
    if request_size <= 0:
        raise click.UsageError("--request-size must be more than 0")
    options = MirrorOptions(
        target_is_zero=target_is_zero,
        flush=flush,
        larger_target=True,
        copy=CopyOptions(request_size=request_size, requests=requests, unmap=not allocated, use_extents=not no_extents),
    )
    plan = _Plan(source, target, connections, create, speed, options)
    with meter("copying", progress, default=False) as shown:
        result = uvloop.run(_copy(plan, shown))
    if as_json:
        print_json(result)


async def _copy(plan: _Plan, shown: Meter) -> dict[str, Any]:
    started = time.monotonic()
    async with AsyncExitStack() as stack:
        source = await open_device(plan.source, read_only=True, connections=plan.connections)
        stack.push_async_callback(source.aclose)
        created = _create(plan.target, source.size) if plan.create else None
        try:
            target = await open_device(plan.target, connections=plan.connections)
            stack.push_async_callback(target.aclose)
            _check_fit(source, target)
            job = await _run(plan, source, target, shown)
        except BaseException:
            if created is not None:
                created.unlink(missing_ok=True)
            raise
    seconds = time.monotonic() - started
    ends = {"source": _name(plan.source), "target": _name(plan.target)}
    return {**ends, "size": source.size, "seconds": seconds, **job.statistics()}


def _create(target: Endpoint, size: int) -> Path | None:
    """Make the target's file, all hole, unless there is something of that name already."""
    if not isinstance(target, str) or looks_like_uri(target):
        return None
    path = Path(target)
    try:
        fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o666)
        try:
            os.truncate(fd, size)
        finally:
            os.close(fd)
    except FileExistsError:
        return None
    except OSError as error:
        raise DeviceError.of(error, f"cannot create '{target}'") from None
    return path


def _check_fit(source: BlockDevice, target: BlockDevice) -> None:
    if target.capabilities.read_only:
        raise StateError(f"the target '{target.name}' is read-only")
    if target.size < source.size:
        raise StateError(
            f"the target '{target.name}' has {target.size} bytes, the source {source.size}: make the target at least as large"
        )


async def _run(plan: _Plan, source: BlockDevice, target: BlockDevice, shown: Meter) -> MirrorJob:
    ended = asyncio.Event()

    def emit(event: str, _data: dict[str, Any]) -> None:
        if event == "BLOCK_JOB_READY":
            job.cancel_gently()

    for log in _JOB_LOGS:
        if not log.isEnabledFor(logging.INFO):
            log.setLevel(logging.CRITICAL)  # why it failed is the command's own last line
    job = MirrorJob(
        "copy",
        TrackedDevice(source),
        target,
        emit,
        pivot=lambda: None,
        seal=lambda: None,
        options=plan.options,
        speed=plan.speed,
    )
    job.on_end = lambda _job: ended.set()
    job.start()
    while not ended.is_set():
        shown.show(*job.progress)
        try:
            async with asyncio.timeout(_POLL_SECONDS):
                await ended.wait()
        except TimeoutError:
            continue
    if job.error is not None:
        raise NbdMirrorError(job.error_detail or job.error)
    return job


def _name(end: Endpoint) -> str:
    return end if isinstance(end, str) else " ".join(["[", *end, "]"])


COMMANDS: Final = (copy,)
