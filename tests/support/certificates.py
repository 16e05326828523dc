"""Certificates for tests, made with openssl: authorities, and directories as servers and clients of NBD want them.

authority = Authority(tmp_path / "ca")
authority.server(directory)                 ca-cert.pem, server-cert.pem, server-key.pem, for localhost
authority.client(directory, "/O=Us/CN=me")  ca-cert.pem, client-cert.pem, client-key.pem
"""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Final

from tests.support.peers import require
from tests.support.tools import run

if TYPE_CHECKING:
    from pathlib import Path

# Elliptic curves: made in milliseconds.
_KEY: Final = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
LOCALHOST: Final = "DNS:localhost,IP:127.0.0.1"


class Authority:
    """One that signs certificates. `directory` is its own, and is made."""

    def __init__(self, directory: Path, name: str = "the tests") -> None:
        require("openssl")
        directory.mkdir(parents=True)
        self._directory = directory
        self.certificate = directory / "ca-cert.pem"
        self._key = directory / "ca-key.pem"
        (directory / "index").touch()
        self._config = directory / "config"
        self._config.write_text(
            f"[ca]\ndefault_ca=a\n[a]\ndatabase={directory}/index\nnew_certs_dir={directory}\nrand_serial=yes\n"
            f"certificate={self.certificate}\nprivate_key={self._key}\ndefault_md=sha256\npolicy=p\nunique_subject=no\n"
            "default_crl_days=30\ncopy_extensions=copy\n"
            "[p]\ncountryName=optional\norganizationName=optional\ncommonName=supplied\n"
        )
        extensions = ("-addext", "basicConstraints=critical,CA:TRUE", "-addext", "keyUsage=critical,keyCertSign,cRLSign")
        run("openssl", "req", "-x509", *_KEY, "-subj", f"/CN={name}", "-days", "30", *extensions,
            "-keyout", self._key, "-out", self.certificate)  # fmt: skip

    def server(self, directory: Path, *, names: str = LOCALHOST, dates: tuple[str, str] | None = None) -> Path:
        """A server's directory; `dates` are when its certificate begins and ends, as YYYYMMDDHHMMSSZ."""
        return self._issue(directory, "server", "/CN=a server", dates, f"subjectAltName={names}", "extendedKeyUsage=serverAuth")

    def client(self, directory: Path, subject: str = "/CN=a client", *, dates: tuple[str, str] | None = None) -> Path:
        """A client's directory."""
        return self._issue(directory, "client", subject, dates, "extendedKeyUsage=clientAuth")

    def revoke(self, certificate: Path, crl: Path) -> None:
        """Write a list of revoked certificates with this one in it."""
        run("openssl", "ca", "-config", self._config, "-revoke", certificate)
        run("openssl", "ca", "-config", self._config, "-gencrl", "-out", crl)

    def _issue(self, directory: Path, kind: str, subject: str, dates: tuple[str, str] | None, *extensions: str) -> Path:
        directory.mkdir(exist_ok=True)
        key, request = directory / f"{kind}-key.pem", directory / "request"
        added = [word for each in extensions for word in ("-addext", each)]
        run("openssl", "req", "-new", *_KEY, "-subj", subject, *added, "-keyout", key, "-out", request)
        validity = ["-days", "30"] if dates is None else ["-startdate", dates[0], "-enddate", dates[1]]
        run("openssl", "ca", "-batch", "-notext", "-config", self._config, *validity, "-preserveDN",
            "-in", request, "-out", directory / f"{kind}-cert.pem")  # fmt: skip
        request.unlink()
        shutil.copy(self.certificate, directory / "ca-cert.pem")
        return directory


EXPIRED: Final = ("20200101000000Z", "20200201000000Z")
NOT_YET: Final = ("21000101000000Z", "21000201000000Z")
