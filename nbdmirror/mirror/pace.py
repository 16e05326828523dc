"""The pace of a mirror job: when it gathers, when passes still get shorter, and how a guest is held back.

Times are in seconds, amounts in bytes.
"""

from __future__ import annotations

from typing import Final

from nbdmirror.units import MiB

# How long a READY job lets writes gather before it copies them: a rewritten chunk is copied ten times a second at most.
GATHER_SECONDS: Final = 0.1
# Draining is short when no more than this is left; 16 MiB travel in 10 to 20 ms on loopback.
SMALL: Final = 16 * MiB
# A pass that leaves more than this share of what the pass before it left does not converge.
SHRINKING: Final = 0.75
# A job with a live record flushes after so much, or so long: what a broken job has to copy again is bounded by that, and 64 MiB
# take 60 ms at 1 GiB/s, many times what a flush does.
CHECKPOINT_BYTES: Final = 64 * MiB
CHECKPOINT_SECONDS: Final = 1.0
# And one whose target may be lost, with all that it has not flushed. Less often: losses are rare, and flushing costs.
SAFEKEEP_BYTES: Final = 1024 * MiB
SAFEKEEP_SECONDS: Final = 30.0
# Holding a guest back: so long at a time, released so long in between, and only when this much copying is left in all.
HOLD_SECONDS: Final = 0.1
RELEASE_SECONDS: Final = 0.01
CLOSE_IN_SECONDS: Final = 5.0
CLOSE_IN_TURNS: Final = 60
# Turns after which less than this share must be left, or holding the guest is given up for this pass.
CLOSE_IN_CHECK: Final = 5
CLOSING_IN: Final = 0.98
# How long a guest's write waits for a disk that does not answer: a third of the 30 s after which guests give up a disk.
PATIENCE_SECONDS: Final = 10.0
# And how long it goes on, where it was held for so long in vain.
LET_GO_SECONDS: Final = 1.0
