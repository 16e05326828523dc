"""`nbdmirror status`: jobs, exports and bitmaps of a running daemon, as a table, as JSON, or followed."""

from __future__ import annotations

import asyncio
from typing import Any, Final

import click
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from nbdmirror.cli.bitmap import bitmap_table, bitmaps_of
from nbdmirror.cli.client import ControlClient, run_client
from nbdmirror.cli.options import json_option, print_json, qmp_option
from nbdmirror.errors import InactiveError
from nbdmirror.units import format_size

_WATCH_SECONDS: Final = 1.0


@click.command("status", short_help="Show jobs, exports and bitmaps.")
@click.argument("job", required=False)
@click.option("--watch", is_flag=True, help="Follow until interrupted.")
@json_option
@qmp_option
def status(*, job: str | None, watch: bool, as_json: bool, qmp: str) -> None:
    """Show the daemon's jobs, exports and bitmaps; with JOB only that job of the jobs."""
    if watch and as_json:
        raise click.UsageError("--watch and --json exclude each other")
    if watch:
        run_client(qmp, lambda client: _watch(client, job))
        return
    found = run_client(qmp, lambda client: _ask(client, job))
    if as_json:
        print_json(found)
    else:
        Console().print(_tables(found))


async def _ask(client: ControlClient, job: str | None) -> dict[str, Any]:
    jobs = await client.execute("query-block-jobs")
    history = await client.execute("x-nbdmirror-query-job-history")
    if job is not None:
        jobs = [info for info in jobs if info["device"] == job]
        history = [info for info in history if info["device"] == job][-1:] if not jobs else []
        if not jobs and not history:
            raise InactiveError(f"no job '{job}'; 'nbdmirror status' lists those there are")
    return {
        "jobs": jobs,
        "history": history,
        "exports": await client.execute("query-block-exports"),
        "nodes": await client.execute("query-named-block-nodes"),
    }


async def _watch(client: ControlClient, job: str | None) -> None:
    with Live(console=Console()) as live:
        while True:
            live.update(_tables(await _ask(client, job)))
            await asyncio.sleep(_WATCH_SECONDS)


def _tables(found: dict[str, Any]) -> Group:
    tables = [_jobs([*found["history"], *found["jobs"]]), _exports(found["exports"], found["nodes"])]
    bitmaps = bitmaps_of(found["nodes"])
    return Group(*tables, bitmap_table(bitmaps)) if bitmaps else Group(*tables)


def _jobs(jobs: list[dict[str, Any]]) -> Table:
    table = Table("job", "type", "status", "done", "copied", "zeroed", "left", "error", title="jobs", title_justify="left")
    for info in jobs:
        left = info["len"] - info["offset"]
        percent = f"{info['offset'] * 100 // info['len']} %" if info["len"] else "-"
        state = "cancelled" if info["x-cancelled"] else "failed" if "error" in info else info["status"]
        table.add_row(
            info["device"],
            info["type"],
            "completed" if state == "null" else state,
            percent,
            format_size(info.get("x-bytes-sent", 0)),
            format_size(info.get("x-bytes-zeroed", 0) + info.get("x-bytes-skipped", 0)),
            format_size(left),
            info.get("x-error-detail", ""),
        )
    return table


def _exports(exports: list[dict[str, Any]], nodes: list[dict[str, Any]]) -> Table:
    table = Table("export", "node", "disk", "size", "clients", "mode", title="exports", title_justify="left")
    by_name = {node["node-name"]: node for node in nodes}
    for export in exports:
        node = by_name.get(export["node-name"])
        table.add_row(
            repr(export["x-name"]),
            export["node-name"],
            node["file"] if node else "",
            format_size(node["image"]["virtual-size"]) if node else "",
            str(export["x-clients"]),
            "read-only" if export["x-read-only"] else "read-write",
        )
    return table


COMMANDS: Final = (status,)
