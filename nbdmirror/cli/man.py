"""`nbdmirror man`: the manual pages, made from the commands themselves, so that they say what --help says.

Rules:
1. What could be a request or an escape of roff is escaped; a hyphen that a reader may copy is a minus.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from nbdmirror import __version__

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_EXIT: Final = (
    ("0", "done"),
    ("1", "failed; one line on standard error says what, and what to do"),
    ("2", "wrong usage or configuration"),
    ("124", "timed out"),
    ("130, 143", "ended by a signal"),
)


@click.command("man", short_help="Write the manual pages.")
@click.argument("directory", type=click.Path(file_okay=False, path_type=Path))
@click.pass_context
def man(context: click.Context, *, directory: Path) -> None:
    """Write the manual pages into DIRECTORY, as man1/nbdmirror.1 and one for each command."""
    section = directory / "man1"
    section.mkdir(parents=True, exist_ok=True)
    for each in _walk(context.find_root()):
        (section / f"{_title(each)}.1").write_text("\n".join(_page(each)) + "\n")


def _walk(context: click.Context) -> Iterator[click.Context]:
    """A command and all below it."""
    yield context
    for each in _below(context):
        yield from _walk(each)


def _below(context: click.Context) -> list[click.Context]:
    group = context.command
    if not isinstance(group, click.Group):
        return []
    found = [(name, group.get_command(context, name)) for name in group.list_commands(context)]
    return [click.Context(command, parent=context, info_name=name) for name, command in found if command is not None]


def _title(context: click.Context) -> str:
    return context.command_path.replace(" ", "-")


def _page(context: click.Context) -> Iterator[str]:
    command, below = context.command, _below(context)
    help_text = command.help or ""
    about = command.short_help or help_text.partition("\n")[0]
    yield f'.TH "{_text(_title(context).upper())}" 1 "" "nbdmirror {_text(__version__)}" "nbdmirror"'
    yield from (".SH NAME", f"{_text(_title(context))} \\- {_text(about.rstrip('.'))}")
    yield from (".SH SYNOPSIS", f".B {_text(context.command_path)}", _text(" ".join(command.collect_usage_pieces(context))))
    yield from (".SH DESCRIPTION", *_paragraphs(help_text))
    options = [each.get_help_record(context) for each in command.get_params(context) if isinstance(each, click.Option)]
    yield from _table("OPTIONS", [record for record in options if record is not None])
    if below:
        yield from _table("COMMANDS", [(str(each.info_name), each.command.get_short_help_str(200)) for each in below])
    yield from _table("EXIT STATUS", _EXIT)
    others = below or ([context.parent] if context.parent is not None else [])
    yield from (".SH SEE ALSO", ",\n".join(f".BR {_text(_title(each))} (1)" for each in others))


def _table(title: str, rows: Iterable[tuple[str, str]]) -> Iterator[str]:
    yield f".SH {title}"
    for name, meaning in rows:
        yield from (".TP", f".B {_text(name)}", _text(re.sub(r"\s+", " ", meaning)))


def _paragraphs(text: str) -> Iterator[str]:
    for number, paragraph in enumerate(re.split(r"\n\s*\n", text.strip())):
        if number:
            yield ".PP"
        yield _text(re.sub(r"\s+", " ", paragraph.replace("\b", "")).strip())


def _text(text: str) -> str:
    """Text as roff takes it."""
    escaped = text.replace("\\", "\\e").replace("-", "\\-").replace("'", "\\(aq").replace("`", "\\(ga").replace("^", "\\(ha")
    escaped = escaped.replace("~", "\\(ti").replace('"', "\\(dq")
    return "\\&" + escaped if escaped.startswith(".") else escaped


COMMANDS: Final = (man,)
