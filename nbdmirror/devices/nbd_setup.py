"""What NbdConnection needs for getting connected, and which needs no libnbd of its own: names, TLS, waiting, failures.

Rules:
1. No import of libnbd here: a handle comes in as an argument.
2. TLS is never less than was asked for: what can't be verified is refused before anything is sent.
"""

from __future__ import annotations

import asyncio
import errno
import os
import re
import socket
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeAlias

from nbdmirror.errors import DeviceError, UsageError

if TYPE_CHECKING:
    from nbdmirror.devices.uri import NbdEndpoint

# libnbd's AIO_DIRECTION_* bits and TLS_REQUIRE (libnbd(3)); fixed by its ABI.
READ: Final = 1
WRITE: Final = 2
_TLS_REQUIRE: Final = 2

# The binding ships no types.
Handle: TypeAlias = Any


class LibnbdError(Protocol):
    """`nbd.Error`: the message, and the errno or 0."""

    string: str
    errnum: int


def set_up_tls(handle: Handle, endpoint: NbdEndpoint) -> None:
    """TLS or nothing, with the server verified; UsageError where this libnbd can't do that (rule 2)."""
    if not handle.supports_tls():
        raise UsageError(f"{endpoint.uri}: this libnbd was built without TLS")
    if endpoint.tls_hostname and not hasattr(handle, "set_tls_hostname"):
        raise UsageError(
            f"{endpoint.uri}: this libnbd can't verify another name than the host's; use the certificate's name as the host"
        )
    if endpoint.transport != "tcp" and not endpoint.tls_psk_file and not endpoint.tls_hostname:
        raise UsageError(
            f"{endpoint.uri}: libnbd can't verify a certificate without a host name, so anyone could answer; "
            "use tls-psk-file=FILE, or nbds://HOST over TCP"
        )
    handle.set_tls(_TLS_REQUIRE)
    handle.set_tls_verify_peer(True)
    for value, setter in (
        (endpoint.tls_username, handle.set_tls_username),
        (endpoint.tls_certificates, handle.set_tls_certificates),
        (endpoint.tls_psk_file, handle.set_tls_psk_file),
    ):
        if value:
            setter(value)
    if endpoint.tls_hostname:
        handle.set_tls_hostname(endpoint.tls_hostname)


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
