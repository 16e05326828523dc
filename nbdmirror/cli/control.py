"""`nbdmirror qmp` and `nbdmirror events`: the control socket as it is, for scripts."""

from __future__ import annotations

import json
from typing import Any, Final

import click

from nbdmirror.cli.client import ControlClient, run_client
from nbdmirror.cli.options import print_json, qmp_option
from nbdmirror.errors import UsageError


@click.command("qmp", short_help="Send any command, print the answer as JSON.")
@click.argument("command")
@click.argument("arguments", required=False, metavar="[JSON]")
@qmp_option
def qmp_command(*, command: str, arguments: str | None, qmp: str) -> None:
    """Send COMMAND with the arguments of a JSON object, and print what it returns."""
    parsed = _object(arguments) if arguments is not None else {}
    print_json(run_client(qmp, lambda client: client.execute(command, parsed)))


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        example = '{"id": "mirror0"}'
        raise UsageError(f"the arguments are not JSON ({error}): write an object such as '{example}'") from None
    if not isinstance(value, dict):
        raise UsageError(f"the arguments are not a JSON object: {text}")
    return value


@click.command("events", short_help="Print events as they come.")
@qmp_option
def events(*, qmp: str) -> None:
    """Print every event as a line of JSON, until interrupted."""

    async def work(client: ControlClient) -> None:
        async for event in client.events():
            print_json(event)

    run_client(qmp, work)


COMMANDS: Final = (qmp_command, events)
