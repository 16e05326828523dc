"""Tally: what the clients of an export have asked for so far, in plain integers that metrics look at when they are asked.

Rules:
1. READs and WRITEs that are answered at once are counted in local variables and added up once a batch: 30 ns each. All others
   cost a task or a refusal anyway, and are counted one by one.
2. Bytes are those of requests that succeeded; a request that was refused is counted with its error.
3. A command that the protocol does not have is counted as none of its own, so that no client can make these tables grow.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from nbdmirror.protocol.constants import CMD_DISC, CMD_NAMES, CMD_READ, CMD_WRITE
from nbdmirror.protocol.messages import Refusal

if TYPE_CHECKING:
    from nbdmirror.protocol.messages import Answer, Request

# By number; DISC, which is no request, stands for what is unknown.
OPERATIONS: Final = tuple("unknown" if number == CMD_DISC else name.lower() for number, name in enumerate(CMD_NAMES))


class Tally:
    """One for each export. `requests` and `lengths` (bytes) are by command, `errors` by command and the NBD error."""

    __slots__ = ("errors", "in_flight", "lengths", "requests")

    def __init__(self) -> None:
        self.requests = [0] * len(OPERATIONS)
        self.lengths = [0] * len(OPERATIONS)
        self.errors: dict[tuple[int, int], int] = {}
        self.in_flight = 0

    def add_batch(self, reads: int, read: int, writes: int, written: int) -> None:
        """READs and WRITEs that succeeded, and their bytes."""
        self.requests[CMD_READ] += reads
        self.lengths[CMD_READ] += read
        self.requests[CMD_WRITE] += writes
        self.lengths[CMD_WRITE] += written

    def add(self, request: Request, answer: Answer) -> None:
        """Any request that was answered."""
        command = request.command if request.command < len(OPERATIONS) else CMD_DISC
        self.requests[command] += 1
        if isinstance(answer, Refusal):
            self.errors[command, answer.error] = self.errors.get((command, answer.error), 0) + 1
        else:
            self.lengths[command] += request.length
