"""`nbdmirror bitmap`: the dirty bitmaps of a daemon's disks."""

from __future__ import annotations

import shutil
from typing import Any, Final

import click
from rich.console import Console
from rich.table import Table

from nbdmirror.cli.client import ControlClient, run_client
from nbdmirror.cli.nodes import find_node, find_node_name, node_option
from nbdmirror.cli.options import SIZE, json_option, print_json, qmp_option
from nbdmirror.errors import NotFoundError
from nbdmirror.units import format_size

# In the order of how much of a part is dirty: nothing, something, everything.
_MARKS: Final = ".+#"
_EDGES: Final = 2


@click.group("bitmap", short_help="Add, change and look at dirty bitmaps.")
def bitmap() -> None:
    """Dirty bitmaps: which chunks of a disk have been written since the bitmap was made or cleared."""


@bitmap.command("add", short_help="Begin to record writes.")
@click.argument("name")
@click.option("--granularity", type=SIZE, default="64k", show_default=True, help="Bytes per chunk: a power of two from 512.")
@click.option("--persistent", is_flag=True, help="Keep it in the daemon's state directory.")
@click.option("--disabled", is_flag=True, help="Do not record until it is enabled.")
@node_option
@qmp_option
def add(*, name: str, granularity: int, persistent: bool, disabled: bool, node: str | None, qmp: str) -> None:
    """Make the bitmap NAME, which records every write from now on."""

    async def work(client: ControlClient) -> None:
        arguments = {"granularity": granularity, "persistent": persistent, "disabled": disabled}
        await _act(client, "add", node, {"name": name, **arguments})

    run_client(qmp, work)


def _verb(verb: str, help_text: str) -> click.Command:
    """A command that is one QMP command on one bitmap."""

    def callback(*, name: str, node: str | None, qmp: str) -> None:
        run_client(qmp, lambda client: _act(client, verb, node, {"name": name}))

    return click.command(verb, short_help=help_text, help=help_text)(click.argument("name")(node_option(qmp_option(callback))))


for _name, _text in (
    ("remove", "Forget a bitmap."),
    ("clear", "Mark everything in it clean."),
    ("enable", "Let it record writes."),
    ("disable", "Let it record no more."),
):
    bitmap.add_command(_verb(_name, _text))


@bitmap.command("merge", short_help="Mark in one what is marked in others.")
@click.argument("target")
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@click.option("--from-node", metavar="NODE", help="The disk that the sources are of, if it is another.")
@node_option
@qmp_option
def merge(*, target: str, sources: tuple[str, ...], from_node: str | None, node: str | None, qmp: str) -> None:
    """Mark in TARGET what is marked in any SOURCE; granularities may differ, sizes of disks not."""
    named = [{"node": from_node, "name": source} for source in sources] if from_node is not None else list(sources)
    run_client(qmp, lambda client: _act(client, "merge", node, {"target": target, "bitmaps": named}))


async def _act(client: ControlClient, verb: str, node: str | None, arguments: dict[str, Any]) -> None:
    name = await find_node_name(client, node)
    await client.execute(f"block-dirty-bitmap-{verb}", {"node": name, **arguments})


# --- looking ---------------------------------------------------------------------------------------------------------


@bitmap.command("list", short_help="Show all bitmaps.")
@json_option
@click.option("--node", metavar="NODE", help="Only those of this disk.")
@qmp_option
def list_bitmaps(*, as_json: bool, node: str | None, qmp: str) -> None:
    """Show the bitmaps of all disks, newest first."""

    async def work(client: ControlClient) -> list[dict[str, Any]]:
        nodes = [await find_node(client, node)] if node is not None else await client.execute("query-named-block-nodes")
        return bitmaps_of(nodes)

    found = run_client(qmp, work)
    if as_json:
        print_json({"bitmaps": found})
    else:
        Console().print(bitmap_table(found))


def bitmaps_of(nodes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The bitmaps that query-named-block-nodes tells of, each with its node."""
    return [{"node": node["node-name"], **each} for node in nodes for each in node.get("dirty-bitmaps", ())]


def bitmap_table(bitmaps: list[dict[str, Any]]) -> Table:
    """Bitmaps for people."""
    table = Table("bitmap", "node", "dirty", "granularity", "state", title="bitmaps", title_justify="left")
    for info in bitmaps:
        table.add_row(info["name"], info["node"], format_size(info["count"]), format_size(info["granularity"]), _state(info))
    return table


def _state(info: dict[str, Any]) -> str:
    words = ["inconsistent" if info.get("inconsistent") else "recording" if info["recording"] else "disabled"]
    return ", ".join(words + [word for word in ("busy", "persistent") if info[word]])


@bitmap.command("show", short_help="Show where a bitmap is dirty.")
@click.argument("name")
@json_option
@node_option
@qmp_option
def show(*, name: str, as_json: bool, node: str | None, qmp: str) -> None:
    """Show how much of the disk is dirty in NAME, and a map of it. --json has every dirty extent, in bytes."""
    # Two for the bars at its ends; a part of the disk for each other column.
    columns = max(8, min(shutil.get_terminal_size().columns - _EDGES, 1024))

    async def work(client: ControlClient) -> dict[str, Any]:
        info = await _find(client, name, node)
        asked = {"node": info["node"], "name": name}
        if as_json:
            return {**info, **await _extents(client, asked)}
        return {**info, **await client.execute("x-nbdmirror-bitmap-map", {**asked, "parts": columns})}

    found = run_client(qmp, work)
    if as_json:
        print_json(found)
        return
    dirty = sum(found["dirty"])
    grain = format_size(found["granularity"])
    size = format_size(found["size"])
    click.echo(f"bitmap '{name}' of {found['node']}: {_state(found)}")
    click.echo(f"{dirty} of {found['chunks']} chunks of {grain} dirty, {format_size(found['count'])} of {size}")
    click.echo(f"|{draw(found['chunks'], found['dirty'])}|")
    click.echo(f"'{_MARKS[0]}' clean  '{_MARKS[1]}' dirty in part  '{_MARKS[2]}' dirty")


async def _find(client: ControlClient, name: str, node: str | None) -> dict[str, Any]:
    found = await find_node(client, node)
    for info in bitmaps_of([found]):
        if info["name"] == name:
            return info
    raise NotFoundError(f"node '{found['node-name']}' has no bitmap '{name}'; 'nbdmirror bitmap list' shows those there are")


async def _extents(client: ControlClient, asked: dict[str, str]) -> dict[str, Any]:
    extents: list[dict[str, int]] = []
    offset: int | None = 0
    while offset is not None:
        page = await client.execute("x-nbdmirror-bitmap-extents", {**asked, "offset": offset})
        extents += page["extents"]
        offset = page.get("next")
    return {"size": page["size"], "extents": extents}


def draw(chunks: int, dirty: list[int]) -> str:
    """A character for each part of the disk: how many of its chunks are dirty."""
    parts = len(dirty)
    wholes = [chunks * (part + 1) // parts - chunks * part // parts for part in range(parts)]
    return "".join(_MARKS[0 if not count else 2 if count == whole else 1] for count, whole in zip(dirty, wholes, strict=True))


COMMANDS: Final = (bitmap,)
