"""TLS for the server: from files to an `ssl.SSLContext` that is known to work.

    DIR/ca-cert.pem  [DIR/ca-crl.pem]       who signs clients' certificates, and which of those are revoked
    DIR/server-cert.pem  DIR/server-key.pem our own; the names are those of QEMU, nbdkit and libnbd
    keys.psk                                lines `user:hexkey`, instead of certificates

Rules:
1. Whatever would make every client fail is found before anything listens, and is a UsageError that names the file: the context
   is tried in memory, against a client that trusts our certificate and nothing else.
2. TLS 1.2 is the least that is spoken (section "TLS versions"). No compression, renegotiation or resumption.
3. A client's certificate is asked for only where it must be shown, and then by everybody.
"""

from __future__ import annotations

import asyncio
import errno
import os
import re
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from nbdmirror.errors import UsageError
from nbdmirror.protocol.constants import TlsMode
from nbdmirror.server.access import distinguished_name

if TYPE_CHECKING:
    from collections.abc import Mapping

CA_CERT: Final = "ca-cert.pem"
CA_CRL: Final = "ca-crl.pem"
SERVER_CERT: Final = "server-cert.pem"
SERVER_KEY: Final = "server-key.pem"

# How long a client may take to return the goodbye of TLS before the socket is closed without it.
_GOODBYE_SECONDS: Final = 5.0
_PSK_LINE: Final = re.compile(r"(?P<user>[^:]+):(?P<key>([0-9a-fA-F]{2})+)")
# Each with forward secrecy, and what GnuTLS offers with +ECDHE-PSK. Keys without certificates exist up to TLS 1.2 in OpenSSL.
_PSK_CIPHERS: Final = "kECDHEPSK:!eNULL"


@dataclass(frozen=True, slots=True)
class Tls:
    """How a server wants to be spoken to."""

    mode: TlsMode = TlsMode.OFF
    context: ssl.SSLContext | None = None


NO_TLS: Final = Tls()


async def start_tls(tls: Tls, transport: asyncio.Transport, protocol: asyncio.BaseProtocol) -> asyncio.Transport:
    """The server's side of the TLS handshake, over a transport that is not reading. Raises OSError where it fails.

    How long it may take is the listener's to say, as for all of the haggling.
    """
    assert tls.context is not None, "TLS is only offered where it was configured"
    if transport.is_closing():
        raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
    secure = await asyncio.get_running_loop().start_tls(
        transport,
        protocol,
        tls.context,
        server_side=True,
        ssl_shutdown_timeout=_GOODBYE_SECONDS,
    )
    if secure is None:
        raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
    return secure


def subject_of(transport: asyncio.Transport) -> str:
    """The distinguished name in the client's certificate; empty where it was not asked for one."""
    certificate = transport.get_extra_info("peercert") or {}
    return distinguished_name(certificate.get("subject", ()))


def certificate_context(directory: str, *, verify_peer: bool = False) -> ssl.SSLContext:
    """A server with the certificate of `directory`; with `verify_peer` clients need one that its CA has signed."""
    folder = Path(directory)
    for name in (SERVER_CERT, SERVER_KEY, *((CA_CERT,) if verify_peer else ())):
        _check_readable(folder / name)
    context = _context()
    _load_own(context, folder / SERVER_CERT, folder / SERVER_KEY)
    _try_out(context, folder / SERVER_CERT)
    if verify_peer:
        _load_ca(context, folder)
    return context


def psk_context(path: str) -> ssl.SSLContext:
    """A server that knows its clients by the pre-shared keys of a file."""
    keys = parse_psk(path, _check_readable(Path(path)))
    # Python 3.13 brought it. Fetched by name, for the types of older versions do not have it.
    context: Any = _context()
    if not hasattr(context, "set_psk_server_callback"):
        raise UsageError("pre-shared keys for TLS need Python 3.13 or newer; use --tls-certificates")
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(_PSK_CIPHERS)
    context.set_psk_server_callback(lambda user: keys.get(user or "", b""))
    result: ssl.SSLContext = context
    return result


def parse_psk(path: str, text: str) -> Mapping[str, bytes]:
    """The keys by user. Raises UsageError for a line that is none: a key that is silently dropped locks somebody out."""
    keys: dict[str, bytes] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        match = _PSK_LINE.fullmatch(line.strip())
        if match is None:
            raise UsageError(f"'{path}', line {number}: write USER:KEY with the key in hexadecimal, as psktool does")
        if match["user"] in keys:
            raise UsageError(f"'{path}', line {number}: user '{match['user']}' has a key already")
        keys[match["user"]] = bytes.fromhex(match["key"])
    if not keys:
        raise UsageError(f"'{path}' has no keys; psktool -u USER -p FILE makes one")
    return keys


def reason_of(error: OSError) -> str:
    """A failure of OpenSSL's in its words, without its numbers."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message
    if isinstance(error, ssl.SSLError) and error.reason:
        return error.reason.lower().replace("_", " ")
    return error.strerror or str(error) or "the client hung up"  # the loops' ConnectionResetError says nothing


def _context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2  # rule 2
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_TICKET
    context.num_tickets = 0
    return context


def _check_readable(path: Path) -> str:
    """The content of a file that has to be there."""
    try:
        return path.read_text()
    except OSError as error:
        raise UsageError(f"cannot read '{path}': {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"cannot use '{path}': it is not a text file") from None


def _load_own(context: ssl.SSLContext, certificate: Path, key: Path) -> None:
    try:
        # Without a password OpenSSL would ask for one on the terminal.
        context.load_cert_chain(certificate, key, password="")
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise UsageError(f"'{key}' is not the key of '{certificate}'") from None
        remedy = "both must be PEM, the key without a password"
        raise UsageError(f"cannot use '{certificate}' with '{key}' ({reason_of(error)}); {remedy}") from None


def _load_ca(context: ssl.SSLContext, folder: Path) -> None:
    context.verify_mode = ssl.CERT_REQUIRED
    revoked = folder / CA_CRL
    files = [folder / CA_CERT]
    if revoked.exists():
        _check_readable(revoked)
        files.append(revoked)
        context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
    for path in files:
        try:
            context.load_verify_locations(path)
        except ssl.SSLError as error:
            raise UsageError(f"cannot use '{path}' ({reason_of(error)}); it must be PEM") from None


def _try_out(server: ssl.SSLContext, certificate: Path) -> None:
    """A handshake in memory (rule 1): that of a client to whom only the dates and the purpose of our certificate matter."""
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    client.load_verify_locations(certificate)
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = (client.wrap_bio(down, up), server.wrap_bio(up, down, server_side=True))
    try:
        for end in (*ends, *ends):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
    except ssl.SSLError as error:
        raise UsageError(f"no client would accept '{certificate}': {reason_of(error)}") from None
