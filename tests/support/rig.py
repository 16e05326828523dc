"""A mirror job over disks in memory, of which every call can be held: the test says what finishes, when, and how.

rig = Rig(holding_target={"pwrite"})
rig.start()
held = await rig.target.next()      # the job has read its first unit and writes it
...                                 # whatever is to happen meanwhile
held.finish()
await rig.until("BLOCK_JOB_READY")
"""

from __future__ import annotations

import asyncio
import errno
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Literal

from nbdmirror.bitmap.dirty import DirtyBitmap
from nbdmirror.bitmap.named import BitmapSet, NamedBitmap
from nbdmirror.devices.memory import MemoryDevice
from nbdmirror.devices.tracked import TrackedDevice
from nbdmirror.errors import DeviceError
from nbdmirror.mirror import flusher, pace, quiet, transfer
from nbdmirror.mirror.copier import DEFAULT_BUFFER, CopyOptions
from nbdmirror.mirror.job import MirrorJob
from nbdmirror.mirror.options import CopyMode, MirrorOptions
from nbdmirror.mirror.record import Keep, Record
from nbdmirror.mirror.trouble import OnError
from tests.support.fake_link import FakeLink
from tests.support.fakes import GatedDevice, Held, settled

if TYPE_CHECKING:
    from collections.abc import Iterable

    import pytest

    from nbdmirror.extents import ExtentList

# Nothing may hang: each wait has this bound, in seconds, and none comes near it when all is well.
BOUND: Final = 10
CHUNK: Final = 4096
SIZE: Final = 8 * CHUNK


@dataclass(eq=False)
class Call(Held):
    """A call that waits for the test's word, or one that did not have to wait."""

    waits: bool = True

    @property
    def is_held(self) -> bool:
        """Whether it waits still."""
        return self.waits and not self._word.done()


