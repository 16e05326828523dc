"""MirrorOptions: how a mirror job is to be done, as far as the user says."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, Literal

from nbdmirror.errors import StateError
from nbdmirror.mirror.copier import CopyOptions
from nbdmirror.mirror.trouble import OnError
from nbdmirror.units import KiB, MiB, round_up

DEFAULT_GRANULARITY: Final = 64 * KiB
MIN_GRANULARITY: Final = 512
MAX_GRANULARITY: Final = 64 * MiB


class CopyMode(StrEnum):
    """When the guest's writes are copied: some time later, or before they are answered."""

    BACKGROUND = "background"
    WRITE_BLOCKING = "write-blocking"


@dataclass(frozen=True, slots=True)
class MirrorOptions:
    """How to mirror. `granularity` in bytes; `sync` says what is dirty at the start.

    `pending_seconds` is how long a job that waits to be finalized holds the guest, None for as long as it takes. Without
    `flush` nothing makes the copy durable. `larger_target` takes any target that the source fits into.
    `reconnect_seconds` is how long a target that is lost is waited for, None for as long as it takes.
    With `verify` what the bitmap has as clean is compared first.
    """

    sync: Literal["full", "none"] = "full"
    granularity: int = DEFAULT_GRANULARITY
    pending_seconds: float | None = None
    copy_mode: CopyMode = CopyMode.BACKGROUND
    target_is_zero: bool = False
    flush: bool = True
    larger_target: bool = False
    reconnect_seconds: float | None = None
    verify: bool = False
    on_source_error: OnError = OnError.REPORT
    on_target_error: OnError = OnError.REPORT
    copy: CopyOptions = field(default_factory=CopyOptions)

    def __post_init__(self) -> None:
        if not MIN_GRANULARITY <= self.granularity <= MAX_GRANULARITY:
            raise StateError("Parameter 'granularity' expects a value in range [512B, 64MB]")
        if self.granularity & (self.granularity - 1):
            raise StateError("Parameter 'granularity' expects a power of 2")

    def check_sizes(self, source: int, target: int) -> None:
        """A server may round an export up to whole sectors; anything else that differs is a mistake, or asked for."""
        if not source <= target or (target > round_up(source, 512) and not self.larger_target):
            raise StateError("Source and target image have different sizes")
