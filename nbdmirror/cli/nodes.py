"""Which node a command is about, where the user does not say."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import click

from nbdmirror.errors import NotFoundError, UsageError

if TYPE_CHECKING:
    from nbdmirror.cli.client import ControlClient

# What `serve` calls its disk by default.
_DEFAULT: Final = "source"

node_option = click.option("--node", metavar="NODE", help="Of which disk; by default the only one, or 'source'.")


async def find_node(client: ControlClient, name: str | None) -> dict[str, Any]:
    """A node as query-named-block-nodes has it; raises NotFoundError, and UsageError where it is not clear which is meant."""
    nodes: dict[str, dict[str, Any]] = {node["node-name"]: node for node in await client.execute("query-named-block-nodes")}
    known = ", ".join(sorted(nodes))
    if name is not None:
        if name not in nodes:
            raise NotFoundError(f"no node '{name}'; there is {known}")
        return nodes[name]
    if len(nodes) == 1:
        return next(iter(nodes.values()))
    if _DEFAULT not in nodes:
        raise UsageError(f"there are several disks; choose one with --node: {known}")
    return nodes[_DEFAULT]


async def find_node_name(client: ControlClient, name: str | None) -> str:
    """The name of that node; one that was given is left to the daemon to judge."""
    return name if name is not None else str((await find_node(client, None))["node-name"])
