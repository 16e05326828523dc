"""block-dirty-bitmap-*: what each does, what it refuses, and writes that are in flight meanwhile."""

from __future__ import annotations

import asyncio

import pytest

from nbdmirror.commands.bitmap_actions import AddAction, BitmapActions, BitmapAdd
from nbdmirror.errors import StateError
from nbdmirror.inventory import Inventory, Node
from tests.support.fakes import GatedDevice
from tests.unit.commands.bitmap_rig import CHUNK, SIZE, BitmapRig


async def test_new_bitmap_records_and_is_told_of_newest_first() -> None:
    rig = BitmapRig()
    await rig.bitmap("add", "first")
    await rig.bitmap("add", "second", granularity=512, disabled=True)
    assert [info for info, _ in rig.state()["a"]] == [
        {"name": "second", "recording": False, "persistent": False, "busy": False, "granularity": 512, "count": 0},
        {"name": "first", "recording": True, "persistent": False, "busy": False, "granularity": 65536, "count": 0},
    ]


@pytest.mark.parametrize(
    ("arguments", "desc"),
    [
        ({"node": "zz", "name": "x"}, "Cannot find device='zz' nor node-name='zz'"),
        ({"node": "a", "name": ""}, "Bitmap name cannot be empty"),
        ({"node": "a", "name": "", "granularity": 3}, "Bitmap name cannot be empty"),
        ({"node": "a", "name": "there", "granularity": 3}, "Granularity must be power of 2 and at least 512"),
        ({"node": "a", "name": "x", "granularity": 0}, "Granularity must be power of 2 and at least 512"),
        ({"node": "a", "name": "x" * 1024, "granularity": 256}, "Granularity must be power of 2 and at least 512"),
        ({"node": "a", "name": "x" * 1024}, "Bitmap name too long: " + "x" * 1024),
        ({"node": "a", "name": "there"}, "Bitmap already exists: there"),
        ({"node": "a", "name": "there", "persistent": True}, "Bitmap already exists: there"),
        (
            {"node": "a", "name": "there", "persistent": True, "granularity": 3},
            "Granularity must be power of 2 and at least 512",
        ),
    ],
    ids=lambda value: str(value)[:60],
)
async def test_add_refuses(arguments: dict[str, object], desc: str) -> None:
    rig = BitmapRig()
    await rig.bitmap("add", "there")
    before = rig.state()
    assert await rig.refused("block-dirty-bitmap-add", **arguments) == desc
    assert rig.state() == before


async def test_persistent_needs_a_state_directory() -> None:
    inventory = Inventory()
    inventory.add_node(Node("a", "file", GatedDevice(SIZE)))
    actions = BitmapActions(inventory)
    remedy = "the daemon has no state directory; start it with --state-dir"
    with pytest.raises(StateError, match=f"^Can't store persistent bitmaps to a: {remedy}$"):
        await actions.carry_out([AddAction("block-dirty-bitmap-add", BitmapAdd("a", "b", persistent=True))])
    assert list(inventory.nodes["a"].bitmaps) == []


async def test_persistent_bitmap_is_kept_until_removed() -> None:
    rig = BitmapRig()
    await rig.bitmap("add", "p", persistent=True)
    await rig.bitmap("add", "q")
    assert rig.shelf.kept == ["p"]
    for verb in ("clear", "disable", "enable"):
        rig.shelf.settled.clear()
        await rig.bitmap(verb, "p")
        assert rig.shelf.settled == ["p"]
    await rig.bitmap("remove", "p")
    await rig.bitmap("remove", "q")
    assert rig.shelf.kept == []


async def test_keeper_that_fails_is_the_answer() -> None:
    rig = BitmapRig()
    await rig.bitmap("add", "p", persistent=True)
    await rig.bitmap("add", "q")
    before = rig.state()
    rig.shelf.broken = "create"
    assert await rig.refused("block-dirty-bitmap-add", node="a", name="r", persistent=True) == "the shelf is broken"
    rig.shelf.broken = "remove"
    assert await rig.refused("block-dirty-bitmap-remove", node="a", name="p") == "the shelf is broken"
    assert (rig.state(), rig.shelf.kept) == (before, ["p"])


async def test_commands_do_not_come_between_each_other() -> None:
    """While the file of one bitmap is being made, nobody else changes any."""
    rig = BitmapRig()
    first = asyncio.create_task(rig.bitmap("add", "same", persistent=True))
    second = asyncio.create_task(rig.refused("block-dirty-bitmap-add", node="a", name="same"))
    await first
    assert await second == "Bitmap already exists: same"
    assert rig.shelf.kept == ["same"]


