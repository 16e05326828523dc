"""Waiting for something to fail, for a bounded time."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

import pytest

from nbdmirror.errors import DeviceError

if TYPE_CHECKING:
    from collections.abc import Coroutine

# Nothing may hang: each wait has this bound, in seconds, and none comes near it when all is well.
BOUND: Final = 10


async def failed(work: Coroutine[Any, Any, Any] | asyncio.Future[None]) -> DeviceError:
    """The DeviceError that `work` fails with."""
    with pytest.raises(DeviceError) as caught:
        await asyncio.wait_for(work, BOUND)
    assert "\n" not in str(caught.value)
    return caught.value
