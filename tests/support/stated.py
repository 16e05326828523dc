"""A disk and its bitmaps in a state directory, as the daemon sets them up, without a daemon."""

from __future__ import annotations

from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from nbdmirror.bitmap.image import STATE_OFFSET, State
from nbdmirror.devices.file import FileDevice
from nbdmirror.errors import StateError
from nbdmirror.inventory import Node
from nbdmirror.state import BitmapRequest, BitmapStores, StateOptions, set_up_bitmaps
from nbdmirror.units import MiB

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

SIZE = 10 * MiB + 700
OTHER_BOOT = b"x" * 16


@asynccontextmanager
async def served(disk: Path, state: Path, *names: str, read_only: bool = False, **options: Any) -> AsyncIterator[Node]:
    """A disk with its bitmaps; afterwards all is closed in order."""
    async with AsyncExitStack() as stack:
        node = Node("source", "file", FileDevice.open(disk, read_only=read_only))
        stack.push_async_callback(node.disk.aclose)
        asked = StateOptions(str(state), tuple(map(BitmapRequest, names)), **options)
        stores = await set_up_bitmaps(stack, node, asked)
        assert stores is not None
        _STORES[id(node)] = stores
        yield node
        del _STORES[id(node)]


_STORES: dict[int, BitmapStores] = {}


def stores_of(node: Node) -> BitmapStores:
    """What keeps the bitmaps of a disk that is `served`."""
    return _STORES[id(node)]


def files(state: Path) -> list[Path]:
    return sorted((state / "bitmaps").iterdir())


def runs(node: Node, name: str) -> list[tuple[int, int]]:
    bitmap = node.bitmaps.get(name)
    assert bitmap is not None
    return list(bitmap.bits.runs())


def change_state(path: Path, **changes: Any) -> None:
    with path.open("r+b") as file:
        file.seek(STATE_OFFSET)
        changed = replace(State.decode(file.read(512)), **changes)
        file.seek(STATE_OFFSET)
        file.write(changed.encode())


def everything(path: Path) -> dict[str, tuple[bytes, int]]:
    return {str(each): (each.read_bytes(), each.stat().st_ino) for each in path.rglob("*.nbm") if each.is_file()}


async def refusal(disk: Path, state: Path, *names: str, **options: Any) -> str:
    """Why a disk is not served; nothing has changed then."""
    before = everything(state)
    with pytest.raises(StateError) as caught:
        async with served(disk, state, *names, **options):
            pass
    assert everything(state) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)
