"""Where received bytes lie until they have been understood: a window for small messages, buffers of their own for big payloads.

Rules:
1. Bytes are received in place. `get_buffer` names where the next ones go; a payload larger than IN_WINDOW gets a buffer of
   its own before it arrives and is never copied again (6 GB/s instead of 1.7 GB/s at 64 KiB when measured against
   append-and-slice).
2. The window starts small and grows while the peer fills it, so a thousand idle connections cost little and a busy one
   gets a batch of requests from one system call.
3. What a peer claims is never allocated on its word: a payload's buffer is bounded by the caller's limit, and what is too
   large is skipped as it comes.
4. A view into the window is good until the next `get_buffer`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

WINDOW_START: Final = 4 * 1024
WINDOW_MAX: Final = 256 * 1024
IN_WINDOW: Final = 64 * 1024
# After a big payload another one is likely: read only a little past its header, so that little has to be copied over. When
# the bytes that come next begin none, that was the last one.
WINDOW_AFTER_BIG: Final = 4 * 1024


class Receiver:
    """The received, not yet parsed bytes of one connection: `window[start:end]`; `window_view` is a view of it all.

    `take_buffer` makes the buffers of big payloads: of a given length, and of any content, since all of it is overwritten.
    """

    __slots__ = (
        "_after_big",
        "_filled",
        "_grow",
        "_payload",
        "_read_ahead",
        "_skip",
        "_take_buffer",
        "end",
        "start",
        "window",
        "window_view",
    )

    def __init__(self, take_buffer: Callable[[int], bytearray] = bytearray) -> None:
        self._take_buffer = take_buffer
        self.window = bytearray(WINDOW_START)
        self.start = 0
        self.end = 0
        self.window_view = memoryview(self.window)
        self._payload: memoryview | None = None
        self._filled = 0
        self._skip = 0
        self._grow = 0
        self._read_ahead = WINDOW_MAX
        self._after_big = False

    @property
    def available(self) -> int:
        """Bytes in the window."""
        return self.end - self.start

    def get_buffer(self) -> memoryview:
        """Where the next received bytes go; never empty. Ends the life of every view into the window."""
        if self._payload is not None:
            return self._payload[self._filled :]
        if self._grow > len(self.window):
            self._enlarge(self._grow)
        elif self.start == self.end:
            self.start = self.end = 0
        elif len(self.window) - self.end < len(self.window) // 2:
            self._compact()
        return self.window_view[self.end : self.end + self._read_ahead]

    def buffer_updated(self, count: int) -> None:
        """`count` bytes have arrived where `get_buffer` said."""
        if self._payload is not None:
            self._filled += count
            return
        self.end += count
        if self._after_big:
            self._after_big = False
        else:
            self._read_ahead = WINDOW_MAX
        if self._skip:
            dropped = min(self._skip, self.available)
            self._skip -= dropped
            self.start += dropped
        if self.end == len(self.window) and len(self.window) < WINDOW_MAX:
            self._grow = min(4 * len(self.window), WINDOW_MAX)

    def view(self, length: int, skip: int = 0) -> memoryview:
        """The next `length` bytes behind `skip` others, which must be in the window; they are consumed by `consume`."""
        return self.window_view[self.start + skip : self.start + skip + length]

    def consume(self, length: int) -> None:
        """Drop `length` bytes that are in the window."""
        self.start += length

    def need(self, length: int) -> bool:
        """Whether `length` bytes are in the window; if not, it becomes large enough to receive them (at most WINDOW_MAX)."""
        if self.end - self.start >= length:
            return True
        if length > len(self.window):
            self._grow = min(max(4 * len(self.window), length), WINDOW_MAX)
        return False

    def skip(self, length: int) -> None:
        """Drop `length` bytes, of which some have yet to arrive."""
        dropped = min(length, self.available)
        self.start += dropped
        self._skip = length - dropped

    @property
    def is_skipping(self) -> bool:
        """Whether bytes are still awaited that will be dropped."""
        return self._skip > 0

    def begin_payload(self, length: int) -> None:
        """Receive the next `length` bytes into a buffer of their own; what is in the window already moves over."""
        self._payload = memoryview(self._take_buffer(length))
        self._filled = min(length, self.available)
        self._payload[: self._filled] = self.view(self._filled)
        self.start += self._filled
        self._read_ahead = WINDOW_AFTER_BIG
        self._after_big = True

    def finish_payload(self) -> memoryview | None:
        """The payload once it is whole, else None."""
        payload = self._payload
        if payload is None or self._filled < len(payload):
            return None
        self._payload = None
        return payload

    def _compact(self) -> None:
        held = self.available
        self.window_view[:held] = self.window_view[self.start : self.end]
        self.start, self.end = 0, held

    def _enlarge(self, size: int) -> None:
        """A new window: views into the old one keep the old one alive."""
        held = self.available
        window = bytearray(size)
        window[:held] = self.window_view[self.start : self.end]
        self.window, self.window_view = window, memoryview(window)
        self.start, self.end, self._grow = 0, held, 0
