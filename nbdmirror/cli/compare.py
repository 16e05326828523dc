"""`nbdmirror compare`: whether two disks hold the same bytes. Exit status 0 the same, 1 different, 2 trouble."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import Final

import click
import uvloop

from nbdmirror.cli.copy import BracketCommand, Endpoint, endpoint
from nbdmirror.cli.options import USAGE, json_option, print_json
from nbdmirror.devices.open import open_device
from nbdmirror.errors import NbdMirrorError
from nbdmirror.mirror.compare import Comparison
from nbdmirror.mirror.compare import compare as compare_disks

DIFFERENT: Final = 1


@click.command("compare", cls=BracketCommand, short_help="Compare two disks byte for byte.")
@click.argument("a", callback=endpoint)
@click.argument("b", callback=endpoint)
@json_option
def compare(*, a: Endpoint, b: Endpoint, as_json: bool) -> int:
    """Compare A and B: each a path, an NBD URI, or [ COMMAND ... ] for a server that is started for it.

    Exit status 0 if they are the same, 1 if not, 2 on trouble.
    """
    try:
        result = uvloop.run(_compare(a, b))
    except NbdMirrorError as error:
        click.echo(f"nbdmirror: {error}", err=True)
        return USAGE
    same = result.first is None
    if as_json:
        print_json({"same": same, "first": result.first, "differing": result.differing, "compared": result.compared})
    elif not same:
        click.echo(f"different: first at offset {result.first}, {result.differing} bytes in total")
    return 0 if same else DIFFERENT


async def _compare(a: Endpoint, b: Endpoint) -> Comparison:
    async with AsyncExitStack() as stack:
        disks = []
        for end in (a, b):
            disk = await open_device(end, read_only=True)
            stack.push_async_callback(disk.aclose)
            disks.append(disk)
        return await compare_disks(disks[0], disks[1])


COMMANDS: Final = (compare,)
