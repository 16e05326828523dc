"""Which disk is this: a text that tells it from others and survives reboots.

    a file          its inode number and the inode's generation; with its absolute path where the file system has no generations
    a block device  what the kernel says identifies it: the UUID of a mapping or an array, the WWID or serial number of a
                    disk, with the number of the partition; its absolute path where there is none of these
    an NBD export   transport, address and export name

So a file that was made anew or came back from a backup is another disk, even under the same path; a disk that was moved or
renamed is the same, where the system can tell.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import struct
from pathlib import Path
from typing import Final

from nbdmirror.devices.uri import looks_like_uri, parse_endpoint
from nbdmirror.errors import UsageError

# linux/fs.h; ext4, XFS, Btrfs and F2FS answer.
_FS_IOC_GETVERSION: Final = 0x80087601
_IDENTIFYING: Final = ("dm/uuid", "md/uuid", "loop/backing_file", "wwid", "device/wwid", "serial", "device/serial")
# Characters; what is longer, a path as a rule, is shortened to its beginning and a digest.
_LONGEST: Final = 400


def identity_of_file(fd: int, path: str) -> str:
    """The identity of an open regular file."""
    inode = os.fstat(fd).st_ino
    try:
        (generation,) = struct.unpack("l", fcntl.ioctl(fd, _FS_IOC_GETVERSION, bytes(8)))
    except OSError:
        return _bounded(f"file, inode {inode}, {Path(path).absolute()}")
    return f"file, inode {inode}, generation {generation & 0xFFFFFFFF}"


def identity_of_block_device(fd: int, path: str, sys: Path = Path("/sys/dev/block")) -> str:
    """The identity of an open block device; `sys` is where the kernel tells of them."""
    number = os.fstat(fd).st_rdev
    entry = (sys / f"{os.major(number)}:{os.minor(number)}").resolve()
    partition = _said(entry / "partition")
    disk = entry.parent if partition else entry
    for attribute in _IDENTIFYING:
        if value := _said(disk / attribute):
            return _bounded(f"block device, {attribute} {value}" + (f", partition {partition}" if partition else ""))
    return _bounded(f"block device, {Path(path).absolute()}")


def identity_of_export(name: str) -> str:
    """The identity of what an NBD server exports, from the device's name."""
    if looks_like_uri(name):
        try:
            endpoint = parse_endpoint(name)
        except UsageError:
            return _bounded(f"NBD, {name}")
        address = endpoint.socket or f"{endpoint.host}:{endpoint.port}"
        name = f"{endpoint.transport} {address}, export '{endpoint.export}'"
    return _bounded(f"NBD, {name}")


def _said(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def _bounded(text: str) -> str:
    data = text.encode(errors="surrogateescape")
    text = data.decode(errors="backslashreplace")
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}... {hashlib.sha256(data).hexdigest()}"
