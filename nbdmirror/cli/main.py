"""The command group, and the one place where an error becomes an exit status.

Rules:
1. What is expected to go wrong is one line on stderr, `nbdmirror: WHAT; WHAT TO DO`. A traceback is shown with -v only; without
   it even a fault of ours is one line that says so.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import TYPE_CHECKING, Final

import click

from nbdmirror.cli.logs import log_options, logging_to_stderr, say_failure
from nbdmirror.cli.options import FAILED, INTERRUPTED, USAGE
from nbdmirror.errors import NbdMirrorError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence


# Where each command lives. Modules are imported when their command is asked for: importing all takes 0.15 s, which is longer
# than many a command takes.
_MODULES: Final = {
    "serve": "serve",
    "copy": "copy",
    "compare": "compare",
    "mirror": "mirror",
    "status": "status",
    "wait": "job",
    "pause": "job",
    "resume": "job",
    "complete": "job",
    "cancel": "job",
    "dismiss": "job",
    "set-speed": "job",
    "set-copy-mode": "job",
    "bitmap": "bitmap",
    "export": "export",
    "qmp": "control",
    "events": "control",
    "demo": "demo",
    "completion": "completion",
    "man": "man",
    "version": "version",
}


class _Commands(click.Group):
    """The commands of _MODULES, in its order."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """See click."""
        return list(_MODULES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """See click."""
        if cmd_name not in _MODULES:
            return None
        module = importlib.import_module(f"nbdmirror.cli.{_MODULES[cmd_name]}")
        commands: tuple[click.Command, ...] = module.COMMANDS
        return next(command for command in commands if command.name == cmd_name)


@click.group(
    cls=_Commands,
    context_settings={"auto_envvar_prefix": "NBDMIRROR", "help_option_names": ["-h", "--help"], "max_content_width": 120},
)
@log_options
def cli() -> None:
    """Serve a disk over NBD and mirror it to another host while it is in use."""


def run(arguments: Sequence[str]) -> int:
    """Run a command line; returns the exit status."""
    with logging_to_stderr():
        return _run(arguments)


def _run(arguments: Sequence[str]) -> int:
    try:
        result = cli.main(args=list(arguments), prog_name="nbdmirror", standalone_mode=False)
    except click.exceptions.Exit as end:
        return end.exit_code
    except click.Abort:
        return INTERRUPTED
    except click.UsageError as error:
        where = error.ctx.command_path if error.ctx is not None else "nbdmirror"
        return _failed(f"{error.format_message()} ('{where} --help' has the usage)", USAGE)
    except click.ClickException as error:
        return _failed(error.format_message(), FAILED)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has gone; leave nothing for the interpreter to flush and complain about.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except NbdMirrorError as error:
        return _failed(str(error), USAGE if isinstance(error, UsageError) else FAILED)
    except OSError as error:
        return _failed(f"{error.filename or 'output'}: {error.strerror}", FAILED)
    except Exception as error:  # a fault of ours, which a user still gets as one line
        fault = f"internal error: {type(error).__name__}: {error}"
        return _failed(f"{fault}; run with -v for details, and please report it", FAILED)
    return result if isinstance(result, int) else 0


def _failed(message: str, status: int) -> int:
    say_failure(message)
    return status
