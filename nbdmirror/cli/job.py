"""The verbs of jobs: wait, pause, resume, complete, cancel, dismiss, set-speed, set-copy-mode.

`complete` and `cancel` return when the job has ended, so that a script's next line finds the disks as it asked for them.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final

import click

from nbdmirror.cli.client import ControlClient, run_client
from nbdmirror.cli.follow import Outcome, Report, follow
from nbdmirror.cli.mirror import COPY_MODES, check
from nbdmirror.cli.options import SIZE, TIMED_OUT, qmp_option

_WAIT_STATUS: Final = {Outcome.FAILED: 3, Outcome.CANCELLED: 4, Outcome.MISSING: 5}


@click.command("wait", short_help="Wait until a job is ready or has ended.")
@click.argument("job")
@click.option("--ready", "until", flag_value="ready", help="Until it is READY.")
@click.option("--done", "until", flag_value="done", default="done", help="Until it has ended (the default).")
@click.option("--timeout", type=click.FloatRange(0), metavar="SECONDS", help="Give up after so long, with status 124.")
@qmp_option
def wait(*, job: str, until: str, timeout: float | None, qmp: str) -> int:
    """Wait for JOB. Exit status 0; 3 it failed; 4 it was cancelled; 5 no such job; 124 timed out."""
    wanted = frozenset({Outcome.READY, Outcome.PENDING}) if until == "ready" else frozenset[Outcome]()

    async def work(client: ControlClient) -> Report:
        async with asyncio.timeout(timeout):
            return await follow(client, job, wanted)

    try:
        report = run_client(qmp, work)
    except TimeoutError:
        click.echo(f"nbdmirror: job '{job}' is not {until} after {timeout:g} s", err=True)
        return TIMED_OUT
    status = _WAIT_STATUS.get(report.outcome, 0)
    if status:
        reason = {
            Outcome.FAILED: f"job '{job}' failed: {report.error}",
            Outcome.CANCELLED: f"job '{job}' was cancelled",
        }.get(report.outcome, f"no job '{job}'; 'nbdmirror status' lists those there are")
        click.echo(f"nbdmirror: {reason}", err=True)
    return status


def _verb(command: str, key: str, help_text: str) -> click.Command:
    """A command that is one QMP verb and no more."""

    def callback(*, job: str, qmp: str) -> None:
        run_client(qmp, lambda client: client.execute(command, {key: job}))

    return click.command(command.removeprefix("job-"), short_help=help_text, help=help_text)(
        click.argument("job")(qmp_option(callback))
    )


@click.command("set-speed", short_help="Change a job's rate limit.")
@click.argument("job")
@click.argument("rate", type=SIZE)
@qmp_option
def set_speed(*, job: str, rate: int, qmp: str) -> None:
    """Limit JOB to RATE bytes per second; 0 is no limit."""
    run_client(qmp, lambda client: client.execute("block-job-set-speed", {"device": job, "speed": rate}))


@click.command("set-copy-mode", short_help="Change when a job copies what the guest writes.")
@click.argument("job")
@click.argument("mode", type=click.Choice(COPY_MODES))
@qmp_option
def set_copy_mode(*, job: str, mode: str, qmp: str) -> None:
    """Let JOB copy writes in the background, or make the guest wait until the target has them."""
    arguments = {"id": job, "type": "mirror", "copy-mode": mode}
    run_client(qmp, lambda client: client.execute("block-job-change", arguments))


@click.command("complete", short_help="Let a ready job hand over to its target.")
@click.argument("job")
@click.option("--no-pivot", is_flag=True, help="Leave both disks the same, and the source read-only, instead.")
@click.option("--background", is_flag=True, help="Do not wait for the job's end.")
@qmp_option
def complete(*, job: str, no_pivot: bool, background: bool, qmp: str) -> None:
    """Complete JOB: the exports go on from the target. Waits until that is so."""
    _end(qmp, job, "job-complete", {"id": job, "x-pivot": not no_pivot}, background=background)


@click.command("cancel", short_help="End a job without handing over.")
@click.argument("job")
@click.option("--force", is_flag=True, help="At once, even where that leaves the target unfinished.")
@click.option("--background", is_flag=True, help="Do not wait for the job's end.")
@qmp_option
def cancel(*, job: str, force: bool, background: bool, qmp: str) -> None:
    """End JOB. Once READY, and without --force, the target is left as a consistent copy of this moment."""
    _end(qmp, job, "block-job-cancel", {"device": job, "force": force}, background=background)


def _end(qmp: str, job: str, command: str, arguments: dict[str, Any], *, background: bool) -> None:
    async def work(client: ControlClient) -> None:
        await client.execute(command, arguments)
        if not background:
            report = await follow(client, job, frozenset({Outcome.PENDING, Outcome.STOPPED}))
            if not (report.outcome is Outcome.CANCELLED and command == "block-job-cancel"):
                check(job, report)

    run_client(qmp, work)


COMMANDS: Final = (
    wait,
    _verb("job-pause", "id", "Pause a job: nothing is copied until it is resumed."),
    _verb("job-resume", "id", "Let a paused job go on."),
    complete,
    cancel,
    _verb("job-dismiss", "id", "Forget a job that has concluded."),
    set_speed,
    set_copy_mode,
)
