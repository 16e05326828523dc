"""What an export can be told to be beside its disk: with one client only, without depths, durable at once."""

from __future__ import annotations

import asyncio

import pytest

from nbdmirror.protocol import constants as c
from nbdmirror.protocol.messages import DONE, Opened, Request
from nbdmirror.server.buffers import BufferPool
from nbdmirror.server.export import Export, OpenExport
from tests.support.fakes import GatedDevice

SIZE = 4096


def test_several_connections_are_promised_unless_there_can_be_one() -> None:
    disk = GatedDevice(SIZE)
    assert Export("", disk).info().flags & c.TFLAG_CAN_MULTI_CONN
    assert not Export("", disk, multi_conn=False).info().flags & c.TFLAG_CAN_MULTI_CONN


def test_depths_are_offered_unless_told_not_to() -> None:
    disk = GatedDevice(SIZE)
    assert c.ALLOCATION_DEPTH in Export("", disk).info().contexts
    assert c.ALLOCATION_DEPTH not in Export("", disk, allocation_depth=False).info().contexts


@pytest.mark.parametrize("command", [c.CMD_WRITE, c.CMD_TRIM, c.CMD_WRITE_ZEROES])
async def test_writethrough_makes_every_write_durable(command: int) -> None:
    disk = GatedDevice(SIZE, writes_now=True)
    export = Export("", disk, writethrough=True)
    opened = OpenExport(export, Opened(export.info(), structured=True), BufferPool())
    payload = memoryview(bytes(512)) if command == c.CMD_WRITE else None
    request = Request(command, 0, 1, 0, 512, payload)
    assert opened.serve_now(request) is None
    serving = asyncio.create_task(opened.serve(request))
    held = await disk.next()
    assert held.flags == c.FUA
    held.finish()
    assert await serving is DONE