async def test_all_of_a_transaction_is_committed_even_if_some_of_it_does_not_last() -> None:
    rig = BitmapRig()
    for name in ("p", "q"):
        await rig.bitmap("add", name, persistent=True)
    rig.shelf.broken = "settle"
    actions = [
        {"type": f"block-dirty-bitmap-{verb}", "data": {"node": "a", "name": name}}
        for verb, name in (("clear", "p"), ("disable", "q"))
    ]
    assert await rig.refused("transaction", actions=actions) == "the shelf is broken"
    assert not rig.inventory.bitmap("a", "q")[1].recording


@pytest.mark.parametrize("loses", ["clear", "remove"])
async def test_what_was_merged_lasts_before_its_source_is_lost(loses: str) -> None:
    rig = BitmapRig()
    for name in ("p", "q"):
        await rig.bitmap("add", name, persistent=True)
    rig.inventory.bitmap("a", "p")[1].bits.add(0, 1)
    merge = {"type": "block-dirty-bitmap-merge", "data": {"node": "a", "target": "q", "bitmaps": ["p"]}}
    actions = [merge, {"type": f"block-dirty-bitmap-{loses}", "data": {"node": "a", "name": "p"}}]
    before = rig.state()
    rig.shelf.broken = "settle"
    assert await rig.refused("transaction", actions=actions) == "the shelf is broken"
    assert (rig.state(), rig.shelf.kept) == (before, ["p", "q"])
    rig.shelf.broken = ""
    rig.shelf.settled.clear()
    await rig.ask("transaction", actions=actions)
    assert rig.shelf.settled[0] == "q"


async def test_more_bits_than_there_is_memory() -> None:
    rig = BitmapRig()
    rig.inventory.nodes["a"].device.size = 2**63 - 1
    desc = await rig.refused("block-dirty-bitmap-add", node="a", name="b", granularity=512)
    assert desc == "There is not enough memory for 18014398509481983 chunks of 512 bytes; choose larger ones"
    assert rig.state()["a"] == []


@pytest.mark.parametrize("granularity", [512, 65536, 2**31])
async def test_extremes_of_granularity(granularity: int) -> None:
    rig = BitmapRig()
    await rig.bitmap("add", "b", granularity=granularity)
    rig.inventory.bitmap("a", "b")[1].bits.add(SIZE - 1, 1)
    ((info, _),) = rig.state()["a"]
    assert info["count"] == granularity  # the last chunk counts as a whole, even past the end


IN_USE = "Bitmap 'b' is currently in use by another operation and cannot be used"
READ_ONLY = "Bitmap 'b' is readonly and cannot be modified"
INCONSISTENT = "Bitmap 'b' is inconsistent and cannot be used"
VERBS = ("remove", "clear", "enable", "disable", "merge into", "merge from")


@pytest.mark.parametrize(
    ("state", "refused"),
    [
        ("idle", {}),
        ("busy", dict.fromkeys(VERBS, IN_USE)),
        ("read_only", dict.fromkeys(("remove", "clear", "merge into"), READ_ONLY)),
        ("inconsistent", dict.fromkeys(("enable", "disable", "merge into", "merge from"), INCONSISTENT)),
    ],
)
@pytest.mark.parametrize("verb", VERBS)
async def test_what_a_state_forbids(state: str, refused: dict[str, str], verb: str) -> None:
    rig = BitmapRig()
    await rig.bitmap("add", "b")
    await rig.bitmap("add", "other")
    bitmap = rig.inventory.bitmap("a", "b")[1]
    bitmap.users += ["export e"] if state == "busy" else []
    bitmap.read_only = state == "read_only"
    bitmap.inconsistent = state == "inconsistent"
    match verb:
        case "merge into":
            command = {"node": "a", "target": "b", "bitmaps": ["other"]}
        case "merge from":
            command = {"node": "a", "target": "other", "bitmaps": ["b"]}
        case _:
            command = {"node": "a", "name": "b"}
    name = f"block-dirty-bitmap-{verb.partition(' ')[0]}"
    if verb in refused:
        before = rig.state()
        assert await rig.refused(name, **command) == refused[verb]
        assert rig.state() == before
    else:
        await rig.ask(name, **command)


async def test_enable_and_disable_may_be_repeated() -> None:
    rig = BitmapRig()
    await rig.bitmap("add", "b")
    for verb, recording in (("enable", True), ("disable", False), ("disable", False), ("enable", True), ("enable", True)):
        await rig.bitmap(verb, "b")
        assert rig.state()["a"][0][0]["recording"] is recording


