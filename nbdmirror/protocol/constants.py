"""The numbers of the NBD protocol, under the names of its text.

Hot paths compare plain integers (the members of an IntFlag cost half a microsecond per `&`), so flags are final ints here
and enums serve only where a name is wanted in a log line.
"""

from __future__ import annotations

from enum import Enum, IntEnum
from typing import Final

# Section "Newstyle negotiation"
NBDMAGIC: Final = 0x4E42444D41474943
IHAVEOPT: Final = 0x49484156454F5054
OPTION_REPLY_MAGIC: Final = 0x3E889045565A9

FLAG_FIXED_NEWSTYLE: Final = 1 << 0
FLAG_NO_ZEROES: Final = 1 << 1

# Limits of the text, section "Values": strings, and how much option data we are willing to read.
MAX_STRING: Final = 4096
MAX_OPTION_LENGTH: Final = 128 * 1024 * 1024


class Option(IntEnum):
    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    PEEK_EXPORT = 4
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10
    EXTENDED_HEADERS = 11


class OptionReply(IntEnum):
    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = (1 << 31) + 1
    ERR_POLICY = (1 << 31) + 2
    ERR_INVALID = (1 << 31) + 3
    ERR_PLATFORM = (1 << 31) + 4
    ERR_TLS_REQD = (1 << 31) + 5
    ERR_UNKNOWN = (1 << 31) + 6
    ERR_SHUTDOWN = (1 << 31) + 7
    ERR_BLOCK_SIZE_REQD = (1 << 31) + 8
    ERR_TOO_BIG = (1 << 31) + 9
    ERR_EXT_HEADER_REQD = (1 << 31) + 10


class TlsMode(Enum):
    """Sections "TLS versions" and "Server-side requirements": NOTLS, SELECTIVETLS with no export that insists, FORCEDTLS."""

    OFF = "off"
    ON = "on"
    REQUIRE = "require"


class Info(IntEnum):
    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


# Section "Transmission flags"
TFLAG_HAS_FLAGS: Final = 1 << 0
TFLAG_READ_ONLY: Final = 1 << 1
TFLAG_SEND_FLUSH: Final = 1 << 2
TFLAG_SEND_FUA: Final = 1 << 3
TFLAG_ROTATIONAL: Final = 1 << 4
TFLAG_SEND_TRIM: Final = 1 << 5
TFLAG_SEND_WRITE_ZEROES: Final = 1 << 6
TFLAG_SEND_DF: Final = 1 << 7
TFLAG_CAN_MULTI_CONN: Final = 1 << 8
TFLAG_SEND_CACHE: Final = 1 << 10
TFLAG_SEND_FAST_ZERO: Final = 1 << 11

# Section "Request types"
REQUEST_MAGIC: Final = 0x25609513
EXTENDED_REQUEST_MAGIC: Final = 0x21E41C71
CMD_READ: Final = 0
CMD_WRITE: Final = 1
CMD_DISC: Final = 2
CMD_FLUSH: Final = 3
CMD_TRIM: Final = 4
CMD_CACHE: Final = 5
CMD_WRITE_ZEROES: Final = 6
CMD_BLOCK_STATUS: Final = 7
CMD_NAMES: Final = ("READ", "WRITE", "DISC", "FLUSH", "TRIM", "CACHE", "WRITE_ZEROES", "BLOCK_STATUS")

# Section "Command flags". Devices speak of writes with the same numbers: one vocabulary from the wire to the disk.
FUA: Final = 1 << 0
NO_HOLE: Final = 1 << 1
DF: Final = 1 << 2
REQ_ONE: Final = 1 << 3
FAST_ZERO: Final = 1 << 4
PAYLOAD_LEN: Final = 1 << 5
FLAG_NAMES: Final = (
    (FUA, "FUA"),
    (NO_HOLE, "NO_HOLE"),
    (DF, "DF"),
    (REQ_ONE, "REQ_ONE"),
    (FAST_ZERO, "FAST_ZERO"),
    (PAYLOAD_LEN, "PAYLOAD_LEN"),
)

# Sections "Simple reply message" and "Structured reply types"; what has EXTENDED or EXT in its name is from the protocol's
# extension for extended headers.
SIMPLE_REPLY_MAGIC: Final = 0x67446698
STRUCTURED_REPLY_MAGIC: Final = 0x668E33EF
EXTENDED_REPLY_MAGIC: Final = 0x6E8A278C
REPLY_FLAG_DONE: Final = 1
REPLY_NONE: Final = 0
REPLY_OFFSET_DATA: Final = 1
REPLY_OFFSET_HOLE: Final = 2
REPLY_BLOCK_STATUS: Final = 5
REPLY_BLOCK_STATUS_EXT: Final = 6
REPLY_ERROR: Final = (1 << 15) + 1
REPLY_ERROR_OFFSET: Final = (1 << 15) + 2

# Section "Error values": the only errnos that may travel.
EPERM: Final = 1
EIO: Final = 5
ENOMEM: Final = 12
EINVAL: Final = 22
ENOSPC: Final = 28
EOVERFLOW: Final = 75
ENOTSUP: Final = 95
ESHUTDOWN: Final = 108

# Meta contexts: the text's own, and QEMU's (its docs/interop/nbd.txt).
BASE_ALLOCATION: Final = "base:allocation"
ALLOCATION_DEPTH: Final = "qemu:allocation-depth"
DIRTY_BITMAP: Final = "qemu:dirty-bitmap:"

# Section "Block sizes": the payload every server should take, and so the most a client may send unasked.
DEFAULT_MAX_PAYLOAD: Final = 32 * 1024 * 1024
# What our own server takes, and says so: as much as nbdkit.
MAX_PAYLOAD: Final = 64 * 1024 * 1024
