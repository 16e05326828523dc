"""ZeroMap: which chunks of the target are known to read as zeroes, so that zeroes need not be sent there again.

Rules:
1. A bit is set only for a chunk that is wholly known to be zero (rounding inward; the end of the disk completes the last).
2. It is cleared before data is sent to any byte of the chunk (rounding outward), whether or not the write succeeds.
3. Only the job writes to the target, so nobody else has to be watched.
4. Zeroes that were not flushed may be lost with the target's connection, or by a flush that fails. Nothing is known then, and
   what was under way at that moment, by its `epoch`, is not learned of afterwards.
"""

from __future__ import annotations

from nbdmirror.bitmap.dirty import DirtyBitmap


class ZeroMap:
    """One bit per chunk of a disk of `size` bytes."""

    def __init__(self, size: int, granularity: int) -> None:
        self._zero = DirtyBitmap(size, granularity)
        self.epoch = 0

    def set_zero(self, offset: int, length: int, epoch: int | None = None) -> None:
        """The range is known to read as zeroes; where that took time, from what was begun in `epoch`."""
        if epoch is None or epoch == self.epoch:
            self._zero.add_chunks(*self._zero.span_within(offset, length))

    def clear(self, offset: int, length: int) -> None:
        """The range is about to change."""
        self._zero.discard_chunks(*self._zero.span(offset, length))

    def reads_zero(self, offset: int, length: int) -> bool:
        """Whether every chunk that the range touches is known to be zero."""
        first, end = self._zero.span(offset, length)
        run = self._zero.next_run(first, end)
        return run == (first, end)

    def clear_all(self) -> None:
        """Nothing is known any more."""
        self.epoch += 1
        self._zero.clear()
