"""`nbdmirror version`."""

from __future__ import annotations

from typing import Final

import click

from nbdmirror import __version__


@click.command("version", short_help="Print the version.")
def version() -> None:
    """Print the version."""
    click.echo(f"nbdmirror {__version__}")


COMMANDS: Final = (version,)