async def test_merge_takes_names_and_pairs_and_leaves_the_sources() -> None:
    rig = BitmapRig()
    for name in ("t", "x"):
        await rig.bitmap("add", name)
    await rig.bitmap("add", "x", node="b")
    rig.mark("t", 1)
    rig.mark("x", 2)
    rig.mark("x", 3, node="b")
    sources = ["x", {"node": "b", "name": "x"}, "t", "x"]
    await rig.ask("block-dirty-bitmap-merge", node="a", target="t", bitmaps=sources)
    assert (rig.chunks("t"), rig.chunks("x"), rig.chunks("x", "b")) == ([1, 2, 3], [2], [3])


async def test_merge_of_nothing_changes_nothing() -> None:
    rig = BitmapRig()
    await rig.bitmap("add", "t")
    rig.mark("t", 1)
    await rig.ask("block-dirty-bitmap-merge", node="a", target="t", bitmaps=[])
    assert rig.chunks("t") == [1]
    desc = await rig.refused("block-dirty-bitmap-merge", node="a", target="zz", bitmaps=[])
    assert desc == "Dirty bitmap 'zz' not found"


@pytest.mark.parametrize(
    ("last", "desc"),
    [
        ("zz", "Dirty bitmap 'zz' not found"),
        ({"node": "zz", "name": "x"}, "Node 'zz' not found"),
        (
            {"node": "elsewhere", "name": "s"},
            f"Bitmaps are of different sizes (destination size is {SIZE}, source size is {SIZE // 2}) and can't be merged",
        ),
    ],
)
async def test_failed_merge_leaves_the_target(last: object, desc: str) -> None:
    rig = BitmapRig()
    for name in ("t", "x"):
        await rig.bitmap("add", name)
    await rig.bitmap("add", "s", node="elsewhere")
    rig.mark("x", 2)
    assert await rig.refused("block-dirty-bitmap-merge", node="a", target="t", bitmaps=["x", last]) == desc
    assert rig.chunks("t") == []


@pytest.mark.parametrize("verb", ["clear", "add", "enable"])
async def test_write_in_flight_is_not_lost(verb: str) -> None:
    """A write that has begun when a bitmap is cleared, or begins to record, may land afterwards: it counts."""
    rig = BitmapRig()
    if verb != "add":
        await rig.bitmap("add", "b", disabled=verb == "enable")
    writing = asyncio.create_task(rig.inventory.nodes["a"].device.pwrite(b"x" * 2 * CHUNK, 3 * CHUNK))
    held = await rig.disks["a"].next()
    await rig.bitmap(verb, "b")
    assert rig.chunks("b") == [3, 4]
    held.finish()
    await writing
    assert rig.chunks("b") == [3, 4]


async def test_write_that_begins_after_a_disable_is_not_recorded() -> None:
    rig = BitmapRig()
    await rig.bitmap("add", "b")
    device = rig.inventory.nodes["a"].device
    before = asyncio.create_task(device.pwrite(b"x", 0))
    first = await rig.disks["a"].next()
    await rig.bitmap("disable", "b")
    after = asyncio.create_task(device.pwrite(b"x", CHUNK))
    for held in (first, await rig.disks["a"].next()):
        held.finish()
    await asyncio.gather(before, after)
    assert rig.chunks("b") == [0]


async def test_extents_are_told_in_pages() -> None:
    rig = BitmapRig()
    await rig.bitmap("add", "b")
    rig.mark("b", 0, 1, 5, 63)
    page = await rig.ask("x-nbdmirror-bitmap-extents", node="a", name="b", most=2)
    assert page == {
        "size": SIZE,
        "granularity": CHUNK,
        "extents": [{"offset": 0, "length": 2 * CHUNK}, {"offset": 5 * CHUNK, "length": CHUNK}],
        "next": 6 * CHUNK,
    }
    page = await rig.ask("x-nbdmirror-bitmap-extents", node="a", name="b", offset=page["next"])
    assert page["extents"] == [{"offset": 63 * CHUNK, "length": CHUNK}]
    assert "next" not in page
    assert "beyond the end" in await rig.refused("x-nbdmirror-bitmap-extents", node="a", name="b", offset=SIZE + 1)


async def test_map_counts_by_parts() -> None:
    rig = BitmapRig()
    await rig.bitmap("add", "b")
    rig.mark("b", 0, 1, 63)
    assert await rig.ask("x-nbdmirror-bitmap-map", node="a", name="b", parts=2) == {
        "size": SIZE,
        "granularity": CHUNK,
        "chunks": 64,
        "dirty": [2, 1],
    }
    assert "at most" in await rig.refused("x-nbdmirror-bitmap-map", node="a", name="b", parts=100_000)
