"""What an export says of itself, and how it says that its disk has failed."""

from __future__ import annotations

import errno
from dataclasses import replace

import pytest

from nbdmirror.devices.base import Limits
from nbdmirror.devices.memory import MemoryDevice
from nbdmirror.errors import DeviceError
from nbdmirror.protocol import constants as c
from nbdmirror.server.export import Export, refusal_from
from nbdmirror.units import MiB

READ_ONLY = (
    c.TFLAG_HAS_FLAGS
    | c.TFLAG_READ_ONLY
    | c.TFLAG_SEND_FLUSH
    | c.TFLAG_SEND_FUA
    | c.TFLAG_SEND_DF
    | c.TFLAG_CAN_MULTI_CONN
    | c.TFLAG_SEND_CACHE
)
WRITES = c.TFLAG_SEND_TRIM | c.TFLAG_SEND_WRITE_ZEROES | c.TFLAG_SEND_FAST_ZERO


def device(*, read_only: bool = False, rotational: bool = False) -> MemoryDevice:
    made = MemoryDevice(MiB)
    made.capabilities = replace(made.capabilities, read_only=read_only, rotational=rotational)
    return made


def test_a_writable_export_offers_what_there_is_and_nothing_else() -> None:
    """Neither RESIZE (bit 9) nor BLOCK_STATUS_PAYLOAD (bit 12), nor any bit that has no meaning yet."""
    assert Export("", device()).info().flags == READ_ONLY & ~c.TFLAG_READ_ONLY | WRITES


@pytest.mark.parametrize("export", [Export("", device(read_only=True)), Export("", device(), read_only=True)])
def test_a_read_only_export_offers_no_writes_of_any_kind(export: Export) -> None:
    assert export.info().flags == READ_ONLY


def test_a_rotational_disk_is_said_to_be_one() -> None:
    assert Export("", device(rotational=True), read_only=True).info().flags == READ_ONLY | c.TFLAG_ROTATIONAL


@pytest.mark.parametrize(("minimum", "preferred"), [(1, 1), (512, 512), (4096, 4096), (65536, 4096), (1, MiB)])
def test_block_sizes_are_what_the_protocol_allows(minimum: int, preferred: int) -> None:
    made = device()
    made.limits = Limits(minimum=minimum, preferred=preferred)
    info = Export("", made).info()
    assert info.minimum_block == minimum
    assert info.preferred_block == max(minimum, preferred, 512)
    assert info.maximum_payload == 64 * MiB


@pytest.mark.parametrize(
    ("number", "wire"),
    [
        (errno.EPERM, c.EPERM),
        (errno.EROFS, c.EPERM),
        (errno.EACCES, c.EPERM),
        (errno.ENOSPC, c.ENOSPC),
        (errno.EDQUOT, c.ENOSPC),
        (errno.EFBIG, c.ENOSPC),
        (errno.EINVAL, c.EINVAL),
        (errno.ENOMEM, c.ENOMEM),
        (errno.EOVERFLOW, c.EOVERFLOW),
        (errno.ENOTSUP, c.ENOTSUP),
        (errno.ESHUTDOWN, c.ESHUTDOWN),
        (errno.EIO, c.EIO),
        (errno.ENOTCONN, c.EIO),
        (errno.ENODEV, c.EIO),
        (0, c.EIO),
    ],
)
def test_errors_that_may_travel(number: int, wire: int) -> None:
    refusal = refusal_from(DeviceError(number, "writing x"))
    assert refusal.error == wire
    assert "writing x" in refusal.message
