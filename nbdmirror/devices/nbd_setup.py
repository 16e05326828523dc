"""What NbdConnection needs for getting connected, and which needs no libnbd of its own: names, TLS, waiting, failures.

Rules:
1. No import of libnbd here: a handle comes in as an argument.
2. TLS is never less than was asked for: what can't be verified is refused before anything is sent, unless the user said
   that it need not be.
3. Two exports are taken for the same if they have the same size and block sizes, and are both writable or both not. An export
   that offers less than the other is not the same one: what is no longer offered may have been relied upon.
"""

from __future__ import annotations

import asyncio
import errno
import os
import re
import socket
import struct
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeAlias

from nbdmirror.devices.base import Capabilities
from nbdmirror.errors import DeviceError, UsageError
from nbdmirror.protocol.constants import BASE_ALLOCATION

if TYPE_CHECKING:
    from nbdmirror.devices.uri import ClientTls, NbdEndpoint

# libnbd's AIO_DIRECTION_* bits, TLS_REQUIRE and SIZE_* (libnbd(3)); fixed by its ABI.
READ: Final = 1
WRITE: Final = 2
_TLS_REQUIRE: Final = 2
_SIZE_MINIMUM, _SIZE_PREFERRED, _SIZE_MAXIMUM = range(3)
# struct linger: on, 0 seconds.
_NO_LINGER: Final = struct.pack("ii", 1, 0)
# What may differ between two answers of one export: whether its disk rotates, and whether it takes more connections.
_UNIMPORTANT: Final = frozenset({"read_only", "rotational", "multi_conn"})

# The binding ships no types.
Handle: TypeAlias = Any


class LibnbdError(Protocol):
    """`nbd.Error`: the message, and the errno or 0."""

    string: str
    errnum: int


@dataclass(frozen=True, slots=True)
class BlockSizes:
    """What the server advertised, in bytes; 0 where it said nothing."""

    minimum: int
    preferred: int
    maximum: int


@dataclass(frozen=True, slots=True)
class ExportInfo:
    """What a server says of an export when it is connected to."""

    size: int
    block_sizes: BlockSizes
    capabilities: Capabilities

    def change_since(self, earlier: ExportInfo) -> str:
        """Why this can't be the export that `earlier` described, or "" if it can (rule 3)."""
        if self.size != earlier.size:
            return f"its size changed from {earlier.size} to {self.size} bytes"
        if self.block_sizes != earlier.block_sizes:
            return f"its block sizes changed from {earlier.block_sizes} to {self.block_sizes}"
        new, old = self.capabilities, earlier.capabilities
        if new.read_only != old.read_only:
            return f"it is {'read-only' if new.read_only else 'writable'} now"
        names = (field.name for field in fields(Capabilities) if field.name not in _UNIMPORTANT)
        if missing := [name for name in names if getattr(old, name) and not getattr(new, name)]:
            return f"it no longer offers {', '.join(missing)}"
        return ""


def learn(handle: Handle) -> ExportInfo:
    """What the server of a connected handle said."""
    extents = handle.can_meta_context(BASE_ALLOCATION)
    return ExportInfo(
        handle.get_size(),
        BlockSizes(*(handle.get_block_size(which) for which in (_SIZE_MINIMUM, _SIZE_PREFERRED, _SIZE_MAXIMUM))),
        Capabilities(
            read_only=handle.is_read_only(),
            flush=handle.can_flush(),
            fua=handle.can_fua(),
            trim=handle.can_trim(),
            zero=handle.can_zero(),
            fast_zero=handle.can_zero() and handle.can_fast_zero(),
            cache=handle.can_cache(),
            extents=extents,
            rotational=handle.is_rotational(),
            multi_conn=handle.can_multi_conn(),
        ),
    )


