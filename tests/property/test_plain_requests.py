"""What the short cut of the hot path takes for sound, `refusal_of` does, too, and the answers are the same."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from hypothesis import given, settings
from hypothesis import strategies as st

from nbdmirror.devices.base import Limits
from nbdmirror.devices.memory import MemoryDevice
from nbdmirror.protocol import constants as c
from nbdmirror.protocol.messages import Opened, Refusal, Request
from nbdmirror.protocol.transmission import refusal_of
from nbdmirror.server.budget import LARGE
from nbdmirror.server.buffers import BufferPool
from nbdmirror.server.export import Export, OpenExport

SIZE: Final = 3 * LARGE + 1536
# Around every bound: nothing, a byte, a block, what is large, the end of the disk, more than the numbers have bits.
around: Final = st.sampled_from([0, 512, 4096, LARGE, SIZE - 1536, SIZE, 2**32, 2**64 - 2])
numbers: Final = st.builds(lambda base, by: max(0, min(base + by, 2**64 - 1)), around, st.integers(-2, 2) | st.just(512))


@settings(max_examples=500, deadline=None)
@given(
    st.sampled_from([c.CMD_READ, c.CMD_WRITE, c.CMD_DISC, c.CMD_FLUSH, c.CMD_TRIM, c.CMD_WRITE_ZEROES, 8, 2**16 - 1]),
    st.sampled_from([0, c.FUA, c.DF, c.FUA | c.DF, c.NO_HOLE, 1 << 15]),
    numbers,
    numbers,
    st.sampled_from([1, 512, 4096]),
    st.booleans(),
    st.booleans(),
)
def test_the_short_cut_lets_nothing_pass(
    command: int, flags: int, offset: int, length: int, minimum: int, read_only: bool, structured: bool
) -> None:
    device = MemoryDevice(SIZE)
    device.limits = Limits(minimum=minimum)
    device.capabilities = replace(device.capabilities, read_only=read_only)
    export = Export("", device)
    opened = Opened(export.info(), structured)
    payload = memoryview(bytes(length)) if command == c.CMD_WRITE and length <= 4 * LARGE else None
    request = Request(command, flags, 1, offset, length, payload)
    expected = refusal_of(request, opened.info, structured=structured)
    answer = OpenExport(export, opened, BufferPool()).serve_now(request)
    assert (answer if isinstance(answer, Refusal) else None) == expected
    if answer is not None and expected is None:
        assert length <= LARGE
        assert command in (c.CMD_READ, c.CMD_WRITE)
        assert command == c.CMD_READ or not flags
