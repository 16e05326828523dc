"""What a command says on stderr: how much of it, and in whose form.

    stderr    nbdmirror: MESSAGE
    journal   <PRIORITY>nbdmirror: MESSAGE, every line of it, as journald reads it; the default where stderr is its stream
    json      {"time": RFC 3339, "level": ..., "logger": ..., "message": ...}, one object a line

Rules:
1. The options of this module may stand before the command or behind it, and mean the same; the later --log wins.
2. Log lines and the line that a failure ends with have the same form.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

import click

from nbdmirror import __version__

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nbdmirror.cli.options import F

_LEVELS: Final = (logging.WARNING, logging.INFO, logging.DEBUG)
# syslog(3): err, warning, info, debug.
_PRIORITIES: Final = {logging.ERROR: 3, logging.WARNING: 4, logging.INFO: 6, logging.DEBUG: 7}
_META: Final = "nbdmirror.logs"


class _Plain(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("nbdmirror: %(message)s")


class _Journal(_Plain):
    def format(self, record: logging.LogRecord) -> str:
        priority = _PRIORITIES.get(record.levelno, 3)
        return "\n".join(f"<{priority}>{line}" for line in super().format(record).splitlines())


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        said: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            said["traceback"] = self.formatException(record.exc_info)
        return json.dumps(said)


_FORMATS: Final[dict[str, type[logging.Formatter]]] = {"stderr": _Plain, "journal": _Journal, "json": _Json}


class _Stderr(logging.Handler):
    """Whatever stderr is at the time."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            click.echo(self.format(record), err=True)
        except Exception:  # as logging's own handlers: what can't be said is no reason to fail
            self.handleError(record)


def log_options(command: F) -> F:
    """-v, -q, --log and -V."""
    for option in (
        click.version_option(__version__, "-V", "--version", prog_name="nbdmirror", message="%(prog)s %(version)s"),
        click.option("--log", type=click.Choice(tuple(_FORMATS)), expose_value=False, callback=_note,
                     help="The form of what is said on stderr.  [default: journal where stderr is the journal, else stderr]"),
        click.option("-q", "--quiet", is_flag=True, expose_value=False, callback=_note, help="Log errors only."),
        click.option("-v", "--verbose", count=True, expose_value=False, callback=_note,
                     help="Log more; twice for debugging. Shows tracebacks."),
    ):  # fmt: skip
        command = option(command)
    return command


def _note(context: click.Context, param: click.Parameter, value: Any) -> None:  # noqa: ANN401
    """Take down one option, and log as all of them so far want it."""
    noted: dict[str, Any] = context.find_root().meta.setdefault(_META, {"verbose": 0, "quiet": False, "log": None})
    assert param.name is not None, "options have names"
    if param.name == "verbose":
        noted["verbose"] += value
    elif value:
        noted[param.name] = value
    _set_up(logging.ERROR if noted["quiet"] else _LEVELS[min(noted["verbose"], 2)], noted["log"])


def level_was_given(context: click.Context) -> bool:
    """Whether -v or -q says how much is logged."""
    noted: dict[str, Any] = context.find_root().meta[_META]
    return bool(noted["verbose"]) or noted["quiet"]


@contextmanager
def logging_to_stderr() -> Iterator[None]:
    """Log as the options say, while the context lasts; warnings and errors until there are any."""
    root = logging.getLogger()
    before, handler = root.level, _Stderr()
    root.addHandler(handler)
    try:
        _set_up(logging.WARNING, None)
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(before)


def _set_up(level: int, form: str | None) -> None:
    logging.getLogger().setLevel(level)
    if form is None:
        form = "journal" if _stderr_is_the_journal() else "stderr"
    _handler().setFormatter(_FORMATS[form]())


def _handler() -> _Stderr:
    return next(handler for handler in logging.getLogger().handlers if isinstance(handler, _Stderr))


def _stderr_is_the_journal() -> bool:
    """Whether what JOURNAL_STREAM, "DEVICE:INODE", says of a stream is true of our stderr (systemd.exec(5))."""
    try:
        status = os.fstat(2)
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def say_failure(message: str) -> None:
    """The line that a failed command ends with, however quiet it was to be, and with -v a traceback before it."""
    root, handler = logging.getLogger(), _handler()
    if root.isEnabledFor(logging.INFO):
        handler.handle(root.makeRecord("nbdmirror", logging.INFO, "", 0, "where it failed:", (), sys.exc_info()))
    handler.handle(root.makeRecord("nbdmirror", logging.ERROR, "", 0, message, (), None))
