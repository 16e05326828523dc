"""Who may connect: networks, and subjects of client certificates.

Rules:
1. An empty list lets everybody in; a list lets in who matches any of its entries, and hangs up on everybody else.
2. A subject is matched as its distinguished name in the form of RFC 4514, most specific first: `CN=web1,O=Example,C=GB`. What
   is special there is escaped, so that a name with a comma in it is not taken for two.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Final, TypeAlias

from nbdmirror.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network
# As `ssl` gives it: relative distinguished names, each of pairs of a type's long name and its value.
Subject: TypeAlias = "Iterable[Sequence[tuple[str, str]]]"

# RFC 4514, section 3.
_SHORT_NAMES: Final = {
    "commonName": "CN",
    "localityName": "L",
    "stateOrProvinceName": "ST",
    "organizationName": "O",
    "organizationalUnitName": "OU",
    "countryName": "C",
    "streetAddress": "STREET",
    "domainComponent": "DC",
    "userId": "UID",
}
_SPECIAL: Final = re.compile(r'[\\,+"<>;=]|^[ #]| $')


@dataclass(frozen=True, slots=True)
class Access:
    """Who may connect: addresses in `networks`, certificates whose subject matches one of `subjects`."""

    networks: tuple[Network, ...] = ()
    subjects: tuple[str, ...] = ()

    def admits_address(self, address: str) -> bool:
        """Whether a client may come from there."""
        if not self.networks:
            return True
        found = ipaddress.ip_address(address)
        mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
        return any((mapped or found) in network for network in self.networks)

    def admits_subject(self, name: str) -> bool:
        """Whether a client may show a certificate for that distinguished name."""
        return not self.subjects or any(fnmatchcase(name, pattern) for pattern in self.subjects)


EVERYBODY: Final = Access()


def parse_network(text: str) -> Network:
    """An address, or a network as ADDRESS/BITS."""
    try:
        return ipaddress.ip_network(text)
    except ValueError as error:
        raise UsageError(f"'{text}' is no network ({error}); write ADDRESS or ADDRESS/BITS") from None


def distinguished_name(subject: Subject) -> str:
    """A certificate's subject on one line (rule 2)."""
    names = ["+".join(f"{_SHORT_NAMES.get(kind, kind)}={_escaped(value)}" for kind, value in part) for part in subject]
    return ",".join(reversed(names))


def _escaped(value: str) -> str:
    return _SPECIAL.sub(lambda match: "\\" + match[0], value).replace("\0", "\\00")
