"""TlsCredentials: certificates or pre-shared keys that a user has named, for a server or for a client.

Rule: what could not be used later is refused when it is named; the texts are QEMU's where QEMU looks at the same thing.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from nbdmirror.devices.uri import ClientTls
from nbdmirror.errors import StateError, UsageError
from nbdmirror.protocol.constants import TlsMode
from nbdmirror.server.tls import CA_CERT, SERVER_CERT, SERVER_KEY, Tls, certificate_context, parse_psk, psk_context

if TYPE_CHECKING:
    from collections.abc import Iterable

Endpoint = Literal["client", "server"]

PSK_FILE: Final = "keys.psk"
_CLIENT_CERT: Final = "client-cert.pem"
_CLIENT_KEY: Final = "client-key.pem"


@dataclass(frozen=True, slots=True)
class TlsCredentials:
    """A directory of credentials, checked. `tls` is how a server uses them; a client gives libnbd directory and user name.

    A client that does not `verify_peer` talks to any server."""

    directory: str
    endpoint: Endpoint
    tls: Tls | None = None
    psk_username: str | None = None
    verify_peer: bool = True

    def for_client(self, hostname: str) -> ClientTls:
        """What a client needs that expects `hostname`, or the name it connects to; raises StateError."""
        if self.endpoint != "client":
            raise StateError("Expected TLS credentials for a client endpoint")
        if self.psk_username is not None:
            return ClientTls(psk_file=str(Path(self.directory) / PSK_FILE), username=self.psk_username)
        return ClientTls(certificates=self.directory, hostname=hostname, verify=self.verify_peer)

    @classmethod
    def certificates(cls, directory: str, endpoint: Endpoint, *, verify_peer: bool) -> TlsCredentials:
        """Of X.509 certificates; raises StateError."""
        _check_access(directory, (CA_CERT,))
        if endpoint == "server":
            _check_access(directory, (SERVER_CERT, SERVER_KEY))
            try:
                context = certificate_context(directory, verify_peer=verify_peer)
            except UsageError as error:
                raise StateError(str(error)) from None
            return cls(directory, endpoint, Tls(TlsMode.REQUIRE, context))
        if any((Path(directory) / name).exists() for name in (_CLIENT_CERT, _CLIENT_KEY)):
            _check_access(directory, (_CLIENT_CERT, _CLIENT_KEY))
        return cls(directory, endpoint, verify_peer=verify_peer)

    @classmethod
    def keys(cls, directory: str, endpoint: Endpoint, username: str) -> TlsCredentials:
        """Of pre-shared keys; raises StateError."""
        _check_access(directory, (PSK_FILE,))
        path = str(Path(directory) / PSK_FILE)
        try:
            if endpoint == "server":
                return cls(directory, endpoint, Tls(TlsMode.REQUIRE, psk_context(path)))
            known = parse_psk(path, Path(path).read_text(errors="replace"))
        except UsageError as error:
            raise StateError(str(error)) from None
        if username not in known:
            raise StateError(f"Username {username} not found in PSK file {path}")
        return cls(directory, endpoint, psk_username=username)


def _check_access(directory: str, names: Iterable[str]) -> None:
    for name in names:
        path = Path(directory) / name
        try:
            os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        except OSError as error:
            raise StateError(f"Unable to access credentials {path}: {error.strerror}") from None
