"""What several commands share: parameter types, common options, exit statuses.

Exit statuses: 0 done, 1 failed, 2 wrong usage or configuration, 124 timed out, 130 and 143 ended by a signal. `wait` and
`compare` have a few of their own, stated there.
"""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from nbdmirror.errors import UsageError
from nbdmirror.units import parse_size

if TYPE_CHECKING:
    from collections.abc import Callable

FAILED: Final = 1
USAGE: Final = 2
TIMED_OUT: Final = 124
INTERRUPTED: Final = 130

F = TypeVar("F", bound="Callable[..., Any]")


class Size(click.ParamType[int]):
    """Bytes, or a number with k, M, G, T or P."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:  # noqa: ANN401
        """See click."""
        if isinstance(value, int):
            return value
        try:
            return parse_size(value)
        except UsageError as error:
            self.fail(str(error), param, ctx)


class Word(click.ParamType[str]):
    """One value of a repeatable option: an environment variable has several of them, quoted as for a shell."""

    name = "text"

    def split_envvar_value(self, rv: str) -> list[str]:
        """See click."""
        try:
            return shlex.split(rv)
        except ValueError as error:
            raise UsageError(f"{rv!r} in an environment variable: {error}; quote its words as for a shell") from None


SIZE: Final = Size()
WORD: Final = Word()

qmp_option = click.option(
    "--qmp",
    "qmp",
    metavar="PATH",
    required=True,
    envvar="NBDMIRROR_QMP",
    help="The daemon's control socket; NBDMIRROR_QMP gives the default.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


def copy_options(command: F) -> F:
    """How to copy: connections, requests, request size, rate."""
    for option in (
        click.option("--speed", type=SIZE, metavar="RATE", default=0, help="At most so many bytes per second (0: no limit)."),
        click.option("--target-is-zero", "--destination-is-zero", is_flag=True, help="The target reads as zeroes everywhere."),
        click.option("--request-size", type=SIZE, default="1M", show_default=True, help="The most data per request."),
        click.option("--requests", type=click.IntRange(1, 1024), default=16, show_default=True, help="Requests in flight."),
        click.option("--connections", type=click.IntRange(1, 16), default=4, show_default=True, help="At most, per server."),
    ):
        command = option(command)
    return command


def print_json(value: object) -> None:
    """One object, on standard output."""
    click.echo(json.dumps(value))
