"""TLS credentials as objects with an id: object-add and object-del."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Literal

from nbdmirror.errors import NotFoundError, StateError
from nbdmirror.inventory import Inventory
from nbdmirror.qmp.registry import Registry
from nbdmirror.server.tls_credentials import TlsCredentials

_ID: Final = re.compile(r"[A-Za-z][A-Za-z0-9._-]*")


@dataclass(frozen=True, slots=True)
class CertificateOptions:
    """object-add of X.509 certificates."""

    qom_type: Literal["tls-creds-x509"]
    id_: str
    dir_: str | None = None
    endpoint: Literal["client", "server"] = "client"
    verify_peer: bool = True


@dataclass(frozen=True, slots=True)
class PskOptions:
    """object-add of pre-shared keys."""

    qom_type: Literal["tls-creds-psk"]
    id_: str
    dir_: str | None = None
    endpoint: Literal["client", "server"] = "client"
    username: str = "qemu"


class ObjectCommands:
    """Handlers about objects."""

    def __init__(self, inventory: Inventory) -> None:
        self._objects = inventory.objects

    def register(self, registry: Registry) -> None:
        """Name the handlers."""
        registry.command("object-add")(self.object_add)
        registry.command("object-del")(self.object_del)

    def object_add(self, options: CertificateOptions | PskOptions, /) -> None:
        """Check credentials and name them."""
        if not _ID.fullmatch(options.id_):
            raise StateError("Parameter 'id' expects an identifier")
        if options.id_ in self._objects:
            raise StateError(f"attempt to add duplicate property '{options.id_}' to object (type 'container')")
        if options.dir_ is None:
            raise StateError("Missing 'dir' property value")
        if isinstance(options, PskOptions):
            made = TlsCredentials.keys(options.dir_, options.endpoint, options.username)
        else:
            made = TlsCredentials.certificates(options.dir_, options.endpoint, verify_peer=options.verify_peer)
        self._objects[options.id_] = made

    def object_del(self, id_: str) -> None:
        """Forget credentials. Who uses them already goes on with what was read."""
        if self._objects.pop(id_, None) is None:
            raise NotFoundError(f"object '{id_}' not found")
