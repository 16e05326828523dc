"""Named bitmaps: dirty bitmaps with a name and flags, and the set of them that a disk has.

Rules (QEMU's, bitmaps of the block layer):
1. A bitmap that records has every write since it began to: it is marked when the write begins, before the disk changes.
2. A write that is in flight when a bitmap starts to record, or is cleared, counts as one that comes after: it is marked again.
3. What is busy is changed and removed by nobody but its users; what is read-only or inconsistent is not changed. Reads and
   exports of what is inconsistent are refused, too; it can only be removed, or cleared: then it goes on as it was meant to.
4. Checked is in the order busy, read-only, inconsistent.
5. The bits of a bitmap are one object for its whole life: who was given them (an export, a job) sees every change.
6. Who keeps a persistent bitmap hears, through `on_change`, of every change but those of its bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from nbdmirror.errors import StateError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from bitarray import bitarray

    from nbdmirror.bitmap.dirty import DirtyBitmap

MAX_NAME: Final = 1023


class NamedBitmap:
    """`bits` with a name. `recording` says whether writes mark it; `users` who holds it busy, a word each."""

    __slots__ = ("_recording", "bits", "inconsistent", "name", "on_change", "persistent", "read_only", "users")

    def __init__(
        self,
        name: str,
        bits: DirtyBitmap,
        *,
        recording: bool = True,
        persistent: bool = False,
        inconsistent: bool = False,
        read_only: bool = False,
    ) -> None:
        if not name:
            raise StateError("Bitmap name cannot be empty")
        if len(name.encode()) > MAX_NAME:
            raise StateError(f"Bitmap name too long: {name}")
        self.name = name
        self.bits = bits
        self._recording = recording
        self.persistent = persistent
        self.inconsistent = inconsistent
        self.read_only = read_only
        self.users: list[str] = []
        self.on_change: Callable[[], None] = _nobody_hears

    @property
    def recording(self) -> bool:
        """Whether writes mark it now."""
        return self._recording and not self.inconsistent

    @recording.setter
    def recording(self, recording: bool) -> None:
        self._recording = recording

    @property
    def busy(self) -> bool:
        """Whether a job, an export or a transaction holds it."""
        return bool(self.users)

    def check_removable(self) -> None:
        """Raises StateError where it is busy or read-only: for what does not care for the bits, to clear them or remove it."""
        self._check_idle()
        self._check_writable()

    def check_usable(self) -> None:
        """Raises StateError where it is busy or inconsistent: for what leaves the bits as they are."""
        self._check_idle()
        self._check_consistent()

    def check_modifiable(self) -> None:
        """Raises StateError where its bits must not be changed."""
        self._check_idle()
        self._check_writable()
        self._check_consistent()

    def _check_idle(self) -> None:
        if self.busy:
            raise StateError(f"Bitmap '{self.name}' is currently in use by another operation and cannot be used")

    def _check_writable(self) -> None:
        if self.read_only:
            raise StateError(f"Bitmap '{self.name}' is readonly and cannot be modified")

    def _check_consistent(self) -> None:
        if self.inconsistent:
            raise StateError(f"Bitmap '{self.name}' is inconsistent and cannot be used")

    def __repr__(self) -> str:
        return f"<NamedBitmap {self.name!r} {self.bits!r}{' recording' if self.recording else ''}>"


def _nobody_hears() -> None:
    pass


class BitmapSet:
    """The bitmaps of one disk, oldest first; a WriteObserver for all of them at once.

    `in_flight` tells the writes, `(offset, length)` in bytes, that have begun and not ended (rule 2).
    """

    __slots__ = ("_bitmaps", "_in_flight", "_recording")

    def __init__(self, in_flight: Callable[[], Iterable[tuple[int, int]]]) -> None:
        self._bitmaps: dict[str, NamedBitmap] = {}
        self._in_flight = in_flight
        self._recording: tuple[DirtyBitmap, ...] = ()

    def __iter__(self) -> Iterator[NamedBitmap]:
        return iter(self._bitmaps.values())

    def get(self, name: str) -> NamedBitmap | None:
        """The bitmap of that name, if there is one."""
        return self._bitmaps.get(name)

    def check_free(self, name: str) -> None:
        """Raises StateError where the name is taken."""
        if name in self._bitmaps:
            raise StateError(f"Bitmap already exists: {name}")

    def add(self, bitmap: NamedBitmap) -> None:
        """Enter a bitmap; raises StateError where the name is taken."""
        self.check_free(bitmap.name)
        self._bitmaps[bitmap.name] = bitmap
        self._changed(bitmap)

    def remove(self, bitmap: NamedBitmap) -> int:
        """Take a bitmap out, whatever its state; returns the place that it had, for `put_back`."""
        place = list(self._bitmaps).index(bitmap.name)
        del self._bitmaps[bitmap.name]
        self._note_recording()
        return place

    def put_back(self, bitmap: NamedBitmap, place: int) -> None:
        """Undo a removal."""
        names = list(self._bitmaps.items())
        names.insert(place, (bitmap.name, bitmap))
        self._bitmaps = dict(names)
        self._changed(bitmap)

    def record(self, bitmap: NamedBitmap) -> None:
        """Let writes mark it from now on."""
        bitmap.recording = True
        self._changed(bitmap)

    def stop_recording(self, bitmap: NamedBitmap) -> None:
        """Let writes that begin from now on leave it alone."""
        bitmap.recording = False
        self._changed(bitmap)

    def clear(self, bitmap: NamedBitmap) -> None:
        """Unmark everything, but for what is being written just now if it records. Makes it consistent."""
        bitmap.bits.clear()
        bitmap.inconsistent = False
        self._changed(bitmap)

    def restore(self, bitmap: NamedBitmap, bits: bitarray, *, inconsistent: bool) -> None:
        """Undo a clearing: `bits` are a snapshot of it, and so was its state."""
        bitmap.bits.restore(bits)
        bitmap.inconsistent = inconsistent
        self._changed(bitmap)

    def _changed(self, bitmap: NamedBitmap) -> None:
        bitmap.on_change()
        self._note_recording()
        self._mark_in_flight(bitmap)

    def _note_recording(self) -> None:
        self._recording = tuple(each.bits for each in self._bitmaps.values() if each.recording)

    def _mark_in_flight(self, bitmap: NamedBitmap) -> None:
        if bitmap.recording:
            for offset, length in self._in_flight():
                bitmap.bits.add(offset, length)

    # --- every write -----------------------------------------------------------------------------------------------

    def write_begins(self, offset: int, length: int) -> None:
        """See WriteObserver."""
        for bits in self._recording:
            bits.add(offset, length)

    def write_ends(self, offset: int, length: int) -> None:
        """See WriteObserver."""
