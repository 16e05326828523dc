"""The two forms in which scripts name a bitmap to mirror by, with their checks in the order that they rely on.

    sync=full bitmap=B                                  B is the working bitmap itself (proposed for QEMU)
    sync=bitmap|incremental bitmap=B bitmap-mode=M      M says what becomes of B in the end (Proxmox VE)

A mode makes it the second form, whatever `sync` says. `incremental` is `bitmap` with `on-success`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from nbdmirror.errors import StateError
from nbdmirror.mirror.options import MAX_GRANULARITY
from nbdmirror.mirror.record import Keep, Record

if TYPE_CHECKING:
    from collections.abc import Callable

    from nbdmirror.bitmap.named import NamedBitmap

Sync = Literal["full", "top", "none", "bitmap", "incremental"]
Mode = Literal["on-success", "never", "always"]


@dataclass(frozen=True, slots=True)
class BitmapForm:
    """What was asked for, as far as bitmaps are concerned. `granularity` is 0 where none was given."""

    sync: Sync
    bitmap: str | None
    mode: Mode | None
    granularity: int

    def record(self, find: Callable[[str], NamedBitmap], source_block: int, target_block: int) -> Record | None:
        """The record to work by, if there is to be one; raises StateError, and what `find` raises."""
        if self.mode is not None or self.sync in ("bitmap", "incremental"):
            return self._with_mode(find, source_block, target_block)
        if self.bitmap is None:
            return None
        if self.sync != "full":
            raise StateError(f"Sync mode '{self.sync}' not supported with bitmap.")
        self._check_granularity()
        bitmap = find(self.bitmap)
        _check_blocks(bitmap, source_block, target_block)
        bitmap.check_modifiable()
        if not bitmap.recording:
            raise StateError(f"Bitmap '{bitmap.name}' is not enabled")
        return Record(bitmap, Keep.LIVE)

    def _with_mode(self, find: Callable[[str], NamedBitmap], source_block: int, target_block: int) -> Record:
        # Raw disks have no backing, so their top is all of them.
        sync = "full" if self.sync == "top" else self.sync
        mode = self.mode
        if sync in ("bitmap", "incremental") and self.bitmap is None:
            raise StateError(f"Must provide a valid bitmap name for '{sync}' sync mode")
        if sync == "incremental":
            if mode not in (None, "on-success"):
                raise StateError("Bitmap sync mode must be 'on-success' when using sync mode 'incremental'")
            sync, mode = "bitmap", "on-success"
        if self.bitmap is None:
            raise StateError("Cannot specify bitmap sync mode without a bitmap")
        if sync != "bitmap":
            raise StateError(f"Sync mode '{sync}' not supported with bitmap.")
        self._check_granularity()
        if mode is None:
            raise StateError("bitmap-mode must be specified if a bitmap is provided")
        bitmap = find(self.bitmap)
        _check_blocks(bitmap, source_block, target_block)
        if mode == "never":
            bitmap.check_usable()
        else:
            bitmap.check_modifiable()
        return Record(bitmap, Keep(mode))

    def _check_granularity(self) -> None:
        if self.granularity:
            raise StateError("Granularity and bitmap cannot both be set")


def _check_blocks(bitmap: NamedBitmap, source_block: int, target_block: int) -> None:
    """A chunk must be whole blocks of both disks: what is written beside it would be taken from nowhere."""
    granularity = bitmap.bits.granularity
    if granularity > MAX_GRANULARITY:
        raise StateError("Parameter 'granularity' expects a value in range [512B, 64MB]")
    if granularity % target_block:
        raise StateError(
            f"Bitmap granularity {granularity} is not a multiple of the target image's cluster size {target_block} "
            "and the target image has no backing file"
        )
    if granularity % source_block:
        raise StateError(f"Bitmap granularity {granularity} is not a multiple of the source's block size {source_block}")
