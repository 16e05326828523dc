"""Straight to the socket, past the transport: one system call, and no copy of what the socket takes at once."""

from __future__ import annotations

import os
from typing import Final

_IOV_MAX: Final = 1024


def send_now(fd: int, out: list[bytes | bytearray | memoryview]) -> list[bytes | bytearray | memoryview]:
    """What the non-blocking socket does not take at once; raises OSError where the connection is lost."""
    try:
        sent = os.writev(fd, out[:_IOV_MAX])
    except BlockingIOError:
        return out
    for index, piece in enumerate(out):
        if sent < len(piece):
            return [memoryview(piece)[sent:], *out[index + 1 :]]
        sent -= len(piece)
    return []
