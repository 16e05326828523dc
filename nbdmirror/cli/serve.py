"""`nbdmirror serve`: export a disk and track its writes. qemu-nbd's short flags."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import click
import uvloop

from nbdmirror.cli.bitmap_options import state_options
from nbdmirror.daemon import ServeOptions
from nbdmirror.daemon import serve as run_daemon
from nbdmirror.devices.uri import DEFAULT_PORT
from nbdmirror.protocol.constants import TlsMode

if TYPE_CHECKING:
    from nbdmirror.state import StateOptions


@click.command("serve", short_help="Export a disk and track its writes.")
@click.argument("disk")
@click.option("-k", "--socket", "--unix", "socket_path", metavar="PATH", help="Listen on a Unix socket.")
@click.option("-p", "--port", type=click.IntRange(0, 65535), help="Listen on TCP; 0 lets the kernel choose.  [default: 10809]")
@click.option("-b", "--bind", "--ipaddr", default="127.0.0.1", show_default=True, metavar="ADDR", help="The TCP address.")
@click.option("--insecure", is_flag=True, help="Serve other hosts though TLS is not required.")
@click.option(
    "--tls",
    type=click.Choice([mode.value for mode in TlsMode]),
    help="Whether clients may or must use TLS.  [default: require with certificates or keys, else off]",
)
@click.option("--tls-certificates", metavar="DIR", help="Where server-cert.pem, server-key.pem, ca-cert.pem, ca-crl.pem are.")
@click.option("--tls-verify-peer", is_flag=True, help="Clients need a certificate signed by ca-cert.pem.")
@click.option("--tls-psk", metavar="FILE", help="Pre-shared keys, USER:HEXKEY a line, instead of certificates (Python 3.13).")
@click.option("--allow-ip", multiple=True, metavar="CIDR", help="Serve clients from that network only; repeatable.")
@click.option("--allow-dn", multiple=True, metavar="PATTERN", help="Serve certificates for CN=...,O=... only; repeatable.")
@click.option("-x", "--export-name", default="", metavar="NAME", help='The export\'s name.  [default: ""]')
@click.option("-D", "--description", default="", metavar="TEXT", help="What clients are told of the export.")
@click.option("-r", "--read-only", is_flag=True, help="Refuse writes.")
@click.option(
    "-e", "--shared", "max_clients", type=click.IntRange(0), default=0, metavar="N", help="At most N clients, 0: any."
)
@click.option("--node-name", default="source", show_default=True, help="The disk's name in the control language.")
@click.option("--qmp", "qmp_paths", multiple=True, metavar="PATH", help="A control socket (QMP); repeatable.")
@state_options
@click.option("--run", metavar="COMMAND", help="Run COMMAND with $uri and $qmp set; stop when it ends, with its status.")
@click.option("--ready-fd", type=click.IntRange(0), metavar="N", help="Write a line READY URI to this file descriptor, too.")
@click.option("--pid-file", metavar="PATH", help="Write the process id there once listening.")
def serve(
    *,
    disk: str,
    socket_path: str | None,
    port: int | None,
    bind: str,
    insecure: bool,
    tls: str | None,
    tls_certificates: str | None,
    tls_verify_peer: bool,
    tls_psk: str | None,
    allow_ip: tuple[str, ...],
    allow_dn: tuple[str, ...],
    export_name: str,
    description: str,
    read_only: bool,
    max_clients: int,
    node_name: str,
    qmp_paths: tuple[str, ...],
    run: str | None,
    ready_fd: int | None,
    pid_file: str | None,
    state: StateOptions,
) -> int:
    """Export DISK (a raw file, a block device or an NBD URI) and track its writes.

    Prints "READY URI" once it listens; SIGTERM and SIGINT stop it cleanly.
    """
    if socket_path is not None and port is not None:
        raise click.UsageError("-k and -p exclude each other: a Unix socket or TCP")
    if socket_path is not None and socket_path in qmp_paths:
        raise click.UsageError(f"'{socket_path}' can't be both the NBD socket and a control socket")
    if socket_path is None and port is None:
        port = DEFAULT_PORT
    if len(export_name.encode()) > 4096 or len(description.encode()) > 4096:
        raise click.UsageError("export name and description are at most 4096 bytes each")
    options = ServeOptions(
        disk=disk,
        socket_path=socket_path,
        port=port,
        bind=bind,
        insecure=insecure,
        export_name=export_name,
        description=description,
        read_only=read_only,
        max_clients=max_clients,
        node_name=node_name,
        qmp_paths=qmp_paths,
        run=run,
        ready_fd=ready_fd,
        pid_file=pid_file,
        tls=None if tls is None else TlsMode(tls),
        tls_certificates=tls_certificates,
        tls_verify_peer=tls_verify_peer,
        tls_psk=tls_psk,
        allow_ip=allow_ip,
        allow_dn=allow_dn,
        state=state,
    )
    return uvloop.run(run_daemon(options))


COMMANDS: Final = (serve,)
