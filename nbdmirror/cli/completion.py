"""`nbdmirror completion`: what a shell runs to complete commands and options."""

from __future__ import annotations

from typing import Final

import click
from click.shell_completion import BashComplete, FishComplete, ShellComplete, ZshComplete

_SHELLS: Final[dict[str, type[ShellComplete]]] = {"bash": BashComplete, "zsh": ZshComplete, "fish": FishComplete}


@click.command("completion", short_help="Print a shell's completion script.")
@click.argument("shell", type=click.Choice(tuple(_SHELLS)))
@click.pass_context
def completion(context: click.Context, *, shell: str) -> None:
    """Print the script that lets SHELL complete commands and options.

    bash: eval "$(nbdmirror completion bash)"; zsh: the same, with zsh; fish: nbdmirror completion fish | source
    """
    script = _SHELLS[shell](context.find_root().command, {}, "nbdmirror", "_NBDMIRROR_COMPLETE")
    click.echo(script.source_template % script.source_vars())


COMMANDS: Final = (completion,)
