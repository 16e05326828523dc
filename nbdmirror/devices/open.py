"""From what the user typed to an open device.

    disk.img, /dev/vdb, file:///srv/disk.img     FileDevice
    nbd://..., nbd+unix://..., nbd:HOST:PORT...  NbdDevice
    ["nbdkit", "memory", "1G"]                   NbdDevice over a captive server, which ends with it

Rules:
1. What looks like an NBD endpoint is one, even if a file of that name exists: that is reached as `./nbd:...`.
2. Other schemes are refused by name instead of being looked for as files.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Final
from urllib.parse import unquote

from nbdmirror.devices.file import FileDevice
from nbdmirror.devices.nbd import NbdDevice
from nbdmirror.devices.nbd_link import DEFAULT_LINK, LinkOptions
from nbdmirror.devices.uri import looks_like_uri, parse_endpoint
from nbdmirror.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nbdmirror.devices.base import BlockDevice

_SCHEME: Final = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)
_FILE_URI: Final = re.compile(r"file:(?://(?:localhost)?)?(/(?!/)[^?#]*)", re.IGNORECASE)


async def open_device(
    target: str | Sequence[str],
    *,
    read_only: bool = False,
    connections: int = 4,
    link: LinkOptions = DEFAULT_LINK,
    tls_verify: bool = True,
) -> BlockDevice:
    """Open a path, a URI, or the command (a list) of a captive server.

    `connections`, `link` and `tls_verify` are for NBD URIs; without `tls_verify` any certificate will do. Raises UsageError
    and DeviceError.
    """
    if not isinstance(target, str):
        return await NbdDevice.open_command(target, read_only=read_only)
    if looks_like_uri(target):
        endpoint = parse_endpoint(target)
        if endpoint.tls is not None and not tls_verify:
            endpoint = replace(endpoint, tls=replace(endpoint.tls, verify=False))
        return await NbdDevice.open(endpoint, connections=connections, read_only=read_only, link=link)
    return FileDevice.open(local_path(target), read_only=read_only)


def local_path(target: str) -> str:
    """The path of what is no NBD endpoint; raises UsageError for what is no path either."""
    if not target:
        raise UsageError("the name of a disk can't be empty: give a path or an NBD URI")
    if target.lower().startswith("file:"):
        if (match := _FILE_URI.fullmatch(target)) is None:
            raise UsageError(f"'{target}' is not a local file: write file:///PATH, or just the path")
        return unquote(match[1], errors="surrogateescape")
    if (match := _SCHEME.match(target)) is not None:
        raise UsageError(f"'{target}': '{match[1]}' is not supported; give a path, or the URI of an NBD server for it")
    return target
