"""The command group, and the one place where an error becomes an exit status.

Rules:
1. What is expected to go wrong is one line on stderr, `nbdmirror: WHAT; WHAT TO DO`. A traceback is shown with -v only; without
   it even a fault of ours is one line that says so.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from typing import TYPE_CHECKING

import click

from nbdmirror import __version__
from nbdmirror.cli import compare, control, copy, demo, job, mirror, serve, status
from nbdmirror.cli.options import FAILED, INTERRUPTED, USAGE
from nbdmirror.errors import NbdMirrorError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence


@click.group(
    context_settings={"auto_envvar_prefix": "NBDMIRROR", "help_option_names": ["-h", "--help"], "max_content_width": 120}
)
@click.option("-v", "--verbose", count=True, help="Log more; twice for debugging. Shows tracebacks.")
@click.option("-q", "--quiet", is_flag=True, help="Log errors only.")
@click.version_option(__version__, "-V", "--version", prog_name="nbdmirror", message="%(prog)s %(version)s")
def cli(verbose: int, quiet: bool) -> None:  # noqa: FBT001
    """Serve a disk over NBD and mirror it to another host while it is in use."""
    level = logging.ERROR if quiet else (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    logging.basicConfig(level=level, format="nbdmirror: %(message)s", stream=sys.stderr)


@cli.command("version")
def version() -> None:
    """Print the version."""
    click.echo(f"nbdmirror {__version__}")


for _module in (serve, copy, compare, mirror, status, job, control, demo):
    for _command in _module.COMMANDS:
        cli.add_command(_command)


def run(arguments: Sequence[str]) -> int:
    """Run a command line; returns the exit status."""
    try:
        result = cli.main(args=list(arguments), prog_name="nbdmirror", standalone_mode=False)
    except click.exceptions.Exit as end:
        return end.exit_code
    except click.Abort:
        return INTERRUPTED
    except click.ClickException as error:
        error.show()
        return USAGE if isinstance(error, click.UsageError) else FAILED
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has gone; leave nothing for the interpreter to flush and complain about.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except NbdMirrorError as error:
        return _failed(str(error), USAGE if isinstance(error, UsageError) else FAILED)
    except Exception as error:  # a fault of ours, which a user still gets as one line
        fault = f"internal error: {type(error).__name__}: {error}"
        return _failed(f"{fault}; run with -v for details, and please report it", FAILED)
    return result if isinstance(result, int) else 0


def _failed(message: str, status: int) -> int:
    if logging.getLogger().isEnabledFor(logging.INFO):
        traceback.print_exc()
    click.echo(f"nbdmirror: {message}", err=True)
    return status
