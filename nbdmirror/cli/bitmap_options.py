"""What `serve` says of bitmaps, and of what is to outlive the daemon: four options that become one StateOptions."""

from __future__ import annotations

from functools import wraps
from typing import TYPE_CHECKING, Final

import click

from nbdmirror.bitmap.image import Sync
from nbdmirror.bitmap.named import MAX_NAME
from nbdmirror.bitmap.store import OnInconsistent
from nbdmirror.cli.options import WORD
from nbdmirror.errors import UsageError
from nbdmirror.state import BitmapRequest, StateOptions
from nbdmirror.units import GiB, parse_size

if TYPE_CHECKING:
    from collections.abc import Callable

_LEAST: Final = 512
_MOST: Final = 2 * GiB

_OPTIONS: Final = (
    click.option("--state-dir", metavar="DIR", help="Where persistent bitmaps live; without it nothing outlives the daemon."),
    click.option(
        "-B",
        "--bitmap",
        type=WORD,
        multiple=True,
        metavar="NAME[:GRANULARITY]",
        help="A bitmap of what is written, loaded or made, shown as qemu:dirty-bitmap:NAME; repeatable.  [default: 64k]",
    ),
    click.option(
        "--bitmap-sync",
        type=click.Choice([mode.value for mode in Sync]),
        default=Sync.LAZY.value,
        show_default=True,
        help="When bitmaps are made durable: at the end; with every flush, too; or before the disk changes.",
    ),
    click.option(
        "--on-inconsistent",
        type=click.Choice([policy.value for policy in OnInconsistent]),
        default=OnInconsistent.FAIL.value,
        show_default=True,
        help="What to do with a bitmap that may lack changes after a crash of the host.",
    ),
)


def state_options(command: Callable[..., int]) -> Callable[..., int]:
    """Add the options; the command gets `state`."""

    @wraps(command)
    def with_state(
        *, state_dir: str | None, bitmap: tuple[str, ...], bitmap_sync: str, on_inconsistent: str, **rest: object
    ) -> int:
        requests = tuple(map(parse_request, bitmap))
        names = [request.name for request in requests]
        if len(set(names)) < len(names):
            raise UsageError("-B names a bitmap twice; once is enough")
        state = StateOptions(state_dir, requests, Sync(bitmap_sync), OnInconsistent(on_inconsistent))
        return command(state=state, **rest)

    for option in reversed(_OPTIONS):
        with_state = option(with_state)
    return with_state


def parse_request(text: str) -> BitmapRequest:
    """`NAME` or `NAME:GRANULARITY`; what is behind the last colon is the granularity. Raises UsageError."""
    name, colon, size = text.rpartition(":")
    if not colon:
        name, size = text, ""
    try:
        length = len(name.encode())
    except UnicodeEncodeError:
        raise UsageError("the name of a bitmap has to be UTF-8") from None
    if not 0 < length <= MAX_NAME:
        raise UsageError(f"-B '{text[:64]}': the name of a bitmap has 1 to {MAX_NAME} bytes")
    if not colon:
        return BitmapRequest(name)
    granularity = parse_size(size)
    if not _LEAST <= granularity <= _MOST or granularity & (granularity - 1):
        raise UsageError(f"-B '{text}': the granularity is a power of two from {_LEAST} to 2G")
    return BitmapRequest(name, granularity)
