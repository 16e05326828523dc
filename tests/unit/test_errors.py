from __future__ import annotations

import errno

import pytest

from nbdmirror import errors
from nbdmirror.errors import DeviceError, InactiveError, NbdMirrorError, NotFoundError


@pytest.mark.parametrize(
    "kind",
    [errors.UsageError, errors.ProtocolError, errors.StateError, errors.NotFoundError, errors.InactiveError, DeviceError],
)
def test_one_root_and_no_other_relations(kind: type[Exception]) -> None:
    assert issubclass(kind, NbdMirrorError)
    assert not issubclass(kind, OSError | ValueError)


def test_inactive_is_a_way_of_not_being_found() -> None:
    assert issubclass(InactiveError, NotFoundError)


def test_device_error_says_what_failed_and_why() -> None:
    error = DeviceError(errno.ENOSPC, "write to /dev/sda")
    assert str(error) == "write to /dev/sda: No space left on device"
    assert (error.errno, error.context, error.reason) == (errno.ENOSPC, "write to /dev/sda", "No space left on device")


def test_device_error_without_context() -> None:
    assert str(DeviceError(errno.EPERM)) == "Operation not permitted"


@pytest.mark.parametrize(
    "error",
    [DeviceError(0, "x"), DeviceError.of(OSError("no number"), "x"), DeviceError.of(OSError(0, ""), "x")],
)
def test_device_error_always_has_a_number(error: DeviceError) -> None:
    assert error.errno == errno.EIO


def test_device_error_of_an_os_error() -> None:
    error = DeviceError.of(OSError(errno.EROFS, "whatever"), "open disk.img")
    assert (error.errno, str(error)) == (errno.EROFS, "open disk.img: Read-only file system")
