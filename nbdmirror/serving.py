"""What `serve` was asked for, and what follows from it: where to listen, how to speak TLS, whom to let in.

Rules:
1. Options that contradict each other are a UsageError that names both, before anything is opened or listens.
2. What would serve the disk to more people than was asked for is refused: the open network without TLS needs --insecure.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol

from nbdmirror.commands.saved_jobs import Resume
from nbdmirror.devices.uri import DEFAULT_PORT
from nbdmirror.errors import UsageError
from nbdmirror.protocol.constants import MAX_STRING, TlsMode
from nbdmirror.server.access import Access, parse_network
from nbdmirror.server.tls import NO_TLS, Tls, certificate_context, psk_context
from nbdmirror.sockets import listen_tcp, listen_unix, listen_vsock
from nbdmirror.state import StateOptions
from nbdmirror.systemd import Activated

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from contextlib import AbstractContextManager

    from nbdmirror.sockets import ServerSocket

DEFAULT_NODE_NAME: Final = "source"
# The options that say where to listen, by their parameters' names.
LISTENING: Final = frozenset(("socket", "port", "bind", "vsock"))
_LOOPBACK: Final = "127.0.0.1"
_MAX_U32: Final = 2**32 - 1


# The options that count at the start alone, and what the configuration file calls them.
FIXED: Final = {
    "socket_path": "server.socket",
    "port": "server.port",
    "bind": "server.bind",
    "vsock": "server.vsock",
    "qmp_paths": "server.qmp",
    "pid_file": "server.pid_file",
    "metrics": "metrics.listen",
}


class Source(Protocol):
    """Where options come from that may change while the daemon runs."""

    def read(self) -> ServeOptions:
        """The options as they are now; raises UsageError."""

    def blamed(self) -> AbstractContextManager[None]:
        """Lets a UsageError say where the option stands that it is about."""


@dataclass(frozen=True, slots=True)
class DiskOptions:
    """A disk that is to be served: a path or an NBD URI, its node, and its export."""

    disk: str
    node_name: str = DEFAULT_NODE_NAME
    export_name: str = ""
    description: str = ""
    read_only: bool = False


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """What `serve` was asked for.

    `log_level` is None where the command line has said it, and `metrics` where there are to be none.
    At most one of `socket_path`, `port` (with `bind`) and `vsock` (CID or None for any, and port) is set, and none
    with sockets for NBD that were passed; without any it is TCP on this host. File descriptors: `ready_fd`
    gets the READY line, `background_fd`, too, once stdio has been left behind, and `parent_fd` is readable at the parent's end.
    """

    disks: tuple[DiskOptions, ...]
    socket_path: str | None = None
    port: int | None = None
    bind: str | None = None
    vsock: tuple[int | None, int] | None = None
    activated: Activated = field(default_factory=Activated)
    insecure: bool = False
    max_clients: int = 0
    qmp_paths: tuple[str, ...] = ()
    run: str | None = None
    ready_fd: int | None = None
    background_fd: int | None = None
    parent_fd: int | None = None
    pid_file: str | None = None
    tls: TlsMode | None = None
    tls_certificates: str | None = None
    tls_verify_peer: bool = False
    tls_psk: str | None = None
    allow_ip: tuple[str, ...] = ()
    allow_dn: tuple[str, ...] = ()
    state: StateOptions = field(default_factory=StateOptions)
    resume: Resume = Resume.AUTO
    metrics: str | None = None
    log_level: str | None = None

    @property
    def keeps_bitmaps(self) -> bool:
        """Whether a disk has bitmaps from the start on, or bitmaps and jobs that outlive the daemon."""
        return self.state.directory is not None or bool(self.state.bitmaps)

    @property
    def is_tcp(self) -> bool:
        """Whether every client comes by TCP."""
        if self.activated.nbd:
            return all(_is_tcp(each) for each in self.activated.nbd)
        return self.socket_path is None and self.vsock is None


def check_names(options: ServeOptions) -> None:
    """Raises UsageError where the options say two things at once of where to listen, or too much of what is served."""
    given = {
        "-k": options.socket_path is not None,
        "-p": options.port is not None,
        "-b": options.bind is not None,
        "--vsock": options.vsock is not None,
    }
    named = [option for option, is_given in given.items() if is_given]
    if named and options.activated.nbd:
        raise UsageError(f"{' and '.join(named)}: the service manager has passed a socket to listen on; leave it out")
    if options.metrics is not None and options.activated.metrics:
        raise UsageError("--metrics: the service manager has passed a socket for metrics; leave it out")
    if len(named) > 1 and named != ["-p", "-b"]:
        raise UsageError(f"{' and '.join(named)} exclude each other: a Unix socket (-k), TCP (-p, -b) or a vsock (--vsock)")
    if options.socket_path is not None and options.socket_path in options.qmp_paths:
        raise UsageError(f"'{options.socket_path}' can't be both the NBD socket and a control socket")
    if any(max(len(disk.export_name.encode()), len(disk.description.encode())) > MAX_STRING for disk in options.disks):
        raise UsageError(f"export name and description are at most {MAX_STRING} bytes each")
    if len(options.disks) > 1 and options.keeps_bitmaps:
        raise UsageError(
            f"--state-dir and -B are for one disk, and there are {len(options.disks)} exports; give it a daemon of its own"
        )


def parse_vsock(text: str) -> tuple[int | None, int]:
    """[CID:]PORT; raises UsageError."""
    # No port 0: the kernel's choice has ten digits, which libnbd does not take in a URI.
    *cid, port = (int(part) if part.isdecimal() and part.isascii() else 0 for part in text.split(":"))
    if len(cid) > 1 or not all(0 < number <= _MAX_U32 for number in (*cid, port)):
        raise UsageError(f"'{text}' is not [CID:]PORT, which are numbers from 1 on")
    return (cid[0] if cid else None), port


def server_sockets(options: ServeOptions) -> Sequence[ServerSocket]:
    """The sockets to serve NBD on, listening. Raises UsageError and ListenError."""
    if options.activated.nbd:
        return options.activated.nbd
    if options.socket_path is not None:
        return [listen_unix(options.socket_path)]
    if options.vsock is not None:
        return [listen_vsock(*options.vsock)]
    port = DEFAULT_PORT if options.port is None else options.port
    return [listen_tcp(options.bind or _LOOPBACK, port)]


def tls_of(options: ServeOptions) -> Tls:
    """How to speak TLS, if at all. Who names certificates or keys wants TLS required, unless they say otherwise."""
    has_identity = options.tls_certificates is not None or options.tls_psk is not None
    mode = options.tls or (TlsMode.REQUIRE if has_identity else TlsMode.OFF)
    if options.tls_certificates is not None and options.tls_psk is not None:
        raise UsageError("--tls-certificates and --tls-psk exclude each other")
    if mode is TlsMode.OFF and has_identity:
        raise UsageError("--tls off contradicts --tls-certificates and --tls-psk; leave one of them out")
    if mode is not TlsMode.OFF and not has_identity:
        raise UsageError(f"--tls {mode.value} needs --tls-certificates DIR or --tls-psk FILE")
    if options.tls_verify_peer and options.tls_certificates is None:
        raise UsageError("--tls-verify-peer verifies certificates: it needs --tls-certificates DIR")
    if options.tls_certificates is not None:
        return Tls(mode, certificate_context(options.tls_certificates, verify_peer=options.tls_verify_peer))
    return NO_TLS if options.tls_psk is None else Tls(mode, psk_context(options.tls_psk))


def access_of(options: ServeOptions) -> Access:
    """Who may connect. What would let somebody past a list is refused."""
    if options.allow_ip and not options.is_tcp:
        raise UsageError("--allow-ip goes with TCP: clients of a Unix socket or a vsock have no IP address")
    if options.allow_dn and not options.tls_verify_peer:
        raise UsageError("--allow-dn looks at clients' certificates: it needs --tls-verify-peer")
    if options.allow_dn and options.tls is TlsMode.ON:
        raise UsageError("--allow-dn needs --tls require: with --tls on, clients may come without a certificate")
    return Access(tuple(map(parse_network, options.allow_ip)), options.allow_dn)


def check_exposure(options: ServeOptions, tls: Tls) -> None:
    """Raises UsageError where anybody on the network could read and write the disk (rule 2)."""
    if options.insecure or tls.mode is TlsMode.REQUIRE:
        return
    for address in _tcp_addresses(options):
        if not _is_loopback(address):
            raise UsageError(
                f"serving on {address} without TLS lets anybody on the network read and write the disk; "
                "bind (-b) to 127.0.0.1, require TLS with --tls-certificates, or add --insecure if the network is yours alone"
            )


def _tcp_addresses(options: ServeOptions) -> Iterable[str]:
    if options.activated.nbd:
        return [each.sock.getsockname()[0] for each in options.activated.nbd if _is_tcp(each)]
    return [options.bind or _LOOPBACK] if options.is_tcp else []


def _is_tcp(server: ServerSocket) -> bool:
    return server.sock.family in (socket.AF_INET, socket.AF_INET6)


def _is_loopback(host: str) -> bool:
    """Whether every address of `host` is this machine's own; one that has none is refused by who listens on it."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return True
    return all(str(address[4][0]).startswith("127.") or address[4][0] == "::1" for address in found)
