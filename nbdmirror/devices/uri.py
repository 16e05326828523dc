"""What users type for an NBD endpoint, as data: `NBD URIs` and the older pseudo-URIs of QEMU. Pure: no I/O.

    nbd://HOST[:10809][/EXPORT]             TCP; nbd+tcp:// is the same; IPv6 in brackets
    nbd+unix:///[EXPORT]?socket=PATH        a Unix socket; a relative PATH is relative to the working directory
    nbd+vsock://[CID][:10809][/EXPORT]      a virtual machine's socket; CID 2, the host, where none is given
    nbds://, nbds+unix://, nbds+vsock://    the same over TLS, or not at all
    nbd:HOST:PORT[:exportname=NAME]         QEMU's older forms, which management tools still write
    nbd:unix:PATH[:exportname=NAME]

Rules:
1. Everything after the first slash of the path is the export's name, percent-decoded: `nbd://h//disk` is export `/disk`.
2. What is not understood is refused in one line which names the text and the remedy: a misspelt parameter must not
   silently turn TLS options off. Only parameters called `x-*` are ignored (NBD URI text, "experimental").
3. `endpoint.uri` is the one spelling printed for users; parsing it gives an equal endpoint.
4. A server's certificate is verified unless the text says `tls-verify-peer=false`, in exactly libnbd's words for that.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Literal
from urllib.parse import quote, unquote, unquote_to_bytes

from nbdmirror.errors import UsageError
from nbdmirror.protocol.constants import MAX_STRING
from nbdmirror.sockets import MAX_SOCKET_PATH

Transport = Literal["tcp", "unix", "vsock"]

DEFAULT_PORT: Final = 10809  # IANA, and the NBD URI text
# <linux/vm_sockets.h>: the host, and numbers of 32 bits for both halves of an address.
_VSOCK_HOST: Final = "2"
_MAX_U32: Final = 2**32 - 1

_LOOKS_LIKE: Final = re.compile(r"nbds?(\+[a-z]+)?:", re.IGNORECASE)
_URI: Final = re.compile(r"(?P<scheme>[a-z+]+)://(?P<authority>[^/?#]*)(?P<path>/[^?#]*)?(\?(?P<query>[^#]*))?", re.IGNORECASE)
_AUTHORITY: Final = re.compile(r"((?P<user>[^@]*)@)?(\[(?P<ipv6>[^\]]*)\]|(?P<host>[^:\[\]@]*))(:(?P<port>\d*))?")
_SCHEMES: Final[dict[str, tuple[Transport, bool]]] = {
    "nbd": ("tcp", False),
    "nbd+tcp": ("tcp", False),
    "nbd+unix": ("unix", False),
    "nbd+vsock": ("vsock", False),
    "nbds": ("tcp", True),
    "nbds+tcp": ("tcp", True),
    "nbds+unix": ("unix", True),
    "nbds+vsock": ("vsock", True),
}
_TLS_PARAMETERS: Final = frozenset({"tls-certificates", "tls-psk-file", "tls-hostname", "tls-type", "tls-verify-peer"})
_YES: Final = frozenset({"1", "true", "yes", "on"})
_NO: Final = frozenset({"0", "false", "no", "off"})
# Left as they are where a URI is printed: allowed there by RFC 3986, and taken literally by every client.
_SAFE_IN_PATH: Final = "/:@!$,;=~-._"
_SAFE_IN_QUERY: Final = "/:@,~-._"


@dataclass(frozen=True, slots=True)
class ClientTls:
    """TLS or nothing, and who we are there.

    `certificates` is a directory of ca-cert.pem, client-cert.pem and client-key.pem, the system's authorities where it is
    empty; `psk_file` holds pre-shared keys instead, and `username` says which of them is ours. `hostname` is the name in
    the server's certificate where that is not the host's. Without `verify` any certificate will do.
    """

    certificates: str = ""
    psk_file: str = ""
    username: str = ""
    hostname: str = ""
    verify: bool = True


@dataclass(frozen=True, slots=True)
class NbdEndpoint:
    """Where an export is and what it is called, in clear if `tls` is None.

    `host` and `port` belong to tcp and vsock (there the host is the CID in decimal), `socket` to unix. Raises UsageError
    for what no endpoint can have.
    """

    transport: Transport
    host: str = ""
    port: int = 0
    socket: str = ""
    export: str = ""
    tls: ClientTls | None = None

    def __post_init__(self) -> None:
        if self.transport == "unix":
            _check_socket(self.socket)
        elif not 0 < self.port <= (_MAX_U32 if self.transport == "vsock" else 65535):
            raise UsageError(f"port {self.port} of NBD server '{self.host}' is not a port number")
        _check_export(self.export)

    @classmethod
    def unix(cls, path: str, export: str = "") -> NbdEndpoint:
        """An export on a Unix socket."""
        return cls("unix", socket=path, export=export)

    @classmethod
    def tcp(cls, host: str, port: int = DEFAULT_PORT, export: str = "") -> NbdEndpoint:
        """An export on a TCP port."""
        return cls("tcp", host=host, port=port, export=export)

    @property
    def uri(self) -> str:
        """The preferred URI, for users to read and to paste into any NBD client."""
        scheme = ("nbds" if self.tls else "nbd") + ("" if self.transport == "tcp" else f"+{self.transport}")
        path = "/" + quote(self.export, _SAFE_IN_PATH, errors="surrogateescape") if self.export else ""
        authority = f"{quote(self.tls.username, '~-._')}@" if self.tls and self.tls.username else ""
        if self.transport == "unix":
            path = path or "/"
        elif ":" in self.host:
            authority += f"[{quote(self.host, ':')}]:{self.port}"
        else:
            authority += f"{quote(self.host, '')}:{self.port}"
        query = "&".join(f"{key}={quote(value, _SAFE_IN_QUERY, errors='surrogateescape')}" for key, value in self._parameters())
        return f"{scheme}://{authority}{path}{'?' if query else ''}{query}"

    def _parameters(self) -> list[tuple[str, str]]:
        tls = self.tls or ClientTls()
        pairs = (
            ("socket", self.socket),
            ("tls-certificates", tls.certificates),
            ("tls-psk-file", tls.psk_file),
            ("tls-hostname", tls.hostname),
            ("tls-verify-peer", "" if tls.verify else "false"),
        )
        return [(key, value) for key, value in pairs if value]

    def __str__(self) -> str:
        return self.uri


def looks_like_uri(text: str) -> bool:
    """Whether `text` is meant as an NBD endpoint rather than a path; a file of such a name is reached as `./nbd:...`."""
    return _LOOKS_LIKE.match(text) is not None


def parse_endpoint(text: str) -> NbdEndpoint:
    """The endpoint that `text` names; UsageError, in one line with the remedy, where it names none."""
    if text[:4].lower() == "nbd:" and not text.startswith("//", 4):
        return _parse_qemu(text)
    match = _URI.fullmatch(text)
    if match is None:
        if "#" in text:
            raise _refusal(text, "a '#' in an export's name or a path is written as %23")
        raise _refusal(text, "write nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=PATH")
    if (known := _SCHEMES.get(match["scheme"].lower())) is None:
        raise _refusal(text, f"'{match['scheme']}' is none of {', '.join(sorted(_SCHEMES))}")
    transport, tls = known
    parameters = _parse_query(text, match["query"] or "", transport, tls)
    user, host, port = _parse_authority(text, match["authority"], transport)
    return NbdEndpoint(
        transport,
        host=host,
        port=port,
        socket=parameters.get("socket", ""),
        export=_decode(text, (match["path"] or "/")[1:]),
        tls=_client_tls(user, parameters) if tls else None,
    )


def _client_tls(user: str, parameters: dict[str, str]) -> ClientTls:
    return ClientTls(
        certificates=parameters.get("tls-certificates", ""),
        psk_file=parameters.get("tls-psk-file", ""),
        username=user,
        hostname=parameters.get("tls-hostname", ""),
        verify=parameters.get("tls-verify-peer", "true").lower() in _YES,
    )


def _parse_authority(text: str, authority: str, transport: Transport) -> tuple[str, str, int]:
    """User, host and port: `[user@]host[:port]`."""
    match = _AUTHORITY.fullmatch(authority)
    if match is None:
        raise _refusal(text, f"'{authority}' is not HOST or HOST:PORT; an IPv6 address goes in brackets: [::1]:{DEFAULT_PORT}")
    user = _decode(text, match["user"] or "")
    if ":" in (match["user"] or ""):
        raise _refusal(text, "NBD has no passwords; a pre-shared key is read from tls-psk-file=FILE")
    host = _decode(text, match["ipv6"] or match["host"] or "")
    port = int(match["port"]) if match["port"] else DEFAULT_PORT
    if transport == "unix":
        if host or match["port"]:
            raise _refusal(text, "a Unix socket has no host: write three slashes, nbd+unix:///EXPORT?socket=PATH")
        return user, "", 0
    if not 0 < port <= (_MAX_U32 if transport == "vsock" else 65535):
        raise _refusal(text, f"{port} is not a port number")
    if transport == "tcp":
        return user, host or "localhost", port
    if host and not (host.isdecimal() and host.isascii() and int(host) <= _MAX_U32):
        raise _refusal(text, f"'{host}' is not a vsock CID, which is a number: nbd+vsock://3:{port}/EXPORT")
    return user, host or _VSOCK_HOST, port


def _parse_query(text: str, query: str, transport: Transport, tls: bool) -> dict[str, str]:  # noqa: FBT001
    """The parameters, each known, given once and fit for the scheme."""
    parameters: dict[str, str] = {}
    for item in filter(None, query.split("&")):
        key, _, value = item.partition("=")
        if key.lower().startswith("x-"):
            continue
        if key != "socket" and key not in _TLS_PARAMETERS:
            raise _refusal(text, f"unknown parameter '{key}'; known are socket, {', '.join(sorted(_TLS_PARAMETERS))}")
        if key in parameters:
            raise _refusal(text, f"parameter '{key}' is given twice")
        if key in _TLS_PARAMETERS and not tls:
            raise _refusal(text, f"'{key}' goes with TLS: write nbds:// or nbds+unix:// for it")
        parameters[key] = _decode(text, value)
    if transport == "unix" and not parameters.get("socket"):
        raise _refusal(text, "a Unix socket is named by its path: add ?socket=PATH")
    if transport != "unix" and "socket" in parameters:
        raise _refusal(text, "socket= goes with nbd+unix:///EXPORT?socket=PATH")
    kind, has_key = parameters.pop("tls-type", "").lower(), "tls-psk-file" in parameters
    if kind == "psk" and not has_key:
        raise _refusal(text, "a pre-shared key is in a file: add tls-psk-file=FILE")
    if kind not in ("", "psk" if has_key else "x509"):
        raise _refusal(text, f"tls-type={kind} is not possible here; with certificates it is x509, with tls-psk-file=FILE psk")
    if parameters.get("tls-verify-peer", "true").lower() not in _YES | _NO:
        raise _refusal(text, "tls-verify-peer is true or false")
    return parameters


def _parse_qemu(text: str) -> NbdEndpoint:
    """QEMU's `nbd:unix:PATH` and `nbd:HOST:PORT`, with the export's name, taken literally, after `:exportname=`."""
    where, _, export = text[4:].partition(":exportname=")
    if where.startswith("unix:") and len(where) > len("unix:"):
        return NbdEndpoint.unix(where.removeprefix("unix:"), export)
    match = _AUTHORITY.fullmatch(where)
    if match is None or match["user"] is not None or not match["port"] or not 0 < int(match["port"]) < 65536:
        raise _refusal(text, "write nbd:HOST:PORT:exportname=NAME, nbd:unix:PATH:exportname=NAME, or better an nbd:// URI")
    return NbdEndpoint.tcp(match["ipv6"] or match["host"] or "localhost", int(match["port"]), export)


def _decode(text: str, part: str) -> str:
    """Percent-decoded; bytes which are not UTF-8 stay bytes, as in file names."""
    if re.search(r"%(?![0-9a-fA-F]{2})", part):
        raise _refusal(text, f"'{part}' has a stray '%', which is written as %25")
    if b"\0" in unquote_to_bytes(part):
        raise _refusal(text, "neither names nor paths can have a NUL in them")
    return unquote(part, errors="surrogateescape")


def _check_socket(path: str) -> None:
    if not path:
        raise UsageError("a Unix socket needs a path")
    if (length := len(path.encode(errors="surrogateescape"))) > MAX_SOCKET_PATH:
        raise UsageError(
            f"the socket path '{path}' is {length} bytes long, and the system takes {MAX_SOCKET_PATH}: "
            "use a shorter one, or one relative to the working directory"
        )


def _check_export(name: str) -> None:
    try:
        length = len(name.encode())
    except UnicodeEncodeError:
        raise UsageError(f"the export name {name!a} is not UTF-8, which NBD wants") from None
    if length > MAX_STRING:
        raise UsageError(f"the export name '{name[:20]}...' is {length} bytes long, and NBD takes {MAX_STRING} bytes")


def _refusal(text: str, remedy: str) -> UsageError:
    shown = text if text.isprintable() else ascii(text)[1:-1]
    return UsageError(f"'{shown}' is not an NBD endpoint: {remedy}")
