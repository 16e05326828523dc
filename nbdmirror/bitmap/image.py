"""The file of a persistent bitmap: layout, encoding, and what its state says after a crash.

    offset  length             content
    0       4096               head: what never changes; crc32 in its last 4 bytes
    4096    512                state: what changes as it is used; crc32 in its last 4 bytes; zeroes up to 8192
    8192    whole pages        regions: one bit per region of the disk, bit order little-endian (`regions` has the rules)
    ...     whole pages        bits: one per chunk of the disk, bit order little-endian, zeroes after the last

    head    magic "NBDMBMAP", u32 version, u32 granularity, u64 size of the disk, u64 bytes per region, 16 bytes UUID,
            u16 length of the name, u16 length of the identity, the name, the identity; UTF-8, numbers little-endian
    state   magic "NBDMSTAT", u64 generation, u32 flags (1 in use, 2 recording, 4 unsure), u32 sync (0 lazy, 1 barrier,
            2 intent), 16 bytes boot id, u32 crc32 of the bits, valid while not in use

Rules:
1. The file has its full length from the beginning; it appears under its name when it is complete, and never otherwise.
2. The state is one sector of 512 bytes, which a disk writes whole or not at all: a power cut leaves the old one or the new
   one. So what does not check is damaged, and refused; nothing is guessed or repaired.
3. In use, with the boot id of now: whoever used it was killed, the host was not, and the page cache has had every bit. The
   bits are exact. With another boot id the host has crashed: only `sync` says what they are worth then.
4. Unsure: the file system has failed to write bits back. They count as after a crash of the host, even if there was none.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import Final
from urllib.parse import quote

from nbdmirror.errors import NbdMirrorError
from nbdmirror.units import MiB, round_up

PAGE: Final = 4096
STATE_OFFSET: Final = PAGE
REGIONS_OFFSET: Final = 2 * PAGE
SUFFIX: Final = ".nbm"

_MAGIC: Final = b"NBDMBMAP"
_STATE_MAGIC: Final = b"NBDMSTAT"
_VERSION: Final = 1
_HEAD: Final = struct.Struct("<8sIIQQ16sHH")
_STATE: Final = struct.Struct("<8sQII16sI")
_SECTOR: Final = 512
_CRC: Final = struct.Struct("<I")
_IN_USE: Final = 1
_RECORDING: Final = 2
_UNSURE: Final = 4
_NAME_MAX: Final = 1023
# What is left of the page; who needs more shortens it.
IDENTITY_MAX: Final = 2048

# Small enough that little is copied in vain after a power cut, large enough that few writes are the first to a region.
_REGION: Final = 4 * MiB
# A map of at most 64 KiB: up to 2 TiB have regions of 4 MiB, 16 TiB of 32 MiB.
_MOST_REGIONS: Final = 1 << 19
# Of a file name 255 bytes are allowed; this leaves room for the digest and the suffix.
_READABLE: Final = 120


class ImageError(NbdMirrorError):
    """The file is not a bitmap that can be used; says why."""


class Sync(Enum):
    """When bits are made durable: at the orderly end, with every flush of a client too, or before the disk changes."""

    LAZY = "lazy"
    BARRIER = "barrier"
    INTENT = "intent"


class Worth(IntEnum):
    """What the bits in a file are worth."""

    EXACT = 0
    """Every change, as it was marked."""
    REGIONS = 1
    """Every change, together with the regions that are on record."""
    FLUSHED = 2
    """What clients had flushed is marked; other changes may be missing."""
    NOTHING = 3
    """Any change may be missing."""


_SYNCS: Final = (Sync.LAZY, Sync.BARRIER, Sync.INTENT)
_AFTER_A_CRASH: Final = {Sync.LAZY: Worth.NOTHING, Sync.BARRIER: Worth.FLUSHED, Sync.INTENT: Worth.REGIONS}


def region_size_of(size: int) -> int:
    """Bytes per region for a disk of `size` bytes."""
    region = _REGION
    while size > region * _MOST_REGIONS:
        region *= 2
    return region


@dataclass(frozen=True, slots=True)
class Head:
    """What never changes about a bitmap: of which disk it is, and its shape."""

    name: str
    size: int
    granularity: int
    identity: str
    uuid: bytes
    region_size: int

    @property
    def regions_length(self) -> int:
        """Bytes of the region map, whole pages."""
        return round_up(-(-self.size // self.region_size) + 7 >> 3, PAGE)

    @property
    def bits_offset(self) -> int:
        """Where the bits begin."""
        return REGIONS_OFFSET + self.regions_length

    @property
    def bits_length(self) -> int:
        """Bytes that hold bits."""
        return -(-self.size // self.granularity) + 7 >> 3

    @property
    def file_length(self) -> int:
        """Bytes of the whole file."""
        return self.bits_offset + round_up(self.bits_length, PAGE)

    def encode(self) -> bytes:
        """The first page."""
        name, identity = self.name.encode(), self.identity.encode()
        assert len(name) <= _NAME_MAX, "names are checked before"
        assert len(identity) <= IDENTITY_MAX, "identities are shortened before"
        fixed = _HEAD.pack(_MAGIC, _VERSION, self.granularity, self.size, self.region_size, self.uuid, len(name), len(identity))
        return _sealed(fixed + name + identity, PAGE)

    @classmethod
    def decode(cls, page: bytes) -> Head:
        """The reverse; raises ImageError."""
        page = page[:PAGE]
        if len(page) < PAGE or not page.startswith(_MAGIC):
            raise ImageError("it is no bitmap of nbdmirror")
        _, version, granularity, size, region_size, uuid, name_length, identity_length = _HEAD.unpack_from(page)
        if version > _VERSION:
            raise ImageError(f"it has version {version}, and this nbdmirror knows up to {_VERSION}: use a newer one")
        if not _is_sealed(page):
            raise ImageError("it is damaged: the checksum of its head does not match")
        start = _HEAD.size
        texts = page[start : start + name_length], page[start + name_length : start + name_length + identity_length]
        try:
            name, identity = texts[0].decode(), texts[1].decode()
        except UnicodeDecodeError:
            raise ImageError("it is damaged: its name is no text") from None
        if granularity < _SECTOR or granularity & granularity - 1 or region_size < _REGION or region_size & region_size - 1:
            raise ImageError("it is damaged: its granularity makes no sense")
        return cls(name, size, granularity, identity, uuid, region_size)


@dataclass(frozen=True, slots=True)
class State:
    """What changes as a bitmap is used. `generation` counts how often it was opened for recording."""

    generation: int
    in_use: bool
    recording: bool
    sync: Sync
    boot_id: bytes
    unsure: bool = False
    bits_crc: int = 0

    def encode(self) -> bytes:
        """The sector."""
        flags = self.in_use * _IN_USE | self.recording * _RECORDING | self.unsure * _UNSURE
        sync = _SYNCS.index(self.sync)
        return _sealed(_STATE.pack(_STATE_MAGIC, self.generation, flags, sync, self.boot_id, self.bits_crc), _SECTOR)

    @classmethod
    def decode(cls, sector: bytes) -> State:
        """The reverse; raises ImageError."""
        sector = sector[:_SECTOR]
        if len(sector) < _SECTOR or not sector.startswith(_STATE_MAGIC) or not _is_sealed(sector):
            raise ImageError("it is damaged: the checksum of its state does not match")
        _, generation, flags, sync, boot_id, crc = _STATE.unpack_from(sector)
        if flags & ~(_IN_USE | _RECORDING | _UNSURE) or sync >= len(_SYNCS):
            raise ImageError("it is damaged: its state makes no sense")
        in_use, recording, unsure = (bool(flags & flag) for flag in (_IN_USE, _RECORDING, _UNSURE))
        return cls(generation, in_use, recording, _SYNCS[sync], boot_id, unsure, crc)

    def worth(self, boot_id: bytes) -> Worth:
        """What the bits are worth on a host of this boot id (rules 3 and 4)."""
        if not self.in_use or (self.boot_id == boot_id and not self.unsure):
            return Worth.EXACT
        return _AFTER_A_CRASH[self.sync]


def check_content(head: Head, state: State, content: bytes | memoryview) -> None:
    """Raises ImageError where regions and bits, as they are in the file `content`, can't be what was stored."""
    bits = content[head.bits_offset : head.bits_offset + head.bits_length]
    spare = -(-head.size // head.granularity) & 7
    if spare and bits[-1] >> spare:
        raise ImageError("it is damaged: it marks what is behind the end of the disk")
    if state.in_use:
        return
    if any(content[REGIONS_OFFSET : head.bits_offset]):
        raise ImageError("it is damaged: it was closed in order and has regions on record")
    if zlib.crc32(bits) != state.bits_crc:
        raise ImageError("it is damaged: the checksum of its bits does not match")


def file_name(name: str, identity: str) -> str:
    """The name of the file, which people may read and nobody has to: the content says what it is."""
    digest = hashlib.sha256(f"{identity}\0{name}".encode()).hexdigest()[:16]
    return f"{quote(name, safe='')[:_READABLE]}-{digest}{SUFFIX}"


def _sealed(content: bytes, length: int) -> bytes:
    padded = content.ljust(length - _CRC.size, b"\0")
    return padded + _CRC.pack(zlib.crc32(padded))


def _is_sealed(block: bytes) -> bool:
    end = len(block) - _CRC.size
    return bool(_CRC.unpack_from(block, end)[0] == zlib.crc32(block[:end]))
