"""The system calls that Python's os module lacks: fallocate with a mode, statfs's type, and the block device ioctls.

Rules:
1. One function per call, OSError as the kernel gave it; what to do about it is the caller's.
2. Every call releases the GIL, so a thread that blocks in one holds up nobody.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from typing import Final

_libc: Final = ctypes.CDLL(None, use_errno=True)
_fallocate: Final = _libc.fallocate64
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)

# linux/falloc.h
FALLOC_KEEP_SIZE: Final = 0x01
FALLOC_PUNCH_HOLE: Final = 0x02
FALLOC_ZERO_RANGE: Final = 0x10

# linux/fs.h
_BLKROGET: Final = 0x125E
_BLKGETSIZE64: Final = 0x80081272
_BLKSSZGET: Final = 0x1268
_BLKDISCARD: Final = 0x1277
_BLKROTATIONAL: Final = 0x127E
_BLKZEROOUT: Final = 0x127F

# linux/magic.h: file systems whose data is nowhere but in memory
_MEMORY_FILE_SYSTEMS: Final = frozenset((0x01021994, 0x858458F6))


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2)."""
    while _fallocate(fd, mode, offset, length):
        error = ctypes.get_errno()
        if error != errno.EINTR:
            raise OSError(error, os.strerror(error))


def lives_in_memory(fd: int) -> bool:
    """Whether the file is on tmpfs or ramfs, where reading never waits for a disk."""
    buffer = ctypes.create_string_buffer(256)
    if _libc.fstatfs(fd, buffer):
        return False
    return ctypes.c_long.from_buffer(buffer).value & 0xFFFFFFFF in _MEMORY_FILE_SYSTEMS


def block_device_size(fd: int) -> int:
    """Bytes."""
    return int(struct.unpack("Q", fcntl.ioctl(fd, _BLKGETSIZE64, bytes(8)))[0])


def block_device_sector(fd: int) -> int:
    """The logical sector in bytes: what discarding and zeroing must be aligned to."""
    return int(struct.unpack("i", fcntl.ioctl(fd, _BLKSSZGET, bytes(4)))[0])


def block_device_is_read_only(fd: int) -> bool:
    """Whether the kernel refuses writes to the device."""
    return bool(struct.unpack("i", fcntl.ioctl(fd, _BLKROGET, bytes(4)))[0])


def block_device_is_rotational(fd: int) -> bool:
    """Whether seeks cost."""
    return bool(struct.unpack("H", fcntl.ioctl(fd, _BLKROTATIONAL, bytes(2)))[0])


def block_discard(fd: int, offset: int, length: int) -> None:
    """BLKDISCARD: the content is undefined afterwards."""
    fcntl.ioctl(fd, _BLKDISCARD, struct.pack("QQ", offset, length))


def block_zero_out(fd: int, offset: int, length: int) -> None:
    """BLKZEROOUT: reads as zeroes afterwards and stays allocated."""
    fcntl.ioctl(fd, _BLKZEROOUT, struct.pack("QQ", offset, length))
