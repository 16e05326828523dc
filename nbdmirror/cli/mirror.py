"""`nbdmirror mirror`: start a mirror job on a running daemon, and watch it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import click

from nbdmirror.cli.client import ControlClient, run_client
from nbdmirror.cli.follow import Outcome, Report, follow
from nbdmirror.cli.options import SIZE, copy_options, qmp_option
from nbdmirror.cli.progress import meter
from nbdmirror.devices.open import local_path
from nbdmirror.devices.uri import looks_like_uri, parse_endpoint
from nbdmirror.errors import NbdMirrorError

COPY_MODES: Final = ("background", "write-blocking")
ON_ERROR: Final = ("report", "ignore", "enospc", "stop", "auto")


@click.command("mirror", short_help="Start a mirror job on a running daemon.")
@click.argument("target")
@qmp_option
@click.option("--device", default="source", show_default=True, metavar="NODE", help="The node to mirror.")
@click.option("--job-id", metavar="ID", help="The job's name.  [default: mirror0, or the next that is free]")
@click.option("--sync", type=click.Choice(["full", "top", "none"]), default="full", show_default=True, help="What to copy.")
@click.option("--bitmap", metavar="NAME", help="Copy what this bitmap of the node has marked, and keep it up to date.")
@click.option("--granularity", type=SIZE, metavar="SIZE", help="Bytes per bit of the dirty bitmap.  [default: 64k]")
@click.option(
    "--copy-mode",
    type=click.Choice(COPY_MODES),
    default="background",
    show_default=True,
    help="Whether the guest waits until the target has what it writes.",
)
@click.option(
    "--on-source-error",
    type=click.Choice(ON_ERROR),
    default="report",
    show_default=True,
    help="When the source can't be read: end the job, go on trying, or pause it (enospc: only where no space is left).",
)
@click.option(
    "--on-target-error",
    type=click.Choice(ON_ERROR),
    default="report",
    show_default=True,
    help="When the target fails: the same.",
)
@click.option("--buffer", "buf_size", type=SIZE, metavar="SIZE", help="The most data in flight.  [default: 16M]")
@click.option(
    "--reconnect",
    type=click.IntRange(0),
    metavar="SECONDS",
    help="When the target is lost, wait for it for so long.  [default: as long as it takes]",
)
@click.option(
    "--request-timeout",
    type=click.IntRange(0),
    metavar="SECONDS",
    default=10,
    show_default=True,
    help="A target that is silent for so long is lost; ten times as long where it has to wait for its disk (0: never).",
)
@click.option("--tls-no-verify", is_flag=True, help="Take any server with TLS for the target, also where it can't be verified.")
@click.option("--unmap/--no-unmap", default=True, help="Let zeroes become holes on the target (the default).")
@click.option("--progress", "-P", is_flag=False, flag_value="", metavar="[=FD]", help="Write N/100 lines to FD.")
@click.option("--background", is_flag=True, help="Return as soon as the job has started.")
@click.option("--complete", is_flag=True, help="Complete the job when it is ready, and wait for its end.")
@copy_options
def mirror(
    *,
    target: str,
    qmp: str,
    device: str,
    job_id: str | None,
    sync: str,
    bitmap: str | None,
    granularity: int | None,
    copy_mode: str,
    on_source_error: str,
    on_target_error: str,
    buf_size: int | None,
    reconnect: int | None,
    request_timeout: int,
    tls_no_verify: bool,
    unmap: bool,
    progress: str | None,
    background: bool,
    complete: bool,
    connections: int,
    requests: int,
    request_size: int,
    target_is_zero: bool,
    speed: int,
) -> None:
    """Mirror a node of the daemon to TARGET, a path or an NBD URI.

    Shows progress until the job is READY; it goes on keeping the target in step until `complete` or `cancel`.
    """
    if background and complete:
        raise click.UsageError("--background and --complete exclude each other: completing means waiting")
    arguments: dict[str, Any] = {
        "device": device,
        "target": _endpoint(target),
        "sync": sync,
        "mode": "existing",
        "speed": speed,
        "copy-mode": copy_mode,
        "on-source-error": on_source_error,
        "on-target-error": on_target_error,
        "unmap": unmap,
        "target-is-zero": target_is_zero,
        "x-tls-verify": not tls_no_verify,
        "x-request-timeout": request_timeout,
        "x-connections": connections,
        "x-requests": requests,
        "x-request-size": request_size,
    }
    optional = {"bitmap": bitmap, "granularity": granularity, "buf-size": buf_size, "x-reconnect": reconnect}
    arguments.update((name, value) for name, value in optional.items() if value is not None)

    async def work(client: ControlClient) -> str:
        name = job_id or await _free_job_id(client)
        await client.execute("drive-mirror", {"job-id": name, **arguments})
        if background:
            return name
        with meter(f"mirroring {device}", progress, default=True) as shown:
            check(name, await follow(client, name, frozenset({Outcome.READY, Outcome.STOPPED}), shown))
            if complete:
                await client.execute("job-complete", {"id": name})
                check(name, await follow(client, name, frozenset({Outcome.PENDING, Outcome.STOPPED}), shown))
        return name

    name = run_client(qmp, work)
    click.echo(f"{name} {'started' if background else 'completed' if complete else 'ready'}")


def _endpoint(target: str) -> str:
    """The target as the daemon has to be told, which has a working directory of its own; raises UsageError."""
    if not looks_like_uri(target):
        return str(Path(local_path(target)).absolute())
    endpoint = parse_endpoint(target)
    if endpoint.socket:
        endpoint = replace(endpoint, socket=str(Path(endpoint.socket).absolute()))
    return endpoint.uri


async def _free_job_id(client: ControlClient) -> str:
    taken = {job["id"] for job in await client.execute("query-jobs")}
    number = 0
    while f"mirror{number}" in taken:
        number += 1
    return f"mirror{number}"


def check(job_id: str, report: Report) -> None:
    """Raise NbdMirrorError where a job did not get to what was waited for."""
    match report.outcome:
        case Outcome.STOPPED:
            error = report.info["x-last-error"]["text"]
            raise NbdMirrorError(f"job '{job_id}' is paused by an error: {error}; resume it, or cancel it with --force")
        case Outcome.FAILED:
            raise NbdMirrorError(f"job '{job_id}' failed: {report.error}")
        case Outcome.CANCELLED:
            raise NbdMirrorError(f"job '{job_id}' was cancelled")
        case Outcome.MISSING:
            raise NbdMirrorError(f"no job '{job_id}'; 'nbdmirror status' lists those there are")


COMMANDS: Final = (mirror,)
