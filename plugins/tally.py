"""What a plugin counts of its requests: how many, how many bytes, how many at once."""

from __future__ import annotations

import threading
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


class Tally:
    """Counts by kind. Any thread may call."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count: Counter[str] = Counter()
        self._bytes: Counter[str] = Counter()
        self._in_flight = self._max_in_flight = 0

    @contextmanager
    def request(self, kind: str, length: int = 0) -> Iterator[None]:
        """A request that is in flight."""
        with self._lock:
            self._count[kind] += 1
            self._bytes[kind] += length
            self._in_flight += 1
            self._max_in_flight = max(self._max_in_flight, self._in_flight)
        try:
            yield
        finally:
            with self._lock:
                self._in_flight -= 1

    def note(self, kind: str, length: int) -> None:
        """A request that takes no time."""
        with self._lock:
            self._count[kind] += 1
            self._bytes[kind] += length

    def reset(self) -> None:
        """Count anew; what is in flight stays in flight."""
        with self._lock:
            self._count.clear()
            self._bytes.clear()
            self._max_in_flight = self._in_flight

    def counts(self) -> dict[str, object]:
        """For a report; a kind that has not come is not in it."""
        with self._lock:
            requests = {kind: {"count": count, "bytes": self._bytes[kind]} for kind, count in self._count.items()}
            return {"requests": requests, "in-flight": self._in_flight, "max-in-flight": self._max_in_flight}