class HeldDisk(GatedDevice):
    """A disk that holds the calls named in `holding`, reads and block status among them, and fails those in `broken`.

    A read that is held returns what was there when it arrived: the oldest that a disk may return. A write that fails has
    written half of what it was to write: nothing may be taken for granted of it. What a flush makes durable is `durable`.
    """

    def __init__(self, size: int = SIZE, *, holding: Iterable[str] = (), name: str = "held") -> None:
        super().__init__(size, name=name)
        self.holding = set(holding)
        self.broken: dict[str, DeviceError] = {}
        self.calls: list[Call] = []  # type: ignore[assignment]  # each is a Held
        self.durable = bytes(size)
        # The most that one answer of `extents` covers.
        self.status_limit = size or 1

    def with_blocks(self, minimum: int) -> HeldDisk:
        """The same, with blocks of `minimum` bytes."""
        self.limits = replace(self.limits, minimum=minimum)
        return self

    async def _hold(self, name: str, offset: int, length: int, flags: int = 0) -> None:
        call = Call(name, offset, length, flags, waits=name in self.holding and name not in self.broken)
        self.calls.append(call)
        if name in self.broken:
            raise self.broken[name]
        if call.waits:
            self._arrived.put_nowait(call)
            await call.wait()

    def pread_now(self, buffer: bytearray | memoryview, offset: int) -> bool:
        return False

    async def pread(self, buffer: bytearray | memoryview, offset: int) -> None:
        before = bytes(self.data[offset : offset + len(buffer)])
        await self._hold("pread", offset, len(buffer))
        buffer[:] = before

    async def pwrite(self, data: bytes | bytearray | memoryview, offset: int, flags: int = 0) -> None:
        try:
            await self._hold("pwrite", offset, len(data), flags)
        except DeviceError:
            MemoryDevice.pwrite_now(self, bytes(data)[: len(data) // 2 or 1], offset)
            raise
        MemoryDevice.pwrite_now(self, data, offset)

    async def extents(self, offset: int, length: int) -> ExtentList:
        before = await MemoryDevice.extents(self, offset, min(length, self.status_limit))
        await self._hold("extents", offset, length)
        return before

    async def flush(self) -> None:
        before = bytes(self.data)
        await super().flush()
        self.durable = before

    def named(self, name: str) -> list[Call]:
        """The calls of this name so far."""
        return [held for held in self.calls if held.name == name]


def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the job leaves to time passes at once; it asks for block status however short a run is, and holds no guest back."""
    for name, value in {"GATHER_SECONDS": 0, "RELEASE_SECONDS": 0, "LET_GO_SECONDS": 0, "CLOSE_IN_SECONDS": -1}.items():
        monkeypatch.setattr(pace, name, value)
    monkeypatch.setattr(transfer, "_WORTH_ASKING", 0)
    monkeypatch.setattr(quiet, "_ABANDON_SECONDS", 0.01)
    monkeypatch.setattr(flusher, "_LAST_SECONDS", 0.01)


def eio(context: str = "held") -> DeviceError:
    return DeviceError(errno.EIO, context)


class Rig:
    """Source, target and the job between them."""

    def __init__(
        self,
        size: int = SIZE,
        *,
        data: bytes = b"",
        holding_source: Iterable[str] = (),
        holding_target: Iterable[str] = (),
        target_size: int | None = None,
        sync: Literal["full", "none"] = "full",
        granularity: int = CHUNK,
        requests: int = 4,
        request_size: int = CHUNK,
        buffer: int = DEFAULT_BUFFER,
        speed: int = 0,
        auto_finalize: bool = True,
        auto_dismiss: bool = True,
        flush: bool = True,
        target_is_zero: bool = False,
        on_source_error: OnError = OnError.REPORT,
        on_target_error: OnError = OnError.REPORT,
        copy_mode: CopyMode = CopyMode.BACKGROUND,
        pending_seconds: float | None = None,
        keep: Keep | None = None,
        marked: Iterable[int] = (),
        linked: bool = False,
        reconnect_seconds: float | None = None,
    ) -> None:
        self.source = HeldDisk(size, holding=holding_source, name="source")
        self.target = HeldDisk(size if target_size is None else target_size, holding=holding_target, name="target")
        if data:
            MemoryDevice.pwrite_now(self.source, data, 0)
        self.link = FakeLink(self.target)
        self.device = TrackedDevice(self.source)
        self.bitmaps = BitmapSet(self.device.writes_in_flight)
        self.device.observe(self.bitmaps)
        self.bitmap = NamedBitmap("b", DirtyBitmap(size, granularity))
        self.bitmaps.add(self.bitmap)
        for chunk in marked:
            self.bitmap.bits.add_chunks(chunk, chunk + 1)
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.pivots = self.seals = 0
        self.ended = False
        self._changed = asyncio.Event()
        self.job = MirrorJob(
            "j",
            self.device,
            TrackedDevice(self.target),
            self.emit,
            pivot=self.pivot,
            seal=self.seal,
            options=MirrorOptions(
                sync=sync,
                granularity=granularity,
                target_is_zero=target_is_zero,
                flush=flush,
                copy_mode=copy_mode,
                pending_seconds=pending_seconds,
                reconnect_seconds=reconnect_seconds,
                on_source_error=on_source_error,
                on_target_error=on_target_error,
                copy=CopyOptions(request_size=request_size, requests=requests, buffer=buffer),
            ),
            link=self.link if linked else None,
            record=None if keep is None else Record(self.bitmap, keep),
            speed=speed,
            auto_finalize=auto_finalize,
            auto_dismiss=auto_dismiss,
        )
        self.job.on_end = self._on_end

    def start(self) -> None:
        self.job.start()

    def emit(self, event: str, data: dict[str, Any]) -> None:
        self.events.append((event, data))
        self._changed.set()

    def pivot(self) -> None:
        """As the inventory does it."""
        assert self.device.is_drained
        self.pivots += 1
        self.device.replace_below(self.target)
        self.device.forget(self.bitmaps)

    def seal(self) -> None:
        assert self.device.is_drained
        self.seals += 1

    def _on_end(self, _job: object) -> None:
        self.ended = True

    @property
    def words(self) -> list[str]:
        """The events so far: statuses by their names, others by theirs."""
        return [data["status"] if event == "JOB_STATUS_CHANGE" else event for event, data in self.events]

    def of(self, event: str) -> dict[str, Any]:
        """The data of the last event of a name."""
        return [data for name, data in self.events if name == event][-1]

    async def until(self, word: str, count: int = 1) -> None:
        """Wait for the `count`th event of a word."""
        async with asyncio.timeout(BOUND):
            while self.words.count(word) < count:
                self._changed.clear()
                await self._changed.wait()

    async def ready(self) -> None:
        self.start()
        await self.until("BLOCK_JOB_READY")

    async def release(self) -> None:
        """Hold nothing any more, and finish what is held: a disk that did not answer wakes up."""
        for disk in (self.source, self.target):
            disk.holding.clear()
            for held in disk.calls:
                if held.is_held:
                    held.finish()
        await settled()

    def differing(self) -> set[int]:
        """The chunks in which the disks differ."""
        size = self.job.state.dirty.granularity
        source, target = self.source.data, self.target.data[: len(self.source.data)]
        return {at // size for at in range(0, len(source), size) if source[at : at + size] != target[at : at + size]}

    def dirty(self) -> set[int]:
        """The chunks that the job has marked."""
        return _chunks(self.job.state.dirty)

    def recorded(self) -> set[int]:
        """The chunks that the named bitmap has marked."""
        return _chunks(self.bitmap.bits)


def _chunks(bits: DirtyBitmap) -> set[int]:
    return {chunk for chunk in range(bits.chunks) if bits.is_dirty(chunk)}
