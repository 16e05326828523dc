"""`nbdmirror export`: exports beside the one that the daemon was started with, on an NBD server of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import click
from rich.console import Console
from rich.table import Table

from nbdmirror.cli.client import ControlClient, run_client
from nbdmirror.cli.nodes import find_node_name, node_option
from nbdmirror.cli.options import json_option, print_json, qmp_option
from nbdmirror.errors import StateError, UsageError


@click.group("export", short_help="Add, remove and list exports.")
def export() -> None:
    """Exports that are made while the daemon runs. They are served by an NBD server of their own, apart from serve's export."""


@export.command("add", short_help="Offer a disk, also read-only, or with bitmaps.")
@click.argument("name")
@click.option("--id", "export_id", metavar="ID", help="What to call it on the control socket; by default NAME.")
@click.option("-w", "--writable", is_flag=True, help="Let clients write.")
@click.option("-B", "--bitmap", "bitmaps", multiple=True, metavar="NAME", help="Show this dirty bitmap to clients; repeatable.")
@click.option("-D", "--description", default="", metavar="TEXT", help="For people who list the exports.")
@click.option("-k", "--socket", "path", metavar="PATH", help="Start the NBD server on this Unix socket, if none runs.")
@click.option("-p", "--port", type=click.IntRange(0, 65535), help="Start it on this TCP port, if none runs.")
@click.option("-b", "--bind", default="127.0.0.1", show_default=True, metavar="ADDR", help="With -p: the address to listen on.")
@click.option("--tls-creds", metavar="ID", help="With -k or -p: TLS with these credentials, made by object-add.")
@json_option
@node_option
@qmp_option
def add(
    *,
    name: str,
    export_id: str | None,
    writable: bool,
    bitmaps: tuple[str, ...],
    description: str,
    path: str | None,
    port: int | None,
    bind: str,
    tls_creds: str | None,
    as_json: bool,
    node: str | None,
    qmp: str,
) -> None:
    """Offer a disk under NAME, and print its URI. Bitmaps are shown as qemu:dirty-bitmap:NAME; meanwhile they are busy."""
    start = _start_arguments(path, port, bind, tls_creds)

    async def work(client: ControlClient) -> dict[str, Any]:
        arguments = {"type": "nbd", "id": name if export_id is None else export_id, "name": name}
        arguments["node-name"] = await find_node_name(client, node)
        if not (await client.execute("x-nbdmirror-query-nbd-server"))["running"]:
            if start is None:
                raise StateError("no NBD server runs; start one with -k PATH or -p PORT")
            await client.execute("nbd-server-start", start)
        given = {"writable": writable, "bitmaps": list(bitmaps), "description": description}
        await client.execute("block-export-add", {**arguments, **given})
        return next(each for each in await client.execute("query-block-exports") if each["id"] == arguments["id"])

    made = run_client(qmp, work)
    if as_json:
        print_json(made)
    else:
        click.echo(made["x-uri"])


def _start_arguments(path: str | None, port: int | None, bind: str, tls_creds: str | None) -> dict[str, Any] | None:
    """What nbd-server-start takes, where the user says where to listen."""
    if path is not None and port is not None:
        raise UsageError("-k and -p exclude each other")
    if path is not None:
        # The daemon may stand in another directory.
        addr: dict[str, Any] = {"type": "unix", "data": {"path": str(Path(path).absolute())}}
    elif port is not None:
        addr = {"type": "inet", "data": {"host": bind, "port": str(port)}}
    elif tls_creds is not None:
        raise UsageError("--tls-creds goes with -k or -p: TLS belongs to the server")
    else:
        return None
    return {"addr": addr} if tls_creds is None else {"addr": addr, "tls-creds": tls_creds}


@export.command("remove", short_help="Take an export away.")
@click.argument("export_id", metavar="ID")
@click.option("--force", is_flag=True, help="Disconnect its clients.")
@qmp_option
def remove(*, export_id: str, force: bool, qmp: str) -> None:
    """End the export ID, which nobody may be using. Waits until nothing of it is in flight any more."""

    async def work(client: ControlClient) -> None:
        await client.execute("block-export-del", {"id": export_id, "mode": "hard" if force else "safe"})
        events = client.events()
        while any(each["id"] == export_id for each in await client.execute("query-block-exports")):
            await anext(events)

    run_client(qmp, work)


@export.command("stop", short_help="Stop the NBD server, with all exports that were added.")
@qmp_option
def stop(*, qmp: str) -> None:
    """Stop the NBD server. Its exports end; the one of serve stays."""
    run_client(qmp, lambda client: client.execute("nbd-server-stop"))


@export.command("list", short_help="Show all exports.")
@json_option
@qmp_option
def list_exports(*, as_json: bool, qmp: str) -> None:
    """Show all exports, newest first, with where they can be reached."""
    found = run_client(qmp, lambda client: client.execute("query-block-exports"))
    if as_json:
        print_json({"exports": found})
        return
    table = Table("id", "node", "clients", "mode", "bitmaps", title="exports", title_justify="left")
    table.add_column("URI", overflow="fold")  # to be pasted, so whole
    for each in found:
        mode = "shutting down" if each["shutting-down"] else "read-only" if each["x-read-only"] else "read-write"
        bitmaps = ", ".join(each["x-bitmaps"])
        table.add_row(each["id"], each["node-name"], str(each["x-clients"]), mode, bitmaps, each["x-uri"])
    Console().print(table)


COMMANDS: Final = (export,)
