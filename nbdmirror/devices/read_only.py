"""ReadOnlyDevice: a disk that takes no more writes, whatever its users were told when they came."""

from __future__ import annotations

import errno
from dataclasses import replace
from typing import TYPE_CHECKING, NoReturn

from nbdmirror.devices.base import BlockDevice
from nbdmirror.errors import DeviceError

if TYPE_CHECKING:
    from nbdmirror.extents import ExtentList


class ReadOnlyDevice(BlockDevice):
    """`below`, of which every write fails with EPERM."""

    def __init__(self, below: BlockDevice) -> None:
        self.below = below
        self.name, self.size = below.name, below.size
        self.limits, self.capabilities = below.limits, replace(below.capabilities, read_only=True)
        self.pread_now = below.pread_now  # type: ignore[method-assign]  # one call less in the hot path

    def _refuse(self) -> NoReturn:
        raise DeviceError(errno.EPERM, f"'{self.name}' takes no more writes")

    def pwrite_now(self, data: bytes | bytearray | memoryview, offset: int) -> bool:  # noqa: ARG002
        """See BlockDevice."""
        self._refuse()

    async def pread(self, buffer: bytearray | memoryview, offset: int) -> None:
        """See BlockDevice."""
        await self.below.pread(buffer, offset)

    async def pwrite(self, data: bytes | bytearray | memoryview, offset: int, flags: int = 0) -> None:  # noqa: ARG002
        """See BlockDevice."""
        self._refuse()

    async def zero(self, offset: int, length: int, flags: int = 0) -> None:  # noqa: ARG002
        """See BlockDevice."""
        self._refuse()

    async def trim(self, offset: int, length: int, flags: int = 0) -> None:  # noqa: ARG002
        """See BlockDevice."""
        self._refuse()

    async def flush(self) -> None:
        """See BlockDevice; what was written before still has to become durable."""
        await self.below.flush()

    async def cache(self, offset: int, length: int) -> None:
        """See BlockDevice."""
        await self.below.cache(offset, length)

    async def extents(self, offset: int, length: int) -> ExtentList:
        """See BlockDevice."""
        return await self.below.extents(offset, length)

    async def aclose(self) -> None:
        """See BlockDevice."""
        await self.below.aclose()
