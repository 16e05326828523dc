"""transaction: all or nothing, at one point in time."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.support.fakes import settled
from tests.unit.commands.bitmap_rig import CHUNK, BitmapRig


def action(verb: str, **data: Any) -> dict[str, Any]:
    return {"type": f"block-dirty-bitmap-{verb}", "data": {"node": "a", **data}}


ABORT = {"type": "abort", "data": {}}


async def prepared() -> BitmapRig:
    rig = BitmapRig()
    for name in ("old", "on", "off", "new"):
        await rig.bitmap("add", name, disabled=name == "off", persistent=name == "old")
    rig.mark("on", 1, 2)
    rig.mark("off", 2, 3)
    rig.mark("old", 9)
    return rig


# Each action, and the ways in which taking it back could forget a flag, bits or a place.
ACTIONS = {
    "add": [action("add", name="x")],
    "add persistent": [action("add", name="x", persistent=True)],
    "remove": [action("remove", name="on")],
    "remove persistent": [action("remove", name="old")],
    "clear": [action("clear", name="on")],
    "enable": [action("enable", name="off")],
    "enable what is on": [action("enable", name="on")],
    "disable": [action("disable", name="on")],
    "disable what is off": [action("disable", name="off")],
    "merge": [action("merge", target="on", bitmaps=["off", {"node": "a", "name": "old"}])],
    "merge with itself": [action("merge", target="on", bitmaps=["on"])],
    "all at once": [
        action("add", name="x"),
        action("merge", target="x", bitmaps=["on", "off"]),
        action("clear", name="on"),
        action("disable", name="on"),
        action("enable", name="off"),
        action("remove", name="old"),
        action("add", name="old", granularity=512),
        action("remove", name="x"),
    ],
}


@pytest.mark.parametrize("actions", ACTIONS.values(), ids=ACTIONS)
async def test_failure_takes_everything_back(actions: list[Any]) -> None:
    rig = await prepared()
    before, kept = rig.state(), list(rig.shelf.kept)
    rig.shelf.settled.clear()
    desc = await rig.refused("transaction", actions=[*actions, ABORT])
    assert desc == "Transaction aborted using Abort action"
    assert (rig.state(), rig.shelf.kept, rig.shelf.settled) == (before, kept, [])
    # And what records, records on.
    writing = asyncio.create_task(rig.inventory.nodes["a"].device.pwrite(b"x", 20 * CHUNK))
    (await rig.disks["a"].next()).finish()
    await writing
    recorded = {name: 20 in rig.chunks(name) for name in ("old", "on", "off", "new")}
    assert recorded == {"old": True, "on": True, "off": False, "new": True}


@pytest.mark.parametrize("actions", ACTIONS.values(), ids=ACTIONS)
async def test_success_keeps_everything(actions: list[Any]) -> None:
    together, alone = await prepared(), await prepared()
    await together.ask("transaction", actions=actions)
    for each in actions:
        await alone.ask(each["type"], **each["data"])
    assert together.state() == alone.state()
    assert together.shelf.kept == alone.shelf.kept


async def test_nothing_is_a_success() -> None:
    rig = await prepared()
    before = rig.state()
    await rig.ask("transaction", actions=[])
    assert rig.state() == before


async def test_later_actions_see_earlier_ones() -> None:
    rig = await prepared()
    desc = await rig.refused("transaction", actions=[action("remove", name="on"), action("clear", name="on")])
    assert desc == "Dirty bitmap 'on' not found"
    await rig.ask("transaction", actions=[action("add", name="x"), action("merge", target="x", bitmaps=["on"])])
    assert rig.chunks("x") == [1, 2]


@pytest.mark.parametrize("verb", ["add", "remove", "clear", "enable", "disable", "merge"])
async def test_grouped_completion_is_refused(verb: str) -> None:
    rig = await prepared()
    data: dict[str, Any] = {"target": "on", "bitmaps": ["off"]} if verb == "merge" else {"name": "x" if verb == "add" else "on"}
    grouped = {"completion-mode": "grouped"}
    before = rig.state()
    desc = await rig.refused("transaction", actions=[action(verb, **data)], properties=grouped)
    assert desc == f"Action 'block-dirty-bitmap-{verb}' does not support Transaction property completion-mode = grouped"
    assert rig.state() == before
    desc = await rig.refused("transaction", actions=[ABORT], properties=grouped)
    assert desc == "Transaction aborted using Abort action"


async def test_persistent_bitmap_is_forgotten_at_the_commit_alone() -> None:
    rig = await prepared()
    await rig.refused("transaction", actions=[action("remove", name="old"), ABORT])
    assert rig.shelf.kept == ["old"]
    await rig.ask("transaction", actions=[action("remove", name="old")])
    assert rig.shelf.kept == []


async def test_disks_are_drained_first() -> None:
    """A write in flight is on one side of a rotation, not on both, and none begins while it is waited for."""
    rig = BitmapRig()
    for node in ("a", "b"):
        await rig.bitmap("add", "old", node=node)
    devices = [rig.inventory.nodes[node].device for node in ("a", "b")]
    first = asyncio.create_task(devices[1].pwrite(b"x", 0))
    held = await rig.disks["b"].next()
    rotation = asyncio.create_task(
        rig.ask(
            "transaction",
            actions=[
                {"type": f"block-dirty-bitmap-{verb}", "data": {"node": node, "name": name}}
                for node in ("a", "b")
                for verb, name in (("add", "new"), ("disable", "old"))
            ],
        )
    )
    await settled()
    later = [asyncio.create_task(device.pwrite(b"x", CHUNK)) for device in devices]
    await settled()
    assert not rotation.done()
    assert rig.chunks("old", "b") == [0]
    held.finish()
    await rotation
    for disk in ("a", "b"):
        (await rig.disks[disk].next()).finish()
    await asyncio.gather(first, *later)
    assert [rig.chunks(name, node) for node in ("a", "b") for name in ("old", "new")] == [[], [1], [0], [1]]


async def test_rollback_lets_writes_go_on() -> None:
    rig = await prepared()
    await rig.refused("transaction", actions=[action("clear", name="on"), ABORT])
    assert not rig.inventory.nodes["a"].device.is_drained