def set_up_tls(handle: Handle, endpoint: NbdEndpoint, tls: ClientTls) -> None:
    """TLS or nothing, with the server verified; UsageError where this libnbd can't do that (rule 2)."""
    if not handle.supports_tls():
        raise UsageError(f"{endpoint.uri}: this libnbd was built without TLS")
    if tls.hostname and not hasattr(handle, "set_tls_hostname"):
        raise UsageError(
            f"{endpoint.uri}: this libnbd can't verify another name than the host's; use the certificate's name as the host"
        )
    if tls.verify and endpoint.transport != "tcp" and not tls.psk_file and not tls.hostname:
        raise UsageError(
            f"{endpoint.uri}: libnbd can't verify a certificate without a host name, so anyone could answer; "
            "use tls-psk-file=FILE, or nbds://HOST over TCP, or say tls-verify-peer=false (mirror: --tls-no-verify)"
        )
    handle.set_tls(_TLS_REQUIRE)
    handle.set_tls_verify_peer(tls.verify)
    for value, setter in (
        (tls.username, handle.set_tls_username),
        (tls.certificates, handle.set_tls_certificates),
        (tls.psk_file, handle.set_tls_psk_file),
    ):
        if value:
            setter(value)
    if tls.hostname:
        handle.set_tls_hostname(tls.hostname)


def abort_when_closed(fd: int) -> None:
    """Let the system forget what is still to be sent when the socket is closed, instead of delivering it some time later.

    A link that comes back would else bring old writes after newer ones; the goodbye of a healthy connection is sent long
    before. Unix sockets deliver at once and don't mind.
    """
    with socket.socket(fileno=os.dup(fd)) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)


async def resolve(endpoint: NbdEndpoint, timeout: float) -> list[str]:
    """The host's addresses, in the system's order of preference."""
    try:
        async with asyncio.timeout(timeout):
            found = await asyncio.get_running_loop().getaddrinfo(endpoint.host, endpoint.port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        raise DeviceError(errno.EHOSTUNREACH, f"cannot connect to {endpoint.uri} ({error.strerror})") from None
    except TimeoutError:
        raise DeviceError(errno.ETIMEDOUT, f"cannot connect to {endpoint.uri} (name lookup)") from None
    # getnameinfo's spelling of an address keeps the zone of a link-local one.
    names = [socket.getnameinfo(address, socket.NI_NUMERICHOST)[0] for *_, address in found]
    return list(dict.fromkeys(names))


def start_connecting(handle: Handle, endpoint: NbdEndpoint, host: str) -> None:
    """To be called in a thread: `host` may be a name that has to be looked up."""
    if endpoint.transport == "unix":
        handle.aio_connect_unix(endpoint.socket)
    elif endpoint.transport == "vsock":
        handle.aio_connect_vsock(int(host), endpoint.port)
    else:
        handle.aio_connect_tcp(host, str(endpoint.port))


async def wait_for_fd(loop: asyncio.AbstractEventLoop, fd: int, direction: int) -> int:
    """Wait until `fd` is ready in one of the directions; which one is returned."""
    ready: asyncio.Future[int] = loop.create_future()

    def set_ready(which: int) -> None:
        if not ready.done():
            ready.set_result(which)

    try:
        if direction & READ:
            loop.add_reader(fd, set_ready, READ)
        if direction & WRITE:
            loop.add_writer(fd, set_ready, WRITE)
        return await ready
    finally:
        loop.remove_reader(fd)
        loop.remove_writer(fd)


def connect_failure(error: LibnbdError, name: str) -> DeviceError:
    """libnbd's message without its own names in front and the errno's text behind, which DeviceError adds."""
    number = error.errnum or (errno.ECONNRESET if "disconnected" in error.string else errno.EPROTO)
    detail = re.sub(r"^nbd_\w+: |(gnutls_)?handshake: ", "", error.string).removesuffix(f": {os.strerror(number)}")
    if "certificate verification" in detail:  # GnuTLS does not say why
        detail = "its certificate has expired, is for another host, or is not signed by the ca-cert.pem that was given"
    context = f"cannot connect to {name}"
    # Where the system call itself failed, the errno says it all.
    return DeviceError(number, context if detail.startswith(("connect", "socket")) else f"{context} ({detail})")
