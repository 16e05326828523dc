"""BlockDevice: what every disk can do, in one vocabulary from the wire to the platter.

Rules:
1. `(offset, length)` in bytes, in this order, everywhere. The caller has checked the range: 0 <= offset, 0 < length and
   offset + length <= size, aligned to `limits.minimum`. Devices do not check again.
2. A method raises DeviceError and nothing else when the disk fails; after a failed write the range's content is unknown.
3. `*_now` answer at once or not at all: True means done, False means "this could block, use the coroutine", and
   nothing was promised of the buffer or the range. They may raise DeviceError.
4. Buffers belong to the caller, who leaves them alone until the call has returned. `pread` fills the whole buffer.
5. Write flags are the NBD command flags (`protocol.constants`): FUA (durable before it returns), NO_HOLE (stay
   allocated), FAST_ZERO (fail at once with ENOTSUP where zeroing is no faster than writing).
6. `flush` makes durable every write that had returned when it was called.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from nbdmirror.extents import ExtentList
from nbdmirror.protocol.constants import DEFAULT_MAX_PAYLOAD


@dataclass(frozen=True, slots=True)
class Limits:
    """Block sizes in bytes (NBD protocol, "Block sizes"): alignment, best request, most payload per read or write.

    `maximum_zero` bounds one zero, trim or extents call.
    """

    minimum: int = 1
    preferred: int = 4096
    maximum: int = DEFAULT_MAX_PAYLOAD
    maximum_zero: int = 2**32 - 1


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a disk offers beyond reading and writing. A device that lacks one may raise ENOTSUP when it is used."""

    read_only: bool = False
    flush: bool = True
    fua: bool = True
    trim: bool = True
    zero: bool = True
    fast_zero: bool = True
    cache: bool = True
    extents: bool = True
    rotational: bool = False
    multi_conn: bool = True


class BlockDevice(ABC):
    """A disk of `size` bytes. `name` is for messages: a path or URI."""

    name: str
    size: int
    limits: Limits
    capabilities: Capabilities

    def pread_now(self, buffer: bytearray | memoryview, offset: int) -> bool:  # noqa: ARG002
        """Fill `buffer` from `offset` if that can't block."""
        return False

    def pwrite_now(self, data: bytes | bytearray | memoryview, offset: int) -> bool:  # noqa: ARG002
        """Write `data` at `offset` if that can't block for long; never durable by itself."""
        return False

    @abstractmethod
    async def pread(self, buffer: bytearray | memoryview, offset: int) -> None:
        """Fill `buffer` from `offset`."""

    @abstractmethod
    async def pwrite(self, data: bytes | bytearray | memoryview, offset: int, flags: int = 0) -> None:
        """Write all of `data` at `offset`; flags: FUA."""

    @abstractmethod
    async def zero(self, offset: int, length: int, flags: int = 0) -> None:
        """Make the range read as zeroes, as a hole where that is possible; flags: FUA, NO_HOLE, FAST_ZERO."""

    @abstractmethod
    async def trim(self, offset: int, length: int, flags: int = 0) -> None:
        """The content is no longer wanted; afterwards it is undefined until written again. Flags: FUA."""

    @abstractmethod
    async def flush(self) -> None:
        """Make durable what has been written so far."""

    async def cache(self, offset: int, length: int) -> None:  # noqa: B027  a hint may be ignored
        """A hint that the range will be read soon."""

    async def extents(self, offset: int, length: int) -> ExtentList:
        """Block status of the range; at least its first byte is covered. All data where nothing better is known."""
        return ExtentList.all_data(offset, length)

    def abandoned(self, offset: int, length: int) -> None:  # noqa: B027  only who tells observers has anything to do
        """A write of the range was announced and never came whole: it has changed nothing."""

    @property
    def is_away(self) -> bool:
        """Whether what it is made of can't be reached just now, so that requests wait."""
        return False

    def identity(self) -> str:
        """What tells this disk from others, after a restart, too (`devices.identity`)."""
        return self.name

    async def lock(self) -> None:  # noqa: B027  some have nothing to lock
        """Keep other daemons off this disk while it is open, as far as that is possible; raises StateError."""

    @abstractmethod
    async def aclose(self) -> None:
        """Release everything; idempotent. Nothing is flushed: who wants that asks for it."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name} {self.size} bytes>"
